"""Images and labels of your own as a source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sparse_cl.data.checks import refuse_channels_last, refuse_other_range
from lightning_sparse_cl.data.labels import whole_labels
from lightning_sparse_cl.data.sources import ImageSource


@dataclass(frozen=True, eq=False)
class TensorSource(ImageSource):
    """Images and labels of your own.

    Labels are ids, with gaps if you like: the classes are those that occur in training, in ascending order, and
    :meth:`names` has their ids as text. Or labels are names, which are counted in alphabetical order. Negative ids are
    refused, since -1 marks samples without a label elsewhere.

    Args:
        train, test: images (N, C, H, W), uint8 in 0-255 or float, and labels (N,), integers from 0 on or names;
            tensors, numpy arrays or, of names, lists.
        crop, flip: see :class:`~lightning_sparse_cl.ImageTransform`; for uint8 images.

    Raises:
        ValueError: if they are something else, or training and test images differ in shape, type or range.
    """

    train: tuple[Tensor, Tensor] = field(repr=False)
    test: tuple[Tensor, Tensor] = field(repr=False)
    crop: int = 0
    flip: bool = False
    ids: Tensor = field(init=False, repr=False)
    """The id (num_classes,) of each class."""
    given_names: list[str] = field(init=False, repr=False)
    """The name of each id, if labels are names."""

    def __post_init__(self) -> None:
        names = _names_in(self.train)
        object.__setattr__(self, "given_names", names)  # it is frozen
        for name in ("train", "test") if names else ():
            object.__setattr__(self, name, _with_numbers(f"TensorSource({name}=...)", getattr(self, name), names))
        for name in ("train", "test"):
            object.__setattr__(self, name, _pair(f"TensorSource({name}=...)", getattr(self, name)))  # it is frozen
        if (self.crop or self.flip) and self.train[0].is_floating_point():
            raise ValueError("TensorSource(crop, flip): only uint8 images are augmented, floats pass unchanged")
        (train, labels), (test, tested) = self.train, self.test
        if train.shape[1:] != test.shape[1:]:
            shapes = tuple(train.shape[1:]), tuple(test.shape[1:])
            raise ValueError(f"TensorSource: train and test images differ in shape, {shapes[0]} and {shapes[1]}")
        if train.dtype != test.dtype:
            raise ValueError(f"TensorSource: train and test images differ in type, {train.dtype} and {test.dtype}")
        refuse_other_range("TensorSource", ("train images", train), ("test images", test))
        object.__setattr__(self, "ids", labels.unique())
        if unknown := set(tested.tolist()) - set(self.ids.tolist()):
            raise ValueError(f"TensorSource(test=...): no training sample has the label {min(unknown)}")

    @property
    def num_classes(self) -> int:  # type: ignore[override]  # computed here, a constant there
        return len(self.ids)

    def names(self) -> list[str]:
        return [self.given_names[i] if self.given_names else str(i) for i in self.ids.tolist()]

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = self.train if train else self.test
        return images, torch.searchsorted(self.ids, labels)


def _names_in(given: Any) -> list[str]:
    """The names among training labels, in alphabetical order. If labels are no names, none."""
    labels: Any = given[1] if isinstance(given, tuple | list) and len(given) == 2 else None
    listed = labels.tolist() if isinstance(labels, np.ndarray) and labels.dtype.kind in "USO" else labels
    if not isinstance(listed, tuple | list) or not all(isinstance(name, str) for name in listed):
        return []
    return sorted(set(listed))


def _with_numbers(name: str, given: Any, names: list[str]) -> tuple[Any, Tensor]:
    """Images, and for each name of a class its number."""
    images, labels = given
    numbers = {known: i for i, known in enumerate(names)}
    if unknown := [str(label) for label in labels if str(label) not in numbers]:
        raise ValueError(f"{name}: no training sample has the label {unknown[0]!r}")
    return images, torch.tensor([numbers[str(label)] for label in labels])


def _pair(name: str, given: Any) -> tuple[Tensor, Tensor]:
    """Images and labels as tensors on the CPU, where tasks are made of them."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        kind = f"{type(given).__name__} of {len(given)}" if isinstance(given, tuple | list) else type(given).__name__
        raise ValueError(f"{name}: give a pair (images, labels), got a {kind}")
    try:
        images, labels = (torch.as_tensor(np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x) for x in given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: images and labels are tensors or arrays of numbers: {error}") from error
    images, labels = images.detach().cpu(), labels.cpu()
    if images.ndim != 4 or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(
            f"{name}: images are (N, C, H, W) and labels (N,), N > 0, got {tuple(images.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"{name}: images are uint8 or float, got {images.dtype}")
    refuse_channels_last(name, images.shape[1:], images.dtype, batch=True)
    labels = whole_labels(labels, name)
    if labels.min() < 0:
        raise ValueError(f"{name}: labels are integers from 0 on, got {int(labels.min())}")
    return images, labels
