"""Task sequences: a source's classes divided into tasks, or one problem seen through changing inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_sparse_cl.data.augment import ImageTransform
from lightning_sparse_cl.data.datamodule import TaskDataModule, _standardise
from lightning_sparse_cl.data.loader import ImageTensors
from lightning_sparse_cl.data.sources import (
    CIFAR10,
    CIFAR100,
    MNIST,
    Digits,
    FashionMNIST,
    ImageFolder,
    MiniImageNet,
    Source,
    Tensors,
    TinyImageNet,
)


class SourceTasks(TaskDataModule):
    """Tasks made of one source; a subclass overrides :meth:`divide`.

    Args:
        source: the images.
        num_tasks: tasks to make of them.
        transform: from stored to network input; None takes the source's, or else normalises by the mean and deviation
            of the first task's training images.
        kwargs: see :class:`TaskDataModule`.
    """

    def __init__(self, source: Source, num_tasks: int, transform: ImageTransform | None = None, **kwargs: Any) -> None:
        super().__init__(transform=source.image_transform() if transform is None else transform, **kwargs)
        if num_tasks < 1:
            raise ValueError(f"{type(self).__name__}(num_tasks={num_tasks}): a sequence has at least one task")
        self.source = source
        self.planned = num_tasks
        """Tasks the source is divided into; with ``joint`` they are tested, but not trained, apart."""

    def divide(self, images: Tensor, labels: Tensor) -> list[ImageTensors]:
        """One part of the source, images (N, C, H, W) and labels (N,), as one data set a task."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its tasks are: override divide()")

    def prepare_data(self) -> None:
        self.source.fetch()

    def load(self) -> tuple[list[ImageTensors], list[ImageTensors]]:
        train, test = self.divide(*self.source.read(train=True)), self.divide(*self.source.read(train=False))
        for part, sets in {"training": train, "test": test}.items():
            for t, data in enumerate(sets):
                if not len(data):
                    raise ValueError(f"{type(self).__name__}: task {t} has no {part} images in {self.source}")
        if self.transform is None:
            self.transform = _standardise(train[0], self.source.crop, self.source.flip)
        return train, test


