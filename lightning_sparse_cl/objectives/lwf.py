"""Learning without forgetting (Li & Hoiem, 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse_cl.nests import Nest, rows
from lightning_sparse_cl.objectives.base import CrossEntropy, Learner, LooksBack, Terms, coefficient, head_of, positive
from lightning_sparse_cl.objectives.features import features_of, fit_head
from lightning_sparse_cl.objectives.teacher import Teacher


class LwF(LooksBack, CrossEntropy):
    """On new samples, keep the answers that the network gave for old classes::

        L = CE(x, y) + alpha * CE(softmax(teacher(x) / T), softmax(model(x) / T)),  both among the old classes

    The teacher is the network at the last task's end. It sees the same augmented samples as the network, at the cost of
    a forward pass. (The released code records its logits once per task, on images that are not normalised, and compares
    them with those of augmented ones.)

    Args:
        alpha: weight of the distillation.
        temperature: T.
        warmup: before a task, fit the head's new rows to the present features: the paper's first stage.
        single_head: see :class:`CrossEntropy`.

    Raises:
        ValueError: if ``alpha`` is negative or ``temperature`` not positive.
    """

    old: Tensor
    """Which classes (num_classes,) earlier tasks have had."""
    takes = ("classes",)
    reads_network = True

    def __init__(
        self, alpha: float = 3.0, temperature: float = 2.0, warmup: bool = True, single_head: bool = False
    ) -> None:
        super().__init__(single_head)
        self.alpha = coefficient(self, "alpha", alpha)
        self.temperature = positive(self, "temperature", temperature)
        self.warmup = warmup
        self.teacher = Teacher()

    def build(self, network: nn.Module, layout: Nest, seed: int) -> None:
        super().build(network, layout, seed)
        self.teacher.build(network)
        self.register_buffer("old", torch.zeros(head_of(network).out_features, dtype=torch.bool))

    def on_task_start(self, trainer: Any, pl_module: Any, task: int) -> None:
        super().on_task_start(trainer, pl_module, task)
        new = trainer.datamodule.live().to(self.old.device) & ~self.old
        if self.warmup and self.tasks and new.any():
            raw, labels = trainer.datamodule.stored()
            of_new = new[labels]
            fit_head(
                pl_module.head,
                features_of(pl_module.backbone, rows(raw, of_new), trainer.datamodule.prepare),
                labels[of_new],
                new,
            )

    def forward(self, model: Learner, x: Nest, y: Tensor, replay: Any) -> Terms:
        terms = super().forward(model, x, y, replay)
        if self.tasks and self.alpha:
            p = (self.teacher(x).float() / self.temperature).masked_fill(~self.old, -torch.inf).softmax(1)
            q = (terms["logits"].float() / self.temperature).masked_fill(~self.old, -torch.inf).log_softmax(1)
            terms["rest"] = -self.alpha * (p * q.masked_fill(~self.old, 0)).sum(1).mean()
        return terms

    def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
        self.teacher.take(pl_module.network)
        self.old |= trainer.datamodule.live().to(self.old.device)
        super().on_task_end(trainer, pl_module, task)
