"""Drop the smallest weights and grow others, every few steps: SET, RigL and SNFS are one callback with three scores."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse_cl.callbacks.schedule import position
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier, reset_state
from lightning_sparse_cl.sparsity import top_k_mask
from lightning_sparse_cl.sparsity.scores import check_sparsity, whole_part


class DropAndGrow(Sparsifier):
    """Base: each layer starts with a random ``round((1 - sparsity) n)`` of its n weights and keeps that number.

    Every ``interval`` steps each layer drops the fraction f of its weights that is smallest in magnitude, and as many
    grow where :meth:`grow_scores` is largest among the others, those just dropped too, which then keep their value. The
    other grown weights start from zero, and so does their optimiser state. f is ``fraction`` at a task's start and
    follows a cosine to 0 at the part ``until`` of it, after which the mask rests; every task starts anew, for in
    continual learning the end of training is not known (the papers have one task).

    A subclass says where to grow, and may say :meth:`how_many` in each layer.

    Args:
        sparsity: zero fraction of the masked weights, in [0, 1).
        fraction: of the alive weights exchanged at first, in [0, 1].
        interval: steps between exchanges.
        until: part of the task after which nothing is exchanged, in (0, 1].
        dense: patterns of weights that stay dense; None is the first and last layer and 1x1 convolutions.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        sparsity: float,
        fraction: float = 0.3,
        interval: int = 100,
        until: float = 0.75,
        dense: Sequence[str] | None = None,
    ) -> None:
        super().__init__(dense)
        name = type(self).__name__
        check_sparsity(name, sparsity)
        if not 0 <= fraction <= 1:
            raise ValueError(f"{name}(fraction={fraction}): the fraction of alive weights exchanged, in [0, 1]")
        if interval < 1:
            raise ValueError(f"{name}(interval={interval}): steps between exchanges, at least 1")
        if not 0 < until <= 1:
            raise ValueError(f"{name}(until={until}): the part of a task with exchanges, in (0, 1]")
        self.sparsity, self.fraction, self.interval, self.until = sparsity, fraction, interval, until

    @abstractmethod
    def grow_scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """What the growth ranks: a score for each masked weight."""

    def how_many(self, dropped: dict[str, int], free: dict[str, int]) -> dict[str, int]:
        """How many weights each layer grows, by default as many as it dropped; ``free`` is how many it could."""
        return dropped

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        names = self.names(pl_module)
        if self.unmasked(pl_module):
            for name, score in self.random(pl_module, names, 0).items():
                self.masks.set_alive(name, top_k_mask(score, max(1, round((1 - self.sparsity) * score.numel()))))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.due(trainer):
            self.exchange(trainer, pl_module)

    def due(self, trainer: pl.Trainer) -> bool:
        """Whether weights are exchanged at this step."""
        return trainer.global_step > 0 and trainer.global_step % self.interval == 0 and self.exchanged(trainer) > 0

    def exchanged(self, trainer: pl.Trainer) -> float:
        """f, the fraction of alive weights that is exchanged now: fraction / 2 (1 + cos(pi t / t_end))."""
        at, batch = position(trainer), trainer.fit_loop.epoch_loop.batch_progress.current.processed
        t = (at.epoch + batch / trainer.num_training_batches) / at.epochs
        if math.isinf(at.epochs) and trainer.max_steps > 0:
            t = trainer.global_step / trainer.max_steps
        return 0.0 if t >= self.until else self.fraction / 2 * (1 + math.cos(math.pi * t / self.until))

    @torch.no_grad()
    def exchange(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop and grow. Weights that are dropped and grown again keep their value; frozen ones are not dropped."""
        scores, part = self.grow_scores(trainer, pl_module), self.exchanged(trainer)
        before, kept, dropped, free = dict(self.masks.alive), {}, {}, {}
        for name, score in scores.items():
            frozen = self.masks.is_frozen(name)
            pool = before[name] & ~frozen
            alive, movable = int(before[name].sum()), int(pool.sum())
            dropped[name] = whole_part(part, movable)
            free[name] = score.numel() - alive + dropped[name]
            kept[name] = frozen | top_k_mask(pl_module.get_parameter(name).abs(), movable - dropped[name], among=pool)
        for name, count in self.how_many(dropped, free).items():
            grown = top_k_mask(scores[name], count, among=~kept[name])
            self.masks.set_alive(name, kept[name] | grown)
            reset_state(trainer, pl_module, {name: grown & ~before[name]})


class SET(DropAndGrow):
    """Sparse evolutionary training (Mocanu et al., 2018): grows at random.

    It drops the smallest weights in magnitude; the paper drops the smallest positive and the largest negative ones.
    """

    def grow_scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        return self.random(pl_module, self.names(pl_module), 1, trainer.global_step)


class RigL(DropAndGrow):
    """RigL (Evci et al., 2020): grows where the gradient, also that of pruned weights, is largest.

    An exchange takes the place of the optimiser's step, as in Algorithm 1 of the paper. Where a step makes several
    backward passes (SAM, accumulated batches), their gradients are added.
    """

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.due(trainer):
            self.masks.ask_whole(self.names(pl_module))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.masks.whole:  # decided when the batch began, whatever the steps of it
            self.exchange(trainer, pl_module)

    def grow_scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        return {name: grad.abs() for name, grad in self.masks.take_whole().items()}

    def exchange(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().exchange(trainer, pl_module)
        for parameter in pl_module.parameters():
            parameter.grad = None  # optimisers skip these, momentum and weight decay included


class SNFS(DropAndGrow):
    """Sparse networks from scratch (Dettmers & Zettlemoyer, 2019): grows where the momentum is largest.

    The momentum m <- 0.9 m + 0.1 g is that of all weights, pruned ones too, so that every step needs whole gradients;
    it is kept here, and the optimiser need not have any. What all layers dropped is shared out among them by the mean
    |m| of their alive weights, as far as there is room: the number of weights is constant in all, not in each layer.
    """

    def __init__(
        self,
        sparsity: float,
        fraction: float = 0.5,
        interval: int = 100,
        until: float = 1.0,
        dense: Sequence[str] | None = None,
    ) -> None:
        super().__init__(sparsity, fraction, interval, until, dense)
        self._momentum: dict[str, Tensor] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.masks.ask_whole(self.names(pl_module))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        for name, grad in self.masks.take_whole().items():
            self._momentum[name] = 0.1 * grad if name not in self._momentum else self._momentum[name].lerp(grad, 0.1)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def grow_scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        return {name: m.abs() for name, m in self._momentum.items()}

    def how_many(self, dropped: dict[str, int], free: dict[str, int]) -> dict[str, int]:
        mean = {n: float(m[self.masks.alive[n]].abs().mean().nan_to_num()) for n, m in self._momentum.items()}
        return share_out(sum(dropped.values()), mean, free)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._momentum = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._momentum = {name: m.to(pl_module.device) for name, m in self._momentum.items()}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"momentum": dict(self._momentum)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._momentum = dict(state["momentum"])


def share_out(total: int, weight: dict[str, float], room: dict[str, int]) -> dict[str, int]:
    """Split ``total`` in proportion to the weights, whole numbers up to each one's room; what is over goes on."""
    given = dict.fromkeys(weight, 0)
    while (left := total - sum(given.values())) > 0:
        open_ = {n: max(w, 1e-30) for n, w in weight.items() if given[n] < room[n]}
        if not open_:
            break
        scale = left / sum(open_.values())
        parts = {n: min(int(w * scale), room[n] - given[n]) for n, w in open_.items()}
        if not any(parts.values()):  # less than one each: to the largest
            parts = {max(open_, key=lambda n: open_[n]): 1}
        for name, part in parts.items():
            given[name] += part
    return given
