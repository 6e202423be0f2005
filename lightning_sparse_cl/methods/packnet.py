"""PackNet: each task trains the free weights, keeps a part of them, and leaves the others (Mallya & Lazebnik, 2018)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import lightning.pytorch as pl
from torch import nn
from torch.optim import SGD, Optimizer

from lightning_sparse_cl.callbacks.pruning import OneShotPruning, Reopen
from lightning_sparse_cl.callbacks.subnetworks import TaskSubnetworks
from lightning_sparse_cl.methods.isolation import IsolatingModule
from lightning_sparse_cl.objectives.base import CrossEntropy, Objective
from lightning_sparse_cl.optim.sam import UpdateRule


class PackNet(IsolatingModule):
    """ "PackNet: Adding Multiple Tasks to a Single Network by Iterative Pruning"::

        free weights start from zero                               reopen = Reopen("zero")
        train them; earlier tasks' weights are used, and stay      subnetworks = TaskSubnetworks
        prune the smallest of them, retrain the others             pruning = OneShotPruning(0.5, retrain=10)
        the last task keeps all that is free                            "      last=False

    Two readings of how much a task keeps: a fraction of the weights that are free (the paper; with 0.5 the five first
    tasks have 50, 25, 12.5, 6.25 and 3.1 % of all), ``OneShotPruning(0.5, of="free")``; or equal shares of all weights,
    ``OneShotPruning(0.0, of="share")``, which is what SparCL's FLOPs of PackNet assume.

    The paper starts from a network that was trained on ImageNet, and all tasks use its batch-norm as it is,
    ``TaskSubnetworks("frozen")``; here the first task trains the network, and each task has its own batch-norm and
    biases unless told otherwise, which helps later tasks. The released code keeps the epoch that is best on test data;
    here the last one is kept. The code's learning rate is 0.001, a tenth of that after 10 of 20 epochs, and 0.0001 in
    the 10 epochs of retraining: policy ``TaskLRSchedule``.

    After ``Reopen("zero")`` a unit whose inputs and outputs are all free has no gradient on either side, and stays dead
    unless its bias or batch-norm lets something through. ``Reopen("random")`` draws free weights anew.

    Args:
        backbone: maps a batch of samples, such as images (B, C, H, W), to features (B, D).
        pruning: when and how much. If None, half of what is free, and a task's last three epochs retrain it. Keep the
            head dense: ``dense=["head.weight"]``.
        subnetworks: how tasks are kept apart. If None, each has its own batch-norm.
        reopen: where free weights start from. If None, zero.
        objective: if None, cross-entropy among the task's classes.
        update: if None, one backward pass.
        optimizer: if None, SGD with learning rate 0.01 and momentum 0.9.
        policies: further callbacks.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pruning: OneShotPruning | None = None,
        subnetworks: TaskSubnetworks | None = None,
        reopen: Reopen | None = None,
        objective: Objective | None = None,
        update: UpdateRule | None = None,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        policies: Sequence[pl.Callback] = (),
    ) -> None:
        pruning = pruning or OneShotPruning(0.5, retrain=3, last=False, dense=["head.weight"])
        super().__init__(
            backbone,
            objective or CrossEntropy(single_head=True),
            update,
            optimizer or partial(SGD, lr=0.01, momentum=0.9),
            policies=[pruning, subnetworks or TaskSubnetworks(), reopen or Reopen("zero"), *policies],
        )
