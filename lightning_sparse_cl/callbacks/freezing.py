"""Freeze what a task has kept, so that later tasks cannot change it (EsaCL, line 12; PackNet)."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_sparse_cl.callbacks.score_pruning import ScorePruning
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier
from lightning_sparse_cl.callbacks.trainer_parts import parts_of
from lightning_sparse_cl.optim.frank_wolfe import StochasticFrankWolfe


class FreezeMasks(Sparsifier):
    """At a task's end, freeze the weights that are alive, after they were pruned. Needs a :class:`TaskSchedule`.

    Freezing acts on the update: frozen weights stay bit-identical for the rest of the run, with any optimiser.

    Raises:
        ValueError: if the module has no masks and no callback prunes.
        TypeError: without a :class:`TaskSchedule`.
    """

    after = (*Sparsifier.after, ScorePruning)
    needs_tasks = True

    def __init__(self) -> None:
        super().__init__()  # the pruning callback chooses the weights

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        makers = (c for c in parts_of(trainer).callbacks if getattr(c, "makes_masks", False))
        if not self.masks.is_pruned() and not any(makers):
            raise ValueError(
                f"FreezeMasks: {type(pl_module).__name__} has no masks and no callback here makes any, so nothing "
                "would ever be frozen; add one that prunes, such as OneShotPruning"
            )

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        for name, alive in self.masks.alive.items():
            self.masks.set_frozen(name, alive)

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, StochasticFrankWolfe):  # K counts the coordinates that are left
                for name, frozen in self.masks.frozen.items():
                    optimizer.set_free(pl_module.get_parameter(name), int((~frozen).sum()))
