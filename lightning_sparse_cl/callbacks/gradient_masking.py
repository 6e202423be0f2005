"""Dynamic gradient masking: update only the weights that matter most now (SparCL, 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse_cl.callbacks.importance import live_classes, mean_gradients, memory_batches, memory_of
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier
from lightning_sparse_cl.sparsity import top_k_mask
from lightning_sparse_cl.sparsity.scores import whole_part


class DynamicGradientMasking(Sparsifier):
    """DGM (SparCL, section 4.3): of every layer's n weights, int(q n) of the unpruned ones are not updated.

    Kept are those of largest continual gradient importance::

        CGI(w) = alpha |dL~(B)/dw| + beta |dL(M)/dw|                             (eq 3)

    with L~ the cross-entropy among the current task's classes over the batch B, and L that among all classes over as
    many exemplars drawn from the memory M, if there is one. The mask is chosen anew at every ``interval``-th batch, the
    first of each epoch included (after weights may have been exchanged), and holds in between: weights outside it stay
    bit-identical, whatever the optimiser's momentum or weight decay.

    Works with any LightningModule, with or without pruned weights: list it after the callback that prunes.

    Args:
        q: fraction of all weights of a layer whose gradient is dropped, on top of the sparsity s: the gradient's
            sparsity is s + q. In [0, 1).
        interval: batches between refreshes.
        alpha: weight of the current batch's gradient.
        beta: weight of the memory's gradient.
        gradients: ``"measured"`` takes both terms at a refresh, in two passes more. ``"training"`` takes the gradient
            of the refreshing step itself, of the whole training loss, as in the released code; that one step needs it
            for all unpruned weights.
        dense: patterns of weights that are always updated; None is the first and last layer and 1x1 convolutions.

    Raises:
        ValueError: if an argument is out of range, or q leaves nothing to update.
    """

    def __init__(
        self,
        q: float = 0.05,
        interval: int = 30,
        alpha: float = 0.5,
        beta: float = 1.0,
        gradients: Literal["measured", "training"] = "measured",
        dense: Sequence[str] | None = None,
    ) -> None:
        super().__init__(dense)
        name = type(self).__name__
        if not 0 <= q < 1:
            raise ValueError(f"{name}(q={q}): the fraction of gradients dropped, in [0, 1)")
        if interval < 1:
            raise ValueError(f"{name}(interval={interval}): batches between refreshes, at least 1")
        if not (alpha >= 0 and beta >= 0):
            raise ValueError(f"{name}(alpha={alpha}, beta={beta}): the weights of the gradients are >= 0")
        if gradients not in ("measured", "training"):
            raise ValueError(f"{name}(gradients={gradients!r}): gradients is 'measured' or 'training'")
        self.q, self.interval = q, interval
        self.alpha, self.beta, self.gradients = alpha, beta, gradients
        self._due = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.names(pl_module)  # a pattern that matches nothing is an error before training
        self._due = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
        if batch_idx % self.interval or not self.q:
            return
        for name in self.names(pl_module):
            self.masks.set_updated(name, None)
        self._due = self.gradients == "training"
        if not self._due:
            self._choose(self.importance(trainer, pl_module, batch))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        weights = {name: pl_module.get_parameter(name) for name in self.names(pl_module)} if self._due else {}
        grads = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        if grads:  # none: this step was taken away, by RigL
            self._due = False
            self._choose({name: grad.abs() for name, grad in grads.items()})
            for name, grad in grads.items():
                grad.mul_(self.masks.updated[name])

    def importance(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> dict[str, Tensor]:
        """CGI (eq 3) of every weight."""
        names, memory = self.names(pl_module), memory_of(pl_module)
        live = live_classes(trainer, pl_module)
        cgi = {
            n: self.alpha * g.abs() for n, g in mean_gradients(trainer, pl_module, names, [batch], live, True).items()
        }
        if memory is not None:
            drawn = list(memory_batches(trainer, memory.draw(len(batch[1]))))
            grads = mean_gradients(trainer, pl_module, names, drawn, alive_only=True)
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
        for name, score in scores.items():  # a layer that is sparser than the others keeps one at least
            kept = max(1, unpruned[name] - dropped[name])
            self.masks.set_updated(name, top_k_mask(score, kept, among=pools[name]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name in list(self.masks.updated):
            self.masks.set_updated(name, None)
