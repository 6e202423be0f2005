"""How long a task sequence will still take."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl

from lightning_sparse_cl.callbacks.schedule import TaskSchedule
from lightning_sparse_cl.callbacks.trainer_parts import first_callback, task_data


class SequenceTime:
    """The time that this process has trained a task sequence, and an estimate of the time left.

    A batch still to come is assumed to take as long as those before did on average, including the evaluation and
    pruning between them. Batches before a resume do not count.
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self._end: float | None = None
        self._before = 0

    def begin(self, trainer: pl.Trainer) -> None:
        """Start the clock. Call it before every batch; the first call counts."""
        if self._began is None:
            self._began, self._before = time.monotonic(), _progress(trainer).total.processed

    def update(self, trainer: pl.Trainer) -> None:
        """Estimate anew; call it when a batch is done."""
        done = _progress(trainer).total.processed - self._before
        if self._began is not None and done > 0:
            now = time.monotonic()
            self._end = now + (now - self._began) / done * batches_left(trainer)

    @property
    def elapsed(self) -> float | None:
        """Seconds since the first batch, or None before it."""
        return None if self._began is None else time.monotonic() - self._began

    @property
    def left(self) -> float | None:
        """Seconds left, or None before the first batch is done."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())


def batches_left(trainer: pl.Trainer) -> int:
    """Batches of this process until the sequence ends: in all epochs planned, with the samples that are alive now.

    Raises:
        ValueError: if the trainer has no :class:`TaskSchedule`.
    """
    data, schedule = task_data(trainer), first_callback(trainer, TaskSchedule)
    if schedule is None:
        raise ValueError("batches_left: the Trainer has no TaskSchedule, so the end of the sequence is not known")
    task = data.task
    running = trainer.num_training_batches - _progress(trainer).current.processed
    ends_now = data.starts[-1] > trainer.current_epoch
    epochs = 0 if ends_now else max(0, schedule.epochs_of(task) - data.epoch_in_task - 1)
    left = max(0, int(running)) + epochs * _batches(trainer, task)
    return left + sum(schedule.epochs_of(t) * _batches(trainer, t) for t in range(task + 1, data.num_tasks))


def _progress(trainer: pl.Trainer) -> Any:
    return trainer.fit_loop.epoch_loop.batch_progress  # its annotation is a base class without this count


def _batches(trainer: pl.Trainer, task: int) -> int:
    """Batches of one epoch of the task."""
    data, limit = task_data(trainer), trainer.limit_train_batches
    batches = len(data.alive[task]) // (data.batch_size * trainer.world_size)
    return min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))


def duration(seconds: float) -> str:
    """A duration in words: "12 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
