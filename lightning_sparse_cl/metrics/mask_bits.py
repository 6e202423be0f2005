"""What the masks of all tasks take to store: the entropy that no code can beat, and an actual code."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

GROUP = 32
"""How many tasks' masks at a time are one symbol."""
LENGTH = 8
"""Bits in the table for the length of a symbol's code."""


def mask_bits(masks: Iterable[Tensor]) -> dict[str, float]:
    """Bits per weight that the masks of T tasks take together.

    Each weight has one bit per task; these T bits are one symbol, so that masks that share much take little. EsaCL's eq
    6.24 and WSN's tables assume a factor gamma of compression instead.

    Args:
        masks: T boolean masks (n,) or of any one shape, one per task. More than 32 tasks are taken 32 at a time.

    Returns:
        ``plain``, T; ``entropy``, that of the symbols as they occur; ``coded``, a Huffman code's with its table, or T
        where that takes more. (With few weights and many tasks, nearly every symbol is a different one, and the table
        takes nearly all of the bits.)
    """
    entropy = coded = 0.0
    tasks, symbols = 0, torch.zeros(0, dtype=torch.long)
    for tasks, mask in enumerate(masks, 1):
        at = (tasks - 1) % GROUP
        if not at:
            entropy, coded = entropy + _entropy(symbols), coded + _coded(symbols, GROUP)
            symbols = torch.zeros(mask.numel(), dtype=torch.long)
        symbols |= mask.reshape(-1).cpu().long() << at
    last = (tasks - 1) % GROUP + 1 if tasks else 0
    return {"plain": float(tasks), "entropy": entropy + _entropy(symbols), "coded": coded + _coded(symbols, last)}


def _entropy(symbols: Tensor) -> float:
    counts, n = symbols.unique(return_counts=True)[1].tolist(), max(symbols.numel(), 1)
    return sum(c * math.log2(n / c) for c in counts) / n


def _coded(symbols: Tensor, tasks: int) -> float:
    counts = symbols.unique(return_counts=True)[1].tolist()
    return min(tasks, (huffman_bits(counts) + len(counts) * (tasks + LENGTH)) / max(symbols.numel(), 1))


def huffman_bits(counts: Sequence[int]) -> int:
    """Bits that a Huffman code takes for symbols with these counts; one bit each if there is only one symbol."""
    if len(counts) < 2:
        return sum(counts)
    heap, total = list(counts), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return total
