"""Ranking of weights: exactly k of them, always."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_mask(scores: Tensor, k: int, among: Tensor | None = None) -> Tensor:
    """True on the k largest scores; ties are broken by position, so that exactly k are kept.

    Args:
        scores: any shape.
        k: how many to keep; the whole pool if it is smaller.
        among: boolean pool of the same shape to choose from; None is everywhere.

    Returns:
        A boolean mask of the scores' shape.
    """
    flat = scores.detach().reshape(-1)
    pool = None if among is None else among.reshape(-1)
    k = min(k, flat.numel() if pool is None else int(pool.sum()))
    if pool is not None:
        flat = flat.masked_fill(~pool, -torch.inf)
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    if k > 0:
        mask[flat.sort(descending=True, stable=True).indices[:k]] = True
    return mask.view(scores.shape)


def check_sparsity(owner: str, sparsity: float) -> None:
    """Raises ValueError unless ``sparsity`` is a zero fraction, in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"{owner}(sparsity={sparsity}): sparsity is the zero fraction, in [0, 1)")
