"""Where images come from: the base class of sources, the packaged digits, and torchvision's data sets."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_sparse_cl.data.augment import ImageTransform
from lightning_sparse_cl.nests import Nest


class Source:
    """Labelled samples, mostly images, with a training and a test part. A subclass sets the attributes and overrides
    :meth:`read`.

    Attributes:
        num_classes: labels are in ``range(num_classes)``.
        mean, std: per channel, on the scale 0-1; empty if the tasks made of the source compute their own.
        crop, flip: random changes in training, see :class:`~lightning_sparse_cl.ImageTransform`.
    """

    num_classes: int
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    crop: int = 0
    flip: bool = False

    def fetch(self) -> None:
        """Download what is missing, if the source was told to. Called by one process, before any of them reads."""

    def read(self, train: bool) -> tuple[Nest, Tensor]:
        """N samples, such as images (N, C, H, W), and labels (N,), whole numbers, of the training or the test part."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its images are: override read()")

    def items(self, train: bool) -> Dataset | None:
        """The samples as a data set that reads each on request; :meth:`read` then gives their places in it.

        If None, :meth:`read` gives the samples.
        """
        return None

    def names(self) -> list[str]:
        """Names of the classes, by label. If not overridden, the labels as text."""
        return [str(c) for c in range(self.num_classes)]

    def tested_only(self) -> list[str]:
        """Names of classes that only have test images; their labels come after ``num_classes``."""
        return []

    def transform(self) -> ImageTransform | None:
        """From stored images to network input. None if the source has no mean and deviation."""
        return ImageTransform(self.mean, self.std, self.crop, self.flip) if self.mean else None


@dataclass(frozen=True)
class DigitsSource(Source):
    """1797 real handwritten digits, 8x8, 10 classes; they come with the package. A fixed fifth is the test part.

    "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998,
    https://doi.org/10.24432/C50P49, CC BY 4.0; the test part of that data set, as scikit-learn ships it.

    Args:
        table: give digits as rows of 64 numbers, for networks that take tables; they are standardised per column.
    """

    table: bool = False
    num_classes = 10
    mean, std = (0.3059,), (0.3764,)

    def transform(self) -> ImageTransform | None:
        return None if self.table else super().transform()

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        with resources.files(__package__).joinpath("digits.csv.gz").open("rb") as file, gzip.open(file) as table:
            rows = np.loadtxt(table, delimiter=",", dtype=np.int64)
        pixels, labels = rows[:, :64], rows[:, 64]
        images = np.rint(pixels * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
        random = np.random.RandomState(0)  # its draws never change between numpy versions
        test = np.zeros(len(labels), dtype=bool)
        for c in range(self.num_classes):
            members = random.permutation(np.flatnonzero(labels == c))
            test[members[: len(members) // 5]] = True
        chosen = ~test if train else test
        found = torch.from_numpy(images[chosen])
        return found.flatten(1) if self.table else found, torch.from_numpy(labels[chosen])


@dataclass(frozen=True)
class _TorchvisionSource(Source):
    """The images of ``dataset``, a class in ``torchvision.datasets``.

    Args:
        root: folder of the data, in torchvision's layout.
        download: fetch what is missing.
    """

    dataset: ClassVar[str]
    root: str = "data"
    download: bool = False

    def fetch(self) -> None:
        if self.download:
            self._open(train=True)

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        data = self._open(train)
        images = torch.as_tensor(data.data)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        return images, torch.as_tensor(data.targets)

    def _open(self, train: bool) -> Any:
        from torchvision import datasets  # takes a second to import

        try:
            return getattr(datasets, self.dataset)(self.root, train=train, download=self.download)
        except RuntimeError as error:
            if self.download:
                raise
            raise FileNotFoundError(
                f"{self}: the data are missing or damaged in {self.root!r}; set download: true to fetch them there"
            ) from error


class MNISTSource(_TorchvisionSource):
    """MNIST, 70,000 handwritten digits, 28x28, 10 classes (LeCun et al., 1998)."""

    dataset = "MNIST"
    num_classes = 10
    mean, std = (0.1307,), (0.3081,)


class FashionMNISTSource(_TorchvisionSource):
    """Fashion-MNIST, 70,000 pictures of clothes, 28x28, 10 classes (Xiao et al., 2017)."""

    dataset = "FashionMNIST"
    num_classes = 10
    mean, std = (0.2860,), (0.3530,)

    def names(self) -> list[str]:
        from torchvision import datasets

        return list(datasets.FashionMNIST.classes)


class _CIFARSource(_TorchvisionSource):
    """CIFAR-10 or CIFAR-100, which keep the names of their classes in a file of their own."""

    key: ClassVar[str] = ""
    """Key of the names in that file. If empty, torchvision's key."""

    def names(self) -> list[str]:
        from torchvision import datasets
        from torchvision.datasets.utils import check_integrity

        kind = getattr(datasets, self.dataset)
        path = Path(self.root, kind.base_folder, kind.meta["filename"])
        if not check_integrity(str(path), kind.meta["md5"]):  # it is unpickled below
            raise FileNotFoundError(f"{self}: {str(path)!r} is missing or damaged")
        with path.open("rb") as file:
            names = pickle.load(file, encoding="latin1").get(self.key or kind.meta["key"])
        return super().names() if names is None else list(names)


class CIFAR10Source(_CIFARSource):
    """CIFAR-10, 60,000 colour images, 32x32, 10 classes (Krizhevsky, 2009)."""

    dataset = "CIFAR10"
    num_classes = 10
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2615)
    crop, flip = 4, True


@dataclass(frozen=True)
class CIFAR100Source(_CIFARSource):
    """CIFAR-100, 60,000 colour images, 32x32, 100 classes in 20 superclasses (Krizhevsky, 2009).

    Args:
        coarse: label by superclass.
    """

    dataset = "CIFAR100"
    coarse: bool = False
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    crop, flip = 4, True

    @property
    def num_classes(self) -> int:  # type: ignore[override]  # computed here, a constant there
        return 20 if self.coarse else 100

    @property
    def key(self) -> str:  # type: ignore[override]  # computed here, a constant there
        return "coarse_label_names" if self.coarse else ""

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = super().read(train)
        return images, self._coarse(train) if self.coarse else labels

    def superclasses(self) -> Tensor:
        """The superclass (100,) of each class, both numbered alphabetically."""
        superclass = torch.zeros(100, dtype=torch.long)
        superclass[replace(self, coarse=False).read(train=False)[1]] = self._coarse(train=False)
        return superclass

    def _coarse(self, train: bool) -> Tensor:
        data = self._open(train)  # verifies the file that is unpickled below
        ((name, _),) = data.train_list if train else data.test_list
        with Path(data.root, data.base_folder, name).open("rb") as file:
            return torch.tensor(pickle.load(file, encoding="latin1")["coarse_labels"])
