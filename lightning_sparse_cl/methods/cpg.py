"""CPG: compacting, picking and growing (Hung et al., 2019)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lightning_sparse_cl.callbacks.compact_pick_grow import CompactPickGrow
from lightning_sparse_cl.callbacks.pruning import Reopen
from lightning_sparse_cl.callbacks.subnetworks import TaskSubnetworks
from lightning_sparse_cl.methods.isolation import IsolatingModule
from lightning_sparse_cl.nests import Nest
from lightning_sparse_cl.objectives.base import CrossEntropy, Objective
from lightning_sparse_cl.optim.sam import UpdateRule
from lightning_sparse_cl.sparsity.masks import Masks
from lightning_sparse_cl.sparsity.weight_scores import WeightScores


class CPG(IsolatingModule):
    """ "Compacting, Picking and Growing for Unforgetting Continual Learning"::

        pick     old weights, m = 1[r > 0.005], r = 0.01 at first   picks = WeightScores(threshold, init)
                 train the free weights and r                       stages = CompactPickGrow(target, learn)
        grow     if the target accuracy is missed, and start over      "   (sizes)
        compact  prune step by step while the target is reached        "   (compact, steps, ramp)
        retrain  what is left, and r anew                              "   (retrain)
                 weights stay for ever, and may be picked           subnetworks = TaskSubnetworks

    ``backbone`` is the network at its largest size, 1.5 times the weights of the first one in the paper.

    Pruned weights are zero at once; in the released code they act in training until the epoch is over. The code decides
    by accuracies on the test data, here those on held-out samples. After retraining the best network seen is kept; the
    released code compares only with the network whose picks were just reset.

    Args:
        backbone: maps a batch of samples, such as images (B, C, H, W), to features (B, D). It must be possible to
            follow channels through it.
        stages: the target and the stages of a task.
        subnetworks: how tasks are kept apart. If None, each has its own batch-norm, and tasks that find no free weight
            pick among old ones.
        reopen: where free weights start from. If None, zero.
        objective: if None, cross-entropy among the task's classes.
        update: if None, one backward pass.
        optimizer: for the weights. If None, SGD with learning rate 0.01, Nesterov's momentum 0.9, weight decay 4e-5.
        mask_optimizer: for the scores. If None, Adam with learning rate 0.0005.
        policies: further callbacks.
    """

    masks_are_learnt = True

    def __init__(
        self,
        backbone: nn.Module,
        stages: CompactPickGrow,
        subnetworks: TaskSubnetworks | None = None,
        reopen: Reopen | None = None,
        objective: Objective | None = None,
        update: UpdateRule | None = None,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        mask_optimizer: Callable[[Iterable], Optimizer] | None = None,
        policies: Sequence[pl.Callback] = (),
    ) -> None:
        if not isinstance(stages, CompactPickGrow):
            raise ValueError(f"CPG(stages={stages!r}): a CompactPickGrow")
        super().__init__(
            backbone,
            objective or CrossEntropy(single_head=True),
            update,
            optimizer or partial(SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=4e-5),
            policies=[reopen or Reopen("zero"), stages, subnetworks or TaskSubnetworks(full="share"), *policies],
        )
        self.stages = stages
        self.mask_optimizer = mask_optimizer or partial(Adam, lr=0.0005)
        self.picks = WeightScores(threshold=0.005, init=0.01, anew=True)

    def build(
        self, layout: Nest, num_classes: int, seed: int = 0, inputs: Nest | None = None, target: str = "classes",
        labels: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().build(layout, num_classes, seed, inputs, target, labels)
        self.picks.build(self.network, seed)

    def effective_weights(self) -> dict[str, Tensor]:
        """Old weights times their picks."""
        masks = Masks.of(self)
        if not masks.frozen:
            return {}
        weights = {name: self.get_parameter(name) for name in self.picks.names}
        return {
            name: torch.where(masks.frozen_part(name), weights[name] * pick, weights[name])
            for name, pick in self.picks.masks().items()
        }

    def idle(self) -> list[nn.Parameter]:
        """The scores, while there are no old weights to pick."""
        return [] if Masks.of(self).frozen else list(self.picks.scores)

    def whole_gradients(self) -> list[str]:
        """While picks are learnt, the gradients of old weights are taken, too."""
        return self.picks.names if Masks.of(self).frozen and self.stages.picks_learn else []

    def task_masks(self) -> dict[str, Tensor]:
        """The task's own weights, and the old ones that it has picked."""
        masks = Masks.of(self)
        alive, picks = masks.alive, self.picks.masks()
        return {name: alive[name] & (~masks.frozen_part(name) | (picks[name] > 0)) for name in alive if name in picks}

    def configure_optimizers(self) -> list[Optimizer]:
        """One optimiser for the weights, one for the scores."""
        weights = [p for n, p in self.named_parameters() if not n.startswith("picks.")]
        return [self.optimizer(weights), self.mask_optimizer(self.picks.parameters())]
