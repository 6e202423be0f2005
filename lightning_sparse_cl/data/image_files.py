"""Sources whose images are files in folders: Tiny ImageNet, Mini-ImageNet and any folder of classes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from lightning_sparse_cl.data.pictures import Fit, decode, image_paths, open_picture, read_of_size, unread
from lightning_sparse_cl.data.sources import Source


@dataclass(frozen=True)
class TinyImageNetSource(Source):
    """Tiny ImageNet, 200 classes of 64x64 (CS231n, Stanford, 2015); its validation part is the test part.

    A subset works: classes may lack images, and ``wnids.txt`` may list fewer classes.

    Args:
        root: folder that holds, or will hold, the archive's folder ``tiny-imagenet-200``.
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
    def num_classes(self) -> int:  # type: ignore[override]  # computed here, a constant there
        return len(self._wnids()) if (self.folder / "wnids.txt").exists() else 200

    def names(self) -> list[str]:
        return self._wnids()

    def fetch(self) -> None:
        if self.download and not self.folder.exists():
            from torchvision.datasets.utils import download_and_extract_archive

            download_and_extract_archive(self.url, self.root, md5="90528d7ca1a48142e341f4ef8d21d0de")

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        self.fetch()
        label = {wnid: i for i, wnid in enumerate(self._wnids())}
        if train:
            found = [(path, i) for wnid, i in label.items() for path in image_paths(self.folder / "train" / wnid)]
        else:
            lines = self._lines("val", "val_annotations.txt")
            rows = [line.split("\t")[:2] for line in lines]
            found = [(self.folder / "val" / "images" / name, label[wnid]) for name, wnid in rows if wnid in label]
        return decode([path for path, _ in found], str(self), (64, 64)), _labels(found)

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
class MiniImageNetSource(Source):
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

    def names(self) -> list[str]:
        return list(self._members())

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        found = []
        for label, paths in enumerate(self._members().values()):
            kept = len(paths) * 5 // 6
            found += [(path, label) for path in (paths[:kept] if train else paths[kept:])]
        return decode([path for path, _ in found], str(self), (self.size, self.size), resize=True), _labels(found)

    def _members(self) -> dict[str, list[Path]]:
        """The images of each class."""
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
        return members


class ImageFiles(Dataset):
    """Image files, each read when it is asked for.

    Args:
        paths: paths of the files, which the fingerprint of a task covers.
        read: function from a path to an image (C, H, W).
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], Tensor]) -> None:
        self.paths, self.read = paths, read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.read(self.paths[index])


@dataclass(frozen=True)
class ImageFolderSource(Source):
    """Any images in ``root/train/<class>/**`` and ``root/test/<class>/**`` (or ``val``).

    Classes are the folders of the training part, numbered alphabetically. Files of JPEG, PNG, BMP, PPM, WebP and TIFF
    are read, 16-bit grey ones scaled to 8 bits; a warning counts other files, and files that lie beside the classes.
    Hidden files and notes (.txt, .md, .json, .csv, .xml, .yaml, .html, .ini, .db) are passed over.

    Args:
        root: the folder.
        size: side in pixels that images are resized to. If None, they keep their sizes, which must all be equal.
        crop, flip: see :class:`~lightning_sparse_cl.ImageTransform`.
        fit: how images are made square: ``"squash"`` scales both sides to ``size``, ``"crop"`` scales the shorter side,
            and cuts out the middle.
        channels: 3 (RGB) or 1 (grey). If None, as in the first training image.
        in_memory: read all images at once; otherwise each when it is asked for, with ``num_workers`` to help.

    Raises:
        ValueError: if ``fit`` or ``channels`` is another value, or ``fit`` is ``"crop"`` without a ``size``.
    """

    root: str
    size: int | None = None
    crop: int = 0
    flip: bool = False
    fit: Fit = "squash"
    channels: int | None = 3
    in_memory: bool = True

    def __post_init__(self) -> None:
        if self.fit not in ("squash", "crop"):
            raise ValueError(f"ImageFolderSource(fit={self.fit!r}): fit is 'squash' or 'crop'")
        if self.size is not None and (isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f"ImageFolderSource(size={self.size!r}): a number of pixels, at least 1")
        if self.fit == "crop" and self.size is None:
            raise ValueError("ImageFolderSource(fit='crop'): images are cut to a size: give size")
        if self.channels not in (1, 3, None):
            raise ValueError(
                f"ImageFolderSource(channels={self.channels}): 3 (RGB), 1 (grey), or null: as in the images"
            )

    @property
    def num_classes(self) -> int:  # type: ignore[override]  # computed here, a constant there
        return len(self.classes)

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return _folders(self._part(train=True))

    def names(self) -> list[str]:
        return self.classes

    def tested_only(self) -> list[str]:
        return [name for name in _folders(self._part(train=False)) if name not in self.classes]

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        found = self._found(train)
        if not self.in_memory:
            return torch.arange(len(found)), _labels(found)
        how = (str(self), self._size, self.size is not None, self.fit, self._channels)
        return decode([path for path, _ in found], *how), _labels(found)

    def items(self, train: bool) -> Dataset | None:
        if self.in_memory:
            return None
        read = partial(
            read_of_size, name=str(self), size=self._size, resize=self.size is not None, fit=self.fit,
            channels=self._channels,
        )  # fmt: skip
        return ImageFiles([path for path, _ in self._found(train)], read)

    def _found(self, train: bool) -> list[tuple[Path, int]]:
        """The files of a part and their labels."""
        part, found = self._part(train), []
        if others := unread(part):
            rank_zero_warn(f"{self}: files of {str(part)!r} that are not read: {others}")
        names = self.classes + ([] if train else self.tested_only())
        for name in _folders(part):
            paths = image_paths(part / name)
            if not paths:
                raise ValueError(f"{self}: the folder {str(part / name)!r} has no images")
            found += [(path, names.index(name)) for path in paths]
        return found

    @cached_property
    def _first(self) -> Any:
        """The first training image, in mode L or RGB."""
        path = next(path for name in self.classes for path in image_paths(self._part(train=True) / name))
        return open_picture(path, str(self))

    @property
    def _size(self) -> tuple[int, int]:
        return (self.size, self.size) if self.size else (self._first.height, self._first.width)

    @property
    def _channels(self) -> int:
        return self.channels or len(self._first.getbands())

    def _part(self, train: bool) -> Path:
        names = ["train"] if train else ["test", "val"]
        parts = [Path(self.root, name) for name in names if Path(self.root, name).is_dir()]
        if not parts or not _folders(parts[0]):
            wanted = " or ".join(repr(str(Path(self.root, name, "<class>"))) for name in names)
            raise FileNotFoundError(f"{self}: there is no folder {wanted}; place the images of each class in one")
        return parts[0]


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _labels(found: Sequence[tuple[Path, int]]) -> Tensor:
    return torch.tensor([label for _, label in found], dtype=torch.long)
