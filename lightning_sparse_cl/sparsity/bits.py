"""Masks as bits, eight per byte; and the bits of any tensor summed up in two numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

PLACES = 2 ** torch.arange(8, dtype=torch.uint8)


def pack(mask: Tensor) -> Tensor:
    """A boolean mask of any shape as bytes (ceil(n / 8),), first element in the lowest bit."""
    bits = nn.functional.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits * PLACES.to(mask.device)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean mask of ``shape`` that :func:`pack` has packed."""
    return (bits[:, None] & PLACES.to(bits.device)).bool().flatten()[: torch.Size(shape).numel()].view(shape)


def digest(tensor: Tensor) -> Tensor:
    """Two whole numbers (2,) that tell whether any bit of a tensor has changed: the sum of its entries' bits, and the
    sum weighted by their places.
    """
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    bits = tensor.detach().reshape(-1).view(whole).long()
    return torch.stack([bits.sum(), (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum()])
