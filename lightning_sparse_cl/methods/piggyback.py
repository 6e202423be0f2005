"""Piggyback: masks on the weights of a trained network, which stay as they are (Mallya et al., 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import lightning.pytorch as pl
from torch import nn
from torch.optim import Adam, Optimizer

from lightning_sparse_cl.callbacks.subnetworks import TaskSubnetworks
from lightning_sparse_cl.methods.scored import ScoredModule
from lightning_sparse_cl.objectives.base import CrossEntropy, Objective
from lightning_sparse_cl.optim.sam import UpdateRule
from lightning_sparse_cl.sparsity.scores import check_number
from lightning_sparse_cl.sparsity.subnetworks import Subnetworks
from lightning_sparse_cl.sparsity.weight_scores import WeightScores


class Piggyback(ScoredModule):
    """ "Piggyback: Adapting a Single Network to Multiple Tasks by Learning to Mask Weights"::

        W is a trained network; here the first task's, or ``pretrained``
        task t: r = 0.01 for each weight, m = 1[r > 0.005]         scores = WeightScores(threshold=0.005, init=0.01)
        L(f(m * W)); dL/dr = W dL/d(m W)                           sparsity/weight_scores.py
        a task is its mask: one bit per weight subnetworks = TaskSubnetworks(full="share")

    In the paper, W was trained on ImageNet and no task changes it. In a sequence that starts from nothing the first
    task trains all weights, which are fixed from then on; with ``pretrained`` it learns a mask, too. Tasks do not build
    on one another. Batch-norm and biases are the task's own (the paper's stay those of the trained network).

    All masks start with every weight on. Adam moves a score by at most its learning rate per step, so that no weight
    can be off before step 0.005 / lr: short tasks need a larger rate than the paper's 0.0001.

    Args:
        backbone: maps a batch of samples, such as images (B, C, H, W), to features (B, D).
        pretrained: whether ``backbone`` has been trained, so that the first task learns a mask only.
        threshold: scores above it are on.
        init: value that all scores start from.
        ternary: whether negative scores change the sign of their weight (the paper's other masks); two bits per weight.
        subnetworks: how tasks are kept apart. If None, each has its own batch-norm.
        objective: if None, cross-entropy among the task's classes.
        update: if None, one backward pass.
        optimizer: for the scores and everything else that is trained. If None, Adam with learning rate 0.001.
        policies: further callbacks.

    Raises:
        ValueError: if scores would start with all weights off, or ``subnetworks`` refuses tasks without free weights.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pretrained: bool = False,
        threshold: float = 0.005,
        init: float = 0.01,
        ternary: bool = False,
        subnetworks: TaskSubnetworks | None = None,
        objective: Objective | None = None,
        update: UpdateRule | None = None,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        policies: Sequence[pl.Callback] = (),
    ) -> None:
        subnetworks = subnetworks or TaskSubnetworks(full="share")
        if subnetworks.full == "error":
            raise ValueError(
                "Piggyback(subnetworks=TaskSubnetworks(full='error')): after the first task no weight is free; use "
                "'share'"
            )
        for name, value in (("pretrained", pretrained), ("ternary", ternary)):
            if not isinstance(value, bool):
                raise ValueError(f"Piggyback({name}={value!r}): {name} is True or False")
        check_number("Piggyback", "threshold", threshold)
        check_number("Piggyback", "init", init)
        if ternary and threshold <= 0:
            raise ValueError(f"Piggyback(threshold={threshold}, ternary=True): a positive threshold is needed")
        if not threshold < init < math.inf:
            raise ValueError(
                f"Piggyback(threshold={threshold}, init={init}): scores start above the threshold, with all weights "
                "on, and finite"
            )
        super().__init__(
            backbone,
            objective or CrossEntropy(single_head=True),
            update,
            optimizer or partial(Adam, lr=0.001),
            policies=[subnetworks, *policies],
            scores=WeightScores(threshold=threshold, init=init, anew=True, negates=ternary),
            fixed=pretrained,
        )
        self.pretrained = pretrained

    def learns_masks(self) -> bool:
        return self.pretrained or len(Subnetworks.of(self)) > 0
