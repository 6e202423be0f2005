"""Growth rules of "Continual Dynamic Sparse Training" other than random (SET) and gradient (RigL), and SNFS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse_cl.callbacks.drop_grow import DropAndGrow, RigL
from lightning_sparse_cl.callbacks.schedule import position
from lightning_sparse_cl.callbacks.trainer_parts import parts_of
from lightning_sparse_cl.sparsity.blocks import SINGLE, NofM
from lightning_sparse_cl.sparsity.distributions import Distribution
from lightning_sparse_cl.sparsity.enforcement import Enforcement
from lightning_sparse_cl.sparsity.layers import Chosen


class _Remembering(DropAndGrow):
    """Base of the rules that keep a tensor for each weight; it is reset with every mask that is drawn."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: dict[str, Tensor] = {}

    def prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any = None) -> None:
        for name in self.unmasked(pl_module):
            self._kept.pop(name, None)
        super().prune(trainer, pl_module, batch)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._kept = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._kept = {name: kept.to(pl_module.device) for name, kept in self._kept.items()}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"kept": dict(self._kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._kept = dict(state["kept"])


class UnfiredGrowth(_Remembering):
    """Grows at random among the weights that were never alive in this task, or among all when none are left.

    Unfired growth of "Continual Dynamic Sparse Training" (section 3); what has fired is forgotten with the task.
    """

    def exchange(self, trainer: pl.Trainer, pl_module: pl.LightningModule, names: Sequence[str]) -> None:
        alive = self.masks.alive
        self._kept |= {name: alive[name] | self._kept.get(name, False) for name in names}
        super().exchange(trainer, pl_module, names)

    def grow_scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        scores = self.random(pl_module, self.names(pl_module), 1, trainer.global_step)
        return {name: score + ~self._kept[name] for name, score in scores.items() if name in self._kept}


class MomentumGrowth(_Remembering):
    """Grows where the momentum m <- 0.9 m + 0.1 g is largest; every layer keeps its number.

    All weights, including pruned ones, have a momentum, so that every step needs whole gradients; it is kept here, and
    the optimiser need not have any. The code of "Continual Dynamic Sparse Training" ranks Adam's |m / (sqrt(v) + eps)|
    instead, which ties the rule to that optimiser; its text says momentum.
    """

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        Enforcement.of(pl_module).ask_whole(self.names(pl_module))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        for name, grad in Enforcement.of(pl_module).take_whole(self.stepped_by(pl_module, optimizer)).items():
            grad = grad.nan_to_num(0, 0, 0) / scale  # values that overflowed under a gradient scaler count as zero
            self._kept[name] = 0.1 * grad if name not in self._kept else self._kept[name].lerp(grad, 0.1)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def grow_scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        return {name: m.abs() for name, m in self._kept.items()}


class SNFS(MomentumGrowth):
    """Sparse networks from scratch (Dettmers & Zettlemoyer, 2019): momentum growth across layers.

    The number of weights dropped in all layers is divided among them by the mean |m| of their alive weights, as far as
    there is room: the total number of weights is constant, not that of each layer.
    """

    def __init__(
        self,
        sparsity: float,
        fraction: float = 0.5,
        interval: int = 100,
        until: float = 1.0,
        final: float = 0.0,
        distribution: Distribution = "uniform",
        dense: Chosen | None = None,
        sparse: Chosen | None = None,
        block: Sequence[int] | str = SINGLE,
    ) -> None:
        super().__init__(sparsity, fraction, interval, until, final, distribution, dense, sparse, block)
        if isinstance(self.block, NofM):
            raise ValueError(
                f"{type(self).__name__}(block={block!r}): it moves weights between layers, and n:m is the same in all "
                "layers; use RigL"
            )

    def grow_counts(self, dropped: dict[str, int], free: dict[str, int]) -> dict[str, int]:
        alive = self.masks.alive
        mean = {n: float(self._kept[n][alive[n]].abs().mean().nan_to_num()) for n in dropped}
        size = self.block.size
        shares = share_out(sum(dropped.values()) // size, mean, {name: room // size for name, room in free.items()})
        return {name: size * blocks for name, blocks in shares.items()}


class AdaptiveGrowth(RigL):
    """Grows at random in the first half of the tasks, by the gradient in the second.

    Fig 6 of "Continual Dynamic Sparse Training". A rule that switches once earlier tasks have frozen more than half of
    the masked weights was also tried: at sparsity 0.9 tasks share so much that it never switched in ten tasks, and it
    was 0.8 and 1.1 points worse (the preset of ``benchmarks/continual_dst.py``, ERK, two seeds).
    """

    def late(self, trainer: pl.Trainer) -> bool:
        """Whether the running task grows by the gradient."""
        return position(trainer).task >= getattr(parts_of(trainer).datamodule, "num_tasks", 1) / 2

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.late(trainer):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        else:
            DropAndGrow.on_train_batch_start(self, trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.late(trainer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
        else:
            DropAndGrow.on_before_optimizer_step(self, trainer, pl_module, optimizer)

    def exchange(self, trainer: pl.Trainer, pl_module: pl.LightningModule, names: Sequence[str]) -> None:
        if self.late(trainer):
            super().exchange(trainer, pl_module, names)
        else:
            DropAndGrow.exchange(self, trainer, pl_module, names)

    def grow_scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        if self.late(trainer):
            return super().grow_scores(trainer, pl_module)
        return self.random(pl_module, self.names(pl_module), 1, trainer.global_step)


def share_out(total: int, weight: dict[str, float], room: dict[str, int]) -> dict[str, int]:
    """Split ``total`` into whole numbers in proportion to the weights; what exceeds a room goes to the others."""
    given = dict.fromkeys(weight, 0)
    while (left := total - sum(given.values())) > 0:
        open_ = {n: max(w, 1e-30) for n, w in weight.items() if given[n] < room[n]}
        if not open_:
            break
        scale = left / sum(open_.values())
        parts = {n: min(int(w * scale), room[n] - given[n]) for n, w in open_.items()}
        if not any(parts.values()):  # less than one each: it goes to the largest
            parts = {max(open_, key=lambda n: open_[n]): 1}
        for name, part in parts.items():
            given[name] += part
    return given
