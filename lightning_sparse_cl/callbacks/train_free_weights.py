"""Weights that learn only at the end of a task, if no earlier task has them (ExSSNeT)."""

from __future__ import annotations

from typing import Any, Protocol, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_sparse_cl.callbacks.schedule import TaskSchedule, position
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier
from lightning_sparse_cl.callbacks.trainer_parts import first_callback, parts_of, task_data
from lightning_sparse_cl.sparsity.scores import check_number
from lightning_sparse_cl.sparsity.weight_scores import WeightScores


class Scored(Protocol):
    """A module that learns masks by scores, as this callback sees it: :class:`~lightning_sparse_cl.SupSup`."""

    scores: WeightScores
    train_free: int
    """For how many of a task's last epochs its scores stay as they are."""

    def task_masks(self) -> dict[str, Tensor]:
        """The masks that the running task has learnt."""


class TrainFreeWeights(Sparsifier):
    """Hold the weights that have scores, and train some of them in a task's last epochs; ``SupSup(train_free=...)``.

    These are the weights in the task's mask that no earlier task uses, as in "Exclusive Supermask Subnetwork Training
    for Continual Learning" (Yadav & Bansal, 2023). The module keeps its mask fixed during these epochs.

    Args:
        epochs: how many of a task's last epochs.

    Raises:
        ValueError: if ``epochs`` is not a whole number of at least 1, or a task has no more epochs than these.
        TypeError: if the module does not stop its scores for these epochs.
    """

    needs_tasks = True
    masks_gradients = True

    def __init__(self, epochs: int) -> None:
        super().__init__()
        check_number("TrainFreeWeights", "epochs", epochs, whole=True)
        if epochs < 1:
            raise ValueError(f"TrainFreeWeights(epochs={epochs}): how many of a task's last epochs, at least 1")
        self.epochs = epochs

    def trains(self, trainer: pl.Trainer) -> bool:
        """Whether the running epoch is one of these."""
        at = position(trainer)
        return at.epoch >= at.epochs - self.epochs

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if getattr(pl_module, "train_free", None) != self.epochs:
            raise TypeError(
                f"TrainFreeWeights(epochs={self.epochs}): {type(pl_module).__name__} does not stop its scores for it; "
                f"use SupSup(train_free={self.epochs}), which adds this callback"
            )
        data, schedule = task_data(trainer, self), first_callback(trainer, TaskSchedule)
        learnt = len(data.learnt.classes) if data.learnt else 0
        for task in range(learnt, data.num_tasks) if not parts_of(trainer).fast_dev_run else ():
            if schedule is not None and (epochs := schedule.epochs_of(task)) <= self.epochs:
                raise ValueError(
                    f"TrainFreeWeights(epochs={self.epochs}): task {task} has {epochs} epochs, so none is left to "
                    "learn its mask"
                )

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        for name in cast(Scored, pl_module).scores.names:
            nothing = torch.zeros_like(pl_module.get_parameter(name), dtype=torch.bool)
            self.masks.set_updated(name, nothing)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        at = position(trainer)
        if batch_idx == 0 and at.epoch == max(at.epochs - self.epochs, 0):
            for name, mask in cast(Scored, pl_module).task_masks().items():
                self.masks.set_updated(name, mask & ~self.masks.frozen_part(name))
