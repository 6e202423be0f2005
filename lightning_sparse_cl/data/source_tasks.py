"""Task sequences made of one source: the base of class splits and changing domains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_sparse_cl.data.checks import refuse_empty
from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.data.description import DataDescription
from lightning_sparse_cl.data.labels import whole_labels
from lightning_sparse_cl.data.loader import SampleTensors
from lightning_sparse_cl.data.sources import Source
from lightning_sparse_cl.nests import Nest, as_nest, layout_of_one, rows


class SourceTasks(TaskDataModule):
    """Tasks made of one source; a subclass overrides :meth:`divide`.

    Args:
        source: the samples.
        num_tasks: number of tasks to make of them.
        transform: from stored to network input. If None, the source's transform, or else normalisation by the mean and
            deviation of the first task's training samples, see :class:`TaskDataModule`.
        kwargs: see :class:`TaskDataModule`.
    """

    def __init__(
        self, source: Source, num_tasks: int, transform: Callable[[Any], Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(transform=transform, **kwargs)
        self.transform = self.usual_transform = source.transform() if transform is None else transform
        if num_tasks < 1:
            raise ValueError(f"{type(self).__name__}(num_tasks={num_tasks}): a sequence has at least one task")
        self.source = source
        self.planned = num_tasks
        """Number of tasks in the source; with ``joint`` they are trained together, but tested separately.
        """

    def divide(self, inputs: Nest, labels: Tensor) -> list[SampleTensors]:
        """One part of the source, N samples and labels (N,), as one data set per task."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its tasks are: override divide()")

    def divide_training(self, inputs: Nest, labels: Tensor) -> list[SampleTensors]:
        """The same for the training part, if it is divided differently from the test part."""
        return self.divide(inputs, labels)

    def prepare_data(self) -> None:
        self.source.fetch()

    def names(self) -> list[str]:
        """Names of the classes, by label."""
        return self.source.names()

    def load(self) -> tuple[list[Dataset], list[Dataset]]:
        spare = self._spare()
        divided = self.divide_training(*self._read(train=True))
        (inputs, labels), files = self._read(train=False), {part: self.source.items(part) for part in (True, False)}
        train = [_opened(data, files[True]) for data in divided]
        own = labels < self.source.num_classes
        test = [_opened(data, files[False]) for data in self.divide(rows(inputs, own), labels[own])]
        refuse_empty(f"{type(self).__name__} of {self.source}", train, test)
        learnt_otherwise = self.known is not None and self.known.normalisation is not None
        if self.transform is None or (learnt_otherwise and self.given_transform is None):
            self.transform = self._normalised(train[0], self.source.crop, self.source.flip)
        names = self.names()
        self.class_names = names + list(spare)
        for task in [] if self.known is None else self.known.names:
            there = [name for name in task if name in spare]
            if there and not set(task) & set(names):
                here = torch.isin(labels, torch.tensor([spare[name] for name in there]))
                label = torch.zeros(int(labels.max()) + 1, dtype=torch.long)
                label[list(spare.values())] = len(names) + torch.arange(len(spare))
                train.append(_opened(SampleTensors(rows(inputs, slice(0)), labels[:0]), files[False]))
                test.append(_opened(SampleTensors(rows(inputs, here), label[labels[here]]), files[False]))
        return train, test

    def _spare(self) -> dict[str, int]:
        """Labels in the source of the classes that were learnt before, are in no task here, and have test images.

        Raises:
            ValueError: if a class that was not learnt has only test images.
        """
        known = set() if self.known is None else set(self.known.class_names)
        only = self.source.tested_only()
        if unknown := set(only) - known:
            raise ValueError(
                f"{type(self).__name__} of {self.source}: there are test images of the class {min(unknown)!r}, but "
                "none for training"
            )
        if not known:
            return {}
        taken = set(self.names())
        return {name: c for c, name in enumerate(self.source.names() + only) if name in known - taken}

    def description(self) -> DataDescription:
        how = {name: getattr(self.source, name) for name in ("size", "fit") if hasattr(self.source, name)}
        return replace(super().description(), **how)

    def _read(self, train: bool) -> tuple[Nest, Tensor]:
        """A part of the source, with labels in ``range(source.num_classes)``."""
        name = f"{type(self).__name__} of {self.source}"
        inputs, labels = self.source.read(train)
        inputs = as_nest(inputs, name)
        labels = whole_labels(torch.as_tensor(labels), name)  # as an index, uint8 would act as a mask
        most = self.source.num_classes + (0 if train else len(self.source.tested_only()))
        if (wrong := labels[(labels < 0) | (labels >= most)]).numel():
            raise ValueError(
                f"{name}: a source of {self.source.num_classes} classes labels them 0-{self.source.num_classes - 1}, "
                f"got {int(wrong[0])}"
            )
        return inputs, labels


class _Opened(Dataset):
    """The samples at some places of a data set that reads them one by one, with their labels."""

    def __init__(self, data: Any, places: Tensor, labels: Tensor) -> None:
        self.data, self.places, self.targets = data, places, labels
        self.paths = [data.paths[i] for i in places.tolist()] if hasattr(data, "paths") else None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Nest, int]:
        return self.data[int(self.places[index])], int(self.targets[index])


def _opened(places: SampleTensors, items: Any) -> Dataset:
    """The samples themselves, or, if the source reads them one by one, those at these places."""
    if items is None:
        return places
    if not len(places):
        return SampleTensors(layout_of_one(items[0]), places.labels)
    return _Opened(items, places.inputs, places.labels)
