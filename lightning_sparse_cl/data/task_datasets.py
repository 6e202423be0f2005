"""Torch data sets of your own as a task sequence, in memory or read item by item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset

from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.data.items import Items
from lightning_sparse_cl.data.named_labels import numbered
from lightning_sparse_cl.data.targets import KINDS, target_of


class TaskDatasets(TaskDataModule):
    """A sequence of torch data sets of your own, one per task.

    Items are pairs (sample, label). Samples are PIL images, tensors or arrays, such as images (C, H, W), uint8 in 0-255
    or float, or dicts, tuples and lists of tensors; all have the same keys, shapes and types. See
    :class:`~lightning_sparse_cl.data.items.Items` for what is refused. Labels are whole numbers from 0 on, with gaps if
    you like, or names: classes are counted over all tasks in ascending order, and ``class_names`` has their labels as
    text.

    Labels of other targets: ``multi_label``, 0 or 1 for each of C labels; ``real_numbers``, one or C numbers;
    ``class_maps``, the class (H, W) of each pixel, or 255 where it does not count, for backbones that give features (B,
    D, H, W). The objective says which targets it takes, and the accuracy matrix has mAP, R² or mIoU.

    Args:
        train, test: one data set per task.
        in_memory: read them once into tensors; otherwise they are read item by item, with ``num_workers`` to help.
        item_transform: applied to each sample when it is read, before it is stored: any callable, such as one that
            resizes images or pads series to one length.
        target: what labels are: ``classes``, ``multi_label``, ``real_numbers`` or ``class_maps``; see
            :mod:`lightning_sparse_cl.data.targets`.
        class_names: what labels 0, 1, ... are called. If None, their names, or else their numbers.
        kwargs: see :class:`TaskDataModule`.
    """

    def __init__(
        self,
        train: Sequence[Dataset],
        test: Sequence[Dataset],
        in_memory: bool = True,
        item_transform: Callable[[Any], Any] | None = None,
        target: str = "classes",
        class_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.target = target_of(target, "TaskDatasets")
        if not all(isinstance(sets, Sequence) for sets in (train, test)):
            kinds = f"{type(train).__name__} and {type(test).__name__}"
            raise ValueError(f"TaskDatasets: train and test are lists of data sets, one per task, got {kinds}")
        if len(train) != len(test) or not train:
            raise ValueError(
                f"TaskDatasets: one training and one test set per task, got {len(train)} training, "
                f"{len(test)} test sets"
            )
        listed = class_names is None or (isinstance(class_names, Sequence) and not isinstance(class_names, str))
        if not listed or (class_names and (len(set(class_names)) < len(class_names) or not _are_texts(class_names))):
            raise ValueError(f"TaskDatasets(class_names={class_names!r}): a list of texts, all different")
        self.given = {"train": train, "test": test}
        self.in_memory, self.item_transform, self.given_names = in_memory, item_transform, class_names

    def load(self) -> tuple[Sequence[Dataset], Sequence[Dataset]]:
        name = type(self).__name__
        every = [data for part in self.given.values() for data in part]
        sets, names = numbered(every) if self.target is KINDS["classes"] else (every, [])
        if names and self.given_names is not None:
            raise ValueError(f"{name}(class_names=...): labels are names already, such as {names[0]!r}")
        self.class_names = names if self.given_names is None else list(self.given_names)
        given = {"train": sets[: len(sets) // 2], "test": sets[len(sets) // 2 :]}
        train, test = (
            [Items(data, f"{name}({part}[{t}])", self.item_transform, self.target) for t, data in enumerate(sets)]
            for part, sets in given.items()
        )
        if self.in_memory:
            return [items.gather() for items in train], [items.gather() for items in test]
        return train, test


def _are_texts(names: Sequence[str]) -> bool:
    return all(isinstance(name, str) for name in names)
