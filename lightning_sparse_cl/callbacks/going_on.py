"""A fit that goes on from what a module remembers of its sequence, as it would from a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch.optim import Optimizer

from lightning_sparse_cl.callbacks.trainer_parts import callbacks_of, task_data


def go_on(trainer: pl.Trainer, pl_module: pl.LightningModule, sequence: Mapping[str, Any]) -> None:
    """Have the Trainer restore what the module remembers, when it restores checkpoints; call it before that.

    Checkpoints that callbacks have saved are those of the run that has ended, and stay so; but an open sequence is one
    run, whose ``last.ckpt`` is replaced.

    Args:
        trainer: in ``setup`` of a fit.
        pl_module: its weights and masks are taken as they are.
        sequence: what the module remembers.
    """
    data, is_open = type(task_data(trainer)).__qualname__, task_data(trainer).is_open
    found = copy.deepcopy({k: v for k, v in sequence.items() if k != sequence["task_sequence"]["tested"]["data"]})
    found[data] = copy.deepcopy(sequence[sequence["task_sequence"]["tested"]["data"]])
    found["state_dict"] = pl_module.state_dict()
    found["run"] = found.get("run", "") if is_open else ""
    kinds = tuple({type(saving).__qualname__ for saving in callbacks_of(trainer, Checkpoint)} | {"SequenceCheckpoint"})
    found["callbacks"] = {key: state for key, state in found["callbacks"].items() if not key.startswith(kinds)}
    connector = trainer._checkpoint_connector
    if not hasattr(connector, "_loaded_checkpoint"):  # Lightning restores from files only, and then from here
        raise RuntimeError("lightning_sparse_cl: this version of Lightning keeps what it restores elsewhere")
    connector._loaded_checkpoint = found


def remembered(trainer: pl.Trainer) -> dict[str, Any]:
    """What a module needs to go on when its fit has ended. Call it on all processes."""
    found = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    for state in found["optimizer_states"]:  # which does not outlive a task
        state["state"] = {}
    return found


@torch.no_grad()
def enlarge_state(optimizer: Optimizer) -> None:
    """Momentum and the like of a weight that has grown since: that of its new entries is zero."""
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            if torch.is_tensor(value) and value.ndim == weight.ndim and value.shape != weight.shape:
                state[key] = torch.zeros_like(weight, dtype=value.dtype)
                state[key][tuple(slice(n) for n in value.shape)] = value
