"""SNIP: prune once before training, by connection sensitivity (Lee et al., 2019)."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
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
        ValueError: if an argument is out of range, the loss cannot be had, or its gradient is zero all over a weight,
            so that there is nothing to rank: behind a layer that starts at zero (LoRA's B, the last batch-norm of
            residual blocks under ``zero_init_last``), or in one that does not act on the loss.
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
        scores = {name: (pl_module.get_parameter(name).detach() * grad).abs() for name, grad in grads.items()}
        ranked = torch.stack([score.any() for score in scores.values()]).tolist()
        if flat := [name for name, some in zip(scores, ranked) if not some]:
            raise ValueError(
                f"{type(self).__name__}: |w dL/dw| is zero all over {', '.join(flat[:3])}{', ...' * (len(flat) > 3)}, "
                "so there is nothing to rank; weights behind a layer that starts at zero have no gradient yet: "
                "initialise it otherwise, or keep these weights dense by `dense`"
            )
        return scores
