"""Data sets that are read item by item, with every item checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from lightning_sparse_cl.data.labels import listed_labels, whole, whole_labels
from lightning_sparse_cl.data.loader import SampleTensors, length
from lightning_sparse_cl.data.pictures import pixels
from lightning_sparse_cl.nests import Nest, as_nest, each, ordered, refuse_other_kind, rows, tensors


class Items(Dataset):
    """Any data set of pairs (sample, label), with samples as tensors or nests, all alike, and labels as integers.

    A sample is a PIL image, see :func:`~lightning_sparse_cl.data.pictures.eight_bits`, a tensor, an array of numbers, a
    number, or a dict, tuple or list of these. Labels are whole numbers of any type.

    Args:
        data: has a length, and items by index.
        name: for errors.
        transform: makes of each sample what is checked and given. If None, it stays as it is.

    Raises:
        ValueError: at once if the data set is empty or has no length; with each item that is something else, not
            finite, unlike item 0, or not what the data set lists in ``.targets``.
    """

    def __init__(self, data: Dataset, name: str, transform: Callable[[Any], Any] | None = None) -> None:
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise ValueError(
                f"{name}: a data set has a length, and items by index; {type(data).__name__} does not, read it into one"
            )
        if not length(data):
            raise ValueError(f"{name}: the data set is empty")
        self.data, self.name, self.transform = data, name, transform
        self.numbers: dict[int, int] | None = None
        """The label inside of each label of the data set. If None, they are the same."""

    def renumbered(self, numbers: dict[int, int]) -> Items:
        """The same items with other labels."""
        twin = copy.copy(self)
        twin.numbers = numbers
        return twin

    def __len__(self) -> int:
        return length(self.data)

    def __getitem__(self, index: int) -> tuple[Nest, int]:
        if index >= len(self):  # ends an iteration, which not every data set does by itself
            raise IndexError(index)
        sample, label = self._read(index)
        if label != (known := int(self._found[index])):
            source = "the data set's list of labels (.targets) has" if self._listed is not None else "it once had"
            raise ValueError(f"{self.name}: item {index} has the label {label}, but {source} {known}")
        return sample, label if self.numbers is None else self.numbers[label]

    @cached_property
    def first(self) -> Nest:
        """The sample of item 0; all others have its keys, shapes and types."""
        return self._pair(0)[0]

    @property
    def targets(self) -> Tensor:
        """Labels (N,), without reading the samples if the data set lists them."""
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

    def _read(self, index: int) -> tuple[Nest, int]:
        sample, label = self._pair(index)
        if index:
            refuse_other_kind(f"{self.name}: tensors of item {index}", sample, "those of item 0", self.first)
        return sample, label

    def _pair(self, index: int) -> tuple[Nest, int]:
        item = self.data[index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ValueError(f"{self.name}: items are pairs (sample, label); item {index} is {_what(item)}")
        value = item[0] if self.transform is None else self.transform(item[0])
        sample, label = self._sample(index, value), whole(item[1])
        if label is None:
            raise ValueError(
                f"{self.name}: labels are whole numbers, one for each sample; that of item {index} is {_what(item[1])}"
            )
        return sample, label

    def _sample(self, index: int, value: Any) -> Nest:
        if hasattr(value, "getbands"):  # a PIL image
            try:
                return pixels(value)
            except Exception as error:  # the file of an image may be read only now, and be broken in any way
                raise ValueError(f"{self.name}: cannot take the image of item {index}: {error}") from error
        if isinstance(value, Mapping):
            return {key: self._sample(index, value[key]) for key in ordered(value, f"{self.name}: item {index}")}
        if isinstance(value, tuple | list) and not all(isinstance(part, int | float) for part in value):
            return tuple(self._sample(index, part) for part in value)
        if isinstance(value, np.ndarray):
            value = value.copy()  # it may be read-only
        try:
            tensor: Tensor = as_nest(value, "")
        except ValueError:
            raise ValueError(
                f"{self.name}: samples are images, tensors, arrays, numbers, or dicts, tuples and lists of them; item "
                f"{index} is or has {_what(value)}"
            ) from None
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{self.name}: the sample of item {index} has values that are NaN or infinite")
        return tensor.detach()

    def gather(self) -> SampleTensors:
        """The whole set in memory."""
        if isinstance(self.data, SampleTensors) and self.transform is None:
            return self.data
        inputs = each(lambda tensor: tensor.new_empty(len(self), *tensor.shape), self.first)
        labels = torch.empty(len(self), dtype=torch.long)
        for i in range(len(self)):
            sample, labels[i] = self._read(i)
            each(Tensor.copy_, rows(inputs, i), sample)
        if self._listed is not None and len(wrong := (labels != self._listed).nonzero()):
            i = int(wrong[0])
            rank_zero_warn(
                f"{self.name}: item {i} has the label {int(labels[i])}, but the data set's list of labels (.targets) "
                f"has {int(self._listed[i])}; in memory the items count"
            )
        for i in range(0, len(self), -(-len(self) // 8)):  # eight, evenly spaced
            if not all(map(torch.equal, tensors(self._read(i)[0]), tensors(rows(inputs, i)))):
                rank_zero_warn(
                    f"{self.name}: item {i} is another each time it is read; in memory it stays what it was the first "
                    "time, in_memory=False draws anew"
                )
                break
        return SampleTensors(inputs, labels)


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
