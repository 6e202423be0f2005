"""Labels: which values are labels, and where a data set lists them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset


def whole(label: Any) -> int | None:
    """A number, or tensor of one element, as an integer. None if it is not a whole number."""
    if isinstance(label, Tensor):
        label = label.item() if label.numel() == 1 else None
    elif isinstance(label, np.ndarray | np.generic):
        label = label.item() if label.size == 1 else None
    if isinstance(label, int) or (isinstance(label, float) and label.is_integer()):
        return int(label)
    return None


def is_number(name: str) -> bool:
    """Whether the name of a class is a number."""
    return name.isascii() and name.isdigit()


def whole_labels(labels: Tensor, name: str) -> Tensor:
    """The labels (N,) as int64, on their device.

    Raises:
        ValueError: naming ``name``, if one is not a whole number.
    """
    if labels.is_complex():
        raise ValueError(f"{name}: labels are whole numbers, got {labels.dtype}")
    if labels.is_floating_point():
        broken = (~labels.isfinite() | (labels != labels.round())).nonzero()
        if len(broken):
            first = int(broken[0])
            raise ValueError(f"{name}: labels are whole numbers; label {first} is {labels[first].item():g}")
    return labels.detach().long()


def listed_labels(data: Any) -> Tensor | None:
    """The labels (N,) that a torch data set lists in ``.targets``, without decoding an image. None if it lists none.

    They are found through ``Subset`` and ``ConcatDataset``. Labels that a ``target_transform`` changes do not count as
    listed.
    """
    if isinstance(data, Subset):
        inner = listed_labels(data.dataset)
        return None if inner is None else inner[torch.as_tensor(data.indices, dtype=torch.long)]
    if isinstance(data, ConcatDataset):
        parts = [listed_labels(part) for part in data.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if getattr(data, "targets", None) is None or getattr(data, "target_transform", None) is not None:
        return None
    try:
        targets = torch.as_tensor(data.targets)
    except (TypeError, ValueError):  # text, or lists of several lengths
        return None
    return targets.cpu() if targets.ndim == 1 else None
