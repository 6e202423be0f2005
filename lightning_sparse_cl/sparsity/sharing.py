"""What several masks of one weight have in common, counted on their bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sparse_cl.sparsity.bits import PLACES

ENTRIES = 2**22
"""Of all masks together that are unpacked at a time."""


class Sharing(NamedTuple):
    """Numbers of entries, of T masks."""

    both: Tensor
    """(T, T): how many entries two masks have in common; on the diagonal how many one has."""
    used: Tensor
    """(T,): how many the first masks have together, up to each."""


def sharing(masks: Sequence[Tensor]) -> Sharing:
    """Count what masks share.

    Args:
        masks: T of one weight, at least one, eight entries a byte, as :func:`~lightning_sparse_cl.sparsity.bits.pack`
            makes them.

    Returns:
        The counts, on the CPU.
    """
    device, tasks = masks[0].device, len(masks)
    both, used = torch.zeros(tasks, tasks, dtype=torch.long), torch.zeros(tasks, dtype=torch.long)
    for part in torch.stack([m.to(device) for m in masks]).split(max(ENTRIES // (8 * tasks), 1), 1):
        bits = (part[:, :, None] & PLACES.to(device)).ne(0).flatten(1).float()
        both += (bits @ bits.T).long().cpu()  # whole numbers below 2**24: exact
        used += bits.cummax(0).values.sum(1).long().cpu()
    return Sharing(both, used)
