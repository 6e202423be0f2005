"""What all sparsity callbacks share: one set of masks per module, enforced and checkpointed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

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
        self._seed: int | None = None
        self._names: list[str] | None = None  # looked up once a fit

    def names(self, pl_module: pl.LightningModule) -> list[str]:
        """The weights this callback prunes.

        Raises:
            ValueError: if a pattern of ``dense`` matches nothing, or nothing is left.
        """
        if self._names is None:
            try:
                self._names = sparse_weights(pl_module, self.dense)
            except ValueError as error:
                raise ValueError(f"{type(self).__name__}: {error}") from error
        return self._names

    def unmasked(self, pl_module: pl.LightningModule) -> bool:
        """Whether the weights have no masks yet, so that the first are to be made.

        Raises:
            ValueError: if only some of them have: masks of other layers, from a checkpoint or an earlier fit.
        """
        without = [name for name in self.names(pl_module) if name not in self.masks.alive]
        if without and len(self.masks) > 0:
            raise ValueError(
                f"{type(self).__name__}(dense={self.dense}): the module's masks are of {', '.join(self.masks)}; "
                f"{', '.join(without)} would have to have one too. Go on with the same `dense`"
            )
        return bool(without)

    def random(self, pl_module: pl.LightningModule, names: Sequence[str], *at: int) -> dict[str, Tensor]:
        """Uniform scores for the named weights: the same on every process and after a resume, others ``at`` others."""
        generator = torch.Generator().manual_seed(hash((self._seed, *at)) % 2**63)
        weights = {name: pl_module.get_parameter(name) for name in names}
        return {n: torch.rand(w.shape, generator=generator).to(w.device) for n, w in weights.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seed = state["seed"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._loaded = self._seed = self._names = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._seed is None:
            self._seed = trainer.strategy.broadcast(torch.initial_seed())
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


def reset_state(trainer: pl.Trainer, pl_module: pl.LightningModule, grown: Mapping[str, Tensor]) -> None:
    """Momentum and other optimiser state of weights that have just been grown starts from zero."""
    for name, mask in grown.items():
        weight = pl_module.get_parameter(name)
        for optimizer in trainer.optimizers:
            for value in optimizer.state.get(weight, {}).values():
                if torch.is_tensor(value) and value.shape == weight.shape:
                    value.masked_fill_(mask, 0)
