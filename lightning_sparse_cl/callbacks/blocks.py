"""Blocks of neighbouring tasks, for tables and pictures that have no room for every task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

Value = float | None
"""A figure, or None where it is not defined; nan means the same."""


def blocks(count: int, most: int) -> list[range]:
    """``count`` indices in at most ``most`` neighbouring blocks of equal size; the last block may be smaller."""
    size = max(1, -(-count // most))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def labels(count: int, most: int) -> list[str]:
    """Names of the blocks, counted from 1: "3", or "3-4"."""
    return [f"{b[0] + 1}-{b[-1] + 1}" if len(b) > 1 else str(b[0] + 1) for b in blocks(count, most)]


def mean(values: Iterable[Value]) -> Value:
    """Mean of the values that are defined, or None if there are none."""
    defined = [v for v in values if v is not None and v == v]
    return fmean(defined) if defined else None


def means(values: Sequence[Value], most: int) -> list[Value]:
    """Mean of each block."""
    return [mean(values[i] for i in block) for block in blocks(len(values), most)]


def ends(count: int, most: int) -> list[int]:
    """The last index of each block."""
    return [block[-1] for block in blocks(count, most)]
