"""Ranking of weights: exactly k of them, always."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def top_k_mask(scores: Tensor, k: int, among: Tensor | None = None) -> Tensor:
    """True on the k largest scores; ties are broken by position, so that exactly k are kept. NaN counts as infinite.

    Args:
        scores: any shape.
        k: how many to keep; the whole pool if it is smaller.
        among: boolean pool of the same shape to choose from. If None, everywhere.

    Returns:
        A boolean mask of the scores' shape.
    """
    flat = scores.detach().reshape(-1)
    flat = flat if flat.is_floating_point() else flat.double()
    at = slice(None) if among is None else among.reshape(-1).nonzero()[:, 0]
    pool = flat[at]
    pool = pool.masked_fill(pool.isnan(), torch.inf)
    k = min(k, len(pool))
    mask = torch.zeros_like(flat, dtype=torch.bool)
    if k > 0:
        least = pool.topk(k, sorted=False).values.min()  # a selection: sorting all of them takes many times as long
        kept = pool > least
        ties = (pool == least).nonzero()[:, 0]
        kept[ties[: k - int(kept.sum())]] = True
        mask[at] = kept
    return mask.view(scores.shape)


def top_k_masks(scores: Mapping[str, Tensor], k: int, among: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """:func:`top_k_mask` of several weights that are ranked together, by name."""
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    pool = None if among is None else torch.cat([among[name].reshape(-1) for name in scores])
    parts = top_k_mask(flat, k, pool).split([s.numel() for s in scores.values()])
    return {name: part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def whole_part(fraction: float, n: int) -> int:
    """int(fraction * n), where a product such as 0.29 * 100 = 28.999... is meant to be whole."""
    return int(fraction * n + 1e-9)


def check_sparsity(owner: str, sparsity: float) -> None:
    """Raise ValueError unless ``sparsity`` is a zero fraction, in [0, 1)."""
    check_number(owner, "sparsity", sparsity)
    if not 0 <= sparsity < 1:
        raise ValueError(f"{owner}(sparsity={sparsity}): sparsity is the zero fraction, in [0, 1)")


def check_number(owner: str, field: str, value: object, whole: bool = False) -> None:
    """Raise ValueError unless ``value`` is a number, or a whole one."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"{owner}({field}={value!r}): {field} is a {'whole ' * whole}number")
