"""Pictures: PIL images and image files of any mode, as pixels of 8 bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_sparse_cl.thread_pool import thread_pool

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff"}
"""Endings of the files that are read."""
NOTES = {".txt", ".md", ".json", ".csv", ".xml", ".yaml", ".yml", ".html", ".ini", ".db"}
"""Endings of files that are not taken for images, including ``Thumbs.db`` and ``desktop.ini``."""


def eight_bits(image: Any) -> Any:
    """A PIL image in mode L or RGB.

    Grey of 16 bits is divided by 257, so that white stays white. Grey with alpha and black-and-white become L, all
    other modes RGB; alpha is dropped.

    Raises:
        ValueError: if the range of the pixels is not known (modes F and I, except for 16 bits that Pillow opens as I),
            or Pillow cannot convert the mode.
    """
    mode = image.mode
    if mode in ("L", "RGB"):
        return image
    if mode == "F" or (mode == "I" and not _is_sixteen_bits(image)):
        raise ValueError(f"the pixels of mode {mode} (32 bits) have no known range; convert them to 8 bits")
    if mode.startswith("I"):
        from PIL import Image

        return Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8))
    if mode in ("La", "RGBa"):  # Pillow converts premultiplied alpha only to these
        image = image.convert(mode.upper())
    if mode == "PA" or (mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
    return image.convert("L" if mode in ("1", "LA", "La") else "RGB")


def _is_sixteen_bits(image: Any) -> bool:
    """Whether mode I holds 16 bits, as older Pillow opens such PNGs; judged by format, or values beyond 8 bits."""
    low, high = image.getextrema()
    return low >= 0 and high < 2**16 and (image.format in ("PNG", "PPM") or high == 0 or high > 255)


def pixels(image: Any) -> Tensor:
    """A PIL image as uint8 (1, H, W) if it is grey, else (3, H, W). Raises as :func:`eight_bits` does."""
    array = np.array(eight_bits(image))
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def image_paths(folder: Path) -> list[Path]:
    """The image files anywhere in a folder, in order, except hidden ones."""
    return [path for path in _files(folder) if path.suffix.lower() in ENDINGS]


def unread(part: Path) -> str:
    """Which files of ``part/<class>/**`` are not read, and which lie beside the classes, as text; empty if none.

    Hidden files and notes do not count.
    """
    files = [path for path in _files(part) if path.suffix.lower() not in NOTES]
    beside = Counter(path.suffix.lower() for path in files if path.parent == part)
    inside = Counter(path.suffix.lower() for path in files if path.parent != part)
    inside = Counter({ending: n for ending, n in inside.items() if ending not in ENDINGS})
    told = []
    for found, where in ((inside, "in its classes"), (beside, "in no class")):
        if found:
            told.append(
                ", ".join(f"{n} {ending or 'without ending'}" for ending, n in sorted(found.items())) + f" {where}"
            )
    return " and ".join(told)


def unread_below(folder: Path) -> str:
    """Which files anywhere in a folder are not read, as text; empty if none. Hidden files and notes do not count."""
    endings = [path.suffix.lower() for path in _files(folder)]
    found = Counter(ending for ending in endings if ending not in ENDINGS | NOTES)
    return ", ".join(f"{n} {ending or 'without ending'}" for ending, n in sorted(found.items()))


def _files(folder: Path) -> list[Path]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return [p for p in paths if not any(name.startswith(".") for name in p.relative_to(folder).parts)]


def open_picture(path: Path, name: str) -> Any:
    """An image file as a PIL image in mode L or RGB, decoded.

    Raises:
        ValueError: with the name and the file, if it cannot be read or holds several pictures.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            if file.format == "TIFF" and (count := getattr(file, "n_frames", 1)) > 1:
                raise ValueError(f"it holds {count} pictures instead of one")
            image = eight_bits(file)
            image.load()
            return image
    except Exception as error:  # a decoder may raise anything on broken bytes
        raise ValueError(f"{name}: cannot read the image {str(path)!r}: {error}") from error


Fit = Literal["squash", "crop"]
"""How an image is resized: both sides are scaled, or the shorter one is and the middle is cut out."""


def resized(image: Any, size: tuple[int, int], fit: Fit = "squash") -> Any:
    """A PIL image resized to ``size``, rows and columns, bilinearly."""
    from PIL import Image

    rows, columns = size
    if fit == "crop":
        scale = max(rows / image.height, columns / image.width)
        scaled = max(rows, round(scale * image.height)), max(columns, round(scale * image.width))
        image = image.resize(scaled[::-1], Image.Resampling.BILINEAR)
        top, left = (scaled[0] - rows) // 2, (scaled[1] - columns) // 2
        return image.crop((left, top, left + columns, top + rows))
    return image.resize((columns, rows), Image.Resampling.BILINEAR)


def read(path: Path, name: str, size: tuple[int, int] | None = None, fit: Fit = "squash", channels: int = 3) -> Tensor:
    """An image file (C, H, W), uint8, of 1 or 3 channels, resized if asked. Raises as :func:`open_picture` does."""
    image = open_picture(path, name).convert("L" if channels == 1 else "RGB")
    image = image if size is None else resized(image, size, fit)
    return torch.from_numpy(np.array(image).reshape(image.height, image.width, channels)).permute(2, 0, 1)


def decode(
    paths: Sequence[Path], name: str, size: tuple[int, int], resize: bool = False, fit: Fit = "squash",
    channels: int = 3,
) -> Tensor:  # fmt: skip
    """The images (N, C, H, W), uint8, in order; by threads, since Pillow decodes without holding the interpreter lock.

    Raises:
        ValueError: with the name and the file, if one cannot be read, or has another size and is not resized.
    """
    images = torch.empty(len(paths), channels, *size, dtype=torch.uint8)

    def fill(i: int) -> None:
        images[i] = read_of_size(paths[i], name, size, resize, fit, channels)

    with thread_pool() as pool:
        for _ in pool.map(fill, range(len(paths))):
            pass
    return images


def read_of_size(path: Path, name: str, size: tuple[int, int], resize: bool, fit: Fit, channels: int) -> Tensor:
    """:func:`read` of an image that is resized to this size, or must have it. Raises ValueError if it has not."""
    image = read(path, name, size if resize else None, fit, channels)
    if image.shape[1:] != size:
        raise ValueError(
            f"{name}: {str(path)!r} has {image.shape[1]}x{image.shape[2]} pixels instead of {size[0]}x{size[1]}"
        )
    return image
