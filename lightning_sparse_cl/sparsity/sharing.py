"""What several masks of one weight have in common, counted on their bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sparse_cl.sparsity.bits import PLACES

ENTRIES = 2**22
"""How many entries of all masks together are unpacked at a time."""


class Sharing(NamedTuple):
    """Counts of entries in T masks."""

    both: Tensor
    """(T, T): how many entries two masks have in common; on the diagonal how many one has."""
    used: Tensor
    """(T,): how many entries the masks up to each one have together."""


def sharing(masks: Sequence[Tensor]) -> Sharing:
    """Count what masks share.

    Args:
        masks: T >= 1 masks of one weight, eight entries per byte, as :func:`~lightning_sparse_cl.sparsity.bits.pack`
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
