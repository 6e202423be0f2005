"""EsaCL: sharpness-aware, Frank-Wolfe sparse continual learning, pruned in one shot (Ren & Honavar, 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from lightning_sparse_cl.callbacks.freezing import FreezeMasks
from lightning_sparse_cl.callbacks.pruning import OneShotPruning, Reopen
from lightning_sparse_cl.callbacks.trainer_parts import task_data
from lightning_sparse_cl.methods.base import ContinualModule
from lightning_sparse_cl.objectives.base import Objective
from lightning_sparse_cl.objectives.replay import DERpp
from lightning_sparse_cl.optim.frank_wolfe import StochasticFrankWolfe
from lightning_sparse_cl.optim.sam import SharpnessAware, UpdateRule
from lightning_sparse_cl.optim.selection import LossSelection
from lightning_sparse_cl.sparsity import sparse_weights
from lightning_sparse_cl.sparsity.blocks import SINGLE, Block


class EsaCL(ContinualModule):
    """Algorithm 1 of "EsaCL: An Efficient Continual Learning Algorithm", line by line::

        3  sample a mini-batch B                                  TaskDataModule
        4  losses at theta, support samples B_s       (eq 3.17)   selection = LossSelection(sse, ere)
        5  epsilon = rho * g / ||g||_2                (eq 3.18)   update = SharpnessAware(rho)
        6  g at theta + epsilon on B_s                (eq 3.19)     "
        7  m <- m + g                                 (eq 3.15)   optimizer = StochasticFrankWolfe(lr, tau, k)
        8  v <- LMO(m)                                (eq 3.13)     "
        9  theta <- theta + eta * (v - theta)         (eq 3.12)     "
        11 prune s %, in one shot, without retraining             policy OneShotPruning(sparsity)
        12 freeze the survivors                                   policy FreezeMasks, see ``freeze``
        13 expand: reinitialise unused weights                    policy Reopen

    The ablations exchange one part each: without SA ``update=SingleBackward()``, without SP ``optimizer=SGD``,
    without SSE or ERE ``sse=1`` or ``ere=1``.

    Args:
        backbone: maps a batch of samples, such as images (B, C, H, W), to features (B, D).
        objective: the base method, ER, DER++, ... If None, DER++ with 500 exemplars, the paper's main variant.
        sparsity: fraction S of the weights of every pruned layer that each task's pruning removes, in [0, 1).
        freeze: how lines 11-12 are read, as "freeze the pruned parameters" contradicts the paper's own capacity column
            (20 % for any number of tasks at S = 80 %):

            * ``"none"`` (C): after every task the network is pruned to 1 - S of all weights; nothing is frozen, the
              objective protects old tasks, as in the SparCL code that EsaCL is built on.
            * ``"share"`` (B): every one of T tasks keeps (1 - S)/T of all weights and freezes them.
            * ``"free"`` (A): every task keeps 1 - S of the weights that are still free and freezes them (PackNet);
              the share in use grows as 1 - S^t.

            Measured side by side on Split Digits (``benchmarks/esacl_choices.py``) the three lie within the seeds'
            spread at S = 80 % and 95 %, but A ends with 67 % and 23 % of the weights in use. On natural images, without
            SAM and selection, A is better than C, as Frank-Wolfe steps contract whatever is not frozen, and B likely
            is; with both there is no difference (``benchmarks/esacl_cifar10.py``, five seeds). C is the default: it
            holds the sparsity for any number of tasks, which need not be known in advance.

        update: if None, SAM with rho = 0.05.
        optimizer: if None, stochastic Frank-Wolfe with eta = 0.01 and tau = 5; it constrains the weights that are
            pruned and takes SGD steps for the others. Where its ``k`` is None, K is a quarter of the fraction that a
            task's pruning keeps: at K above that fraction accuracy collapses. With ``prune_epoch`` K is the
            whole fraction.
        selection: if None, SSE and ERE at the paper's 40 %, after a warm-up of two epochs per task (see
            :class:`LossSelection` for why).
        dense: weights that are never pruned; see :class:`~lightning_sparse_cl.Sparsifier`.
        policies: further callbacks.
        prune_epoch: the epoch inside each task at whose start it is pruned; see :class:`OneShotPruning`. If None, the
            task's end, as the paper says.
        reopen: how the next task gets pruned weights back. If None, all of them, drawn anew, as the paper says.
        block: outputs and inputs of a block of weights: pruning keeps whole blocks, and the polytope's vertices
            consist of them (:class:`~lightning_sparse_cl.optim.KSparsePolytope`). Not in the paper.

    Raises:
        ValueError: if ``sparsity``, ``freeze``, ``prune_epoch`` or ``block`` is out of range, or ``reopen`` gives back
            a part of the weights in other blocks.
    """

    def __init__(
        self,
        backbone: nn.Module,
        objective: Objective | None = None,
        sparsity: float = 0.8,
        freeze: Literal["none", "share", "free"] = "none",
        update: UpdateRule | None = None,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        selection: LossSelection | None = None,
        dense: Sequence[str] | None = None,
        policies: Sequence[pl.Callback] = (),
        prune_epoch: int | None = None,
        reopen: Reopen | None = None,
        block: Sequence[int] = SINGLE,
    ) -> None:
        if freeze not in ("none", "share", "free"):
            raise ValueError(f"EsaCL(freeze={freeze!r}): the readings of lines 11-12 are none, share, free")
        if prune_epoch is not None and (not isinstance(prune_epoch, int) or prune_epoch < 1):
            raise ValueError(f"EsaCL(prune_epoch={prune_epoch!r}): an epoch of each task, counted from 0, at least 1")
        if not isinstance(reopen, Reopen | None):
            raise ValueError(f"EsaCL(reopen={reopen!r}): reopen is a Reopen, such as Reopen('zero', 0.3)")
        blocks = Block.of("EsaCL", block)
        if reopen is not None and reopen.part < 1 and reopen.block != blocks:
            raise ValueError(
                f"EsaCL(block={list(blocks)}, reopen=Reopen(part={reopen.part}, block={list(reopen.block)})): both "
                "have the same blocks"
            )
        of: Literal["share", "free"] = "share" if freeze == "share" else "free"
        pruning = OneShotPruning(sparsity, of, dense, epoch=prune_epoch, block=blocks)
        freezing = [] if freeze == "none" else [FreezeMasks()]
        super().__init__(
            backbone,
            objective or DERpp(),
            update or SharpnessAware(),
            optimizer or partial(StochasticFrankWolfe, k=None),
            selection or LossSelection(),
            [pruning, *freezing, reopen or Reopen(), *policies],
        )
        self.sparsity, self.dense, self.block = sparsity, dense, blocks
        self._reading = freeze  # ``freeze`` is a method of LightningModule
        self._pruned_inside = prune_epoch is not None

    def configure_optimizers(self) -> Optimizer:
        """Two groups of parameters: the pruned weights, which Frank-Wolfe constrains, and the others."""
        pruned = set(sparse_weights(self, self.dense))
        groups: dict[bool, list] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            groups[name in pruned].append(parameter)
        optimizer = self.optimizer([{"params": group, "constrained": key} for key, group in groups.items()])
        kept = 1 - self.sparsity
        if self._reading == "share":  # by one task
            kept /= task_data(self.trainer).num_tasks
        for group in optimizer.param_groups:
            if group["constrained"] and "block" in group and group["block"] is None:
                group["block"] = tuple(self.block)
            if "k" in group and group["k"] is None:
                group["k"] = kept if self._pruned_inside else kept / 4
        return optimizer
