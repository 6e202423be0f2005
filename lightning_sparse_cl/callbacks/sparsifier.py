"""What all sparsity callbacks share: one set of masks per module, enforced and checkpointed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_sparse_cl.sparsity import Masks, sparse_weights


class Sparsifier(pl.Callback):
    """Base of the sparsity callbacks. Works on any LightningModule, in manual and automatic optimisation.

    All sparsity callbacks of a module share its :class:`~lightning_sparse_cl.sparsity.Masks`; the module's
    ``state_dict`` keeps its keys, the masks are saved under ``"masks"`` in the checkpoint. Like the weights, masks stay
    with the module: a second ``fit`` goes on with what the first has pruned and frozen.

    Args:
        dense: shell patterns of weight names that stay dense; None keeps the first layer, the last layer and 1x1
            convolutions dense (see :func:`~lightning_sparse_cl.sparsity.sparse_weights`).
    """

    masks: Masks

    def __init__(self, dense: Sequence[str] | None = None) -> None:
        self.dense = dense
        self._loaded: dict[str, Any] | None = None

    def names(self, pl_module: pl.LightningModule) -> list[str]:
        """The weights this callback prunes."""
        return sparse_weights(pl_module, self.dense)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._loaded = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.masks = Masks.of(pl_module)
        if self._loaded is not None:
            self.masks.load_state_dict(self._loaded)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            self.masks.enforce(optimizer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint["masks"] = Masks.of(pl_module).state_dict()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self._loaded = checkpoint.get("masks")
