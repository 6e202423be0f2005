"""Drop the smallest weights and grow others, every few steps: one callback whose subclasses say where to grow."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse_cl.callbacks.pruning import Reopen
from lightning_sparse_cl.callbacks.schedule import position
from lightning_sparse_cl.callbacks.score_pruning import ScorePruning
from lightning_sparse_cl.callbacks.sparsifier import reset_state
from lightning_sparse_cl.callbacks.steps import StepCounter
from lightning_sparse_cl.sparsity.blocks import SINGLE
from lightning_sparse_cl.sparsity.distributions import Distribution
from lightning_sparse_cl.sparsity.enforcement import Enforcement
from lightning_sparse_cl.sparsity.layers import Chosen
from lightning_sparse_cl.sparsity.scores import check_number, whole_part
from lightning_sparse_cl.sparsity.subnetworks import Subnetworks


class DropAndGrow(ScorePruning):
    """Base: each layer starts with random weights, exactly as many as ``distribution`` gives it, and keeps that number.

    Every ``interval`` optimiser steps each layer drops the fraction f of its weights whose score, the magnitude, is
    smallest, and as many grow where :meth:`grow_scores` is largest among the others, including those just dropped,
    which then keep their value. The other grown weights start from zero (frozen ones have their frozen value), and so
    does their optimiser state. f is ``fraction`` at a task's start and follows a cosine to ``final`` at the part
    ``until`` of the task, after which the mask stays; every task starts anew, as in continual learning the end of
    training is not known (the papers have one task). A task that finds no masks, because :class:`Reopen` took them
    away, draws new ones.

    Frozen weights are never dropped, except next to :class:`TaskSubnetworks`, which remembers them: there they compete
    with the others, and may be grown again, as in the code of "Continual Dynamic Sparse Training".

    A subclass says where to grow by :meth:`grow_scores`, and may say how many by :meth:`grow_counts`.

    Args:
        sparsity: zero fraction of the masked weights, in [0, 1).
        fraction: fraction of the alive weights exchanged at first, in [0, 1].
        interval: optimiser steps between exchanges.
        until: part of the task after which nothing is exchanged, in (0, 1].
        final: fraction exchanged at last, in [0, fraction].
        distribution: how weights are divided among layers, see :class:`ScorePruning`.
        dense: weights that stay dense; see :class:`Sparsifier`.
        sparse: weights that are pruned; see :class:`Sparsifier`.
        block: see :class:`ScorePruning`.

    Raises:
        ValueError: if an argument is out of range, or the end of the task is not known.
    """

    after = (*ScorePruning.after, Reopen)

    def __init__(
        self,
        sparsity: float,
        fraction: float = 0.3,
        interval: int = 100,
        until: float = 0.75,
        final: float = 0.0,
        distribution: Distribution = "uniform",
        dense: Chosen | None = None,
        sparse: Chosen | None = None,
        block: Sequence[int] | str = SINGLE,
    ) -> None:
        super().__init__(sparsity, distribution=distribution, dense=dense, sparse=sparse, block=block)
        name = type(self).__name__
        check_number(name, "interval", interval, whole=True)
        for field, value in (("fraction", fraction), ("until", until), ("final", final)):
            check_number(name, field, value)
        if not 0 <= fraction <= 1:
            raise ValueError(f"{name}(fraction={fraction}): the fraction of alive weights exchanged, in [0, 1]")
        if interval < 1:
            raise ValueError(f"{name}(interval={interval}): steps between exchanges, at least 1")
        if not 0 < until <= 1:
            raise ValueError(f"{name}(until={until}): the part of a task with exchanges, in (0, 1]")
        if not 0 <= final <= fraction:
            raise ValueError(f"{name}(final={final}): the fraction exchanged at last, in [0, fraction={fraction}]")
        self.fraction, self.interval, self.until, self.final = fraction, interval, until, final
        self._steps = StepCounter()
        self._exchanged: dict[Optimizer, int] = {}  # the step of each optimiser, which may ask repeatedly

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._steps, self._exchanged = StepCounter(), {}

    @abstractmethod
    def grow_scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """The scores by which weights grow, for each masked weight."""

    def grow_counts(self, dropped: dict[str, int], free: dict[str, int]) -> dict[str, int]:
        """How many weights each layer grows, by default as many as it dropped; ``free`` is how many it could grow."""
        return dropped

    def scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> dict[str, Tensor]:
        """Random scores, for a task's first masks."""
        return self.random(pl_module, self.names(pl_module), 0, position(trainer).task)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if position(trainer).progress is None:
            raise ValueError(
                f"{type(self).__name__}(until={self.until}): the end of the training is not known; "
                "give Trainer(max_steps=...) or Trainer(max_epochs=...)"
            )
        self.draw(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._steps.begin(trainer, Enforcement.of(pl_module))

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        self._steps.restart()
        self._exchanged = {}
        self.draw(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self._steps.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._steps.load_state_dict(state["steps"])

    def draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw a task's first masks, where there are none."""
        if self.due(trainer, pl_module):
            self.prune(trainer, pl_module)

    def protected(self, name: str) -> Tensor:
        kept = super().protected(name)
        return torch.zeros_like(kept) if len(Subnetworks.of(self.masks.module)) else kept

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.moves(trainer, optimizer):
            self._exchanged[optimizer] = self._steps.taken(optimizer)
            if names := self.stepped_by(pl_module, optimizer):
                self.exchange(trainer, pl_module, names)

    def moves(self, trainer: pl.Trainer, optimizer: Optimizer, ahead: int = 0) -> bool:
        """Whether the weights of an optimiser are exchanged at its coming step; steps count from the task's start.

        Args:
            trainer: the trainer.
            optimizer: the optimiser of the weights.
            ahead: how many steps after the coming one to ask for.
        """
        if trainer.fit_loop._skip_backward:  # an epoch in which Lightning's SWA only measures batch-norm
            return False
        step = self._steps.taken(optimizer) + ahead
        due = step > 0 and step % self.interval == 0 and self._exchanged.get(optimizer) != step
        return due and self.exchanged(trainer) > 0

    def exchanged(self, trainer: pl.Trainer) -> float:
        """f, the fraction of alive weights that is exchanged now; 0 once the mask stays."""
        t = position(trainer).progress or 0.0
        return 0.0 if t >= self.until else cosine(t / self.until, self.fraction, self.final)

    @torch.no_grad()
    def exchange(self, trainer: pl.Trainer, pl_module: pl.LightningModule, names: Sequence[str]) -> None:
        """Drop and grow. Weights that are dropped and grown again keep their value; protected ones are not dropped."""
        if self.unmasked(pl_module):
            raise ValueError(f"{type(self).__name__}: its masks were taken away inside a task, not between two")
        found, part = self.grow_scores(trainer, pl_module), self.exchanged(trainer)
        scores = {name: found[name] for name in names if name in found}
        before, kept, dropped, free = self.masks.alive, {}, {}, {}
        for name, score in scores.items():
            protected = self.protected(name)
            pool = before[name] & ~protected
            alive, movable = int(before[name].sum()), int(pool.sum())
            dropped[name] = self.block.size * whole_part(part, movable // self.block.size)
            free[name] = score.numel() - alive + dropped[name]
            magnitude = {name: pl_module.get_parameter(name).abs()}
            kept[name] = protected | self.rank(magnitude, movable - dropped[name], {name: pool})[name]
        for name, count in self.grow_counts(dropped, free).items():
            grown = self.rank({name: scores[name]}, count, {name: ~kept[name]}, kept)[name]
            self.masks.set_alive(name, kept[name] | grown)
            reset_state(trainer, pl_module, {name: grown & ~before[name]})
        Enforcement.of(pl_module).apply_to_averages()


class SET(DropAndGrow):
    """Sparse evolutionary training (Mocanu et al., 2018): grows at random.

    It drops the smallest weights in magnitude; the paper drops the smallest positive and the largest negative ones.
    """

    def grow_scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        return self.random(pl_module, self.names(pl_module), 1, trainer.global_step)


class RigL(DropAndGrow):
    """RigL (Evci et al., 2020): grows where the gradient, including that of pruned weights, is largest.

    An exchange replaces the optimiser's step, as in Algorithm 1 of the paper: nothing else moves. Gradients of several
    backward passes are summed as ``.grad`` sums them. With a gradient that is not finite, nothing is exchanged.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._gradients: dict[str, Tensor] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        enforcement = Enforcement.of(pl_module)
        moving = [optimizer for optimizer in trainer.optimizers if self.moves(trainer, optimizer)]
        if enforcement.whole and not moving:  # asked for a step that did not come, as the task is over
            enforcement.forget_whole(self.names(pl_module))
        for optimizer in moving:
            enforcement.ask_whole(self.stepped_by(pl_module, optimizer))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        enforcement = Enforcement.of(pl_module)
        if enforcement.whole and self.moves(trainer, optimizer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.moves(trainer, optimizer, ahead=1):  # it may come in the same batch
            enforcement.ask_whole(self.stepped_by(pl_module, optimizer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        Enforcement.of(pl_module).forget_steps()

    def exchange(self, trainer: pl.Trainer, pl_module: pl.LightningModule, names: Sequence[str]) -> None:
        self._gradients = Enforcement.of(pl_module).take_whole(names)
        if not self._gradients:
            rank_zero_warn(
                f"{type(self).__name__}: no gradient of {', '.join(names[:3])} has come by a backward pass, so nothing "
                "is exchanged; gradients that are set by hand are not seen"
            )
        elif torch.stack([grad.isfinite().all() for grad in self._gradients.values()]).all():  # no overflow
            super().exchange(trainer, pl_module, names)
            optimizer = next(o for o in trainer.optimizers if names[0] in self.stepped_by(pl_module, o))
            Enforcement.of(pl_module).take_away_step(optimizer)
        self._gradients = {}

    def grow_scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        return {name: grad.abs() for name, grad in self._gradients.items()}


def cosine(t: float, start: float, end: float) -> float:
    """From ``start`` at t = 0 to ``end`` at t = 1, along half a cosine."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * t))
