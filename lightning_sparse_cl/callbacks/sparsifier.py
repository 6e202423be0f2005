"""What all sparsity callbacks share: the masks of the module, enforced, checkpointed, and held by its averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse_cl.callbacks.averaging import AVERAGING, averages
from lightning_sparse_cl.callbacks.flops import FlopsCounter
from lightning_sparse_cl.callbacks.task_callback import TaskCallback
from lightning_sparse_cl.callbacks.trainer_parts import callbacks_of, first_callback
from lightning_sparse_cl.sparsity.enforcement import Enforcement
from lightning_sparse_cl.sparsity.layers import Chosen, NothingToPrune, prunable, sparse_weights
from lightning_sparse_cl.sparsity.masks import Masks

SMALL_PART = 0.5
"""A policy that prunes a smaller part of the parameters warns."""


class Sparsifier(TaskCallback):
    """Base of the sparsity callbacks. Works on any LightningModule, in manual and automatic optimisation.

    All sparsity callbacks of a module share its :class:`~lightning_sparse_cl.sparsity.Masks`, which belong to the
    module: copies and later fits go on with what was pruned and frozen. The module's ``state_dict`` keeps its keys; the
    masks are saved under ``"masks"`` in the checkpoint, once. Averages of the weights (Lightning's ``WeightAveraging``,
    ``EMAWeightAveraging``, ``StochasticWeightAveraging``) obey the masks, too.

    Args:
        dense: weights that stay dense, see :func:`~lightning_sparse_cl.sparsity.sparse_weights`. If None, the first
            layer, the last layer and 1x1 shortcut convolutions.
        sparse: weights that are pruned, by pattern or type of layer. If None, those that multiply their layer's input
            and require a gradient; weights that require one later are added then.
    """

    after: ClassVar[tuple[type, ...]] = (FlopsCounter, *AVERAGING)
    makes_masks: ClassVar[bool] = False
    """Whether it prunes: a callback that freezes needs one that prunes."""
    masks_gradients: ClassVar[bool] = False
    """Whether it sets gradient masks, which hold until it changes them."""
    keeps_tasks: ClassVar[bool] = False
    """Whether it stores and freezes what each task uses."""
    masks: Masks

    def __init__(self, dense: Chosen | None = None, sparse: Chosen | None = None) -> None:
        self.dense, self.sparse = dense, sparse
        self._loaded: dict[str, Any] | None = None
        self._seed: int | None = None
        self._names: list[str] | None = None  # found once, and again when other weights are trained
        self._trained: tuple[bool, ...] = ()

    # -- which weights -----------------------------------------------------------------------------------------

    def names(self, pl_module: pl.LightningModule) -> list[str]:
        """The weights this callback prunes.

        Raises:
            ValueError: if an entry of ``dense`` or ``sparse`` matches nothing, nothing is left, or a weight is
                reparametrised.
        """
        if self._names is None:
            try:
                self._names = sparse_weights(pl_module, self.dense, self.sparse)
            except ValueError as error:
                later = pl_module._trainer is not None and bool(callbacks_of(pl_module.trainer, BaseFinetuning))
                if later and isinstance(error, NothingToPrune):
                    return []  # until layers are unfrozen
                raise ValueError(f"{type(self).__name__}: {error}") from error
        return self._names

    def unmasked(self, pl_module: pl.LightningModule) -> list[str]:
        """Which of the weights have no mask yet."""
        alive = self.masks.alive
        return [name for name in self.names(pl_module) if name not in alive]

    def protected(self, name: str) -> Tensor:
        """Weights that must not be dropped: frozen and alive; of the weight's shape."""
        frozen, alive = self.masks.frozen_part(name), self.masks.record(name).alive
        return frozen if alive is None else frozen & alive

    def stepped_by(self, pl_module: pl.LightningModule, optimizer: Optimizer) -> list[str]:
        """Which of the weights ``optimizer`` steps."""
        weights = {name: pl_module.get_parameter(name) for name in self.names(pl_module)}
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [name for name, weight in weights.items() if id(weight) in own]

    def random(self, pl_module: pl.LightningModule, names: Sequence[str], *at: int) -> dict[str, Tensor]:
        """Uniform scores of the weights, the same on every process and after a resume; ``at`` distinguishes draws."""
        generator = torch.Generator().manual_seed(hash((self._seed, *at)) % 2**63)
        weights = {name: pl_module.get_parameter(name) for name in names}
        return {n: torch.rand(w.shape, generator=generator).to(w.device) for n, w in weights.items()}

    def _say_how_much(self, pl_module: pl.LightningModule) -> None:
        """Report, once per fit, weights that are left alone, and if only a small part of the network is pruned."""
        names, weights = self.names(pl_module), dict(pl_module.named_parameters())
        fixed = [n for n in prunable(pl_module) if n in weights and not weights[n].requires_grad and n not in names]
        if fixed and self._is_first(pl_module.trainer):
            rank_zero_warn(
                f"{type(self).__name__}: {len(fixed)} weights require no gradient ({', '.join(fixed[:3])}"
                f"{', ...' * (len(fixed) > 3)}) and are left alone; `sparse` takes them by a pattern of their names"
            )
        pruned = {pl_module.get_parameter(name) for name in names}
        others = sorted(
            ((p.numel(), n) for n, p in pl_module.named_parameters() if p not in pruned and p.requires_grad),
            reverse=True,
        )
        size = sum(p.numel() for p in pruned)
        part = size / max(size + sum(n for n, _ in others), 1)
        if names and part < SMALL_PART:
            largest = ", ".join(name for _, name in others[:3])
            rank_zero_warn(
                f"{type(self).__name__} prunes weights that are {part:.1%} of the trained parameters of "
                f"{type(pl_module).__name__}; the largest that stay dense are {largest}. `sparse` takes weights by "
                "pattern or type of layer, `dense` keeps them"
            )

    def _refuse_rivals(self, trainer: pl.Trainer) -> None:
        """Refuse other callbacks that prune."""
        for other in callbacks_of(trainer, Sparsifier):
            if other.makes_masks and other is not self:
                raise ValueError(
                    f"{type(self).__name__}: {type(other).__name__} makes masks of the same weights; use one of them"
                )

    # -- through a fit -----------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._loaded = self._seed = self._names = None
        self._trained = ()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._seed is None:
            self._seed = trainer.strategy.broadcast(torch.initial_seed())
        self.masks = Masks.of(pl_module)
        if self._is_first(trainer):
            Enforcement.of(pl_module).begin()
            for name in list(self.masks.updated):  # gradient masks belong to a fit that is over
                self.masks.set_updated(name, None)
            if self._loaded is not None:
                goes_on = any(c.masks_gradients for c in callbacks_of(trainer, Sparsifier))
                self.masks.load_state_dict(self._loaded if goes_on else self._loaded | {"updated": {}})
            elif not self.masks.is_pruned():
                _say_zeros(pl_module)
        self._trained = _trained(self.masks)
        for average in averages(trainer):
            Enforcement.of(pl_module).follow(average)
        Enforcement.of(pl_module).apply_to_averages()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        enforcement = Enforcement.of(pl_module)
        for optimizer in trainer.optimizers:
            enforcement.attach(optimizer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (trained := _trained(self.masks)) != self._trained:
            self._trained, self._names = trained, None
            Enforcement.of(pl_module).hook()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        Enforcement.of(pl_module).apply_to_averages()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Enforcement.of(pl_module).apply_to_averages()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Enforcement.of(pl_module).apply_to_averages()

    # -- checkpoints -------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Distinguishes callbacks of one kind, which may act on different weights."""
        return self._generate_state_key(dense=str(self.dense), sparse=str(self.sparse))

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seed = state["seed"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["masks"] = Masks.of(pl_module).state_dict()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._loaded = checkpoint.get("masks")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the masks of the checkpoint whose weights were loaded."""
        if not trainer.ckpt_path or not self._is_first(trainer):
            return
        saved = trainer.strategy.load_checkpoint(trainer.ckpt_path).get("masks")
        if saved is not None:
            Masks.of(pl_module).load_state_dict(saved | {"updated": {}})
            if not saved["alive"] and any(c.makes_masks for c in callbacks_of(trainer, Sparsifier)):
                rank_zero_warn(
                    f"{type(self).__name__}: {trainer.ckpt_path} was written before the weights were pruned; it is "
                    "dense, and so is the network measured now"
                )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_test_start(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_test_start(trainer, pl_module)

    def _is_first(self, trainer: pl.Trainer) -> bool:
        return first_callback(trainer, Sparsifier) is self


def reset_state(trainer: pl.Trainer, pl_module: pl.LightningModule, where: Mapping[str, Tensor]) -> None:
    """Reset momentum and other optimiser state of the weights that ``where`` selects, by name, to zero."""
    for name, mask in where.items():
        weight = pl_module.get_parameter(name)
        for optimizer in trainer.optimizers:
            for value in optimizer.state.get(weight, {}).values():
                if torch.is_tensor(value) and value.shape == weight.shape:
                    value.masked_fill_(mask, 0)


def _trained(masks: Masks) -> tuple[bool, ...]:
    """Which weights require a gradient, without reading their values."""
    return tuple(p is not None and p.requires_grad for _, x in masks.layers for p in dict.values(x._parameters))


def _say_zeros(pl_module: pl.LightningModule) -> None:
    """Warn of weights that are mostly zero but have no mask: they were pruned before they were loaded."""
    zero = {}
    for name in prunable(pl_module):
        try:
            weight = pl_module.get_parameter(name)
        except AttributeError:  # reparametrised
            continue
        if not torch.nn.parameter.is_lazy(weight) and 0 < 2 * int(weight.count_nonzero()) < weight.numel():
            zero[name] = 1 - int(weight.count_nonzero()) / weight.numel()
    if zero:
        name, part = max(zero.items(), key=lambda found: found[1])
        rank_zero_warn(
            f"{type(pl_module).__name__}: {len(zero)} of its weights are mostly zero ({name}: {part:.0%}) and have no "
            "masks, so that zeros will be trained. Masks.from_zeros(module) before the fit masks these zeros; "
            "Masks.of(module).load_state_dict(torch.load(path)['masks']) takes a checkpoint's masks"
        )
