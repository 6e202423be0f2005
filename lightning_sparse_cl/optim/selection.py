"""Intelligent data selection within a batch: SSE and ERE of EsaCL (eqs 3.16-3.19)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_sparse_cl.optim.sam import Stage


class LossSelection:
    """Backpropagate only through the samples of a batch with the largest loss.

    Support sample selection (SSE, eq 3.17) thins out the ascent pass of SAM, elimination of redundant examples (ERE,
    eq 3.19) the descent pass. The paper takes the top 40 % in both from the first step on. With two classes per task
    that can stall at chance: half of an untrained network's answers are wrong, the top 40 % hold wrong ones only, and
    each step just flips the decision. Hence ``warmup`` and a separate fraction for each pass. (On Split Digits with
    replay it does not stall, and all settings lie within the seeds' spread: ``benchmarks/esacl_choices.py``. On five
    tasks of CIFAR-10, with few steps per task, selection costs accuracy: ``benchmarks/esacl_cifar10.py``.)

    When the first pass is thinned out, the losses to rank come from a forward pass of everything without gradient;
    the passes with gradient then see the selected samples only, which is where the computation is saved.

    The paper thins out the current batch only. ``replay`` selects among exemplars, too: in each draw, those with the
    largest loss in that draw's own term. In that benchmark it costs accuracy and saves little, as everything is ranked.
    Penalty terms are kept whole.

    Args:
        sse: fraction kept in the ascent pass, in (0, 1]; 1 switches SSE off.
        ere: fraction kept in the descent pass, in (0, 1]; 1 switches ERE off.
        warmup: epochs at the start of every task that use whole batches and draws.
        replay: fraction kept of each draw from memory, in every pass that replays it, in (0, 1].

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, sse: float = 0.4, ere: float = 0.4, warmup: int = 2, replay: float = 1.0) -> None:
        for name, value in (("sse", sse), ("ere", ere), ("replay", replay)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ValueError(f"LossSelection({name}={value!r}): {name} is the fraction kept, in (0, 1]")
        if warmup < 0:
            raise ValueError(f"LossSelection(warmup={warmup}): warmup is a number of epochs, >= 0")
        self.sse, self.ere, self.warmup, self.replay = sse, ere, warmup, replay

    def size(self, of: Stage | Literal["replay"], whole: int, epoch: int) -> int:
        """J: how many of ``whole`` samples are kept in the given epoch of the task; at least one.

        Args:
            of: what is thinned out: the batch of this pass, or ``"replay"``, a draw from memory.
            whole: how many there are.
            epoch: the epoch of the task, counted from 0.
        """
        kept = {"ascent": self.sse, "descent": self.ere, "replay": self.replay}
        fraction = 1.0 if epoch < self.warmup else kept[of]
        return max(1, round(fraction * whole))

    def thins_replay(self, epoch: int) -> bool:
        """Whether exemplars are selected in the given epoch of the task."""
        return self.replay < 1 and epoch >= self.warmup

    @staticmethod
    def top(losses: Tensor, size: int) -> Tensor:
        """Indices (J,) of the ``size`` largest of the per-sample losses (B,), as in eq 3.17."""
        return losses.topk(size).indices
