"""Co2L: contrastive continual learning (Cha et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse_cl.nests import Nest, each, joined, rows, stacked
from lightning_sparse_cl.objectives.base import Learner, Terms, coefficient, head_of, positive
from lightning_sparse_cl.objectives.features import features_of, fit_head
from lightning_sparse_cl.objectives.memory import BalancedMemory, Exemplars
from lightning_sparse_cl.objectives.replay import Replay
from lightning_sparse_cl.objectives.teacher import Teacher


class CO2L(Replay):
    """Contrastive features that keep their relations, and a linear classifier fitted at each task's end.

    With z the projected features, of length one, of two views of each sample in the batch and each exemplar::

        L_asym = - 1/|S| sum_{i in S} 1/|P(i)| sum_{p in P(i)} log softmax_{k != i}(z_i z_k / tau)_p      (eq 3)
        L_IRD  = - 1/N sum_i sum_{j != i} softmax_j(z*_i z*_j / kappa*) log softmax_j(z_i z_j / kappa)    (eqs 4-6)
        L      = L_asym + alpha * L_IRD

    Anchors S are the views of the current batch only; P(i) are the other views with the label of i; z* are the z of the
    network at the last task's end. (The released code divides L_asym by the number of all views, exemplars included,
    which scales it by the share of the current ones.)

    The head does not shape the features: while the task runs it learns by a cross-entropy that passes no gradient to
    the backbone, so that there are logits to rank samples or weights by. At the task's end it is fitted anew to the
    memory and the last task, with equal weights for all classes.

    Args:
        memory: number of exemplars, at least as many as there are classes; equal shares per class, drawn at random.
        replay_batch_size: number of exemplars replayed in each step, two views of each.
        alpha: weight of the relation distillation L_IRD, the paper's lambda.
        temperature: tau.
        teacher_temperature: kappa*, for the earlier network's relations.
        student_temperature: kappa, for the present ones.
        dim: size of the projections z.

    Raises:
        ValueError: if a coefficient is negative, a temperature not positive, or the memory smaller than the number of
            classes.
    """

    trains_head = False
    views = 2
    ranks_replay = False  # in L_asym exemplars are contrasts, not anchors; L_IRD relates all of them
    memory: BalancedMemory
    seen: Tensor
    """Which classes (num_classes,) have occurred so far."""
    takes = ("classes",)

    def __init__(
        self,
        memory: int = 500,
        replay_batch_size: int = 32,
        alpha: float = 1.0,
        temperature: float = 0.5,
        teacher_temperature: float = 0.01,
        student_temperature: float = 0.2,
        dim: int = 128,
    ) -> None:
        super().__init__(BalancedMemory(memory, by="class"), replay_batch_size)
        self.alpha = coefficient(self, "alpha", alpha)
        self.temperature = positive(self, "temperature", temperature)
        self.teacher_temperature = positive(self, "teacher_temperature", teacher_temperature)
        self.student_temperature = positive(self, "student_temperature", student_temperature)
        self.dim = positive(self, "dim", dim)
        self.teacher = Teacher()

    def build(self, network: nn.Module, layout: Nest, seed: int) -> None:
        head = head_of(network)
        classes, width = head.weight.shape
        self.memory.room_for(classes, self)
        super().build(network, layout, seed)
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.dim))
        self.projection.to(head.weight.dtype)
        self.teacher.build(nn.Sequential(network.get_submodule("backbone"), self.projection))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))

    def draw(self, prepare: Callable[[Nest], Nest]) -> list[Exemplars] | None:
        return super().draw(lambda stored: stacked([prepare(stored), prepare(stored)]))

    def forward(self, model: Learner, x: Nest, y: Tensor, replay: list[Exemplars] | None) -> Terms:
        """The tensors of ``x`` are (B, 2, ...)."""
        (drawn,) = replay or (Exemplars(rows(x, slice(0)), y[:0], y[:0]),)
        labels = torch.cat([y, drawn.labels])
        views = each(lambda both: both.transpose(0, 1).flatten(0, 1), joined([x, drawn.inputs]))  # first views first
        _, features = model(views, features=True)
        z = F.normalize(self.projection(features).float())
        contrast = supervised_contrast(z, labels.repeat(2), self.temperature).view(2, -1).mean(0)
        logits = model.head(features.detach())
        rest = F.cross_entropy(logits, labels.repeat(2))
        if self.tasks and replay is not None:
            before = F.normalize(self.teacher(views).float())
            rest = rest + self.alpha * relation_distance(z, before, self.student_temperature, self.teacher_temperature)
        return {"per_sample": contrast[: len(y)], "rest": rest, "logits": logits[: len(y)]}

    def on_task_start(self, trainer: Any, pl_module: Any, task: int) -> None:
        self.seen |= trainer.datamodule.live().to(self.seen.device)

    def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
        self.teacher.take(nn.Sequential(pl_module.backbone, self.projection))
        raw, labels = trainer.datamodule.stored()
        held = self.memory.contents()
        features = features_of(pl_module.backbone, joined([held.inputs, raw]), trainer.datamodule.prepare)
        fit_head(pl_module.head, features, torch.cat([held.labels, labels]), self.seen)
        generator = torch.Generator().manual_seed(self.memory.seed + task)
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        self.memory.admit(rows(raw, order), labels[order], task)
        super().on_task_end(trainer, pl_module, task)


def supervised_contrast(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss (N,) of each anchor, from z (N, D) of length one and labels (N,); eq 3's inner sum.

    An anchor without another sample of its label has loss zero.
    """
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = (_products(z) / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    same = (labels == labels[:, None]) & ~itself
    return -log_p.masked_fill(~same, 0).sum(1) / same.sum(1).clamp_min(1)


def relation_distance(z: Tensor, before: Tensor, student: float, teacher: float) -> Tensor:
    """Instance-wise relation distillation: cross-entropy of similarities among z (N, D) to those ``before`` (N, D)."""
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    p = (_products(before) / teacher).masked_fill(itself, -torch.inf).softmax(1)
    log_q = (_products(z) / student).masked_fill(itself, -torch.inf).log_softmax(1)
    return -(p * log_q.masked_fill(itself, 0)).sum(1).mean()


def _products(z: Tensor) -> Tensor:
    """Products of all pairs, in full precision: divided by a temperature of 0.01 they are large."""
    with torch.autocast(z.device.type, enabled=False):
        return z.float() @ z.float().T
