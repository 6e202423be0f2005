"""Freeze what a task has kept, so that later tasks cannot change it (EsaCL, line 12; PackNet)."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_sparse_cl.callbacks.sparsifier import Sparsifier
from lightning_sparse_cl.optim.frank_wolfe import StochasticFrankWolfe


class FreezeMasks(Sparsifier):
    """At a task's end, freeze the weights that are alive. List it after the pruning callback.

    Freezing acts on the update: frozen weights are bit-identical for the rest of the run, whatever the optimiser.
    """

    def __init__(self) -> None:
        super().__init__()  # which weights is the pruning callback's choice

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        for name, alive in self.masks.alive.items():
            self.masks.set_frozen(name, alive)

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, StochasticFrankWolfe):  # K counts the coordinates that are left
                for name, frozen in self.masks.frozen.items():
                    optimizer.set_free(pl_module.get_parameter(name), int((~frozen).sum()))
