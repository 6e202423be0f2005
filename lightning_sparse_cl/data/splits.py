"""Class splits of the data sets: each takes the arguments of its source and of :class:`ClassSplit` together."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from lightning_sparse_cl.data.class_split import ClassSplit, Order
from lightning_sparse_cl.data.csv_files import CSVSource
from lightning_sparse_cl.data.image_files import ImageFolderSource, MiniImageNetSource, TinyImageNetSource
from lightning_sparse_cl.data.pictures import Fit
from lightning_sparse_cl.data.series import JapaneseVowelsSource
from lightning_sparse_cl.data.sources import (
    CIFAR10Source,
    CIFAR100Source,
    DigitsSource,
    FashionMNISTSource,
    MNISTSource,
)
from lightning_sparse_cl.data.tensor_source import TensorSource
from lightning_sparse_cl.data.text import TextFolderSource, Tokenizer


class SplitDigits(ClassSplit):
    """:class:`ClassSplit` of the small real digits that come with the package, :class:`DigitsSource`.

    Args:
        table: give digits as rows of 64 numbers.
    """

    def __init__(
        self, num_tasks: int | None = None, class_order: Order = None, table: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(DigitsSource(table), num_tasks, class_order, **kwargs)


class SplitJapaneseVowels(ClassSplit):
    """:class:`ClassSplit` of the real series that come with the package, :class:`JapaneseVowelsSource`: 3 tasks."""

    usual_tasks = 3

    def __init__(self, num_tasks: int | None = None, class_order: Order = None, **kwargs: Any) -> None:
        super().__init__(JapaneseVowelsSource(), num_tasks, class_order, **kwargs)


class _SplitDownloadable(ClassSplit):
    """A split of a source that can be downloaded.

    Args:
        root: folder of the data.
        download: fetch what is missing.
    """

    dataset: type[MNISTSource | FashionMNISTSource | CIFAR10Source | TinyImageNetSource]

    def __init__(
        self,
        num_tasks: int | None = None,
        root: str = "data",
        download: bool = False,
        class_order: Order = None,
        **kwargs: Any,
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
    usual_tasks = 10


class SplitCIFAR100(ClassSplit):
    """:class:`ClassSplit` of :class:`CIFAR100Source`: 10 tasks of 10 classes, or one task of 5 classes per superclass.

    Args:
        num_tasks: a divisor of 100. If None, and no other way is given, 10, or 20 with superclasses.
        root: folder of the data.
        download: fetch what is missing.
        superclasses: task t has the classes of superclass t. It fixes the tasks and ``class_order``.
    """

    source: CIFAR100Source
    usual_tasks = 10

    def __init__(
        self,
        num_tasks: int | None = None,
        root: str = "data",
        download: bool = False,
        superclasses: bool = False,
        class_order: Order = None,
        **kwargs: Any,
    ) -> None:
        if superclasses:
            fixed = {"num_tasks": num_tasks if num_tasks != 20 else None, "class_order": class_order}
            fixed |= {way: kwargs.get(way) for way in ("base", "increment", "sizes", "tasks")}
            if wrong := ", ".join(f"{argument}={value}" for argument, value in fixed.items() if value is not None):
                raise ValueError(
                    f"{type(self).__name__}(superclasses=True, {wrong}): superclasses make 20 tasks in an order of "
                    "their own; leave the rest out"
                )
            num_tasks = 20
        super().__init__(CIFAR100Source(root, download), num_tasks, class_order, **kwargs)
        self.superclasses = superclasses

    def load(self) -> tuple[list[Dataset], list[Dataset]]:
        if self.superclasses:
            self.class_order = self.source.superclasses().argsort(stable=True).tolist()
            self._in_natural_order = False
        return super().load()


class SplitMiniImageNet(ClassSplit):
    """:class:`ClassSplit` of :class:`MiniImageNetSource`: 10 tasks of 10 classes.

    Args:
        root: folder that contains the folder ``mini-imagenet``.
        size: side in pixels that images are resized to.
    """

    usual_tasks = 10

    def __init__(
        self,
        num_tasks: int | None = None,
        root: str = "data",
        size: int = 84,
        class_order: Order = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(MiniImageNetSource(root, size), num_tasks, class_order, **kwargs)


class SplitImageFolder(ClassSplit):
    """:class:`ClassSplit` of images in folders, ``root/train/<class>/**`` and ``root/test/<class>/**`` or ``val``.

    The images are those of :class:`ImageFolderSource`.

    Args:
        root: the folder.
        size: side in pixels that images are resized to. If None, they keep their sizes, which must all be equal.
        crop: zero padding in pixels before a random crop in training; 0 is none.
        flip: mirror half of the training images.
        fit, channels, in_memory: see :class:`ImageFolderSource`. For folders too large for memory use
            ``in_memory=False``, with ``num_workers``.
    """

    usual_tasks = None

    def __init__(
        self,
        root: str,
        num_tasks: int | None = None,
        size: int | None = None,
        crop: int = 0,
        flip: bool = False,
        class_order: Order = None,
        fit: Fit = "squash",
        channels: int | None = 3,
        in_memory: bool = True,
        **kwargs: Any,
    ) -> None:
        source = ImageFolderSource(root, size, crop, flip, fit, channels, in_memory)
        super().__init__(source, num_tasks, class_order, **kwargs)


class SplitTextFolder(ClassSplit):
    """:class:`ClassSplit` of text files in folders, ``root/train/<class>/**.txt`` and ``root/test/<class>/**.txt``.

    Args:
        root, length, tokenizer: see :class:`TextFolderSource`.
    """

    usual_tasks = None

    def __init__(
        self,
        root: str,
        num_tasks: int | None = None,
        length: int = 64,
        tokenizer: Tokenizer | None = None,
        class_order: Order = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(TextFolderSource(root, length, tokenizer), num_tasks, class_order, **kwargs)


class SplitCSV(ClassSplit):
    """:class:`ClassSplit` of the rows of a CSV file: texts, or numbers.

    Args:
        path, label, text, columns, test, length, tokenizer: see :class:`CSVSource`.
    """

    usual_tasks = None

    def __init__(
        self,
        path: str,
        num_tasks: int | None = None,
        label: str = "label",
        text: str | None = None,
        columns: list[str] | None = None,
        test: str | None = None,
        length: int = 64,
        tokenizer: Tokenizer | None = None,
        class_order: Order = None,
        **kwargs: Any,
    ) -> None:
        source = CSVSource(path, label, text, columns, test, length, tokenizer)
        super().__init__(source, num_tasks, class_order, **kwargs)


class SplitTensors(ClassSplit):
    """:class:`ClassSplit` of samples and labels of your own: :class:`TensorSource`.

    Labels may have gaps: the classes that occur are counted in ascending order, also for ``class_order``.

    Args:
        train, test: N samples and labels (N,), see :class:`TensorSource`: images (N, C, H, W), uint8 in 0-255 or float,
            series (N, C, T), tables (N, C), tokens (N, T), or a dict or tuple of tensors; tensors or numpy arrays.
        crop: zero padding in pixels before a random crop in training; 0 is none. For uint8 images.
        flip: mirror half of the training images. For uint8 images.
    """

    usual_tasks = None

    def __init__(
        self,
        train: tuple[Any, Any],
        test: tuple[Any, Any],
        num_tasks: int | None = None,
        crop: int = 0,
        flip: bool = False,
        class_order: Order = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(TensorSource(train, test, crop, flip), num_tasks, class_order, **kwargs)
