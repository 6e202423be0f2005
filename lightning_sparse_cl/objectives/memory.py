"""Memories of exemplars: a reservoir (Vitter, 1985), as in ER and DER++, and equal shares a class or task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn


class Exemplars(NamedTuple):
    """Stored images, labels (m,), tasks (m,), and logits (m, num_classes) if they are kept."""

    images: Tensor
    labels: Tensor
    tasks: Tensor
    logits: Tensor | None = None

    def at(self, rows: Tensor) -> Exemplars:
        """Those at the indices ``rows`` (n,)."""
        logits = None if self.logits is None else self.logits[rows]
        return Exemplars(self.images[rows], self.labels[rows], self.tasks[rows], logits)


class ExemplarMemory(nn.Module):
    """Exemplars in preallocated tensors on the training device: the same ones on every process.

    Images are kept as stored in the data set: un-augmented, as a rule uint8, a quarter of float's size.

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
            raise ValueError(f"{type(self).__name__}(size={size}): a memory holds at least one exemplar")
        self.size = size
        self.seed = 0

    def build(
        self, input_shape: Sequence[int], num_classes: int | None, seed: int, dtype: torch.dtype = torch.uint8
    ) -> None:
        """Allocate for images of a shape and type as stored; if ``num_classes`` is None, no logits are kept."""
        self.seed = seed
        self.register_buffer("images", torch.zeros(self.size, *input_shape, dtype=dtype))
        self.register_buffer("labels", torch.zeros(self.size, dtype=torch.long))
        self.register_buffer("tasks", torch.zeros(self.size, dtype=torch.long))
        self.register_buffer("logits", None if num_classes is None else torch.zeros(self.size, num_classes))

    def __len__(self) -> int:
        raise NotImplementedError

    def draw(self, count: int, times: int = 1) -> Exemplars:
        """``count`` exemplars without repetition, or all there are; ``times`` draws in a row."""
        at = torch.cat([self._places(count) for _ in range(times)])
        logits = None if self.logits is None else self.logits[at]
        return Exemplars(self.images.index_select(0, at), self.labels[at], self.tasks[at], logits)

    def _places(self, count: int) -> Tensor:
        """Where the exemplars of a draw lie."""
        if count < len(self):
            return torch.randperm(len(self), device=self.labels.device)[:count]
        return torch.arange(len(self), device=self.labels.device)

    def contents(self) -> Exemplars:
        """All exemplars, in the order in which they lie; views of the memory."""
        n = len(self)
        logits = None if self.logits is None else self.logits[:n]
        return Exemplars(self.images[:n], self.labels[:n], self.tasks[:n], logits)


class ReservoirMemory(ExemplarMemory):
    """A uniform sample of all samples ever presented.

    Every presentation counts, so that over several epochs the memory may hold an image more than once, as in the
    released DER++ code. What is inserted depends on ``seed`` and on the number of samples seen only, not on a global
    generator: the memory is the same on every process that sees the same samples, and on a resumed run.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.seen = 0
        """Samples presented so far."""

    def __len__(self) -> int:
        return min(self.seen, self.size)

    def slots(self, count: int) -> tuple[Tensor, Tensor]:
        """Where the next ``count`` samples go: distinct slots (s,), and which sample goes into each (s,).

        The n-th sample ever seen (from 0) takes slot n while there is room, and else replaces each slot with
        probability 1 / (n + 1). Of two samples for one slot the later wins, as if inserted one by one.
        """
        n = torch.arange(self.seen, self.seen + count)
        slot = (torch.rand(count, generator=self._generator(), dtype=torch.float64) * (n + 1)).long()
        if self.seen < self.size:
            slot = torch.where(n < self.size, n, slot)
        rows = (slot < self.size).nonzero().squeeze(1)
        if len(rows) > 1:
            same = slot[rows] == slot[rows, None]
            rows = rows[~same.triu(1).any(1)]
        return slot[rows], rows

    def _generator(self) -> torch.Generator:
        """Of the next batch's random numbers."""
        return torch.Generator().manual_seed((self.seed + self.seen * 0x9E3779B97F4A7C15) % 2**63)

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

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen, "seed": self.seed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen, self.seed = state["seen"], state["seed"]


class BalancedMemory(ExemplarMemory):
    """Equal shares of all classes, or of all tasks, seen so far: of G groups M/G each, the rest one by one.

    A group's exemplars lie in an order of preference, and as groups are added the last ones of each go. A group with
    fewer samples than its share leaves places free. It is filled at task ends.

    Args:
        size: number of exemplars M.
        by: what the shares are of.
    """

    def __init__(self, size: int, by: Literal["class", "task"]) -> None:
        super().__init__(size)
        self.by = by
        self.stored = 0
        """Exemplars held."""

    def __len__(self) -> int:
        return self.stored

    def room_for(self, groups: int, owner: object) -> None:
        """Raises ValueError, in the name of ``owner``, unless each of so many groups can have an exemplar."""
        if self.size < groups:
            raise ValueError(
                f"{type(owner).__name__}(memory={self.size}): one exemplar a {self.by} at least, and there are "
                f"{groups}; use a larger memory"
            )

    @torch.no_grad()
    def fill(self, candidates: Exemplars) -> None:
        """Replace what is held by the first candidates of each group, as many as it has room for.

        Raises:
            ValueError: if there are more groups than places, or the memory keeps logits and the candidates have none.
        """
        if self.logits is not None and candidates.logits is None:
            raise ValueError(f"{type(self).__name__}: this memory keeps logits, and the candidates have none")
        groups, group = (candidates.labels if self.by == "class" else candidates.tasks).unique(return_inverse=True)
        self.room_for(len(groups), self)
        counts, order = group.bincount(), group.argsort(stable=True)
        place = torch.empty_like(group)  # within its group, by preference
        place[order] = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group[order]]
        share = self.size // len(groups) + (torch.arange(len(groups), device=group.device) < self.size % len(groups))
        kept = (place < share[group]).nonzero().squeeze(1)
        self.stored = len(kept)
        for held, offered in zip(self.contents(), candidates, strict=True):
            if held is not None and offered is not None:
                held.copy_(offered[kept])

    def admit(self, images: Tensor, labels: Tensor, task: int, logits: Tensor | None = None) -> None:
        """:meth:`fill` with what is held and then these: images as stored (n, C, H, W), labels (n,), logits (n, C)."""

        def joined(old: Tensor, new: Tensor) -> Tensor:
            return torch.cat([old, new.to(old)])

        held, tasks = self.contents(), torch.full_like(labels, task)
        all_logits = None if held.logits is None or logits is None else joined(held.logits, logits)
        self.fill(
            Exemplars(joined(held.images, images), joined(held.labels, labels), joined(held.tasks, tasks), all_logits)
        )

    def get_extra_state(self) -> dict[str, int]:
        return {"stored": self.stored, "seed": self.seed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.stored, self.seed = state["stored"], state["seed"]
