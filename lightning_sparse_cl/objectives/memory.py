"""Exemplar memory filled by reservoir sampling (Vitter, 1985), as in ER and DER++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Exemplars(NamedTuple):
    """A draw from a memory: stored images, labels (m,), and logits (m, num_classes) if they are kept."""

    images: Tensor
    labels: Tensor
    logits: Tensor | None


class ReservoirMemory(nn.Module):
    """A uniform sample of all samples ever presented, in preallocated tensors on the training device.

    Images are kept as stored in the data set: un-augmented, as a rule uint8, a quarter of float's size. Every
    presentation counts, so that over several epochs the memory may hold an image more than once, as in the released
    DER++ code. What is inserted depends on ``seed`` and on the number of samples seen only, not on a global generator:
    the memory is the same on every process that sees the same samples, and on a resumed run.

    Args:
        size: number of exemplars M.

    Raises:
        ValueError: if ``size`` is not positive.
    """

    images: Tensor
    labels: Tensor
    tasks: Tensor
    logits: Tensor | None

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"ReservoirMemory(size={size}): a memory holds at least one exemplar")
        self.size = size
        self.seen = 0
        """Samples presented so far."""
        self.seed = 0

    def build(
        self, input_shape: Sequence[int], num_classes: int | None, seed: int, dtype: torch.dtype = torch.uint8
    ) -> None:
        """Allocate for images of a shape and type as stored; ``num_classes`` None keeps no logits."""
        self.seed = seed
        self.register_buffer("images", torch.zeros(self.size, *input_shape, dtype=dtype))
        self.register_buffer("labels", torch.zeros(self.size, dtype=torch.long))
        self.register_buffer("tasks", torch.zeros(self.size, dtype=torch.long))
        self.register_buffer("logits", None if num_classes is None else torch.zeros(self.size, num_classes))

    def __len__(self) -> int:
        return min(self.seen, self.size)

    def slots(self, count: int) -> tuple[Tensor, Tensor]:
        """Where the next ``count`` samples go: distinct slots (s,), and which sample goes into each (s,).

        The n-th sample ever seen (from 0) takes slot n while there is room, and else replaces each slot with
        probability 1 / (n + 1). Of two samples for one slot the later wins, as if inserted one by one.
        """
        n = torch.arange(self.seen, self.seen + count)
        generator = torch.Generator().manual_seed((self.seed + self.seen * 0x9E3779B97F4A7C15) % 2**63)
        slot = (torch.rand(count, generator=generator, dtype=torch.float64) * (n + 1)).long()
        if self.seen < self.size:
            slot = torch.where(n < self.size, n, slot)
        rows = (slot < self.size).nonzero().squeeze(1)
        if len(rows) > 1:
            same = slot[rows] == slot[rows, None]
            rows = rows[~same.triu(1).any(1)]
        return slot[rows], rows

    @torch.no_grad()
    def add(self, images: Tensor, labels: Tensor, task: int, logits: Tensor | None = None) -> None:
        """Present a batch: stored images (B, C, H, W), labels (B,), logits (B, num_classes)."""
        slots, rows = self.slots(len(labels))
        self.seen += len(labels)
        if not len(slots):
            return
        slots, rows = (i.to(self.labels.device, non_blocking=True) for i in (slots, rows))
        self.images[slots] = images[rows]
        self.labels[slots] = labels[rows]
        self.tasks[slots] = task
        if self.logits is not None and logits is not None:
            self.logits[slots] = logits[rows].to(self.logits.dtype)

    def draw(self, count: int, times: int = 1) -> Exemplars:
        """``count`` exemplars without repetition, or all there are; ``times`` draws in a row."""
        if count < len(self):
            at = torch.cat([torch.randperm(len(self), device=self.labels.device)[:count] for _ in range(times)])
        else:
            at = torch.arange(len(self), device=self.labels.device).repeat(times)
        logits = None if self.logits is None else self.logits[at]
        return Exemplars(self.images.index_select(0, at), self.labels[at], logits)

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen, "seed": self.seed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen, self.seed = state["seen"], state["seed"]
