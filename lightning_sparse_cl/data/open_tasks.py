"""Sequences whose number of tasks is not known: tasks come one after the other, from an iterator or a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import Dataset

from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.data.items import Items
from lightning_sparse_cl.data.named_labels import numbered


class OpenTasks(TaskDataModule):
    """Base of the data modules whose tasks come one after the other; see :func:`learn`.

    Each fit learns the tasks that have come by then, and :meth:`more` says whether there is a further one. A fit from a
    checkpoint takes the tasks that the checkpoint has, whatever has come since; those are for the next fit. A subclass
    overrides :meth:`load` and :meth:`more`.
    """

    is_open = True

    def more(self) -> bool:
        """Whether further tasks have come since the data were read; they are read by the next fit."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say whether there are further tasks: override more()"
        )


class TaskStream(OpenTasks):
    """Tasks handed over by an iterator, until it ends: pairs of a training and a test set, as for ``TaskDatasets``.

    Args:
        tasks: gives one pair of data sets per task, when the task before it has been learnt. When resuming, it is asked
            at once for as many as the checkpoint has.
        kwargs: see :class:`TaskDataModule`.

    Raises:
        ValueError: if there is no task at all, or one is not a pair.
    """

    def __init__(self, tasks: Iterable[tuple[Dataset, Dataset]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._left: Iterator[tuple[Dataset, Dataset]] = iter(tasks)
        self._come: list[tuple[Dataset, Dataset]] = []
        self._names: list[str] = []  # names of classes, if labels are names

    def more(self) -> bool:
        before = len(self._come)
        if not self.left_for_later:
            self._take(1)
        new = self.left_for_later > 0 or len(self._come) > before
        if new:
            self.unload()
        return new

    def load(self) -> tuple[Sequence[Dataset], Sequence[Dataset]]:
        self._take(max(1, len(self.only or ())) - len(self._come))
        if not self._come:
            raise ValueError(f"{type(self).__name__}(tasks=...): the iterator gives no task")
        self.class_names = list(self._names)
        train, test = zip(*self._come, strict=True)
        return train, test

    def _take(self, count: int) -> None:
        for _ in range(count):
            pair = next(self._left, None)
            if pair is None:
                return
            where = f"{type(self).__name__}(task {len(self._come)})"
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ValueError(f"{where}: a task is a pair of a training and a test set, got a {type(pair).__name__}")
            sets, self._names = numbered(pair, self._names)
            parts = zip(sets, ("training", "test"), strict=True)
            self._come.append(tuple(Items(data, f"{where}, {part}").gather() for data, part in parts))  # type: ignore[arg-type]  # two of them


def learn(trainer: pl.Trainer, module: pl.LightningModule, data: OpenTasks, ckpt_path: str | None = None) -> None:
    """Fit a module to an open sequence: each fit learns the tasks that have come, until there are no further ones.

    Args:
        trainer: a trainer with a :class:`TaskSchedule`.
        module: a :class:`ContinualModule`, whose network and memory grow with the classes.
        data: the tasks.
        ckpt_path: a checkpoint of this sequence, with which the first fit begins.
    """
    trainer.fit(module, data, ckpt_path=ckpt_path)
    while data.more():
        trainer.fit(module, data)
