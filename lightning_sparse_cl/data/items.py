"""Data sets that are read item by item, each of which is checked."""

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
from lightning_sparse_cl.data.targets import KINDS, Target
from lightning_sparse_cl.nests import Nest, as_nest, each, ordered, refuse_other_kind, rows, tensors


class Items(Dataset):
    """Any data set of pairs (sample, label), with samples as tensors or nests, all alike, and labels of one target.

    A sample is a PIL image, see :func:`~lightning_sparse_cl.data.pictures.eight_bits`, a tensor, an array of numbers, a
    number, or a dict, tuple or list of these. Labels of classes are whole numbers of any type; those of other targets
    are tensors, arrays, lists, or PIL images of classes. All labels are read when tasks are made, and held in memory.

    Args:
        data: a data set with a length, and items by index.
        name: for errors.
        transform: applied to each sample before it is checked. If None, samples stay as they are.
        target: what labels are.

    Raises:
        ValueError: at once if the data set is empty or has no length; on reading an item that is something else, not
            finite, unlike item 0, or not what the data set lists in ``.targets``.
    """

    def __init__(
        self,
        data: Dataset,
        name: str,
        transform: Callable[[Any], Any] | None = None,
        target: Target = KINDS["classes"],
    ) -> None:
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise ValueError(
                f"{name}: a data set has a length, and items by index; {type(data).__name__} has not; read it into one"
            )
        if not length(data):
            raise ValueError(f"{name}: the data set is empty")
        self.data, self.name, self.transform, self.target = data, name, transform, target
        self.numbers: dict[int, int] | None = None
        """The label that stands for each label of the data set. If None, they are the same."""

    def renumbered(self, numbers: dict[int, int]) -> Items:
        """The same items with other labels."""
        twin = copy.copy(self)
        twin.numbers = numbers
        return twin

    def __len__(self) -> int:
        return length(self.data)

    def __getitem__(self, index: int) -> tuple[Nest, int | Tensor]:
        if index >= len(self):  # ends an iteration, which some data sets do not do themselves
            raise IndexError(index)
        sample, label = self._read(index)
        if isinstance(label, Tensor):
            if not torch.equal(stored := self.target.labels(label[None], self.name)[0], self._found[index]):
                raise ValueError(f"{self.name}: item {index} has another label each time it is read")
            return sample, stored
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
        """Labels (N, ...); if the data set lists them, no samples are read."""
        if self.numbers is None:
            return self._found
        return torch.tensor([self.numbers[label] for label in self._found.tolist()])

    @cached_property
    def _listed(self) -> Tensor | None:
        labels = listed_labels(self.data) if self.target is KINDS["classes"] else None
        if labels is not None and len(labels) != len(self):
            raise ValueError(f"{self.name}: .targets lists {len(labels)} labels for {len(self)} items")
        return None if labels is None else whole_labels(labels, self.name)

    @cached_property
    def _found(self) -> Tensor:
        if self._listed is not None:
            return self._listed
        return self._stored([self._read(i)[1] for i in range(len(self))])

    def _stored(self, labels: list[int | Tensor]) -> Tensor:
        """Labels (N, ...) in the target's form."""
        if self.target is KINDS["classes"]:
            return torch.tensor(labels)
        parts = [torch.as_tensor(label) for label in labels]
        if odd := next((i for i, part in enumerate(parts) if part.shape != parts[0].shape), 0):
            shapes = [tuple(parts[i].shape) for i in (odd, 0)]
            raise ValueError(f"{self.name}: the label of item {odd} is {shapes[0]}, that of item 0 {shapes[1]}")
        return self.target.labels(torch.stack(parts), self.name)

    def _read(self, index: int) -> tuple[Nest, int | Tensor]:
        sample, label = self._pair(index)
        if index:
            try:
                refuse_other_kind(f"{self.name}: tensors of item {index}", sample, "those of item 0", self.first)
            except ValueError as error:
                raise ValueError(f"{error}; item_transform=... makes them so") from None
        return sample, label

    def _pair(self, index: int) -> tuple[Nest, int | Tensor]:
        item = self.data[index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ValueError(f"{self.name}: items are pairs (sample, label); item {index} is {_what(item)}")
        value = item[0] if self.transform is None else self.transform(item[0])
        return self._sample(index, value), self._label(index, item[1])

    def _label(self, index: int, value: Any) -> int | Tensor:
        if self.target is KINDS["classes"]:
            if (label := whole(value)) is not None:
                return label
            expected = "whole numbers, one for each sample"
        else:
            expected = self.target.expected
            try:
                return torch.as_tensor(np.array(value) if hasattr(value, "getbands") else value).detach()
            except (TypeError, ValueError, RuntimeError):  # a name, for example
                pass
        raise ValueError(f"{self.name}: labels are {expected}; that of item {index} is {_what(value)}")

    def _sample(self, index: int, value: Any) -> Nest:
        if hasattr(value, "getbands"):  # a PIL image
            try:
                return pixels(value)
            except Exception as error:  # an image's file may be read only now, and broken in any way
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
        found: list[int | Tensor] = []
        for i in range(len(self)):
            sample, label = self._read(i)
            each(Tensor.copy_, rows(inputs, i), sample)
            found.append(label)
        labels = self._stored(found)
        if self._listed is not None and len(wrong := (labels != self._listed).nonzero()):
            i = int(wrong[0])
            rank_zero_warn(
                f"{self.name}: item {i} has the label {int(labels[i])}, but the data set's list of labels (.targets) "
                f"has {int(self._listed[i])}; in memory the items count"
            )
        for i in range(0, len(self), -(-len(self) // 8)):  # eight, evenly spaced
            if not all(map(torch.equal, tensors(self._read(i)[0]), tensors(rows(inputs, i)))):
                rank_zero_warn(
                    f"{self.name}: item {i} differs each time it is read; in memory it stays as it was the first "
                    "time, in_memory=False draws anew"
                )
                break
        return SampleTensors(inputs, labels, self.target)


def _what(value: Any) -> str:
    """A value that is refused, in a few words."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a dict with the keys {', '.join(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int | float | str | Tensor | np.generic):
        return f"{type(value).__name__} {str(value)[:40]}"
    return type(value).__name__
