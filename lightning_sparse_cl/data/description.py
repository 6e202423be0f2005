"""What a trained network has to know of its data: how images were prepared, and what the classes are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from lightning_sparse_cl.data.pictures import Fit
from lightning_sparse_cl.data.standardised import Normalisation, normaliser
from lightning_sparse_cl.nests import Nest


@dataclass(frozen=True)
class DataDescription:
    """What is known of the data that a module was trained on; made of primitives, so that a checkpoint can hold it.

    Args:
        layout: a batch of no samples, as they were stored.
        mean, std: the normalisation: per channel of images, on the scale 0-1 if uint8, and of series; per column of
            tables. If None, the data had a transform of their own, which is not known here.
        size: side in pixels that image files were resized to. If None, images were not resized.
        class_names: name of each label.
        classes: labels of each task.
        fit: how image files were resized; see :class:`~lightning_sparse_cl.data.ImageFolderSource`.
        target: the kind of label, a name in :mod:`lightning_sparse_cl.data.targets`.
    """

    layout: Nest = field(compare=False)
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    size: int | None
    class_names: tuple[str, ...]
    classes: tuple[tuple[int, ...], ...]
    target: str = "classes"
    fit: Fit = "squash"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a stored sample that is one tensor."""
        return tuple(self.layout.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Type of a stored sample that is one tensor."""
        return self.layout.dtype

    def transform(self) -> Normalisation | None:
        """From stored samples to network input. None if the data had a transform of their own."""
        return None if self.mean is None or self.std is None else normaliser(self.layout, self.mean, self.std)

    def task_of(self, label: int) -> int | None:
        """The task that has a class, counted from 0. None if several tasks have it."""
        found = [task for task, labels in enumerate(self.classes) if label in labels]
        return found[0] if len(found) == 1 else None

    def names_of_tasks(self) -> list[list[str]]:
        """The names of each task's classes."""
        return [[self.class_names[label] for label in labels] for labels in self.classes]

    def to_dict(self) -> dict[str, Any]:
        """The description as a checkpoint holds it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> DataDescription:
        """The description from what :meth:`to_dict` has returned."""
        return cls(**found)
