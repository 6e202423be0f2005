"""SNIP: prune once before training, by connection sensitivity (Lee et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import lightning.pytorch as pl
from torch import Tensor

from lightning_sparse_cl.callbacks.importance import mean_gradients
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier
from lightning_sparse_cl.sparsity.scores import check_sparsity, top_k_masks


class SNIP(Sparsifier):
    """Keep the weights of largest |w dL/dw| on the first batch, and never change the mask again.

    Args:
        sparsity: zero fraction of the masked weights, in [0, 1).
        ranking: ``"layer"``, the same sparsity in every layer, as SparCL adapts it to continual learning;
            ``"global"``, all layers ranked together, as in the paper.
        dense: patterns of weights that stay dense; None is the first and last layer and 1x1 convolutions.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self, sparsity: float, ranking: Literal["layer", "global"] = "layer", dense: Sequence[str] | None = None
    ) -> None:
        super().__init__(dense)
        check_sparsity(type(self).__name__, sparsity)
        if ranking not in ("layer", "global"):
            raise ValueError(f"{type(self).__name__}(ranking={ranking!r}): ranking is 'layer' or 'global'")
        self.sparsity, self.ranking = sparsity, ranking

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
        if not self.unmasked(pl_module):
            return
        names = self.names(pl_module)
        grads = mean_gradients(trainer, pl_module, names, [batch])
        scores = {name: (pl_module.get_parameter(name).detach() * grad).abs() for name, grad in grads.items()}
        for group in [[name] for name in names] if self.ranking == "layer" else [names]:
            total = sum(scores[name].numel() for name in group)
            kept = top_k_masks({name: scores[name] for name in group}, round((1 - self.sparsity) * total))
            for name, mask in kept.items():
                self.masks.set_alive(name, mask)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.names(pl_module)  # a pattern that matches nothing is an error before training
