"""WSN: winning subnetworks, whose masks and weights are learnt together (Kang et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import lightning.pytorch as pl
from torch import nn
from torch.optim import Adam, Optimizer

from lightning_sparse_cl.callbacks.subnetworks import TaskSubnetworks
from lightning_sparse_cl.methods.scored import ScoredModule
from lightning_sparse_cl.objectives.base import CrossEntropy, Objective
from lightning_sparse_cl.optim.sam import UpdateRule
from lightning_sparse_cl.sparsity.weight_scores import WeightScores


class WSN(ScoredModule):
    """ "Forget-free Continual Learning with Winning Subnetworks"::

        m = 1 at the c n largest scores |s| of each layer          scores = WeightScores(keep=c)
        L(f(m * w)); dL/ds = sign(s) w dL/d(m w)                   sparsity/weight_scores.py
        w and s are learnt together, by one optimiser              optimizer
        weights of earlier tasks stay, and may be used             subnetworks = TaskSubnetworks

    Scores are not drawn anew for a task: it begins with the last one's subnetwork, and so shares much of it. Exactly
    ``round(c n)`` weights are kept of each layer (the released code keeps one more). The task's mask is the one of its
    last scores, not of the scores before the last step. The code's batch-norm has no parameters and no statistics, so
    that logits depend on the other samples of a test batch; here each task has its own. The head is dense, and its rows
    of a task's classes are the task's own, as biases are (there heads are masked, and there are no biases).

    Args:
        backbone: maps a batch of samples, such as images (B, C, H, W), to features (B, D).
        keep: c, the fraction of each layer's weights in a subnetwork, in (0, 1].
        subnetworks: how tasks are kept apart. If None, each has its own batch-norm.
        objective: if None, cross-entropy among the task's classes.
        update: if None, one backward pass.
        optimizer: for weights and scores. If None, Adam with learning rate 0.001.
        policies: further callbacks.

    Raises:
        ValueError: if ``keep`` is out of range, or keeps no weight of a layer.
    """

    def __init__(
        self,
        backbone: nn.Module,
        keep: float = 0.5,
        subnetworks: TaskSubnetworks | None = None,
        objective: Objective | None = None,
        update: UpdateRule | None = None,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        policies: Sequence[pl.Callback] = (),
    ) -> None:
        super().__init__(
            backbone,
            objective or CrossEntropy(single_head=True),
            update,
            optimizer or partial(Adam, lr=0.001),
            policies=[subnetworks or TaskSubnetworks(), *policies],
            scores=WeightScores(keep),
        )
