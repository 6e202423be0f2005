"""SNIP: prune once before training, by connection sensitivity (Lee et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sparse_cl.callbacks.importance import mean_gradients
from lightning_sparse_cl.callbacks.own_loss import LossOf, check_loss
from lightning_sparse_cl.callbacks.score_pruning import ScorePruning
from lightning_sparse_cl.sparsity.blocks import SINGLE
from lightning_sparse_cl.sparsity.distributions import Distribution
from lightning_sparse_cl.sparsity.layers import Chosen


class SNIP(ScorePruning):
    """Keep the weights of largest |w dL/dw| on the first batch, and never change the mask again.

    Before a layer that starts at zero (LoRA's B, the last batch-norm of residual blocks under ``zero_init_last``) there
    is no gradient yet. If each layer is ranked by itself, the largest weights are kept there, with a warning.

    Args:
        sparsity: zero fraction of the masked weights, in [0, 1).
        ranking: ``"layer"``, the same sparsity in every layer, as SparCL adapts it to continual learning;
            ``"global"``, all layers ranked together, as in the paper.
        dense: weights that stay dense; see :class:`Sparsifier`.
        sparse: weights that are pruned; see :class:`Sparsifier`.
        distribution: see :class:`ScorePruning`.
        loss: L, a function of (module, batch) that returns a scalar; if None, the loss of ``training_step``.
        block: see :class:`ScorePruning`.

    Raises:
        ValueError: if an argument is out of range, the loss cannot be computed, or weights are ranked together and the
            gradient of some is zero.
    """

    def __init__(
        self,
        sparsity: float,
        ranking: Literal["layer", "global"] = "layer",
        dense: Chosen | None = None,
        sparse: Chosen | None = None,
        distribution: Distribution = "uniform",
        loss: LossOf | None = None,
        block: Sequence[int] | str = SINGLE,
    ) -> None:
        super().__init__(sparsity, ranking, distribution, dense, sparse, block=block)
        self.loss = loss

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_loss(self, pl_module, self.loss)

    def scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> dict[str, Tensor]:
        grads = mean_gradients(trainer, pl_module, self.names(pl_module), [batch], loss=self.loss)
        weights = {name: pl_module.get_parameter(name).detach() for name in grads}
        scores = {name: (weight * grads[name]).abs() for name, weight in weights.items()}
        ranked = torch.stack([score.any() for score in scores.values()]).tolist()
        if flat := [name for name, some in zip(scores, ranked) if not some]:
            told = f"{', '.join(flat[:3])}{', ...' * (len(flat) > 3)}"
            if self.ranking == "global":
                raise ValueError(
                    f"SNIP(ranking='global'): |w dL/dw| is zero all over {told}, which would lose all weights; weights "
                    "before a layer that starts at zero have no gradient yet: initialise it otherwise, keep these "
                    "weights dense by `dense`, or take ranking='layer'"
                )
            rank_zero_warn(
                f"SNIP: |w dL/dw| is zero all over {told}, as before a layer that starts at zero; there the largest "
                "weights are kept"
            )
            scores |= {name: weights[name].abs() for name in flat}
        return scores
