"""Random number generators in the checkpoint, where Lightning saves none."""

from __future__ import annotations

import random
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch import distributed


class RandomState(pl.Callback):
    """Saves the generators of every process and restores them, so that a resumed run draws like an uninterrupted one.

    Each process of a new run gets a stream of its own. When a run goes on with another number of processes, those
    without a saved state start a new stream.
    """

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._states = []

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        states = [_collect()]
        if trainer.world_size > 1:
            states *= trainer.world_size
            distributed.all_gather_object(states, _collect())
        checkpoint["random_states"] = states

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self._states = checkpoint.get("random_states", [])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rank = trainer.global_rank
        if rank < len(self._states):
            _restore(self._states[rank])
        elif rank > 0:
            seed = torch.initial_seed() + rank
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)


def _collect() -> dict[str, Any]:
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())  # a dict only on request
    return {  # tensors and primitives only: the checkpoint must load with weights_only=True
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def _restore(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    for device, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(saved, device)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
