"""Where images come from: public data sets, folders and tensors, read whole into memory."""

from __future__ import annotations

import csv
import gzip
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sparse_cl.data.augment import ImageTransform


class Source:
    """Labelled images with a training and a test part. A subclass sets the attributes and overrides :meth:`read`.

    Attributes:
        num_classes: labels are in ``range(num_classes)``.
        mean, std: per channel, on the scale 0-1; empty if the tasks made of the source shall compute their own.
        crop, flip: what training draws at random, see :class:`~lightning_sparse_cl.ImageTransform`.
    """

    num_classes: int
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    crop: int = 0
    flip: bool = False

    def fetch(self) -> None:
        """Download what is missing, if the source was told to. Called by one process, before any of them reads."""

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W), uint8, and labels (N,), int64, of the training or the test part."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its images are: override read()")

    def image_transform(self) -> ImageTransform | None:
        """From stored images to network input; None if the source has no mean and deviation."""
        return ImageTransform(self.mean, self.std, self.crop, self.flip) if self.mean else None


@dataclass(frozen=True)
class Digits(Source):
    """1797 real handwritten digits, 8x8, 10 classes; they come with the package. A fixed fifth is the test part.

    "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998,
    https://doi.org/10.24432/C50P49, CC BY 4.0; the test part of that data set, as scikit-learn ships it.
    """

    num_classes = 10
    mean, std = (0.3059,), (0.3764,)

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
        return torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen])


@dataclass(frozen=True)
class _Torchvision(Source):
    """A data set of the same name in ``torchvision.datasets``.

    Args:
        root: folder of the data, in torchvision's layout.
        download: fetch what is missing.
    """

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
            return getattr(datasets, type(self).__name__)(self.root, train=train, download=self.download)
        except RuntimeError as error:
            if self.download:
                raise
            raise FileNotFoundError(
                f"{self}: the data are missing or damaged in {self.root!r}; set download: true to fetch them there"
            ) from error


class MNIST(_Torchvision):
    """70,000 handwritten digits, 28x28, 10 classes (LeCun et al., 1998)."""

    num_classes = 10
    mean, std = (0.1307,), (0.3081,)


class FashionMNIST(_Torchvision):
    """70,000 pictures of clothes, 28x28, 10 classes (Xiao et al., 2017)."""

    num_classes = 10
    mean, std = (0.2860,), (0.3530,)


class CIFAR10(_Torchvision):
    """60,000 colour images, 32x32, 10 classes (Krizhevsky, 2009)."""

    num_classes = 10
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2615)
    crop, flip = 4, True


@dataclass(frozen=True)
class CIFAR100(_Torchvision):
    """60,000 colour images, 32x32, 100 classes in 20 superclasses (Krizhevsky, 2009).

    Args:
        coarse: label by superclass.
    """

    coarse: bool = False
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    crop, flip = 4, True

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return 20 if self.coarse else 100

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


@dataclass(frozen=True)
class TinyImageNet(Source):
    """Tiny ImageNet, 200 classes of 64x64 (CS231n, Stanford, 2015); its validation part is the test part.

    A subset works: classes may lack images, and ``wnids.txt`` may list fewer classes.

    Args:
        root: folder that has, or gets, the archive's folder ``tiny-imagenet-200``.
        download: fetch the archive if that folder is missing.
    """

    root: str = "data"
    download: bool = False
    mean, std = (0.4802, 0.4480, 0.3975), (0.2770, 0.2691, 0.2821)
    crop, flip = 4, True
    url = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"

    @property
    def folder(self) -> Path:
        return Path(self.root, "tiny-imagenet-200")

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return len(self._wnids()) if (self.folder / "wnids.txt").exists() else 200

    def fetch(self) -> None:
        if self.download and not self.folder.exists():
            from torchvision.datasets.utils import download_and_extract_archive

            download_and_extract_archive(self.url, self.root, md5="90528d7ca1a48142e341f4ef8d21d0de")

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        self.fetch()
        label = {wnid: i for i, wnid in enumerate(self._wnids())}
        if train:
            found = [(path, i) for wnid, i in label.items() for path in _images(self.folder / "train" / wnid)]
        else:
            lines = self._lines("val", "val_annotations.txt")
            rows = [line.split("\t")[:2] for line in lines]
            found = [(self.folder / "val" / "images" / name, label[wnid]) for name, wnid in rows if wnid in label]
        return _decode(self, [path for path, _ in found], (64, 64)), _labels(found)

    def _wnids(self) -> list[str]:
        return self._lines("wnids.txt")

    def _lines(self, *path: str) -> list[str]:
        file = self.folder.joinpath(*path)
        if not file.exists():
            raise FileNotFoundError(
                f"{self}: {str(file)!r} is missing; set download: true, or unpack {self.url} into {self.root!r}"
            )
        return [line for line in file.read_text().splitlines() if line]


