"""Base of the callbacks that act when tasks begin and end, and how callbacks are put in order."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from lightning_sparse_cl.callbacks.strategies import refuse_shards
from lightning_sparse_cl.callbacks.trainer_parts import callbacks_of, parts_of
from lightning_sparse_cl.task_hooks import TaskHooks, check_task_hooks


class TaskCallback(TaskHooks, pl.Callback):
    """A Lightning callback with the hooks of :class:`~lightning_sparse_cl.task_hooks.TaskHooks`.

    It declares what it needs, and :func:`arrange` orders the Trainer's callbacks accordingly when a fit is set up,
    whatever the order of the list; if that is impossible, the fit is refused.
    """

    after: ClassVar[tuple[type, ...]] = ()
    """Kinds of callbacks that must act before this one, if there are any."""
    needs_tasks: ClassVar[bool] = False
    """Whether it is useless without a :class:`~lightning_sparse_cl.TaskSchedule`."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            arrange(trainer, pl_module)


def arrange(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Sort the Trainer's callbacks by what they declare, and otherwise keep their order.

    A callback that announces tasks comes after the others, so that it sees what they have done with a batch, and before
    the checkpoints, which then see consolidated weights.

    Raises:
        TypeError: if a method looks like a hook of tasks but is none, or a callback needs tasks and there are none.
        ValueError: if the callbacks' declarations are circular, or the strategy keeps weights in parts.
    """
    refuse_shards(trainer)
    callbacks = parts_of(trainer).callbacks
    announces = [c for c in callbacks if getattr(c, "announces_tasks", False)]
    own = callbacks_of(trainer, TaskCallback)
    for owner in (*callbacks, pl_module, getattr(pl_module, "objective", None)) if announces else own:
        check_task_hooks(owner)
    for callback in own:
        if callback.needs_tasks and not announces:
            raise TypeError(
                f"{type(callback).__name__} acts when tasks begin and end; add a TaskSchedule, and a TaskDataModule"
            )
    checkpoints = callbacks_of(trainer, Checkpoint)
    left = [c for c in callbacks if c not in announces and c not in checkpoints]
    placed: list[Any] = []
    while left:
        ready = next((c for c in left if not any(_is_after(c, other) for other in left)), None)
        if ready is None:
            circle = ", ".join(type(c).__name__ for c in left)
            raise ValueError(f"callbacks: {circle} are each declared to come after another of them")
        placed.append(ready)
        left.remove(ready)
    parts_of(trainer).callbacks = [*placed, *announces, *checkpoints]


def _is_after(callback: pl.Callback, other: pl.Callback) -> bool:
    """Whether a callback declares that it comes after another one; within a class, the list decides."""
    if not isinstance(callback, TaskCallback) or type(other) is type(callback):
        return False
    return isinstance(other, callback.after)


def announce(hook: str, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
    """Call a hook of tasks of every callback that has it, then of the module, which passes it on to its objective."""
    for owner in (*parts_of(trainer).callbacks, pl_module):
        if callable(method := getattr(owner, hook, None)):
            method(trainer, pl_module, task)
