"""Class splits: the classes of a source divided into tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sparse_cl.data.image_files import ImageFolderSource, MiniImageNetSource, TinyImageNetSource
from lightning_sparse_cl.data.loader import ImageTensors
from lightning_sparse_cl.data.source_tasks import SourceTasks
from lightning_sparse_cl.data.sources import (
    CIFAR10Source,
    CIFAR100Source,
    DigitsSource,
    FashionMNISTSource,
    ImageSource,
    MNISTSource,
)
from lightning_sparse_cl.data.tensor_source import TensorSource


class ClassSplit(SourceTasks):
    """The classes of a source in equal tasks: with c classes a task, task t has the labels t*c ... (t+1)*c - 1.

    Args:
        source: the images.
        num_tasks: a divisor of the number of classes.
        class_order: the source's classes in the order in which they are met. If None, the natural one; an integer is
            the seed of a random one, a list the order itself.
        kwargs: see :class:`TaskDataModule`.

    Raises:
        ValueError: if the classes do not divide into the tasks, or the order is not one.
    """

    def __init__(
        self, source: ImageSource, num_tasks: int = 5, class_order: int | list[int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(source, num_tasks, **kwargs)
        n = source.num_classes
        if n % num_tasks:
            *most, last = (str(k) for k in range(1, n + 1) if n % k == 0)
            name = f"{type(self).__name__}(num_tasks={num_tasks})"
            numbers = " or ".join(filter(None, [", ".join(most), last]))
            raise ValueError(f"{name}: {n} classes divide into {numbers} tasks")
        order = list(range(n)) if class_order is None else class_order
        if isinstance(order, int):
            order = np.random.RandomState(order).permutation(n).tolist()
        if sorted(order) != list(range(n)):
            raise ValueError(
                f"{type(self).__name__}(class_order={class_order}): the order lists each of the {n} classes "
                f"0-{n - 1} once"
            )
        self.class_order: list[int] = order
        """The source's class behind each label."""

    def load(self) -> tuple[list[ImageTensors], list[ImageTensors]]:
        train, test = super().load()
        self.class_names = [self.class_names[c] for c in self.class_order]
        return train, test

    def divide(self, images: Tensor, labels: Tensor) -> list[ImageTensors]:
        labels = torch.tensor(self.class_order).argsort()[labels]
        task = labels // (len(self.class_order) // self.planned)
        return [ImageTensors(images[task == t], labels[task == t]) for t in range(self.planned)]


# -- one class a data set, with the arguments of its source and of the sequence in one list, for configurations --------

Order = int | list[int] | None


class SplitDigits(ClassSplit):
    """:class:`ClassSplit` of the small real digits that come with the package, :class:`DigitsSource`."""

    def __init__(self, num_tasks: int = 5, class_order: Order = None, **kwargs: Any) -> None:
        super().__init__(DigitsSource(), num_tasks, class_order, **kwargs)


class _SplitDownloadable(ClassSplit):
    """A split of a source that can be downloaded.

    Args:
        root: folder of the data.
        download: fetch what is missing.
    """

    dataset: type[MNISTSource | FashionMNISTSource | CIFAR10Source | TinyImageNetSource]

    def __init__(
        self, num_tasks: int = 5, root: str = "data", download: bool = False, class_order: Order = None, **kwargs: Any
    ) -> None:
        super().__init__(self.dataset(root, download), num_tasks, class_order, **kwargs)


class SplitMNIST(_SplitDownloadable):
    """:class:`ClassSplit` of :class:`MNISTSource`."""

    dataset = MNISTSource


class SplitFashionMNIST(_SplitDownloadable):
    """:class:`ClassSplit` of :class:`FashionMNISTSource`."""

    dataset = FashionMNISTSource


class SplitCIFAR10(_SplitDownloadable):
    """:class:`ClassSplit` of :class:`CIFAR10Source`: 5 tasks of 2 classes."""

    dataset = CIFAR10Source


class SplitTinyImageNet(_SplitDownloadable):
    """:class:`ClassSplit` of :class:`TinyImageNetSource`: 10 tasks of 20 classes."""

    dataset = TinyImageNetSource

    def __init__(self, num_tasks: int = 10, **kwargs: Any) -> None:
        super().__init__(num_tasks, **kwargs)


class SplitCIFAR100(ClassSplit):
    """:class:`ClassSplit` of :class:`CIFAR100Source`: 10 tasks of 10 classes, or one task of 5 for each superclass.

    Args:
        num_tasks: a divisor of 100. If None, 10, with superclasses 20.
        root: folder of the data.
        download: fetch what is missing.
        superclasses: task t has the classes of superclass t. It fixes ``num_tasks`` and ``class_order``.
    """

    source: CIFAR100Source

    def __init__(
        self,
        num_tasks: int | None = None,
        root: str = "data",
        download: bool = False,
        superclasses: bool = False,
        class_order: Order = None,
        **kwargs: Any,
    ) -> None:
        if superclasses and (num_tasks not in (None, 20) or class_order is not None):
            raise ValueError(
                f"{type(self).__name__}(superclasses=True, num_tasks={num_tasks}, class_order={class_order}): "
                "superclasses make 20 tasks in an order of their own; leave both out"
            )
        if num_tasks is None:
            num_tasks = 20 if superclasses else 10
        super().__init__(CIFAR100Source(root, download), num_tasks, class_order, **kwargs)
        self.superclasses = superclasses

    def load(self) -> tuple[list[ImageTensors], list[ImageTensors]]:
        if self.superclasses:
            self.class_order = self.source.superclasses().argsort(stable=True).tolist()
        return super().load()


class SplitMiniImageNet(ClassSplit):
    """:class:`ClassSplit` of :class:`MiniImageNetSource`: 10 tasks of 10 classes.

    Args:
        root: folder that has the folder ``mini-imagenet``.
        size: side in pixels that images are resized to.
    """

    def __init__(
        self, num_tasks: int = 10, root: str = "data", size: int = 84, class_order: Order = None, **kwargs: Any
    ) -> None:
        super().__init__(MiniImageNetSource(root, size), num_tasks, class_order, **kwargs)


class SplitImageFolder(ClassSplit):
    """:class:`ClassSplit` of images in folders, ``root/train/<class>/**`` and ``root/test/<class>/**`` or ``val``.

    The images are those of :class:`ImageFolderSource`.

    Args:
        root: the folder.
        size: side in pixels that images are resized to. If None, they keep theirs, and all must be equal.
        crop: zero padding in pixels before a random crop in training; 0 is none.
        flip: mirror half of the training images.
    """

    def __init__(
        self,
        root: str,
        num_tasks: int,
        size: int | None = None,
        crop: int = 0,
        flip: bool = False,
        class_order: Order = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(ImageFolderSource(root, size, crop, flip), num_tasks, class_order, **kwargs)


class SplitTensors(ClassSplit):
    """:class:`ClassSplit` of images and labels of your own: :class:`TensorSource`.

    Labels may have gaps: classes are those that occur, counted in ascending order, also in ``class_order``.

    Args:
        train, test: images (N, C, H, W), uint8 in 0-255 or float, and labels (N,) of integers from 0 on; tensors or
            numpy arrays.
        crop: zero padding in pixels before a random crop in training; 0 is none. For uint8 images.
        flip: mirror half of the training images. For uint8 images.
    """

    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        num_tasks: int,
        crop: int = 0,
        flip: bool = False,
        class_order: Order = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(TensorSource(train, test, crop, flip), num_tasks, class_order, **kwargs)
