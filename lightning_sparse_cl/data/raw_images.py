"""Turns raw images into the form in which training images were stored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sparse_cl.data.description import DataDescription
from lightning_sparse_cl.data.pictures import eight_bits, open_picture, resized

RawImages = Tensor | np.ndarray | Sequence[Any]
"""Images (N, C, H, W), or a list whose items are images (C, H, W), PIL images or paths of image files."""


def as_stored(images: RawImages, known: DataDescription) -> Tensor:
    """Images of any size and mode as training images were stored, (N, C, H, W).

    They are converted to grey or RGB, and then resized bilinearly, to match the training images. Float images must have
    the shape and range of training already; if training images were floats, only such images are accepted.

    Raises:
        ValueError: if one cannot be read or converted, with its path or index.
    """
    if isinstance(images, Tensor | np.ndarray):
        whole = torch.as_tensor(images)
        if whole.ndim != 4:
            raise ValueError(f"images are (N, C, H, W) or a list of images, got the shape {tuple(whole.shape)}")
        if whole.dtype == known.dtype and whole.shape[1:] == known.input_shape:
            return whole
    elif isinstance(images, str | os.PathLike) or hasattr(images, "getbands"):
        images = [images]
    stored = [one_as_stored(image, known, f"image {i}") for i, image in enumerate(images)]
    return torch.stack(stored) if stored else torch.empty(0, *known.input_shape, dtype=known.dtype)


def one_as_stored(image: Any, known: DataDescription, name: str) -> Tensor:
    """One image as training images were stored, (C, H, W). ``name`` is for errors, see :func:`as_stored`."""
    if isinstance(image, Tensor | np.ndarray):
        image = torch.as_tensor(image)
        if image.dtype == known.dtype and image.shape == known.input_shape:
            return image
    if known.dtype != torch.uint8:
        raise ValueError(
            f"{name}: the training images were {known.dtype} {known.input_shape}, in a range that is not known here; "
            "give such tensors"
        )
    if isinstance(image, str | os.PathLike):
        return _pixels(open_picture(Path(image), name), name, known)
    if isinstance(image, Tensor):
        image = _picture(image, name)
    if not hasattr(image, "getbands"):
        raise ValueError(f"{name}: a path, a PIL image or uint8 (C, H, W) is expected, got a {type(image).__name__}")
    try:
        image = eight_bits(image)
    except Exception as error:  # its file may be read only now
        raise ValueError(f"{name}: {error}") from error
    return _pixels(image, name, known)


def _picture(image: Tensor, name: str) -> Any:
    """A PIL image from a tensor (1, H, W) or (3, H, W), uint8."""
    from PIL import Image

    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(
            f"{name}: uint8 of shape (1, H, W) or (3, H, W) is expected, got {image.dtype} {tuple(image.shape)}"
        )
    array = image.cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if image.shape[0] == 1 else array))


def _pixels(image: Any, name: str, known: DataDescription) -> Tensor:
    """A PIL image of 8 bits as training images were stored."""
    channels, *size = known.input_shape
    if channels not in (1, 3):
        raise ValueError(f"{name}: the training images had {channels} channels, but pictures have 1 or 3")
    image = image.convert("L" if channels == 1 else "RGB")
    if [image.height, image.width] != size:
        if known.size is None:
            rank_zero_warn(f"images of other sizes are resized to {size[0]}x{size[1]}; the training images were not")
        image = resized(image, (size[0], size[1]), known.fit)
    return torch.from_numpy(np.array(image).reshape(*size, channels)).permute(2, 0, 1).contiguous()
