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
    """Make the Trainer restore what the module remembers when it restores checkpoints; call this before that.

    Checkpoints that callbacks have saved belong to the run that has ended, and are kept; but an open sequence is one
    run, whose ``last.ckpt`` is replaced.

    Args:
        trainer: the trainer, in ``setup`` of a fit.
        pl_module: the module, whose weights and masks stay as they are.
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
    if not hasattr(connector, "_loaded_checkpoint"):  # Lightning restores from files only, by way of this attribute
        raise RuntimeError("lightning_sparse_cl: this version of Lightning keeps what it restores elsewhere")
    connector._loaded_checkpoint = found


def remembered(trainer: pl.Trainer) -> dict[str, Any]:
    """What a module needs in order to go on after its fit has ended. Call it on all processes."""
    found = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    for state in found["optimizer_states"]:  # optimiser state does not outlive a task
        state["state"] = {}
    return found


@torch.no_grad()
def enlarge_state(optimizer: Optimizer) -> None:
    """Enlarge momentum and other state of weights that have grown since; it is zero for new entries."""
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            if torch.is_tensor(value) and value.ndim == weight.ndim and value.shape != weight.shape:
                state[key] = torch.zeros_like(weight, dtype=value.dtype)
                state[key][tuple(slice(n) for n in value.shape)] = value
