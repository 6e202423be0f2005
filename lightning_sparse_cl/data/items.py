"""Data sets that are read item by item, with every item checked."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from lightning_sparse_cl.data.labels import listed_labels, whole, whole_labels
from lightning_sparse_cl.data.loader import ImageTensors, length
from lightning_sparse_cl.data.pictures import pixels


class Items(Dataset):
    """Any data set of pairs (image, label), with images as tensors (C, H, W), all alike, and labels as integers.

    Images are PIL images, see :func:`~lightning_sparse_cl.data.pictures.eight_bits`, or tensors or arrays (C, H, W),
    uint8 or float. Labels are whole numbers of any type.

    Args:
        data: has a length, and items by index.
        name: for errors.

    Raises:
        ValueError: at once if the data set is empty or has no length; with each item that is something else, not
            finite, unlike item 0, or not what the data set lists in ``.targets``.
    """

    def __init__(self, data: Dataset, name: str) -> None:
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise ValueError(
                f"{name}: a data set has a length, and items by index; {type(data).__name__} does not, read it into one"
            )
        if not length(data):
            raise ValueError(f"{name}: the data set is empty")
        self.data, self.name = data, name
        self.numbers: dict[int, int] | None = None
        """The label inside of each label of the data set. If None, they are the same."""

    def renumbered(self, numbers: dict[int, int]) -> Items:
        """The same items with other labels."""
        twin = copy.copy(self)
        twin.numbers = numbers
        return twin

    def __len__(self) -> int:
        return length(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= len(self):  # ends an iteration, which not every data set does by itself
            raise IndexError(index)
        image, label = self._read(index)
        if label != (known := int(self._found[index])):
            source = "the data set's list of labels (.targets) has" if self._listed is not None else "it once had"
            raise ValueError(f"{self.name}: item {index} has the label {label}, but {source} {known}")
        return image, label if self.numbers is None else self.numbers[label]

    @cached_property
    def first(self) -> Tensor:
        """The image of item 0, (C, H, W); all others have its shape and type."""
        return self._pair(0)[0]

    @property
    def targets(self) -> Tensor:
        """Labels (N,), without decoding the images if the data set lists them."""
        if self.numbers is None:
            return self._found
        return torch.tensor([self.numbers[label] for label in self._found.tolist()])

    @cached_property
    def _listed(self) -> Tensor | None:
        labels = listed_labels(self.data)
        if labels is not None and len(labels) != len(self):
            raise ValueError(f"{self.name}: .targets lists {len(labels)} labels for {len(self)} items")
        return None if labels is None else whole_labels(labels, self.name)

    @cached_property
    def _found(self) -> Tensor:
        if self._listed is not None:
            return self._listed
        return torch.tensor([self._read(i)[1] for i in range(len(self))])

    def _read(self, index: int) -> tuple[Tensor, int]:
        image, label = self._pair(index)
        if image.shape != self.first.shape or image.dtype != self.first.dtype:
            raise ValueError(
                f"{self.name}: item {index} is {image.dtype} {tuple(image.shape)}, item 0 {self.first.dtype} "
                f"{tuple(self.first.shape)}; all must be equal"
            )
        return image, label

    def _pair(self, index: int) -> tuple[Tensor, int]:
        item = self.data[index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ValueError(f"{self.name}: items are pairs (image, label); item {index} is {_what(item)}")
        image, label = self._tensor(index, item[0]), whole(item[1])
        if label is None:
            raise ValueError(
                f"{self.name}: labels are whole numbers, one for each image; that of item {index} is {_what(item[1])}"
            )
        return image, label

    def _tensor(self, index: int, image: Any) -> Tensor:
        if hasattr(image, "getbands"):  # a PIL image
            try:
                image = pixels(image)
            except Exception as error:  # the file of an image may be read only now, and be broken in any way
                raise ValueError(f"{self.name}: cannot take the image of item {index}: {error}") from error
        elif isinstance(image, np.ndarray) and image.dtype.kind in "biuf":
            image = torch.from_numpy(image.astype(image.dtype.newbyteorder("=")))  # a copy: the array may be read-only
        known = isinstance(image, Tensor) and (image.dtype == torch.uint8 or image.is_floating_point())
        if not known or image.ndim != 3:
            raise ValueError(
                f"{self.name}: images are PIL images or (C, H, W) tensors, uint8 or float; item {index} is "
                f"{_what(image)}"
            )
        if image.is_floating_point() and not bool(image.isfinite().all()):
            raise ValueError(f"{self.name}: the image of item {index} has values that are NaN or infinite")
        return image.detach()

    def gather(self) -> ImageTensors:
        """The whole set in memory."""
        if isinstance(self.data, ImageTensors):
            return self.data
        images, labels = self.first.new_empty(len(self), *self.first.shape), torch.empty(len(self), dtype=torch.long)
        for i in range(len(self)):
            images[i], labels[i] = self._read(i)
        if self._listed is not None and len(wrong := (labels != self._listed).nonzero()):
            i = int(wrong[0])
            rank_zero_warn(
                f"{self.name}: item {i} has the label {int(labels[i])}, but the data set's list of labels (.targets) "
                f"has {int(self._listed[i])}; in memory the items count"
            )
        for i in range(0, len(self), -(-len(self) // 8)):  # eight, evenly spaced
            if not torch.equal(self._read(i)[0], images[i]):
                rank_zero_warn(
                    f"{self.name}: item {i} is another each time it is read; in memory it stays what it was the first "
                    "time, in_memory=False draws anew"
                )
                break
        return ImageTensors(images, labels)


def _what(value: Any) -> str:
    """A value that is refused, in few words."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a dict with the keys {', '.join(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int | float | str | Tensor | np.generic):
        return f"{type(value).__name__} {str(value)[:40]}"
    return type(value).__name__
