"""Intelligent data selection within a batch: SSE and ERE of EsaCL (eqs 3.16-3.19)."""

from __future__ import annotations

from torch import Tensor

from lightning_sparse_cl.optim.sam import Stage


class LossSelection:
    """Backpropagate only through the samples of a batch with the largest loss.

    Support sample selection (SSE, eq 3.17) thins out the ascent pass of SAM, elimination of redundant examples (ERE,
    eq 3.19) the descent pass. The paper takes the top 40 % in both from the first step on. With two classes a task
    that can stall at chance: half of an untrained network's answers are wrong, the top 40 % hold wrong ones only, and
    each step just flips the decision. Hence ``warmup`` and a fraction of its own for each pass. (On Split Digits with
    replay it does not stall, and all settings lie within the seeds' spread: ``benchmarks/esacl_choices.py``.)

    When the ascent pass is thinned out, the losses to rank come from a forward pass of the whole batch without
    gradient; the two passes of SAM then see the selected samples only, which is where the computation is saved.

    Only the current batch is thinned out; the replay and penalty terms of the objective are kept whole in both passes.

    Args:
        sse: fraction kept in the ascent pass, in (0, 1]; 1 switches SSE off.
        ere: fraction kept in the descent pass, in (0, 1]; 1 switches ERE off.
        warmup: epochs at the start of every task that use whole batches.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, sse: float = 0.4, ere: float = 0.4, warmup: int = 2) -> None:
        for name, value in (("sse", sse), ("ere", ere)):
            if not 0 < value <= 1:
                raise ValueError(f"LossSelection({name}={value}): {name} is the fraction kept, in (0, 1]")
        if warmup < 0:
            raise ValueError(f"LossSelection(warmup={warmup}): warmup is a number of epochs, >= 0")
        self.kept = {"ascent": sse, "descent": ere}
        self.warmup = warmup

    def size(self, stage: Stage, batch_size: int, epoch: int) -> int:
        """J: how many of ``batch_size`` samples the pass keeps, in the given epoch of the task; at least one."""
        fraction = 1.0 if epoch < self.warmup else self.kept[stage]
        return max(1, round(fraction * batch_size))

    @staticmethod
    def top(losses: Tensor, size: int) -> Tensor:
        """Indices (J,) of the ``size`` largest of the per-sample losses (B,), as in eq 3.17."""
        return losses.topk(size).indices
