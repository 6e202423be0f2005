"""Early stopping that ends the task, not the sequence."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl

from lightning_sparse_cl.callbacks.trainer_parts import parts_of, task_data


class TaskEarlyStopping(pl.Callback):
    """End the running task when a metric has not improved for ``patience`` epochs; each task starts afresh.

    The metric is read when an epoch and its validation are over; the task is then consolidated at once.

    Args:
        monitor: name of a logged metric, ``"val/acc"`` or ``"val/loss"`` for the methods of this package.
        patience: epochs without improvement after which the task ends, at least 1.
        mode: whether ``"min"`` or ``"max"`` is better.
        min_delta: a change must exceed this to count.

    Raises:
        ValueError: if an argument is out of range, the metric is not logged, or validation is not run every epoch.
    """

    def __init__(
        self, monitor: str, patience: int = 3, mode: Literal["min", "max"] = "min", min_delta: float = 0.0
    ) -> None:
        if patience < 1:
            raise ValueError(f"TaskEarlyStopping(patience={patience}): a task may go at least one epoch without gain")
        if mode not in ("min", "max"):
            raise ValueError(f"TaskEarlyStopping(mode={mode!r}): mode is 'min' or 'max'")
        if min_delta < 0:
            raise ValueError(f"TaskEarlyStopping(min_delta={min_delta}): the least change is >= 0")
        self.monitor, self.patience, self.mode, self.min_delta = monitor, patience, mode, min_delta
        self._best, self._waited = float("inf"), 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.check_val_every_n_epoch != 1:
            raise ValueError(
                f"Trainer(check_val_every_n_epoch={trainer.check_val_every_n_epoch}): TaskEarlyStopping looks at "
                "every epoch's metric; leave it at 1"
            )

        if self.monitor.startswith("val/") and getattr(parts_of(trainer).datamodule, "val_fraction", 1) == 0:
            raise ValueError(
                f"TaskEarlyStopping(monitor={self.monitor!r}): nothing is validated; set the data module's val_fraction"
            )

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        self._best, self._waited = float("inf"), 0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise ValueError(
                f"TaskEarlyStopping(monitor={self.monitor!r}): not logged; there is {', '.join(metrics) or 'nothing'}"
            )
        value = trainer.strategy.reduce(metrics[self.monitor], reduce_op="mean")  # so that every process decides alike
        value = float(value) * (1 if self.mode == "min" else -1)
        if value < self._best - self.min_delta:
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        if self._waited >= self.patience:
            task_data(trainer).end_task()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self._waited = state["best"], state["waited"]
