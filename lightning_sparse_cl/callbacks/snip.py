"""SNIP: prune once before training, by connection sensitivity (Lee et al., 2019)."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor

from lightning_sparse_cl.callbacks.importance import mean_gradients
from lightning_sparse_cl.callbacks.own_loss import LossOf, check_loss
from lightning_sparse_cl.callbacks.score_pruning import ScorePruning
from lightning_sparse_cl.sparsity.distributions import Distribution
from lightning_sparse_cl.sparsity.layers import Chosen


class SNIP(ScorePruning):
    """Keep the weights of largest |w dL/dw| on the first batch, and never change the mask again.

    Args:
        sparsity: zero fraction of the masked weights, in [0, 1).
        ranking: ``"layer"``, the same sparsity in every layer, as SparCL adapts it to continual learning;
            ``"global"``, all layers ranked together, as in the paper.
        dense: weights that stay dense; see :class:`Sparsifier`.
        sparse: weights that are pruned; see :class:`Sparsifier`.
        distribution: see :class:`ScorePruning`.
        loss: L, a function of (module, batch) that returns a scalar; if None, the loss of ``training_step``.

    Raises:
        ValueError: if an argument is out of range, or the loss cannot be had.
    """

    def __init__(
        self,
        sparsity: float,
        ranking: Literal["layer", "global"] = "layer",
        dense: Chosen | None = None,
        sparse: Chosen | None = None,
        distribution: Distribution = "uniform",
        loss: LossOf | None = None,
    ) -> None:
        super().__init__(sparsity, ranking, distribution, dense, sparse)
        self.loss = loss

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_loss(self, pl_module, self.loss)

    def scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> dict[str, Tensor]:
        grads = mean_gradients(trainer, pl_module, self.names(pl_module), [batch], loss=self.loss)
        return {name: (pl_module.get_parameter(name).detach() * grad).abs() for name, grad in grads.items()}
