"""Learning-rate schedules that start again with every task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_sparse_cl.callbacks.task_callback import TaskCallback


class TaskLRSchedule(TaskCallback):
    """One learning-rate scheduler per task, starting from the optimiser's initial learning rate.

    Under manual optimisation Lightning steps no scheduler; under automatic optimisation its schedulers do not know
    about tasks. :class:`~lightning_sparse_cl.StochasticFrankWolfe` scales ``sgd_lr`` as ``lr`` is scaled.

    Args:
        scheduler: makes the scheduler from the optimiser, ``partial(CosineAnnealingLR, T_max=20)`` for example.
        interval: step it after every ``"epoch"`` or every optimiser ``"step"``.

    Raises:
        ValueError: if ``interval`` is neither, or the scheduler waits for a metric (``ReduceLROnPlateau``).
    """

    needs_tasks = True

    def __init__(
        self, scheduler: Callable[[Optimizer], LRScheduler], interval: Literal["epoch", "step"] = "epoch"
    ) -> None:
        if interval not in ("epoch", "step"):
            raise ValueError(f"TaskLRSchedule(interval={interval!r}): interval is 'epoch' or 'step'")
        self.scheduler = scheduler
        self.interval = interval
        self._steps = 0
        self._running: list[LRScheduler] = []
        self._loaded: list[dict[str, Any]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._running, self._loaded = [], []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps = trainer.global_step
        if self._loaded:
            rates = [[group["lr"] for group in o.param_groups] for o in trainer.optimizers]
            self._start(trainer)
            for scheduler, state, saved in zip(self._running, self._loaded, rates, strict=True):
                scheduler.load_state_dict(state)
                for group, rate in zip(scheduler.optimizer.param_groups, saved, strict=True):
                    group["lr"] = rate  # making the scheduler has reset it to the first rate
            self._loaded = []

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        self._start(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.interval == "step" and trainer.global_step > self._steps:  # a real step, not accumulation
            self._steps = trainer.global_step
            self._step()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.interval == "epoch":
            self._step()

    def state_dict(self) -> dict[str, Any]:
        return {"schedulers": [s.state_dict() for s in self._running]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state["schedulers"]

    def _start(self, trainer: pl.Trainer) -> None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.pop("initial_lr", group["lr"])
        try:
            self._running = [self.scheduler(optimizer) for optimizer in trainer.optimizers]
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"TaskLRSchedule(scheduler={_called(self.scheduler)}): {error}") from error
        if any(isinstance(s, ReduceLROnPlateau) for s in self._running):
            raise ValueError("TaskLRSchedule(scheduler=ReduceLROnPlateau): use one that needs no metric to step")

    def _step(self) -> None:
        for scheduler in self._running:
            try:
                scheduler.step()
            except (ArithmeticError, TypeError, ValueError) as error:
                raise ValueError(f"TaskLRSchedule(scheduler={_called(self.scheduler)}): {error}") from error


def _called(scheduler: Any) -> str:
    """The name of a function or class that makes a scheduler."""
    made = getattr(scheduler, "func", scheduler)
    return getattr(made, "__name__", type(made).__name__)
