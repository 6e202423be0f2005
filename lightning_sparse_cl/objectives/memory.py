"""Memories of exemplars: a reservoir (Vitter, 1985), as in ER and DER++, and equal shares per class or task."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_sparse_cl.nests import Nest, each, filled, gathered, named, rows


class Exemplars(NamedTuple):
    """Samples, labels (m, ...), tasks (m,), and logits (m, num_classes) if they are kept."""

    inputs: Nest
    labels: Tensor
    tasks: Tensor
    logits: Tensor | None = None

    def at(self, places: Tensor | slice) -> Exemplars:
        """The exemplars at indices (n,), or in a slice."""
        logits = None if self.logits is None else self.logits[places]
        return Exemplars(rows(self.inputs, places), self.labels[places], self.tasks[places], logits)


class ExemplarMemory(nn.Module):
    """Exemplars in preallocated tensors on the training device: the same ones on every process.

    Samples are kept as stored in the data set: not augmented, and images usually as uint8, a quarter of float's size.

    Args:
        size: number of exemplars M.

    Raises:
        ValueError: if ``size`` is not positive.
    """

    labels: Tensor
    tasks: Tensor
    logits: Tensor | None

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"{type(self).__name__}(size={size}): a memory holds at least one exemplar")
        self.size = size
        self.seed = 0

    def build(self, layout: Nest, num_classes: int | None, seed: int, labels: Tensor | None = None) -> None:
        """Allocate.

        Args:
            layout: a batch of no samples, as they are stored.
            num_classes: length of the logits. If None, none are kept.
            seed: seed of random draws.
            labels: the labels of a batch of no samples, as they are stored. If None, they are classes.
        """
        labels = torch.zeros(0, dtype=torch.long) if labels is None else labels
        self.seed, self._layout = seed, layout
        for name, tensor in named(layout).items():
            self.register_buffer(_buffer(name), tensor.new_zeros(self.size, *tensor.shape[1:]))
        self.register_buffer("labels", labels.new_zeros(self.size, *labels.shape[1:]))
        self.register_buffer("tasks", torch.zeros(self.size, dtype=torch.long))
        self.register_buffer("logits", None if num_classes is None else torch.zeros(self.size, num_classes))

    @property
    def inputs(self) -> Nest:
        """The samples, and room for more: a batch of ``size``."""
        held: dict[str, Any] = self._buffers
        return filled(self._layout, [held[_buffer(name)] for name in named(self._layout)])

    def __len__(self) -> int:
        raise NotImplementedError

    def draw(self, count: int, times: int = 1) -> Exemplars:
        """``count`` exemplars without repetition, or all there are; ``times`` draws in a row."""
        at = torch.cat([self._places(count) for _ in range(times)])
        logits = None if self.logits is None else self.logits[at]
        return Exemplars(gathered(self.inputs, at), self.labels[at], self.tasks[at], logits)

    def _places(self, count: int) -> Tensor:
        """The places of the exemplars of a draw."""
        if count < len(self):
            return torch.randperm(len(self), device=self.labels.device)[:count]
        return torch.arange(len(self), device=self.labels.device)

    def contents(self) -> Exemplars:
        """All exemplars, in the order of their places; views of the memory."""
        return Exemplars(self.inputs, self.labels, self.tasks, self.logits).at(slice(len(self)))


class ReservoirMemory(ExemplarMemory):
    """A uniform sample of all samples ever presented.

    Every presentation counts, so that over several epochs the memory may hold a sample more than once, as in the
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

        The n-th sample ever seen (from 0) takes slot n while there is room, and otherwise replaces each slot with
        probability 1 / (n + 1). If two samples fall on one slot, the later wins, as if inserted one by one.
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
        """The generator of the next batch's random numbers."""
        return torch.Generator().manual_seed((self.seed + self.seen * 0x9E3779B97F4A7C15) % 2**63)

    @torch.no_grad()
    def add(self, inputs: Nest, labels: Tensor, task: int, logits: Tensor | None = None) -> None:
        """Present a batch of B samples as stored, with labels (B,) and logits (B, num_classes)."""
        slots, chosen = self.slots(len(labels))
        self.seen += len(labels)
        if not len(slots):
            return
        slots, chosen = (i.to(self.labels.device, non_blocking=True) for i in (slots, chosen))
        each(lambda held, new: held.index_copy_(0, slots, new[chosen]), self.inputs, inputs)
        self.labels[slots] = labels[chosen].to(self.labels.dtype)
        self.tasks[slots] = task
        if self.logits is not None and logits is not None:
            self.logits[slots] = logits[chosen].to(self.logits.dtype)

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen, "seed": self.seed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen, self.seed = state["seen"], state["seed"]


