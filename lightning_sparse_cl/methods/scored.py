"""Base of the methods that learn a score for each weight, and make masks of the scores."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_sparse_cl.callbacks.subnetworks import FromScratch, TaskSubnetworks
from lightning_sparse_cl.methods.isolation import IsolatingModule
from lightning_sparse_cl.nests import Nest
from lightning_sparse_cl.sparsity.weight_scores import WeightScores


class ScoredModule(IsolatingModule):
    """An :class:`IsolatingModule` whose tasks learn masks by :class:`WeightScores`.

    While a task trains, all weights are multiplied, whatever their masks are, and FLOPs are counted accordingly.

    Args:
        *args: see :class:`IsolatingModule`.
        scores: the scores.
        fixed: whether the weights that have scores are never trained; they then require no gradient.
        **kwargs: see :class:`IsolatingModule`.

    Raises:
        ValueError: if each task is to have a whole copy of the network, or to start from scratch.
    """

    masks_are_learnt = True

    def __init__(self, *args: Any, scores: WeightScores, fixed: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if any(isinstance(p, TaskSubnetworks) and not p.share for p in self.policies):
            raise ValueError(
                f"{type(self).__name__}(subnetworks=TaskSubnetworks(share=False)): its tasks are masks on weights that "
                "they share; leave share=False out"
            )
        if any(isinstance(p, FromScratch) for p in self.policies):
            raise ValueError(
                f"{type(self).__name__}(policies=[..., FromScratch()]): its tasks share weights, which are not drawn "
                "anew; leave FromScratch out"
            )
        self.scores, self.fixed = scores, fixed

    def build(
        self, layout: Nest, num_classes: int, seed: int = 0, inputs: Nest | None = None, target: str = "classes",
        labels: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().build(layout, num_classes, seed, inputs, target, labels)
        network = self.network
        self.scores.build(network, seed)
        for name in self.scores.names if self.fixed else ():
            network.get_parameter(name).requires_grad_(False)

    def learns_masks(self) -> bool:
        """Whether the running task learns masks; if not, it uses all weights."""
        return True

    def learns_scores(self) -> bool:
        """Whether the scores are learnt now; if not, the task's masks stay as they are."""
        return True

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        super().on_task_start(trainer, pl_module, task)
        self.scores.begin(task)

    def idle(self) -> list[nn.Parameter]:
        """The scores, while they are not learnt."""
        return [] if self.learns_masks() and self.learns_scores() else list(self.scores.scores)

    def whole_gradients(self) -> list[str]:
        """Weights whose gradient is taken in every step, whether they are trained or not: their scores need it."""
        return self.scores.names if self.learns_masks() and self.learns_scores() else []

    def effective_weights(self) -> dict[str, Tensor]:
        """Weights times masks."""
        return self.scores.weights(self.network, self.learns_scores()) if self.learns_masks() else {}

    def task_masks(self) -> dict[str, Tensor]:
        """The masks that the running task has learnt."""
        if not self.learns_masks():
            return {}
        return {name: mask != 0 for name, mask in self.scores.masks().items()}

    def task_negated(self) -> dict[str, Tensor]:
        """Where the running task changes the signs of weights."""
        if not self.learns_masks() or not self.scores.negates:
            return {}
        return {name: mask < 0 for name, mask in self.scores.masks().items()}