@dataclass(frozen=True)
class MiniImageNet(Source):
    """Mini-ImageNet, 100 classes of 600 images (Vinyals et al., 2016), numbered as they first appear in the splits.

    For continual learning the three few-shot splits are joined, and the last sixth of every class is the test part.

    Args:
        root: folder with ``mini-imagenet/images/*.jpg`` and ``mini-imagenet/{train,val,test}.csv``, whose columns are
            filename and label.
        size: side in pixels that images are resized to.
    """

    root: str = "data"
    size: int = 84
    num_classes = 100
    crop, flip = 4, True

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        folder = Path(self.root, "mini-imagenet")
        members: dict[str, list[Path]] = {}
        for part in ("train", "val", "test"):
            path = folder / f"{part}.csv"
            if not path.exists():
                raise FileNotFoundError(
                    f"{self}: {str(path)!r} is missing; it cannot be downloaded directly: place the images in "
                    f"{str(folder / 'images')!r} and train.csv, val.csv, test.csv (columns filename,label) beside it"
                )
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    members.setdefault(row["label"], []).append(folder / "images" / row["filename"])
        if len(members) != self.num_classes:
            raise ValueError(f"{self}: the csv files in {str(folder)!r} name {len(members)} classes instead of 100")
        found = []
        for label, paths in enumerate(members.values()):
            kept = len(paths) * 5 // 6
            found += [(path, label) for path in (paths[:kept] if train else paths[kept:])]
        return _decode(self, [path for path, _ in found], (self.size, self.size), resize=True), _labels(found)


@dataclass(frozen=True)
class ImageFolder(Source):
    """Any images in ``root/train/<class>/**`` and ``root/test/<class>/**`` (or ``val``), read as RGB.

    Classes are the folders of the training part, numbered alphabetically.

    Args:
        root: the folder.
        size: side in pixels that images are resized to; None keeps them, and all must be equal.
        crop, flip: see :class:`~lightning_sparse_cl.ImageTransform`.
    """

    root: str
    size: int | None = None
    crop: int = 0
    flip: bool = False

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return len(self.classes)

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return _folders(self._part(train=True))

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        part, found = self._part(train), []
        for name in _folders(part):
            if name not in self.classes:
                raise ValueError(f"{self}: class {name!r} of {str(part)!r} is not among the training classes")
            paths = _images(part / name)
            if not paths:
                raise ValueError(f"{self}: the folder {str(part / name)!r} has no images")
            found += [(path, self.classes.index(name)) for path in paths]
        size = (self.size, self.size) if self.size else self._first_size
        return _decode(self, [path for path, _ in found], size, resize=self.size is not None), _labels(found)

    @cached_property
    def _first_size(self) -> tuple[int, int]:
        first = next(path for name in self.classes for path in _images(self._part(train=True) / name))
        return _rgb(self, first).shape[:2]

    def _part(self, train: bool) -> Path:
        names = ["train"] if train else ["test", "val"]
        parts = [Path(self.root, name) for name in names if Path(self.root, name).is_dir()]
        if not parts or not _folders(parts[0]):
            wanted = " or ".join(repr(str(Path(self.root, name, "<class>"))) for name in names)
            raise FileNotFoundError(f"{self}: there is no folder {wanted}; place the images of each class in one")
        return parts[0]


@dataclass(frozen=True, eq=False)
class Tensors(Source):
    """Images and labels of your own.

    Args:
        train, test: images (N, C, H, W), uint8 in 0-255 or float, and labels (N,) of integers from 0 on.
        crop, flip: see :class:`~lightning_sparse_cl.ImageTransform`; for uint8 images.
    """

    train: tuple[Tensor, Tensor] = field(repr=False)
    test: tuple[Tensor, Tensor] = field(repr=False)
    crop: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        for name in ("train", "test"):
            images, labels = getattr(self, name)
            if images.ndim != 4 or labels.shape != images.shape[:1] or not len(labels):
                raise ValueError(
                    f"Tensors({name}=...): images are (N, C, H, W) and labels (N,), N > 0, got {tuple(images.shape)} "
                    f"and {tuple(labels.shape)}"
                )
            if images.dtype != torch.uint8 and not images.is_floating_point():
                raise ValueError(f"Tensors({name}=...): images are uint8 or float, got {images.dtype}")
            if labels.is_floating_point() or labels.min() < 0:
                raise ValueError(f"Tensors({name}=...): labels are integers from 0 on")
            if (self.crop or self.flip) and images.is_floating_point():
                raise ValueError("Tensors(crop, flip): only uint8 images are augmented, floats pass unchanged")
        if self.train[0].shape[1:] != self.test[0].shape[1:]:
            shapes = [tuple(images.shape[1:]) for images, _ in (self.train, self.test)]
            raise ValueError(f"Tensors: train and test images differ in shape, {shapes[0]} and {shapes[1]}")

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return 1 + max(int(labels.max()) for _, labels in (self.train, self.test))

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = self.train if train else self.test
        return images, labels.long()


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    suffixes = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp"}
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and not p.name.startswith("."))


def _labels(found: Sequence[tuple[Path, int]]) -> Tensor:
    return torch.tensor([label for _, label in found], dtype=torch.long)


def _rgb(source: Source, path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """The image (H, W, 3), resized if asked."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise ValueError(f"{source}: cannot read the image {str(path)!r}: {error}") from error
    return np.asarray(image if size is None else image.resize(size[::-1], Image.Resampling.BILINEAR))


def _decode(source: Source, paths: Sequence[Path], size: tuple[int, int], resize: bool = False) -> Tensor:
    """The images (N, 3, H, W), uint8, in order; by threads, since Pillow decodes without holding the interpreter."""
    images = np.empty((len(paths), 3, *size), dtype=np.uint8)

    def fill(i: int) -> None:
        image = _rgb(source, paths[i], size if resize else None)
        if image.shape[:2] != size:
            raise ValueError(
                f"{source}: {str(paths[i])!r} has {image.shape[0]}x{image.shape[1]} pixels instead of "
                f"{size[0]}x{size[1]}"
            )
        images[i] = image.transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(fill, range(len(paths))):
            pass
    return torch.from_numpy(images)
