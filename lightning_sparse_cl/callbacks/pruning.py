"""One-shot magnitude pruning at task ends, and what happens to the pruned weights afterwards (EsaCL, lines 11, 13)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_sparse_cl.callbacks.schedule import TaskSchedule
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier
from lightning_sparse_cl.sparsity.scores import check_sparsity, top_k_mask


class OneShotPruning(Sparsifier):
    """Keep the largest weights of every pruned layer when a task ends; no retraining follows.

    Per layer and not over the whole network: under Frank-Wolfe the polytopes' radii differ 13-fold between layers, so
    that a global ranking would empty the deep ones. Exactly ``round((1 - sparsity) * n)`` weights are kept, ties broken
    by position. Without a :class:`TaskSchedule` the network is pruned once, when the fit ends: after the checkpoints
    that Lightning writes at epoch ends, so save it with ``trainer.save_checkpoint``.

    Args:
        sparsity: zero fraction, in [0, 1).
        of: what ``1 - sparsity`` is a fraction of: ``"free"``, the layer's weights that are not frozen (all, unless
            :class:`FreezeMasks` acts too); ``"share"``, all weights of the layer divided by the number of tasks, on
            top of the frozen ones, so that the whole sequence ends at ``sparsity``.
        dense: patterns of weights that stay dense; None is the first and last layer and 1x1 convolutions.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self, sparsity: float, of: Literal["free", "share"] = "free", dense: Sequence[str] | None = None
    ) -> None:
        super().__init__(dense)
        check_sparsity(type(self).__name__, sparsity)
        if of not in ("free", "share"):
            raise ValueError(f"OneShotPruning(of={of!r}): of is 'free' or 'share'")
        self.sparsity = sparsity
        self.of = of

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.of == "share" and not _has_schedule(trainer):
            raise ValueError("OneShotPruning(of='share'): a share needs the number of tasks; add a TaskSchedule")
        self.names(pl_module)  # a pattern that matches nothing is an error now, not after the first task

    @torch.no_grad()
    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        for name in self.names(pl_module):
            weight = pl_module.get_parameter(name)
            frozen = self.masks.is_frozen(name)
            pool = ~frozen
            whole = pool.sum().item() if self.of == "free" else weight.numel() / trainer.datamodule.num_tasks
            keep = top_k_mask(weight.abs(), round((1 - self.sparsity) * whole), among=pool)
            self.masks.set_alive(name, keep | frozen)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _has_schedule(trainer):
            self.on_task_end(trainer, pl_module, 0)


class Reopen(Sparsifier):
    """Give the pruned weights back to the next task (EsaCL, line 13).

    Args:
        init: ``"random"`` draws them anew from their layer's own initialisation, as the paper says; ``"zero"`` lets
            them grow from zero, so that the function learnt so far is unchanged. With what was kept, a random draw may
            start up to half outside the L1 budget of a K-sparse polytope (1.3 to 1.4 times on Split Digits); it is
            not scaled, which would change what was learnt, and Frank-Wolfe steps contract it into the polytope.

    Raises:
        ValueError: if ``init`` is neither.
    """

    def __init__(self, init: Literal["random", "zero"] = "random") -> None:
        super().__init__()
        if init not in ("random", "zero"):
            raise ValueError(f"Reopen(init={init!r}): init is 'random' or 'zero'")
        self.init = init

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        for i, (name, alive) in enumerate(list(self.masks.alive.items())):
            self.masks.set_alive(name, None)
            if self.init == "random":
                seed = trainer.datamodule.order_seed + 1000 * task + i
                redraw(pl_module, name, ~(alive | self.masks.is_frozen(name)), seed)


@torch.no_grad()
def redraw(pl_module: pl.LightningModule, name: str, where: Tensor, seed: int) -> None:
    """Give the entries of a weight that are ``where`` new values from its layer's own initialisation, by the seed."""
    layer = copy.deepcopy(pl_module.get_submodule(name.rpartition(".")[0])).cpu()
    with torch.random.fork_rng([]):  # the same draw on every process
        torch.manual_seed(seed % 2**62)
        layer.reset_parameters()
    weight = pl_module.get_parameter(name)
    weight.copy_(torch.where(where, layer.weight.to(weight.device), weight))


def _has_schedule(trainer: pl.Trainer) -> bool:
    return any(isinstance(c, TaskSchedule) for c in trainer.callbacks)
