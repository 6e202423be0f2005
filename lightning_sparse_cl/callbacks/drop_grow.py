"""Drop the smallest weights and grow others, every few steps: one callback whose subclasses say where to grow."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse_cl.callbacks.schedule import position
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier, reset_state
from lightning_sparse_cl.sparsity import top_k_mask
from lightning_sparse_cl.sparsity.distributions import DISTRIBUTIONS, counts
from lightning_sparse_cl.sparsity.scores import check_sparsity, whole_part


class DropAndGrow(Sparsifier):
    """Base: each layer starts with random weights, exactly as many as ``init`` gives it, and keeps that number.

    Every ``interval`` steps each layer drops the fraction f of its weights that is smallest in magnitude, and as many
    grow where :meth:`grow_scores` is largest among the others, those just dropped too, which then keep their value. The
    other grown weights start from zero (frozen ones have their frozen value), and so does their optimiser state. f is
    ``fraction`` at a task's start and follows a cosine to ``final`` at the part ``until`` of it, after which the mask
    rests; every task starts anew, for in continual learning the end of training is not known (the papers have one
    task). A task that finds no masks, because :class:`Reopen` took them away, draws new ones.

    Frozen weights are never dropped, except next to :class:`TaskSubnetworks`, which remembers them: there they compete
    with the others, and may be grown again, as in the code of "Continual Dynamic Sparse Training".

    A subclass says where to grow, and may say :meth:`how_many` in each layer.

    Args:
        sparsity: zero fraction of the masked weights, in [0, 1).
        fraction: of the alive weights exchanged at first, in [0, 1].
        interval: steps between exchanges.
        until: part of the task after which nothing is exchanged, in (0, 1].
        final: the fraction exchanged at last, in [0, fraction].
        init: how weights are divided among layers, ``"uniform"`` or ``"erk"`` (see ``sparsity/distributions.py``).
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
        final: float = 0.0,
        init: Literal["uniform", "erk"] = "uniform",
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
        if not 0 <= final <= fraction:
            raise ValueError(f"{name}(final={final}): the fraction exchanged at last, in [0, fraction={fraction}]")
        if init not in DISTRIBUTIONS:
            raise ValueError(f"{name}(init={init!r}): init is one of {', '.join(DISTRIBUTIONS)}")
        self.sparsity, self.fraction, self.interval, self.until = sparsity, fraction, interval, until
        self.final, self.init = final, init

    @abstractmethod
    def grow_scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """What the growth ranks: a score for each masked weight."""

    def how_many(self, dropped: dict[str, int], free: dict[str, int]) -> dict[str, int]:
        """How many weights each layer grows, by default as many as it dropped; ``free`` is how many it could."""
        return dropped

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.draw(pl_module, 0)

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        self.draw(pl_module, task)

    def draw(self, pl_module: pl.LightningModule, task: int) -> None:
        """A task's first masks, where there are none."""
        names = self.names(pl_module)
        if self.unmasked(pl_module):
            shapes = {name: pl_module.get_parameter(name).shape for name in names}
            kept = counts(type(self).__name__, self.init, shapes, 1 - self.sparsity)
            for name, score in self.random(pl_module, names, 0, task).items():
                self.masks.set_alive(name, top_k_mask(score, kept[name]))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.due(trainer):
            self.exchange(trainer, pl_module)

    def due(self, trainer: pl.Trainer) -> bool:
        """Whether weights are exchanged at this step; steps count from the task's start."""
        step = position(trainer).epoch * trainer.num_training_batches + _batches(trainer)
        return step > 0 and step % self.interval == 0 and self.exchanged(trainer) > 0

    def exchanged(self, trainer: pl.Trainer) -> float:
        """f, the fraction of alive weights that is exchanged now; 0 once the mask rests."""
        at = position(trainer)
        t = (at.epoch + _batches(trainer) / trainer.num_training_batches) / at.epochs
        if math.isinf(at.epochs) and trainer.max_steps > 0:
            t = trainer.global_step / trainer.max_steps
        return 0.0 if t >= self.until else cosine(t / self.until, self.fraction, self.final)

    @torch.no_grad()
    def exchange(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop and grow. Weights that are dropped and grown again keep their value; protected ones are not dropped."""
        if self.unmasked(pl_module):
            raise ValueError(f"{type(self).__name__}: its masks were taken away; list it after Reopen")
        scores, part = self.grow_scores(trainer, pl_module), self.exchanged(trainer)
        before, kept, dropped, free = dict(self.masks.alive), {}, {}, {}
        for name, score in scores.items():
            protected = self.masks.protected(name)
            pool = before[name] & ~protected
            alive, movable = int(before[name].sum()), int(pool.sum())
            dropped[name] = whole_part(part, movable)
            free[name] = score.numel() - alive + dropped[name]
            kept[name] = protected | top_k_mask(
                pl_module.get_parameter(name).abs(), movable - dropped[name], among=pool
            )
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


def _batches(trainer: pl.Trainer) -> int:
    """Batches of the running epoch that are complete."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.processed


def cosine(t: float, start: float, end: float) -> float:
    """From ``start`` at t = 0 to ``end`` at t = 1, along half a cosine."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * t))