class BalancedMemory(ExemplarMemory):
    """Equal shares of all classes, or of all tasks, seen so far: M/G for each of G groups, and the rest one by one.

    A group's exemplars are kept in an order of preference, and as groups are added the last ones of each are dropped. A
    group with fewer samples than its share leaves places free. It is filled at task ends.

    Args:
        size: number of exemplars M.
        by: what has equal shares.
    """

    def __init__(self, size: int, by: Literal["class", "task"]) -> None:
        super().__init__(size)
        self.by = by
        self.stored = 0
        """Exemplars held."""

    def __len__(self) -> int:
        return self.stored

    def room_for(self, groups: int, owner: object) -> None:
        """Raise ValueError, naming ``owner``, unless each of ``groups`` groups can have an exemplar."""
        if self.size < groups:
            raise ValueError(
                f"{type(owner).__name__}(memory={self.size}): at least one exemplar per {self.by}, and there are "
                f"{groups}; use a larger memory"
            )

    @torch.no_grad()
    def fill(self, candidates: Exemplars) -> None:
        """Replace what is held by the first candidates of each group, as many as it has room for.

        Raises:
            ValueError: if there are more groups than places, or the memory keeps logits and the candidates have none.
        """
        if self.logits is not None and candidates.logits is None:
            raise ValueError(f"{type(self).__name__}: this memory keeps logits, but the candidates have none")
        groups, group = (candidates.labels if self.by == "class" else candidates.tasks).unique(return_inverse=True)
        self.room_for(len(groups), self)
        counts, order = group.bincount(), group.argsort(stable=True)
        place = torch.empty_like(group)  # within its group, by preference
        place[order] = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group[order]]
        share = self.size // len(groups) + (torch.arange(len(groups), device=group.device) < self.size % len(groups))
        kept = (place < share[group]).nonzero().squeeze(1)
        self.stored = len(kept)
        candidates = candidates.at(kept)
        each(lambda held, offered: held.copy_(offered), self.contents().inputs, candidates.inputs)
        for held, offered in zip(self.contents()[1:], candidates[1:], strict=True):
            if held is not None and offered is not None:
                held.copy_(offered)

    def admit(self, inputs: Nest, labels: Tensor, task: int, logits: Tensor | None = None) -> None:
        """:meth:`fill` with what is held and then these: n samples as stored, labels (n,), logits (n, num_classes)."""

        def both(old: Tensor, new: Tensor) -> Tensor:
            return torch.cat([old, new.to(old)])

        held, tasks = self.contents(), torch.full((len(labels),), task, device=labels.device)
        all_logits = None if held.logits is None or logits is None else both(held.logits, logits)
        self.fill(
            Exemplars(each(both, held.inputs, inputs), both(held.labels, labels), both(held.tasks, tasks), all_logits)
        )

    def get_extra_state(self) -> dict[str, int]:
        return {"stored": self.stored, "seed": self.seed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.stored, self.seed = state["stored"], state["seed"]


def _buffer(name: str) -> str:
    """The name of the buffer that holds a tensor of the samples; names of buffers have no dots."""
    return "/".join(["samples", *name.split(".")] if name else ["samples"])
