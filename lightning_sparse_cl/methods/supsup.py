"""SupSup: supermasks in superposition, subnetworks of a network that is never trained (Wortsman et al., 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_sparse_cl.callbacks.schedule import position
from lightning_sparse_cl.callbacks.subnetworks import TaskSubnetworks
from lightning_sparse_cl.callbacks.train_free_weights import TrainFreeWeights
from lightning_sparse_cl.methods.scored import ScoredModule
from lightning_sparse_cl.nests import Nest
from lightning_sparse_cl.objectives.base import CrossEntropy, Objective
from lightning_sparse_cl.optim.sam import UpdateRule
from lightning_sparse_cl.sparsity.scores import check_number
from lightning_sparse_cl.sparsity.weight_scores import WeightScores


class SupSup(ScoredModule):
    """ "Supermasks in Superposition"::

        W = sign(w) sqrt(2 / fan_in), never trained                ``signed_constants``
        task t: scores of its own, m = 1 at the largest |s|        scores = WeightScores(keep, anew=True)
        L(f(m * W)); dL/ds = sign(s) W dL/d(m W)                   sparsity/weight_scores.py
        a task is its mask: one bit per weight subnetworks = TaskSubnetworks(full="share")

    Batch-norm, biases and the head's rows of a task's classes are trained, and the task's own (in the released code
    batch-norm has no parameters, and the head is a masked random layer that all tasks share). Each layer keeps the same
    fraction (there, more of small layers).

    Where the task is not known, it is inferred from the answers of all subnetworks, see :class:`TaskInference`; the
    paper's own rule is :class:`EntropyGradient`.

    With ``train_free``, once its mask is learnt, a task trains the weights in it that no earlier task uses, as in
    "Exclusive Supermask Subnetwork Training for Continual Learning" (ExSSNeT; Yadav & Bansal, 2023).

    Args:
        backbone: maps a batch of samples, such as images (B, C, H, W), to features (B, D). Its weights stay as they are
            drawn, except for their size.
        keep: fraction of each layer's weights in a task's mask, in (0, 1].
        signed_constants: whether all weights of a layer get the same magnitude, with the signs that they were drawn
            with. If False, they stay as they were drawn, or trained before.
        train_free: how many of a task's last epochs train weights. The other epochs learn the mask.
        subnetworks: how tasks are kept apart. If None, each has its own batch-norm.
        objective: if None, cross-entropy among the task's classes.
        update: if None, one backward pass.
        optimizer: for scores, batch-norm, biases and head. If None, Adam with learning rate 0.001.
        policies: further callbacks.

    Raises:
        ValueError: if ``keep`` is out of range, or keeps no weight of a layer, or ``subnetworks`` refuses tasks without
            free weights.
    """

    def __init__(
        self,
        backbone: nn.Module,
        keep: float = 0.5,
        signed_constants: bool = True,
        train_free: int = 0,
        subnetworks: TaskSubnetworks | None = None,
        objective: Objective | None = None,
        update: UpdateRule | None = None,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        policies: Sequence[pl.Callback] = (),
    ) -> None:
        subnetworks = subnetworks or TaskSubnetworks(full="share")
        if subnetworks.full == "error":
            raise ValueError("SupSup(subnetworks=TaskSubnetworks(full='error')): no weight is ever free; use 'share'")
        check_number("SupSup", "train_free", train_free, whole=True)
        if train_free < 0:
            raise ValueError(f"SupSup(train_free={train_free}): how many of a task's last epochs, at least 0")
        super().__init__(
            backbone,
            objective or CrossEntropy(single_head=True),
            update,
            optimizer or partial(Adam, lr=0.001),
            policies=[subnetworks, *([TrainFreeWeights(train_free)] if train_free else []), *policies],
            scores=WeightScores(keep, anew=True),
            fixed=not train_free,
        )
        self.signed_constants, self.train_free = signed_constants, train_free

    def learns_scores(self) -> bool:
        at = position(self.trainer) if self.train_free and self._trainer is not None else None
        return at is None or at.epoch < at.epochs - self.train_free

    @torch.no_grad()
    def build(
        self, layout: Nest, num_classes: int, seed: int = 0, inputs: Nest | None = None, target: str = "classes",
        labels: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().build(layout, num_classes, seed, inputs, target, labels)
        network = self.network
        for name in self.scores.names if self.signed_constants else ():
            weight = network.get_parameter(name)
            size = math.sqrt(2 / weight[0].numel())
            weight.copy_(torch.where(weight < 0, -size, size))
