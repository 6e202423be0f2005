"""One-shot magnitude pruning at task ends, and what happens to the pruned weights afterwards (EsaCL, lines 11, 13)."""

from __future__ import annotations

import copy
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sparse_cl.callbacks.schedule import TaskSchedule, position
from lightning_sparse_cl.callbacks.score_pruning import ScorePruning
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier
from lightning_sparse_cl.callbacks.trainer_parts import callbacks_of, first_callback, task_data
from lightning_sparse_cl.sparsity.distributions import Distribution
from lightning_sparse_cl.sparsity.layers import Chosen


class OneShotPruning(ScorePruning):
    """Keep the largest weights of every pruned layer when a task ends; no retraining follows.

    Per layer and not over the whole network: under Frank-Wolfe the polytopes' radii differ 13-fold between layers, so
    that a global ranking would empty the deep ones. Exactly ``round((1 - sparsity) * n)`` weights are kept, ties broken
    by position. Without a :class:`TaskSchedule` the network is pruned once, with the last batch of the fit, so that the
    checkpoints of its end are pruned. Where the last checkpoint was written earlier, a warning says so.

    Args:
        sparsity: zero fraction, in [0, 1).
        of: what ``1 - sparsity`` is a fraction of: ``"free"``, the layer's weights that are not frozen (all, unless
            :class:`FreezeMasks` acts too); ``"share"``, all weights of the layer divided by the number of tasks, on
            top of the frozen ones, so that the whole sequence ends at ``sparsity``.
        dense: weights that stay dense; see :class:`Sparsifier`.
        sparse: weights that are pruned; see :class:`Sparsifier`.
        ranking: ``"layer"``, or ``"global"``, all weights ranked together.
        distribution: see :class:`ScorePruning`.

    Raises:
        ValueError: if an argument is out of range.
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
    ) -> None:
        super().__init__(sparsity, ranking, distribution, dense, sparse)
        if of not in ("free", "share"):
            raise ValueError(f"OneShotPruning(of={of!r}): of is 'free' or 'share'")
        self.of = of
        self._pruned = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.of == "share" and not has_schedule(trainer):
            raise ValueError("OneShotPruning(of='share'): a share needs the number of tasks; add a TaskSchedule")
        learnt = task_data(trainer).learnt if self.of == "share" else None
        if learnt is not None and learnt.planned != (tasks := task_data(trainer).num_tasks):
            raise ValueError(
                f"OneShotPruning(of='share'): each of {learnt.planned} tasks was to have an equal share of the "
                f"weights, and now there are {tasks}; begin a sequence that is to go on with of='free' "
                "(EsaCL: freeze='none' or 'free'), which needs no number of tasks"
            )
        super().on_fit_start(trainer, pl_module)
        self._pruned = False

    def scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> dict[str, Tensor]:
        return {name: pl_module.get_parameter(name).detach().abs() for name in self.names(pl_module)}

    def due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        return False

    def how_many(self, trainer: pl.Trainer, pl_module: pl.LightningModule, group: list[str], density: float) -> int:
        frozen = {name: int(self.masks.frozen_part(name).sum()) for name in group}
        all_ = sum(pl_module.get_parameter(name).numel() for name in group)
        if self.distribution != "uniform":
            density = super().how_many(trainer, pl_module, group, density) / all_
        of = all_ - sum(frozen.values()) if self.of == "free" else all_ / task_data(trainer).num_tasks
        kept = sum(frozen.values()) + round(density * of)
        if kept < 1:
            raise ValueError(
                f"OneShotPruning(sparsity={self.sparsity}): leaves no weight in {group[0]}, which has {all_}; lower "
                "the sparsity or keep the layer dense"
            )
        return kept

    def protected(self, name: str) -> Tensor:
        return self.masks.frozen_part(name)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        for name in self.names(pl_module):
            self.masks.set_alive(name, None)  # all compete again
        self.prune(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        last_step = 0 < trainer.max_steps <= trainer.global_step
        over = position(trainer).over or _averaging_ends(trainer)
        if not has_schedule(trainer) and not self._pruned and (last_step or (trainer.is_last_batch and over)):
            self._pruned = True
            self.on_task_end(trainer, pl_module, 0)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if has_schedule(trainer):
            return
        early = not self._pruned
        if early:
            self._pruned = True
            self.on_task_end(trainer, pl_module, 0)
        saved = [c for c in callbacks_of(trainer, ModelCheckpoint) if c.last_model_path or c.best_model_path]
        if any(early or c._last_global_step_saved < trainer.global_step for c in saved):
            rank_zero_warn(
                "OneShotPruning: the last checkpoint was written before the weights were pruned; the module is pruned, "
                "the checkpoint is not: save it with trainer.save_checkpoint"
            )


def _averaging_ends(trainer: pl.Trainer) -> bool:
    """Whether Lightning's SWA measures batch-norm in the next epoch, which is to see the pruned network."""
    found = callbacks_of(trainer, StochasticWeightAveraging)
    return any(c._model_contains_batch_norm and trainer.current_epoch == c.swa_end for c in found)


class Reopen(Sparsifier):
    """Give the pruned weights back to the next task (EsaCL, line 13). Needs a :class:`TaskSchedule`.

    Args:
        init: ``"random"`` draws them anew from their layer's own initialisation, as the paper says; ``"zero"`` lets
            them grow from zero, so that the function learnt so far is unchanged. With what was kept, a random draw may
            start up to half outside the L1 budget of a K-sparse polytope (1.3 to 1.4 times on Split Digits); it is
            not scaled, which would change what was learnt, and Frank-Wolfe steps contract it into the polytope.

    Raises:
        ValueError: if ``init`` is neither.
    """

    needs_tasks = True

    def __init__(self, init: Literal["random", "zero"] = "random") -> None:
        super().__init__()
        if init not in ("random", "zero"):
            raise ValueError(f"Reopen(init={init!r}): init is 'random' or 'zero'")
        self.init = init

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        for i, (name, alive) in enumerate(list(self.masks.alive.items())):
            self.masks.set_alive(name, None)
            if self.init == "random":
                seed = task_data(trainer).order_seed + 1000 * task + i
                redraw(pl_module, name, ~(alive | self.masks.frozen_part(name)), seed)


@torch.no_grad()
def redraw(pl_module: pl.LightningModule, name: str, where: Tensor, seed: int) -> None:
    """Give the entries of a weight that are ``where`` new values from its layer's own initialisation, by the seed."""
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
"""Methods by which layers draw their weights, torch's of attention being the second."""


def has_schedule(trainer: pl.Trainer) -> bool:
    return first_callback(trainer, TaskSchedule) is not None
