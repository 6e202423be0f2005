"""What a trained network has to know of its data: what images were made into, and what the classes are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lightning_sparse_cl.data.augment import ImageTransform


@dataclass(frozen=True)
class DataDescription:
    """What is known of the data that a module was trained on; in primitives, so that a checkpoint holds it.

    Args:
        input_shape: of a stored image, (C, H, W).
        dtype: of stored images: uint8 in 0-255, or a float type.
        mean, std: per channel, on the scale 0-1: the normalisation of uint8 images. If None, the data had a transform
            of their own, which is not known here.
        size: side in pixels that image files were resized to. If None, images had their size before.
        class_names: name of each label.
        classes: labels of each task.
    """

    input_shape: tuple[int, ...]
    dtype: torch.dtype
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    size: int | None
    class_names: tuple[str, ...]
    classes: tuple[tuple[int, ...], ...]

    def transform(self) -> ImageTransform | None:
        """From stored images to network input. If the data had one of their own, None."""
        return None if self.mean is None or self.std is None else ImageTransform(self.mean, self.std)

    def task_of(self, label: int) -> int | None:
        """The task that has a class, counted from 0. If several tasks have it, None."""
        found = [task for task, labels in enumerate(self.classes) if label in labels]
        return found[0] if len(found) == 1 else None

    def names_of_tasks(self) -> list[list[str]]:
        """The names of each task's classes."""
        return [[self.class_names[label] for label in labels] for labels in self.classes]

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> DataDescription:
        """What :meth:`to_dict` gave."""
        return cls(**found)
