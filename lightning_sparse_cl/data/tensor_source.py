"""Samples and labels of your own as a source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sparse_cl.data.checks import refuse_channels_last, refuse_odd_types, refuse_other_range
from lightning_sparse_cl.data.labels import whole_labels
from lightning_sparse_cl.data.sources import Source
from lightning_sparse_cl.nests import Nest, as_nest, each, is_image, named, refuse_other_kind, rows


@dataclass(frozen=True, eq=False)
class TensorSource(Source):
    """Samples and labels of your own.

    Labels are ids, with gaps if you like: the classes are those that occur in training, in ascending order, and
    :meth:`names` has their ids as text. Labels may also be names, which are counted in alphabetical order. Negative ids
    are refused, since -1 often marks samples without a label.

    Args:
        train, test: N samples and labels (N,). Samples are a tensor or array (N, ...), such as images (N, C, H, W),
            uint8 in 0-255 or float, series (N, C, T), tables (N, C) or tokens (N, T), or a dict or tuple of such.
            Labels are integers from 0 on, or names, in a tensor, an array or a list.
        crop, flip: see :class:`~lightning_sparse_cl.ImageTransform`; for uint8 images.

    Raises:
        ValueError: if they are anything else, or training and test samples differ in keys, shape, type or, for images,
            range.
    """

    train: tuple[Any, Any] = field(repr=False)
    test: tuple[Any, Any] = field(repr=False)
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
        (train, labels), (test, tested) = self.train, self.test
        if (self.crop or self.flip) and not (is_image(train) and train.dtype == torch.uint8):
            raise ValueError("TensorSource(crop, flip): only uint8 images are augmented, others pass unchanged")
        refuse_other_kind("TensorSource: test samples", rows(test, 0), "train samples", rows(train, 0))
        if is_image(train):
            refuse_other_range("TensorSource", ("train images", train), ("test images", test))
        object.__setattr__(self, "ids", labels.unique())
        if unknown := set(tested.tolist()) - set(self.ids.tolist()):
            raise ValueError(f"TensorSource(test=...): no training sample has the label {min(unknown)}")

    @property
    def num_classes(self) -> int:  # type: ignore[override]  # computed here, a constant there
        return len(self.ids)

    def names(self) -> list[str]:
        return [self.given_names[i] if self.given_names else str(i) for i in self.ids.tolist()]

    def read(self, train: bool) -> tuple[Nest, Tensor]:
        inputs, labels = self.train if train else self.test
        return inputs, torch.searchsorted(self.ids, labels)


def _names_in(given: Any) -> list[str]:
    """The names among training labels, in alphabetical order. Empty if labels are not names."""
    labels: Any = given[1] if isinstance(given, tuple | list) and len(given) == 2 else None
    listed = labels.tolist() if isinstance(labels, np.ndarray) and labels.dtype.kind in "USO" else labels
    if not isinstance(listed, tuple | list) or not all(isinstance(name, str) for name in listed):
        return []
    return sorted(set(listed))


def _with_numbers(name: str, given: Any, names: list[str]) -> tuple[Any, Tensor]:
    """The samples, and labels with each class name replaced by its number."""
    inputs, labels = given
    numbers = {known: i for i, known in enumerate(names)}
    if unknown := [str(label) for label in labels if str(label) not in numbers]:
        raise ValueError(f"{name}: no training sample has the label {unknown[0]!r}")
    return inputs, torch.tensor([numbers[str(label)] for label in labels])


def _pair(name: str, given: Any) -> tuple[Nest, Tensor]:
    """Samples and labels as tensors on the CPU, where tasks are made of them."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        kind = f"{type(given).__name__} of {len(given)}" if isinstance(given, tuple | list) else type(given).__name__
        raise ValueError(f"{name}: give a pair (samples, labels), got a {kind}")
    inputs, labels = as_nest(given[0], f"{name}: samples"), as_nest(given[1], f"{name}: labels")
    if not isinstance(labels, Tensor):
        raise ValueError(f"{name}: labels are one tensor (N,), got a {type(given[1]).__name__} of several")
    inputs, labels = each(lambda tensor: tensor.detach().cpu(), inputs), labels.cpu()
    for key, tensor in named(inputs).items():
        if not tensor.ndim or labels.shape != tensor.shape[:1] or not len(labels):
            raise ValueError(
                f"{name}: {f'{key!r} of the ' if key else ''}samples are (N, ...) and labels (N,), N > 0, got "
                f"{tuple(tensor.shape)} and {tuple(labels.shape)}"
            )
    refuse_odd_types(name, inputs)
    if is_image(inputs):
        refuse_channels_last(name, inputs.shape[1:], inputs.dtype, batch=True)
    labels = whole_labels(labels, name)
    if labels.min() < 0:
        raise ValueError(f"{name}: labels are integers from 0 on, got {int(labels.min())}")
    return inputs, labels
