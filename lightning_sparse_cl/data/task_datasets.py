"""Torch data sets of your own as a task sequence, in memory or read item by item."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.data.loader import ImageTensors, length


class TaskDatasets(TaskDataModule):
    """A sequence of torch data sets of your own, one a task. Their labels are used as they are.

    Items are (image, label); images are PIL images, or tensors (C, H, W), uint8 in 0-255 or float.

    Args:
        train, test: one data set a task.
        in_memory: read them once into tensors; else they are read item by item, for which ``num_workers`` helps.
        kwargs: see :class:`TaskDataModule`.
    """

    def __init__(
        self, train: Sequence[Dataset], test: Sequence[Dataset], in_memory: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if len(train) != len(test) or not train:
            raise ValueError(
                f"TaskDatasets: one training and one test set a task, got {len(train)} training, {len(test)} test sets"
            )
        self.given = {"train": train, "test": test}
        self.in_memory = in_memory

    def load(self) -> tuple[Sequence[Dataset], Sequence[Dataset]]:
        train, test = (
            [_Items(data, f"TaskDatasets({part}[{t}])") for t, data in enumerate(sets)]
            for part, sets in self.given.items()
        )
        if self.in_memory:
            return [items.gather() for items in train], [items.gather() for items in test]
        return train, test


class _Items(Dataset):
    """Any data set, with images as tensors (C, H, W)."""

    def __init__(self, data: Dataset, name: str) -> None:
        if not length(data):
            raise ValueError(f"{name}: the data set is empty")
        self.data, self.name = data, name

    def __len__(self) -> int:
        return length(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= len(self):  # ends an iteration, which not every data set does by itself
            raise IndexError(index)
        image, label = self.data[index]
        if hasattr(image, "getbands"):  # a PIL image
            pixels = np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
            image = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
        known = isinstance(image, Tensor) and (image.dtype == torch.uint8 or image.is_floating_point())
        if not known or image.ndim != 3:
            got = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(
                f"{self.name}: images are PIL images or (C, H, W) tensors, uint8 or float; item {index} is {got}"
            )
        return image, int(label)

    @cached_property
    def targets(self) -> Tensor:
        """Labels (N,), without decoding the images if the data set lists them."""
        data, at = self.data, None
        if isinstance(data, Subset):
            at = torch.as_tensor(data.indices)
            data = data.dataset
        if hasattr(data, "targets") and getattr(data, "target_transform", None) is None:
            targets = torch.as_tensor(data.targets)
            return targets if at is None else targets[at]
        return torch.tensor([self[i][1] for i in range(len(self))])

    def gather(self) -> ImageTensors:
        """The whole set in memory."""
        if isinstance(self.data, ImageTensors):
            return self.data
        first, _ = self[0]
        images, labels = first.new_empty(len(self), *first.shape), torch.empty(len(self), dtype=torch.long)
        for i in range(len(self)):
            image, labels[i] = self[i]
            if image.shape != first.shape or image.dtype != first.dtype:
                raise ValueError(
                    f"{self.name}: item {i} is {image.dtype} {tuple(image.shape)}, item 0 {first.dtype} "
                    f"{tuple(first.shape)}; all must be equal"
                )
            images[i] = image
        return ImageTensors(images, labels)
