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
        """Whether weights are exchanged at this step."""
        return trainer.global_step > 0 and trainer.global_step % self.interval == 0 and self.exchanged(trainer) > 0

    def exchanged(self, trainer: pl.Trainer) -> float:
        """f, the fraction of alive weights that is exchanged now; 0 once the mask rests."""
        at, batch = position(trainer), trainer.fit_loop.epoch_loop.batch_progress.current.processed
        t = (at.epoch + batch / trainer.num_training_batches) / at.epochs
        if math.isinf(at.epochs) and trainer.max_steps > 0:
            t = trainer.global_step / trainer.max_steps
        return 0.0 if t >= self.until else cosine(t / self.until, self.fraction, self.final)

    @torch.no_grad()
    def exchange(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop and grow. Weights that are dropped and grown again keep their value; protected ones are not dropped."""
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


class UnfiredGrowth(DropAndGrow):
    """Grows at random among the weights that were never alive in this task; at random when there are none left.

    Unfired growth of "Continual Dynamic Sparse Training" (section 3); what has fired is forgotten with the task.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fired: dict[str, Tensor] = {}

    def draw(self, pl_module: pl.LightningModule, task: int) -> None:
        if self.unmasked(pl_module):
            self._fired = {}
        super().draw(pl_module, task)

    def grow_scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        scores = self.random(pl_module, self.names(pl_module), 1, trainer.global_step)
        for name in scores:
            self._fired[name] = self.masks.alive[name] | self._fired.get(name, False)
        return {name: score + ~self._fired[name] for name, score in scores.items()}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._fired = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._fired = {name: fired.to(pl_module.device) for name, fired in self._fired.items()}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"fired": dict(self._fired)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._fired = dict(state["fired"])


class AdaptiveGrowth(RigL):
    """Grows at random in early tasks and by the gradient in late ones (Fig 6 of "Continual Dynamic Sparse Training").

    Args:
        sparsity: zero fraction of the masked weights, in [0, 1).
        switch: when the gradient takes over: ``"half"``, in the second half of the tasks, as in the paper;
            ``"saturation"``, in the first task that finds more than the fraction ``full`` of the masked weights frozen
            by earlier ones, however many tasks are to come.
        full: see ``switch``, in [0, 1].
        **kwargs: as of :class:`DropAndGrow`.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self, sparsity: float, switch: Literal["half", "saturation"] = "half", full: float = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(sparsity, **kwargs)
        if switch not in ("half", "saturation"):
            raise ValueError(f"AdaptiveGrowth(switch={switch!r}): switch is 'half' or 'saturation'")
        if not 0 <= full <= 1:
            raise ValueError(f"AdaptiveGrowth(full={full}): the fraction of frozen weights, in [0, 1]")
        self.switch, self.full = switch, full

    def late(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether the running task grows by the gradient."""
        if self.switch == "half":
            tasks = getattr(trainer.datamodule, "num_tasks", 1)
            return position(trainer).task >= tasks / 2
        names = self.names(pl_module)
        frozen = sum(int(self.masks.is_frozen(name).sum()) for name in names)
        return frozen > self.full * sum(pl_module.get_parameter(name).numel() for name in names)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.due(trainer) and self.late(trainer, pl_module):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.masks.whole:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
        elif self.due(trainer) and not self.late(trainer, pl_module):
            DropAndGrow.exchange(self, trainer, pl_module)

    def grow_scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        if self.masks.whole:
            return super().grow_scores(trainer, pl_module)
        return self.random(pl_module, self.names(pl_module), 1, trainer.global_step)


class MomentumGrowth(DropAndGrow):
    """Grows where the momentum m <- 0.9 m + 0.1 g is largest; every layer keeps its number.

    The momentum is that of all weights, pruned ones too, so that every step needs whole gradients; it is kept here, and
    the optimiser need not have any. The code of "Continual Dynamic Sparse Training" ranks Adam's |m / (sqrt(v) + eps)|
    instead, which ties the rule to that optimiser; its text says momentum.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._momentum: dict[str, Tensor] = {}

    def draw(self, pl_module: pl.LightningModule, task: int) -> None:
        if self.unmasked(pl_module):
            self._momentum = {}
        super().draw(pl_module, task)

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


class SNFS(MomentumGrowth):
    """Sparse networks from scratch (Dettmers & Zettlemoyer, 2019): momentum growth across layers.

    What all layers dropped is shared out among them by the mean |m| of their alive weights, as far as there is room:
    the number of weights is constant in all, not in each layer.
    """

    def __init__(
        self,
        sparsity: float,
        fraction: float = 0.5,
        interval: int = 100,
        until: float = 1.0,
        final: float = 0.0,
        init: Literal["uniform", "erk"] = "uniform",
        dense: Sequence[str] | None = None,
    ) -> None:
        super().__init__(sparsity, fraction, interval, until, final, init, dense)

    def how_many(self, dropped: dict[str, int], free: dict[str, int]) -> dict[str, int]:
        mean = {n: float(m[self.masks.alive[n]].abs().mean().nan_to_num()) for n, m in self._momentum.items()}
        return share_out(sum(dropped.values()), mean, free)


def cosine(t: float, start: float, end: float) -> float:
    """From ``start`` at t = 0 to ``end`` at t = 1, along half a cosine."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * t))


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
