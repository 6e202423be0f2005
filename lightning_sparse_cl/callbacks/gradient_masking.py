"""Dynamic gradient masking: update only the weights that matter most now (SparCL, 4.3)."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse_cl.callbacks.importance import live_classes, mean_gradients, memory_batches, memory_of
from lightning_sparse_cl.callbacks.own_loss import LossOf, check_loss
from lightning_sparse_cl.callbacks.score_pruning import ScorePruning
from lightning_sparse_cl.callbacks.steps import StepCounter
from lightning_sparse_cl.sparsity.enforcement import Enforcement
from lightning_sparse_cl.sparsity.layers import Chosen
from lightning_sparse_cl.sparsity.scores import check_number, whole_part


class DynamicGradientMasking(ScorePruning):
    """DGM (SparCL, section 4.3): in every layer of n weights, int(q n) of the unpruned ones are not updated.

    Those with the largest continual gradient importance are updated::

        CGI(w) = alpha |dL~(B)/dw| + beta |dL(M)/dw|                             (eq 3)

    with L~ the cross-entropy among the current task's classes over the batch B, and L the one among all classes over as
    many exemplars drawn from the memory M, if there is one. (If a module has no such losses, its own loss is used for
    L~ and L.) The mask is chosen anew at every ``interval``-th step of the optimiser that steps most often, the first
    of each epoch included (after weights may have been exchanged), and holds in between: weights outside it stay
    bit-identical, even with momentum or weight decay.

    Works with any LightningModule, with or without pruned weights.

    Args:
        q: fraction of each layer's weights whose gradient is dropped, in [0, 1), on top of the sparsity s: the
            gradient's sparsity is s + q.
        interval: optimiser steps between refreshes.
        alpha: weight of the current batch's gradient.
        beta: weight of the memory's gradient.
        gradients: ``"measured"`` takes both terms at a refresh, in two additional passes. ``"training"`` takes the
            gradient of the refreshing step itself, of the whole training loss, as in the released code; this step needs
            gradients for all unpruned weights.
        dense: weights that are always updated; see :class:`Sparsifier`.
        sparse: weights whose gradient is masked; see :class:`Sparsifier`.
        loss: replaces L~ and L: a function of (module, batch) that returns a scalar.

    Raises:
        ValueError: if an argument is out of range, or q leaves nothing to update.
    """

    makes_masks = goes_on = False
    masks_gradients = True
    after = (*ScorePruning.after, ScorePruning)

    def __init__(
        self,
        q: float = 0.05,
        interval: int = 30,
        alpha: float = 0.5,
        beta: float = 1.0,
        gradients: Literal["measured", "training"] = "measured",
        dense: Chosen | None = None,
        sparse: Chosen | None = None,
        loss: LossOf | None = None,
    ) -> None:
        name = type(self).__name__
        check_number(name, "q", q)
        check_number(name, "interval", interval, whole=True)
        if not 0 <= q < 1:
            raise ValueError(f"{name}(q={q}): the fraction of gradients dropped, in [0, 1)")
        super().__init__(q, dense=dense, sparse=sparse)
        if interval < 1:
            raise ValueError(f"{name}(interval={interval}): steps between refreshes, at least 1")
        if not (alpha >= 0 and beta >= 0):
            raise ValueError(f"{name}(alpha={alpha}, beta={beta}): the weights of the gradients are >= 0")
        if gradients not in ("measured", "training"):
            raise ValueError(f"{name}(gradients={gradients!r}): gradients is 'measured' or 'training'")
        self.q, self.interval = q, interval
        self.alpha, self.beta, self.gradients, self.loss = alpha, beta, gradients, loss
        self._due: set[str] = set()  # weights for which the coming step's gradient decides
        self._steps, self._chosen = StepCounter(), -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._steps, self._chosen = StepCounter(), -1
        if stage == "fit" and self.q and self.gradients == "measured":
            check_loss(self, pl_module, self.loss)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._due = set()

    def due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        step = self._steps.most()
        return bool(self.q and self.names(pl_module)) and step % self.interval == 0 and step != self._chosen

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._steps.begin(trainer, Enforcement.of(pl_module))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._steps.restart()
        self._chosen = -1

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self._steps.state_dict(), "chosen": self._chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._chosen = state["chosen"]
        self._steps.load_state_dict(state["steps"])

    def prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any = None) -> None:
        self._chosen = self._steps.most()
        for name in self.names(pl_module):
            self.masks.set_updated(name, None)
        if self.gradients == "training":
            self._due = set(self.names(pl_module))
        else:
            self._choose(self.scores(trainer, pl_module, batch))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if not self._due:
            return
        weights = {n: pl_module.get_parameter(n) for n in self.stepped_by(pl_module, optimizer) if n in self._due}
        grads = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        if grads and torch.stack([grad.isfinite().all() for grad in grads.values()]).all():  # no overflow
            self._due -= grads.keys()
            self._choose({name: grad.abs() for name, grad in grads.items()})
            for name, grad in grads.items():
                grad.mul_(self.masks.updated[name])

    def scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> dict[str, Tensor]:
        """CGI (eq 3) of every weight."""
        names, memory = self.names(pl_module), memory_of(pl_module)
        live = live_classes(trainer, pl_module)
        grads = mean_gradients(trainer, pl_module, names, [batch], live, True, self.loss)
        cgi = {name: self.alpha * grad.abs() for name, grad in grads.items()}
        if memory is not None:
            drawn = list(memory_batches(trainer, memory.draw(len(batch[1]))))
            grads = mean_gradients(trainer, pl_module, names, drawn, None, True, self.loss)
            cgi = {name: value + self.beta * grads[name].abs() for name, value in cgi.items()}
        return cgi

    def _choose(self, scores: dict[str, Tensor]) -> None:
        pools = {name: self.masks.movable(name) for name in scores}
        unpruned = {name: int(pool.sum()) for name, pool in pools.items()}
        dropped = {name: whole_part(self.q, score.numel()) for name, score in scores.items()}
        if sum(unpruned.values()) <= sum(dropped.values()):
            raise ValueError(
                f"{type(self).__name__}(q={self.q}): only {sum(unpruned.values())} of the "
                f"{sum(score.numel() for score in scores.values())} weights are unpruned; q must leave some of them"
            )
        for name, score in scores.items():  # a layer that is sparser than the others keeps at least one
            kept = max(1, unpruned[name] - dropped[name])
            self.masks.set_updated(name, self.rank({name: score}, kept, {name: pools[name]})[name])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name in list(self.masks.updated):
            self.masks.set_updated(name, None)
