"""NISPA: stable units keep what was learnt, plastic ones learn what comes (Gurbuz & Dovrolis, 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import lightning.pytorch as pl
from torch import nn
from torch.optim import Adam, Optimizer

from lightning_sparse_cl.callbacks.stable_units import StableUnits
from lightning_sparse_cl.callbacks.subnetworks import TaskSubnetworks
from lightning_sparse_cl.methods.isolation import IsolatingModule
from lightning_sparse_cl.objectives.base import CrossEntropy, Objective
from lightning_sparse_cl.optim.sam import UpdateRule


class NISPA(IsolatingModule):
    """ "NISPA: Neuro-Inspired Stability-Plasticity Adaptation for Continual Learning in Sparse Networks"::

        random connections, of fixed density                       units = StableUnits(sparsity)
        phase tau: train; stable units have the share p of the            "   (phase, phases)
        activity; plastic -> stable connections are rewired               "
        stop when accuracy falls; take the last phase back                "   (tolerance)
        stable -> stable connections stay, others start anew       subnetworks = TaskSubnetworks

    The released code has networks without batch-norm, and multiplies the logits of other classes by zero, so that they
    compete with those of the task; here they are left out. Each task has its own batch-norm and biases unless told
    otherwise. In the code the connections of the head are sparse, too; here a task's classes read all stable units. The
    code keeps the best epoch of a phase by validation, measures activity in training mode, and draws weights anew by
    ``kaiming_normal_``; here the last epoch is kept, activity is measured in eval mode, and weights have their layer's
    own initialisation.

    Adam 0.002, 90 % sparsity, phases of five epochs and a tolerance of 0.75 % are the settings of the code for CIFAR-10
    in five tasks. (EsaCL's table prints 57.36 % Task-IL for NISPA there; the result that NISPA's authors have released
    for the same split has a mean of 91.28 %.)

    Args:
        backbone: maps a batch of samples, such as images (B, C, H, W), to features (B, D). It must be possible to
            follow channels through it, see :class:`StableUnits`.
        units: how stable units are chosen. If None, the settings of the code for CIFAR-10.
        subnetworks: how tasks are kept apart. If None, each has its own batch-norm.
        objective: if None, cross-entropy among the task's classes.
        update: if None, one backward pass.
        optimizer: if None, Adam with learning rate 0.002.
        policies: further callbacks.
    """

    def __init__(
        self,
        backbone: nn.Module,
        units: StableUnits | None = None,
        subnetworks: TaskSubnetworks | None = None,
        objective: Objective | None = None,
        update: UpdateRule | None = None,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        policies: Sequence[pl.Callback] = (),
    ) -> None:
        if not isinstance(units, StableUnits | None):
            raise ValueError(f"NISPA(units={units!r}): a StableUnits, or None")
        super().__init__(
            backbone,
            objective or CrossEntropy(single_head=True),
            update,
            optimizer or partial(Adam, lr=0.002),
            policies=[units or StableUnits(0.9), subnetworks or TaskSubnetworks(), *policies],
        )