class ClassSplit(SourceTasks):
    """The classes of a source in equal tasks: with c classes a task, task t has the labels t*c ... (t+1)*c - 1.

    Args:
        source: the images.
        num_tasks: a divisor of the number of classes.
        class_order: the source's classes in the order in which they are met: None is the natural one, an integer the
            seed of a random one, a list the order itself.
        kwargs: see :class:`TaskDataModule`.

    Raises:
        ValueError: if the classes do not divide into the tasks, or the order is not one.
    """

    def __init__(
        self, source: Source, num_tasks: int = 5, class_order: int | list[int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(source, num_tasks, **kwargs)
        n = source.num_classes
        if n % num_tasks:
            *most, last = (str(k) for k in range(1, n + 1) if n % k == 0)
            name = f"{type(self).__name__}(num_tasks={num_tasks})"
            raise ValueError(f"{name}: {n} classes divide into {', '.join(most)} or {last} tasks")
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

    def divide(self, images: Tensor, labels: Tensor) -> list[ImageTensors]:
        labels = torch.tensor(self.class_order).argsort()[labels]
        task = labels // (len(self.class_order) // self.planned)
        return [ImageTensors(images[task == t], labels[task == t]) for t in range(self.planned)]


class Permuted(SourceTasks):
    """Every task the whole source with its pixels in another fixed order (Goodfellow et al., 2014); task 0 as it is.

    The tasks share their labels. Nothing is augmented: permuted pixels have no neighbours.

    Args:
        source: the images.
        num_tasks: length of the sequence.
        seed: draws the permutations.
        kwargs: see :class:`TaskDataModule`.
    """

    def __init__(self, source: Source, num_tasks: int = 5, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(source, num_tasks, **kwargs)
        self.augment = False
        self.seed = seed

    def permutation(self, task: int, pixels: int) -> Tensor:
        """Which of the (H*W) pixels a task shows at each place; the same in all channels."""
        order = np.random.RandomState([self.seed, task]).permutation(pixels) if task else np.arange(pixels)
        return torch.from_numpy(order)

    def divide(self, images: Tensor, labels: Tensor) -> list[ImageTensors]:
        pixels = images.flatten(2)
        orders = [self.permutation(t, pixels.shape[2]) for t in range(self.planned)]
        return [ImageTensors(pixels[:, :, order].view_as(images), labels) for order in orders]


class Rotated(SourceTasks):
    """Every task the whole source turned further, from 0 to ``max_angle`` (Lopez-Paz and Ranzato, 2017).

    The tasks share their labels.

    Args:
        source: the images.
        num_tasks: length of the sequence.
        max_angle: of the last task, in degrees, counter-clockwise; the others are evenly spaced.
        kwargs: see :class:`TaskDataModule`.
    """

    def __init__(self, source: Source, num_tasks: int = 5, max_angle: float = 180.0, **kwargs: Any) -> None:
        super().__init__(source, num_tasks, **kwargs)
        self.angles = [t * max_angle / max(num_tasks - 1, 1) for t in range(num_tasks)]

    def divide(self, images: Tensor, labels: Tensor) -> list[ImageTensors]:
        from torchvision.transforms.functional import InterpolationMode, rotate

        def turn(angle: float) -> Tensor:  # in pieces, as it takes many times the memory of its input
            if angle == 0:
                return images
            return torch.cat([rotate(part, angle, InterpolationMode.BILINEAR) for part in images.split(4096)])

        return [ImageTensors(turn(angle), labels) for angle in self.angles]


# -- one class a data set, with the arguments of its source and of the sequence in one list, for configurations --------

Order = int | list[int] | None


class SplitDigits(ClassSplit):
    """:class:`ClassSplit` of the small real digits that come with the package, :class:`Digits`."""

    def __init__(self, num_tasks: int = 5, class_order: Order = None, **kwargs: Any) -> None:
        super().__init__(Digits(), num_tasks, class_order, **kwargs)


class _SplitDownloadable(ClassSplit):
    """A split of a source that can be downloaded.

    Args:
        root: folder of the data.
        download: fetch what is missing.
    """

    dataset: type[MNIST | FashionMNIST | CIFAR10 | TinyImageNet]

    def __init__(
        self, num_tasks: int = 5, root: str = "data", download: bool = False, class_order: Order = None, **kwargs: Any
    ) -> None:
        super().__init__(self.dataset(root, download), num_tasks, class_order, **kwargs)


class SplitMNIST(_SplitDownloadable):
    """:class:`ClassSplit` of :class:`MNIST`."""

    dataset = MNIST


class SplitFashionMNIST(_SplitDownloadable):
    """:class:`ClassSplit` of :class:`FashionMNIST`."""

    dataset = FashionMNIST


class SplitCIFAR10(_SplitDownloadable):
    """:class:`ClassSplit` of :class:`CIFAR10`: 5 tasks of 2 classes."""

    dataset = CIFAR10


class SplitTinyImageNet(_SplitDownloadable):
    """:class:`ClassSplit` of :class:`TinyImageNet`: 10 tasks of 20 classes."""

    dataset = TinyImageNet

    def __init__(self, num_tasks: int = 10, **kwargs: Any) -> None:
        super().__init__(num_tasks, **kwargs)


class SplitCIFAR100(ClassSplit):
    """:class:`ClassSplit` of :class:`CIFAR100`: 10 tasks of 10 classes, or one task of 5 for each superclass.

    Args:
        num_tasks: a divisor of 100; None is 10, with superclasses 20.
        root: folder of the data.
        download: fetch what is missing.
        superclasses: task t has the classes of superclass t. It fixes ``num_tasks`` and ``class_order``.
    """

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
        super().__init__(CIFAR100(root, download), num_tasks, class_order, **kwargs)
        self.superclasses = superclasses

    def load(self) -> tuple[list[ImageTensors], list[ImageTensors]]:
        if self.superclasses:
            self.class_order = self.source.superclasses().argsort(stable=True).tolist()
        return super().load()


class SplitMiniImageNet(ClassSplit):
    """:class:`ClassSplit` of :class:`MiniImageNet`: 10 tasks of 10 classes.

    Args:
        root: folder that has the folder ``mini-imagenet``.
        size: side in pixels that images are resized to.
    """

    def __init__(
        self, num_tasks: int = 10, root: str = "data", size: int = 84, class_order: Order = None, **kwargs: Any
    ) -> None:
        super().__init__(MiniImageNet(root, size), num_tasks, class_order, **kwargs)


class SplitImageFolder(ClassSplit):
    """:class:`ClassSplit` of any :class:`ImageFolder`: ``root/train/<class>/**``, ``root/test/<class>/**`` or ``val``.

    Args:
        root: the folder.
        size: side in pixels that images are resized to; None keeps them, and all must be equal.
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
        super().__init__(ImageFolder(root, size, crop, flip), num_tasks, class_order, **kwargs)


class SplitTensors(ClassSplit):
    """:class:`ClassSplit` of images and labels of your own: :class:`Tensors`.

    Args:
        train, test: images (N, C, H, W), uint8 in 0-255 or float, and labels (N,) of integers from 0 on.
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
        super().__init__(Tensors(train, test, crop, flip), num_tasks, class_order, **kwargs)


class PermutedDigits(Permuted):
    """:class:`Permuted` :class:`Digits`."""

    def __init__(self, num_tasks: int = 5, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(Digits(), num_tasks, seed, **kwargs)


class PermutedMNIST(Permuted):
    """:class:`Permuted` :class:`MNIST`.

    Args:
        root: folder of the data.
        download: fetch what is missing.
    """

    def __init__(
        self, num_tasks: int = 10, root: str = "data", download: bool = False, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(MNIST(root, download), num_tasks, seed, **kwargs)


class RotatedDigits(Rotated):
    """:class:`Rotated` :class:`Digits`."""

    def __init__(self, num_tasks: int = 5, max_angle: float = 180.0, **kwargs: Any) -> None:
        super().__init__(Digits(), num_tasks, max_angle, **kwargs)


class RotatedMNIST(Rotated):
    """:class:`Rotated` :class:`MNIST`.

    Args:
        root: folder of the data.
        download: fetch what is missing.
    """

    def __init__(
        self, num_tasks: int = 10, root: str = "data", download: bool = False, max_angle: float = 180.0, **kwargs: Any
    ) -> None:
        super().__init__(MNIST(root, download), num_tasks, max_angle, **kwargs)


class TaskDatasets(TaskDataModule):
    """A sequence of torch data sets of your own, one a task. Their labels are used as they are.

    Items are (image, label); images are PIL images, or tensors (C, H, W), uint8 in 0-255 or float.

    Args:
        train, test: one data set a task.
        in_memory: read them once into tensors; else they are read item by item, for which ``num_workers`` helps.
        kwargs: see :class:`TaskDataModule`.
    """

    def __init__(
        self, train: Sequence[Dataset], test: Sequence[Dataset], in_memory: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if len(train) != len(test) or not train:
            raise ValueError(
                f"TaskDatasets: one training and one test set a task, got {len(train)} training, {len(test)} test sets"
            )
        self.given = {"train": train, "test": test}
        self.in_memory = in_memory

    def load(self) -> tuple[list[Dataset], list[Dataset]]:
        train, test = (
            [_Items(data, f"TaskDatasets({part}[{t}])") for t, data in enumerate(sets)]
            for part, sets in self.given.items()
        )
        if self.in_memory:
            return [items.gather() for items in train], [items.gather() for items in test]
        return train, test


class _Items(Dataset):
    """Any data set, with images as tensors (C, H, W)."""

    def __init__(self, data: Dataset, name: str) -> None:
        if not len(data):
            raise ValueError(f"{name}: the data set is empty")
        self.data, self.name = data, name

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= len(self):  # ends an iteration, which not every data set does by itself
            raise IndexError(index)
        image, label = self.data[index]
        if hasattr(image, "getbands"):  # a PIL image
            pixels = np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
            image = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
        known = isinstance(image, Tensor) and (image.dtype == torch.uint8 or image.is_floating_point())
        if not known or image.ndim != 3:
            got = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(
                f"{self.name}: images are PIL images or (C, H, W) tensors, uint8 or float; item {index} is {got}"
            )
        return image, int(label)

    @cached_property
    def targets(self) -> Tensor:
        """Labels (N,), without decoding the images if the data set lists them."""
        data, at = self.data, slice(None)
        if isinstance(data, Subset):
            data, at = data.dataset, torch.as_tensor(data.indices)
        if hasattr(data, "targets") and getattr(data, "target_transform", None) is None:
            return torch.as_tensor(data.targets)[at]
        return torch.tensor([self[i][1] for i in range(len(self))])

    def gather(self) -> ImageTensors:
        """The whole set in memory."""
        if isinstance(self.data, ImageTensors):
            return self.data
        first, _ = self[0]
        images, labels = first.new_empty(len(self), *first.shape), torch.empty(len(self), dtype=torch.long)
        for i in range(len(self)):
            image, labels[i] = self[i]
            if image.shape != first.shape or image.dtype != first.dtype:
                raise ValueError(
                    f"{self.name}: item {i} is {image.dtype} {tuple(image.shape)}, item 0 {first.dtype} "
                    f"{tuple(first.shape)}; all must be equal"
                )
            images[i] = image
        return ImageTensors(images, labels)
