"""Task sequences made of one source: the base of class splits and changing domains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_sparse_cl.data.augment import ImageTransform
from lightning_sparse_cl.data.checks import refuse_empty
from lightning_sparse_cl.data.datamodule import TaskDataModule
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
        self._given_transform = transform
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

    def names(self) -> list[str]:
        """Names of the classes, by label."""
        return self.source.names()

    def load(self) -> tuple[list[ImageTensors], list[ImageTensors]]:
        only_tested = self._only_tested()
        train, (images, labels) = self.divide_training(*self._read(train=True)), self._read(train=False)
        others = labels >= self.source.num_classes
        test = self.divide(images[~others], labels[~others])
        self.class_names = self.names()
        refuse_empty(f"{type(self).__name__} of {self.source}", train, test)
        learnt_otherwise = self.known is not None and self.known.normalisation is not None
        if self.transform is None or (learnt_otherwise and self._given_transform is None):
            self.transform = self._normalised(train[0], self.source.crop, self.source.flip)
        for classes in only_tested:
            at = self.source.num_classes + torch.tensor([self.source.tested_only().index(c) for c in classes])
            here = torch.isin(labels, at)
            train.append(ImageTensors(images[:0], labels[:0]))
            test.append(ImageTensors(images[here], labels[here] - self.source.num_classes + len(self.names())))
        self.class_names = self.names() + self.source.tested_only()
        return train, test

    def _only_tested(self) -> list[list[str]]:
        """The classes of each task that was learnt before, and of whose images only those for the test are there.

        Raises:
            ValueError: if there are test images of a class that was not.
        """
        names, known = set(self.source.tested_only()), [] if self.known is None else self.known.names
        tasks = [task for task in known if set(task) <= names]
        if unknown := names.difference(*known):
            raise ValueError(
                f"{type(self).__name__} of {self.source}: there are test images of the class {min(unknown)!r}, and "
                "none for training"
            )
        return tasks

    def description(self) -> DataDescription:
        return replace(super().description(), size=getattr(self.source, "size", None))

    def _read(self, train: bool) -> tuple[Tensor, Tensor]:
        """A part of the source, with labels in ``range(source.num_classes)``."""
        name = f"{type(self).__name__} of {self.source}"
        images, labels = map(torch.as_tensor, self.source.read(train))
        labels = whole_labels(labels, name)  # uint8 would choose like a mask where it is an index
        most = self.source.num_classes + (0 if train else len(self.source.tested_only()))
        if (wrong := labels[(labels < 0) | (labels >= most)]).numel():
            raise ValueError(
                f"{name}: a source of {self.source.num_classes} classes labels them 0-{self.source.num_classes - 1}, "
                f"got {int(wrong[0])}"
            )
        return images, labels
