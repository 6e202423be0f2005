"""Task sequences made of one source: the base of class splits and changing domains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_sparse_cl.data.augment import ImageTransform
from lightning_sparse_cl.data.checks import refuse_empty
from lightning_sparse_cl.data.datamodule import TaskDataModule, _standardise
from lightning_sparse_cl.data.description import DataDescription
from lightning_sparse_cl.data.labels import whole_labels
from lightning_sparse_cl.data.loader import ImageTensors
from lightning_sparse_cl.data.sources import ImageSource


class SourceTasks(TaskDataModule):
    """Tasks made of one source; a subclass overrides :meth:`divide`.

    Args:
        source: the images.
        num_tasks: tasks to make of them.
        transform: from stored to network input. If None, the source's, or else normalisation by the mean and deviation
            of the first task's training images (a sample, see :class:`TaskDataModule`).
        kwargs: see :class:`TaskDataModule`.
    """

    def __init__(
        self, source: ImageSource, num_tasks: int, transform: ImageTransform | None = None, **kwargs: Any
    ) -> None:
        super().__init__(transform=source.image_transform() if transform is None else transform, **kwargs)
        if num_tasks < 1:
            raise ValueError(f"{type(self).__name__}(num_tasks={num_tasks}): a sequence has at least one task")
        self.source = source
        self.planned = num_tasks
        """Tasks the source is divided into; with ``joint`` they are tested, but not trained, apart."""

    def divide(self, images: Tensor, labels: Tensor) -> list[ImageTensors]:
        """One part of the source, images (N, C, H, W) and labels (N,), as one data set a task."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its tasks are: override divide()")

    def divide_training(self, images: Tensor, labels: Tensor) -> list[ImageTensors]:
        """The same for the training part, if that is divided in another way than the test part."""
        return self.divide(images, labels)

    def prepare_data(self) -> None:
        self.source.fetch()

    def load(self) -> tuple[list[ImageTensors], list[ImageTensors]]:
        train, test = self.divide_training(*self._read(train=True)), self.divide(*self._read(train=False))
        self.class_names = self.source.names()
        refuse_empty(f"{type(self).__name__} of {self.source}", train, test)
        if self.transform is None:
            self.transform = _standardise(train[0], self.source.crop, self.source.flip)
        return train, test

    def description(self) -> DataDescription:
        return replace(super().description(), size=getattr(self.source, "size", None))

    def _read(self, train: bool) -> tuple[Tensor, Tensor]:
        """A part of the source, with labels in ``range(source.num_classes)``."""
        name = f"{type(self).__name__} of {self.source}"
        images, labels = map(torch.as_tensor, self.source.read(train))
        labels = whole_labels(labels, name)  # uint8 would choose like a mask where it is an index
        if (wrong := labels[(labels < 0) | (labels >= self.source.num_classes)]).numel():
            raise ValueError(
                f"{name}: a source of {self.source.num_classes} classes labels them 0-{self.source.num_classes - 1}, "
                f"got {int(wrong[0])}"
            )
        return images, labels
