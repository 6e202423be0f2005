"""A reservoir that is balanced over classes, whatever their order and number in the stream."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sparse_cl.nests import Nest, each
from lightning_sparse_cl.objectives.memory import ReservoirMemory


class ClassBalancedReservoir(ReservoirMemory):
    """Holds a uniform sample of all samples ever presented of each class, in numbers as equal as possible.

    What is held has the distribution that class-balanced reservoir sampling (CBRS, Chrysakis and Moens, 2020) gives,
    by another algorithm, which takes a whole batch at once, without waiting for the device: every sample presented
    draws a random number, and each class keeps those with the lowest. After every batch, with n_c samples of class c
    presented so far, class c holds ``min(n_c, share)`` of them; the share is the same for all classes, and the largest
    that fits; the places left over go to the first classes, one to each. So the counts of any two classes differ by at
    most one, unless a class has had fewer samples, all of which are then held. (CBRS gives the places left over to
    classes at random.)

    What is held depends on ``seed``, on the samples and on the batches in which they were presented; it is the same on
    every process and on a resumed run.

    Args:
        size: largest number of exemplars, M. If None, ``per_class`` times the number of classes.
        per_class: largest number of exemplars per class, even before all classes have been met. If None, as many as
            there is room for.

    Raises:
        ValueError: if a number is not positive, or both are None.
    """

    lots: Tensor
    """The random number (M,) of each exemplar; the lowest stay."""
    presented: Tensor
    """Samples of each class (num_classes,) presented so far."""
    counts: Tensor
    """Exemplars of each class (num_classes,) that are held."""

    def __init__(self, size: int | None = None, per_class: int | None = None) -> None:
        if size is None and per_class is None:
            raise ValueError(f"{type(self).__name__}: give size, per_class or both")
        if per_class is not None and per_class < 1:
            raise ValueError(f"{type(self).__name__}(per_class={per_class}): at least one exemplar per class")
        super().__init__(1 if size is None else size)
        self.most, self.per_class = size, per_class

    def room_for(self, classes: int, owner: object) -> None:
        """Size the memory, before it is built.

        Raises:
            ValueError: naming ``owner``, unless each of ``classes`` classes can have an exemplar.
        """
        sizes = [self.most, None if self.per_class is None else self.per_class * classes]
        self.size, self.classes = min(size for size in sizes if size is not None), classes
        if self.size < classes:
            raise ValueError(
                f"{type(owner).__name__}(memory={self.size}): at least one exemplar per class, and there are "
                f"{classes}; use a larger memory"
            )

    def build(self, layout: Nest, num_classes: int | None, seed: int, labels: Tensor | None = None) -> None:
        super().build(layout, num_classes, seed, labels)
        self.register_buffer("lots", torch.zeros(self.size, dtype=torch.long))
        self.register_buffer("presented", torch.zeros(self.classes, dtype=torch.long))
        self.register_buffer("counts", torch.zeros(self.classes, dtype=torch.long))

    def __len__(self) -> int:
        return super().__len__() if self.per_class is None else int(self.counts.sum())

    def __bool__(self) -> bool:
        return self.seen > 0  # asked in every step, so it must not wait for the device

    @torch.no_grad()
    def add(self, inputs: Nest, labels: Tensor, task: int, logits: Tensor | None = None) -> None:
        """Present a batch of B samples as stored, with labels (B,) and logits (B, num_classes)."""
        generator, device = self._generator(), self.labels.device
        lots = torch.randint(2**LOT_BITS, (len(labels),), generator=generator).to(device, non_blocking=True)
        self.seen += len(labels)
        held = torch.arange(self.size, device=device) < self.counts.sum()
        self.presented.index_add_(0, labels, torch.ones_like(labels))
        wanted = self.presented if self.per_class is None else self.presented.clamp(max=self.per_class)
        share = equal_shares(wanted, self.size)
        self.counts.copy_(share)

        # Held and new exemplars, by class and then by lot: each class keeps as many as it is to hold.
        classes = torch.cat([self.labels.where(held, self.classes), labels])
        ranked, order = (classes * 2**LOT_BITS + torch.cat([self.lots, lots])).sort(stable=True)
        ranked = ranked >> LOT_BITS
        first = torch.searchsorted(ranked, torch.arange(self.classes + 1, device=device))
        place = torch.arange(len(ranked), device=device) - first[ranked]
        stays = torch.empty_like(place, dtype=torch.bool)
        stays[order] = place < torch.cat([share, share.new_zeros(1)])[ranked]
        held, new = stays.split([self.size, len(labels)])

        # New exemplars that stay go to the lowest free places. The other places are rewritten with what they hold,
        # so that the number of new ones need not be known.
        count = min(self.size, len(labels))
        rows, slots = ((~new).int().argsort(stable=True)[:count], held.int().argsort(stable=True)[:count])
        written = new[rows]
        self.labels[slots] = labels[rows].where(written, self.labels[slots])
        self.lots[slots] = lots[rows].where(written, self.lots[slots])
        self.tasks[slots] = self.tasks[slots].masked_fill(written, task)
        each(
            lambda to, new: to.index_copy_(0, slots, new[rows].where(_as(written, new), to[slots])), self.inputs, inputs
        )
        if self.logits is not None and logits is not None:
            kept = logits[rows].to(self.logits.dtype)
            self.logits[slots] = kept.where(_as(written, kept), self.logits[slots])

    def _places(self, count: int) -> Tensor:
        """As in every memory; but with ``per_class``, while fewer than ``count`` are held, some may occur twice.

        Only the device knows how many are held, and a draw does not wait for it: it has ``count`` places, or as many as
        samples were presented, and exemplars are repeated as evenly as possible.
        """
        if self.per_class is None:
            return super()._places(count)
        count, device = min(count, self.seen, self.size), self.labels.device
        held = self.counts.sum()
        order = torch.rand(self.size, device=device).masked_fill(torch.arange(self.size, device=device) >= held, 2)
        return order.argsort()[torch.arange(count, device=device) % held]


LOT_BITS = 40
"""Bits of the random numbers, so that class and number together fit into an integer of 64 bits."""


def equal_shares(available: Tensor, places: int) -> Tensor:
    """Divide places into shares (n,) that are as equal as possible and at most ``available`` (n,).

    Places left over go, one each, to the first that can take one more.
    """
    lowest, left = available.sort().values, torch.arange(len(available), 0, -1, device=available.device)
    level = ((places - (lowest.cumsum(0) - lowest)) // left).max()  # over how many of the lowest are filled
    shares = available.minimum(level)
    more = available > level
    return shares + (more & (more.cumsum(0) <= places - shares.sum()))


def _as(rows: Tensor, like: Tensor) -> Tensor:
    """A tensor (n,) that is broadcast over the other dimensions of ``like`` (n, ...)."""
    return rows.view(-1, *[1] * (like.ndim - 1))
