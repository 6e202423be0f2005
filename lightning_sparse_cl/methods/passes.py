"""The passes of one training step: which samples each of them sees, and what they keep until after the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sparse_cl.backbones.batch_norm import batch_norm_still
from lightning_sparse_cl.nests import Nest, rows
from lightning_sparse_cl.objectives.base import Objective
from lightning_sparse_cl.optim.sam import Outputs, Stage
from lightning_sparse_cl.optim.selection import LossSelection


class Passes:
    """The loss of one step; an update rule calls it once for each backward pass.

    All passes share the batch and the exemplars drawn for it. Batch-norm statistics move in one of them only.

    Args:
        module: the method's module: it gives logits, and a ``penalty()`` to every pass.
        objective: gives the losses of a pass.
        batch: samples (B, ...), followed by their further views, and labels (B, ...).
        replay: what was drawn from memory. If None, nothing.
        selection: which samples each pass keeps.
        epoch: the epoch of the task, counted from 0.
    """

    def __init__(
        self, module: Any, objective: Objective, batch: tuple[Nest, Tensor], replay: Sequence | None,
        selection: LossSelection, epoch: int,
    ) -> None:  # fmt: skip
        self.module, self.objective, self.selection, self.epoch = module, objective, selection, epoch
        self.x, self.y = batch
        self.replay, self.drawn = replay, objective.drawn * objective.views
        self.thinned = replay is not None and selection.thins_replay(epoch)
        self._before: Outputs = {}  # losses and logits of the whole batch and replay, from before the update
        self._moved = False  # whether batch-norm statistics have moved

    def __call__(self, stage: Stage, part: tuple[int, int] | None = None, replays: bool = True) -> Outputs:
        """The outputs of one pass, with the ``loss`` to descend on or to climb.

        Args:
            stage: which pass it is.
            part: ``(k, n)`` for the loss of the k-th of n parts of the batch, and of nothing else. If None, all.
            replays: whether the pass sees the exemplars.

        Raises:
            ValueError: if the batch is too small for ``n`` parts, or exemplars are to be selected and the objective
                does not return a loss for each.
        """
        if part is not None:
            return self._part(*part)
        size, exemplars = self.selection.size(stage, len(self.y), self.epoch), self.replay if replays else None
        if (size < len(self.y) or self.thinned) and not self._before:
            self._rank()
        kept = self.selection.top(self._before["per_sample"], size) if size < len(self.y) else slice(None)
        replayed = self.drawn
        if self.thinned and exemplars is not None:
            exemplars = [
                draw.at(self.selection.top(losses, self.selection.size("replay", len(losses), self.epoch)))
                for draw, losses in zip(exemplars, self._before["replayed"], strict=True)
            ]
            replayed = sum(len(draw.labels) for draw in exemplars)
        still = self._moved or (self.replay is not None and not replays)  # statistics see the exemplars, too
        with batch_norm_still(self.module, still):
            outputs = self._outputs(rows(self.x, kept), self.y[kept], exemplars, replayed)
        self._moved |= not still
        if not self._before:
            self._before = {"per_sample": outputs["per_sample"].detach(), "logits": outputs["logits"].detach()}
        return outputs | {"loss": outputs["per_sample"].mean() + outputs["rest"] + self.module.penalty()}

    @property
    def logits(self) -> Tensor:
        """Logits (B, num_classes) of the whole batch from before the update; to be asked for after the first pass."""
        return self._before["logits"]

    def _rank(self) -> None:
        """Compute the losses of everything, without gradient."""
        with torch.no_grad(), batch_norm_still(self.module):
            self._before = self._outputs(self.x, self.y, self.replay if self.thinned else None, self.drawn)
        if self.thinned and "replayed" not in self._before:
            raise ValueError(
                f"LossSelection(replay={self.selection.replay}): {type(self.objective).__name__}.forward() "
                "returns no 'replayed', the losses of each draw; use replay=1, or return them"
            )

    def _part(self, k: int, n: int) -> Outputs:
        if n > len(self.y):
            raise ValueError(f"{type(self.module.update).__name__}: a batch of {len(self.y)} has fewer than {n} parts")
        here = torch.arange(len(self.y), device=self.y.device).tensor_split(n)[k]
        with batch_norm_still(self.module):
            outputs = self.objective(self.module, rows(self.x, here), self.y[here], None)
        return outputs | {"loss": outputs["per_sample"].mean()}

    def _outputs(self, x: Nest, y: Tensor, replay: Any, replayed: int) -> Outputs:
        """The objective's outputs for one pass. FlopsCounter reads ``objective.replayed``, the exemplars in it."""
        self.objective.replayed = 0 if replay is None else replayed
        try:
            return self.objective(self.module, x, y, replay)
        finally:
            self.objective.replayed = 0
