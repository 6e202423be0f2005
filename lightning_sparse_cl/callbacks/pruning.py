"""One-shot magnitude pruning at task ends, and what happens to the pruned weights afterwards (EsaCL, lines 11, 13)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sparse_cl.callbacks.schedule import TaskSchedule, position
from lightning_sparse_cl.callbacks.score_pruning import ScorePruning
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier, reset_state
from lightning_sparse_cl.callbacks.trainer_parts import callbacks_of, first_callback, parts_of, task_data
from lightning_sparse_cl.sparsity.blocks import SINGLE, Block, NofM
from lightning_sparse_cl.sparsity.distributions import Distribution
from lightning_sparse_cl.sparsity.layers import Chosen
from lightning_sparse_cl.sparsity.scores import check_number, top_k_mask, whole_part


class OneShotPruning(ScorePruning):
    """Keep the largest weights of every pruned layer: at a task's end, without retraining, or inside the task.

    It prunes per layer, not over the whole network: under Frank-Wolfe the polytopes' radii differ 13-fold between
    layers, so that a global ranking would empty the deep ones. Exactly ``round((1 - sparsity) * n)`` weights are kept,
    ties broken by position. Without a :class:`TaskSchedule` the network is pruned once, with the last batch of the fit,
    so that the checkpoints of its end are pruned. If the last checkpoint was written earlier, a warning says so.

    With ``epoch`` or ``retrain`` the weights are pruned inside the task, and the mask then holds until the task ends:
    the rest of the task trains the sparse network. Momentum and other optimiser state of pruned weights is cleared, so
    that Frank-Wolfe does not spend its K on them. A task that ends before this epoch is pruned at its end.

    Args:
        sparsity: zero fraction, in [0, 1).
        of: what ``1 - sparsity`` is a fraction of: ``"free"``, the layer's weights that are not frozen (all, unless
            :class:`FreezeMasks` acts too); ``"share"``, all weights of the layer divided by the number of tasks, on
            top of the frozen ones, so that the whole sequence ends at ``sparsity``.
        dense: weights that stay dense; see :class:`Sparsifier`.
        sparse: weights that are pruned; see :class:`Sparsifier`.
        ranking: ``"layer"``, or ``"global"``, all weights ranked together.
        distribution: see :class:`ScorePruning`.
        epoch: the epoch of each task, counted from 0, at whose start the weights are pruned, at least 1. The epochs
            before it train every weight that is not pruned or frozen. Without a :class:`TaskSchedule` it is an epoch of
            the fit. If None, the weights are pruned at the task's end.
        retrain: instead of ``epoch``: how many of the task's last epochs train the pruned network, at least 1.
        last: whether the sequence's last task is pruned, too. If False, it keeps all weights that are free.
        block: see :class:`ScorePruning`.

    Raises:
        ValueError: if an argument is out of range, or a task has no such epoch.
    """

    goes_on = False

    def __init__(
        self,
        sparsity: float,
        of: Literal["free", "share"] = "free",
        dense: Chosen | None = None,
        sparse: Chosen | None = None,
        ranking: Literal["layer", "global"] = "layer",
        distribution: Distribution = "uniform",
        epoch: int | None = None,
        retrain: int | None = None,
        last: bool = True,
        block: Sequence[int] | str = SINGLE,
    ) -> None:
        super().__init__(sparsity, ranking, distribution, dense, sparse, block=block)
        name = type(self).__name__
        if of not in ("free", "share"):
            raise ValueError(f"{name}(of={of!r}): of is 'free' or 'share'")
        if of == "share" and isinstance(self.block, NofM):
            raise ValueError(f"{name}(of='share', block={block!r}): each task would have a part of n; use of='free'")
        if epoch is not None:
            check_number(name, "epoch", epoch, whole=True)
            if epoch < 1:
                raise ValueError(f"{name}(epoch={epoch}): an epoch of each task, counted from 0, at least 1")
        if retrain is not None:
            check_number(name, "retrain", retrain, whole=True)
            if retrain < 1:
                raise ValueError(f"{name}(retrain={retrain}): how many of a task's last epochs, at least 1")
            if epoch is not None:
                raise ValueError(f"{name}(epoch={epoch}, retrain={retrain}): both say when to prune; give one of them")
        self.of, self.epoch, self.retrain, self.last = of, epoch, retrain, last
        self._pruned_at: int | None = None
        """Step before which this task's weights were pruned."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._pruned_at = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        name = type(self).__name__
        if self.of == "share" and not has_schedule(trainer):
            raise ValueError(f"{name}(of='share'): a share needs the number of tasks; add a TaskSchedule")
        learnt = task_data(trainer).learnt if self.of == "share" else None
        if learnt is not None and learnt.planned != (tasks := task_data(trainer).num_tasks):
            raise ValueError(
                f"{name}(of='share'): each of {learnt.planned} tasks was to have an equal share of the "
                f"weights, but now there are {tasks}; begin a sequence that is to go on with of='free' "
                "(EsaCL: freeze='none' or 'free'), which needs no number of tasks"
            )
        self._check_epoch(trainer)
        super().on_fit_start(trainer, pl_module)

    @property
    def inside(self) -> str | None:
        """The argument that makes it prune inside tasks, as it was given. None if it prunes at their ends."""
        given = {"epoch": self.epoch, "retrain": self.retrain}
        return next((f"{name}={value}" for name, value in given.items() if value is not None), None)

    def _check_epoch(self, trainer: pl.Trainer) -> None:
        name = type(self).__name__
        schedule = first_callback(trainer, TaskSchedule)
        if not self.last and schedule is None:
            raise ValueError(f"{name}(last=False): only a sequence has a last task; add a TaskSchedule")
        if self.inside is None or parts_of(trainer).fast_dev_run:
            return
        data = task_data(trainer) if schedule is not None else None
        tasks = [0] if data is None else range(len(data.learnt.classes) if data.learnt else 0, data.num_tasks)
        for task in tasks if self.last else tasks[:-1]:
            epochs = position(trainer).epochs if schedule is None else schedule.epochs_of(task)
            if max(self.epoch or 0, self.retrain or 0) >= epochs:
                of = "the fit" if schedule is None else f"task {task + 1}"
                counted = "counted from 0" if self.epoch else "the first of which trains all weights"
                allowed = "" if epochs < 2 else "1, or " if epochs == 2 else f"1 to {epochs - 1}, or "
                raise ValueError(
                    f"{name}({self.inside}): {of} has {epochs} epochs, {counted}; use {allowed}null to prune at the end"
                )
            if self.retrain and math.isinf(epochs):
                raise ValueError(
                    f"{name}({self.inside}): the fit's number of epochs is not known; set the Trainer's "
                    "max_epochs, or use epoch"
                )

    def _spares(self, trainer: pl.Trainer) -> bool:
        """Whether the running task is spared from pruning."""
        return not self.last and task_data(trainer).task == task_data(trainer).num_tasks - 1

    def scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> dict[str, Tensor]:
        return {name: pl_module.get_parameter(name).detach().abs() for name in self.names(pl_module)}

    def due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        if self.inside is None or self._pruned_at is not None or self._spares(trainer):
            return False
        at = position(trainer)
        return at.epoch >= (at.epochs - (self.retrain or 0) if self.epoch is None else self.epoch)

    def how_many(self, trainer: pl.Trainer, pl_module: pl.LightningModule, group: list[str], density: float) -> int:
        name = type(self).__name__
        frozen = {name: int(self.masks.frozen_part(name).sum()) for name in group}
        if isinstance(self.block, NofM) and any(frozen.values()):
            raise ValueError(
                f"{name}(block='{self.block}'): {next(n for n, count in frozen.items() if count)} has frozen weights, "
                "which fill places of its groups; use blocks such as [2, 2], or do not freeze masks"
            )
        all_ = sum(pl_module.get_parameter(name).numel() for name in group)
        if self.distribution != "uniform":
            density = super().how_many(trainer, pl_module, group, density) / all_
        of = all_ - sum(frozen.values()) if self.of == "free" else all_ / task_data(trainer).num_tasks
        kept = sum(frozen.values()) + self.block.size * round(density * of / self.block.size)
        if kept < 1:
            raise ValueError(
                f"{name}(sparsity={self.sparsity}): leaves no weight in {group[0]}, which has {all_}; lower "
                "the sparsity or keep the layer dense"
            )
        return kept

    def protected(self, name: str) -> Tensor:
        return self.masks.frozen_part(name)

    def prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any = None) -> None:
        for name in self.names(pl_module):
            self.masks.set_alive(name, None)  # all weights compete again
        super().prune(trainer, pl_module, batch)
        reset_state(trainer, pl_module, {name: ~self.masks.alive[name] for name in self.names(pl_module)})
        self._pruned_at = trainer.global_step

    def is_pruned(self, pl_module: pl.LightningModule) -> bool:
        """Whether all weights of the running task have been pruned, including those that were unfrozen late."""
        return self._pruned_at is not None and not self.unmasked(pl_module)

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        self._pruned_at = None

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        if not self.is_pruned(pl_module) and not self._spares(trainer):
            self.prune(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        last_step = 0 < trainer.max_steps <= trainer.global_step
        over = position(trainer).over or _averaging_ends(trainer)
        ends = not has_schedule(trainer) and (last_step or (trainer.is_last_batch and over))
        if ends and not self.is_pruned(pl_module):
            self.prune(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if has_schedule(trainer):
            return
        early = not self.is_pruned(pl_module)
        if early:
            self.prune(trainer, pl_module)
        saved = [c for c in callbacks_of(trainer, ModelCheckpoint) if c.last_model_path or c.best_model_path]
        if any(early or c._last_global_step_saved < (self._pruned_at or 0) for c in saved):
            rank_zero_warn(
                "OneShotPruning: the last checkpoint was written before the weights were pruned; the module is pruned, "
                "the checkpoint is not: save it with trainer.save_checkpoint"
            )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"pruned_at": self._pruned_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._pruned_at = state.get("pruned_at")


def _averaging_ends(trainer: pl.Trainer) -> bool:
    """Whether Lightning's SWA measures batch-norm in the next epoch, which must see the pruned network."""
    found = callbacks_of(trainer, StochasticWeightAveraging)
    return any(c._model_contains_batch_norm and trainer.current_epoch == c.swa_end for c in found)


class Reopen(Sparsifier):
    """Give the pruned weights back to the next task (EsaCL, line 13). Needs a :class:`TaskSchedule`.

    Args:
        init: ``"random"`` draws them anew from their layer's own initialisation, as the paper says; ``"zero"`` lets
            them grow from zero, so that the function learnt so far is unchanged. Together with the kept weights, a
            random draw may exceed the L1 budget of a K-sparse polytope by up to half (1.3 to 1.4 times on Split
            Digits); it is not scaled, as that would change what was learnt, and Frank-Wolfe steps contract it into the
            polytope.
        part: fraction of each layer's pruned weights that is given back, in (0, 1], drawn at random, at least one. The
            others stay pruned for another task, which then trains a sparse network from its first step.
        block: outputs and inputs of a block of weights, which are given back together; see :class:`ScorePruning`.

    Raises:
        ValueError: if an argument is out of range.
    """

    needs_tasks = True

    def __init__(
        self, init: Literal["random", "zero"] = "random", part: float = 1.0, block: Sequence[int] = SINGLE
    ) -> None:
        super().__init__()
        if init not in ("random", "zero"):
            raise ValueError(f"Reopen(init={init!r}): init is 'random' or 'zero'")
        check_number("Reopen", "part", part)
        if not 0 < part <= 1:
            raise ValueError(f"Reopen(part={part}): the fraction of the pruned weights that is given back, in (0, 1]")
        self.init, self.part, self.block = init, part, Block.of("Reopen", block)

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        for i, (name, alive) in enumerate(list(self.masks.alive.items())):
            reopened = ~(alive | self.masks.frozen_part(name))
            if self.part < 1:
                blocks = self.block.all(reopened)
                count = max(1, whole_part(self.part, int(blocks.sum())))
                lots = self.block.sums(self.random(pl_module, [name], task, i)[name])
                reopened = self.block.spread(top_k_mask(lots, count, blocks))
            self.masks.set_alive(name, None if self.part == 1 else alive | reopened)
            if self.init == "random":
                redraw(pl_module, name, reopened, task_data(trainer).order_seed + 1000 * task + i)


@torch.no_grad()
def redraw(pl_module: pl.LightningModule, name: str, where: Tensor, seed: int) -> None:
    """Draw the entries ``where`` of a weight anew from its layer's own initialisation, by the seed."""
    path, _, own = name.rpartition(".")
    layer: Any = copy.deepcopy(pl_module.get_submodule(path)).cpu()
    reset = next((r for n in RESETS if callable(r := getattr(layer, n, None))), None)
    if reset is None:
        raise ValueError(
            f"{name} cannot be drawn anew: its layer, a {type(layer).__name__}, has no {' or '.join(RESETS)}; use "
            "Reopen('zero')"
        )
    with torch.random.fork_rng([]):  # the same draw on every process
        torch.manual_seed(seed % 2**62)
        reset()
    weight = pl_module.get_parameter(name)
    weight.copy_(torch.where(where, layer.get_parameter(own).to(weight.device), weight))


RESETS = ("reset_parameters", "_reset_parameters")
"""Methods by which layers draw their weights; the second is that of torch's attention."""


def has_schedule(trainer: pl.Trainer) -> bool:
    return first_callback(trainer, TaskSchedule) is not None
