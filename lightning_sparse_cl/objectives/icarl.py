"""iCaRL: incremental classifier and representation learning (Rebuffi et al., 2017)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.nests import Nest, joined, rows
from lightning_sparse_cl.objectives.base import Learner, Terms, head_of
from lightning_sparse_cl.objectives.features import features_of
from lightning_sparse_cl.objectives.memory import BalancedMemory, Exemplars
from lightning_sparse_cl.objectives.replay import Replay
from lightning_sparse_cl.objectives.teacher import Teacher


class ICaRL(Replay):
    """Exemplars by herding, distillation, and classification by the nearest mean of exemplars.

    Every class has a sigmoid output; L is the binary cross-entropy, averaged over the classes seen so far (Algorithm 3;
    the authors' code includes those of all tasks to come, with target 0: ``over="all"``)::

        over the task's classes: target 1 for the label, else 0;  over the other old ones: target sigmoid(teacher(x))

    The teacher is the network at the last task's end. At a task's end each class keeps the exemplars whose running mean
    stays closest to the class mean (Algorithm 4); features have length one. An image belongs to the class whose
    exemplars' mean mu, also of length one, is nearest (Algorithm 1), i.e. has the largest product with the features:
    these products are the logits in eval mode.

    The paper and the released code mix exemplars into the training set; here each step draws ``replay_batch_size``
    of them as in ER, which is a larger part, and both parts of the batch count the same.

    Args:
        memory: number of exemplars, at least as many as there are classes.
        replay_batch_size: number of exemplars replayed in each step.
        over: ``"seen"`` for the mean over the classes seen so far, ``"all"`` for all classes of the sequence.

    Raises:
        ValueError: if ``memory`` is smaller than the number of classes, or ``over`` is neither.
    """

    trains_head = False
    memory: BalancedMemory
    old: Tensor
    """Which classes (num_classes,) earlier tasks have had."""
    elsewhere: Tensor
    """Which of the old classes are not in the running task."""
    seen: Tensor
    """Which classes have occurred so far, including those of the running task."""
    means: Tensor
    """Mean feature (num_classes, D) of each old class's exemplars, of length one."""
    takes = ("classes",)

    def __init__(self, memory: int = 500, replay_batch_size: int = 32, over: Literal["seen", "all"] = "seen") -> None:
        super().__init__(BalancedMemory(memory, by="class"), replay_batch_size)
        if over not in ("seen", "all"):
            raise ValueError(f"ICaRL(over={over!r}): the loss is a mean over 'seen' or 'all' classes")
        self.over = over
        self.teacher = Teacher()

    def build(self, network: nn.Module, layout: Nest, seed: int) -> None:
        classes, width = head_of(network).weight.shape
        self.memory.room_for(classes, self)
        super().build(network, layout, seed)
        self.teacher.build(network)
        self.register_buffer("old", torch.zeros(classes, dtype=torch.bool))
        self.register_buffer("elsewhere", torch.zeros(classes, dtype=torch.bool))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))
        self.register_buffer("means", torch.zeros(classes, width))

    def on_task_start(self, trainer: Any, pl_module: Any, task: int) -> None:
        live = trainer.datamodule.live().to(self.seen.device)
        self.seen |= live
        self.elsewhere.copy_(self.old & ~live)

    def forward(self, model: Learner, x: Nest, y: Tensor, replay: list[Exemplars] | None) -> Terms:
        (drawn,) = replay or (Exemplars(rows(x, slice(0)), y[:0], y[:0]),)
        everything, labels = joined([x, drawn.inputs]), torch.cat([y, drawn.labels])
        logits = model(everything)
        target = F.one_hot(labels, logits.shape[1]).to(logits)
        if self.tasks:
            target = torch.where(self.elsewhere, self.teacher(everything).to(logits).sigmoid(), target)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        if self.over == "seen":
            loss = loss * self.seen / self.seen.float().mean()
        current, replayed = loss.mean(1).split([len(y), len(drawn.labels)])
        rest = replayed.mean() if len(replayed) else logits.new_zeros(())
        return {"per_sample": current, "rest": rest, "logits": logits[: len(y)], "replayed": [replayed.detach()]}

    def classify(self, head: nn.Linear, features: Tensor) -> Tensor:
        if not self.tasks:
            return super().classify(head, features)
        with torch.autocast(features.device.type, enabled=False):  # rounding would make close unit vectors equal
            nearness = F.normalize(features.float()) @ self.means.float().T
        return nearness.masked_fill(~self.old, -torch.inf)

    def classifier(self, head: nn.Linear) -> tuple[nn.Module, list[int] | None]:
        if not self.tasks:
            return super().classifier(head)
        return NearestMean(self.means[self.old]), self.old.nonzero().squeeze(1).tolist()

    def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
        held = self.memory.contents()
        raw, labels = trainer.datamodule.stored()
        everything = Exemplars(
            joined([held.inputs, raw]), torch.cat([held.labels, labels]),
            torch.cat([held.tasks, torch.full_like(labels, task)]),
        )  # fmt: skip
        features = F.normalize(features_of(pl_module.backbone, everything.inputs, trainer.datamodule.prepare))
        new = trainer.datamodule.live().to(labels.device)[everything.labels]
        order, at = [(~new).nonzero().squeeze(1)], torch.arange(len(new), device=new.device)
        most = -(-self.memory.size // int(self.seen.sum()))
        for c in labels.unique():
            of_class = at[everything.labels == c]
            order.append(of_class[herding(features[of_class], min(len(of_class), most))])
        kept = torch.cat(order)
        self.memory.fill(everything.at(kept))
        self._average(pl_module, trainer.datamodule)
        self.teacher.take(pl_module.network)
        self.old.copy_(self.seen)
        super().on_task_end(trainer, pl_module, task)

    def _average(self, model: Learner, data: TaskDataModule) -> None:
        """The mean feature of each class's exemplars, of length one."""
        held = self.memory.contents()
        features = F.normalize(features_of(model.backbone, held.inputs, data.prepare))
        sums = features.new_zeros(self.means.shape).index_add_(0, held.labels, features)
        self.means.copy_(F.normalize(sums))


class NearestMean(nn.Module):
    """Features (B, D), scaled to length one, times the means (C, D) of classes: the nearest has the largest product."""

    def __init__(self, means: Tensor) -> None:
        super().__init__()
        self.means = nn.Linear(means.shape[1], len(means), bias=False)
        self.means.weight.data = means.detach().clone()

    def forward(self, features: Tensor) -> Tensor:
        return self.means(F.normalize(features))


def herding(features: Tensor, count: int) -> Tensor:
    """Indices (count,) of features (n, D), chosen one by one to keep their mean nearest to that of all (Alg 4)."""
    mean, total = features.mean(0), torch.zeros_like(features[0])
    taken = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    chosen = torch.empty(count, dtype=torch.long, device=features.device)
    for k in range(count):
        distance = (mean - (total + features) / (k + 1)).norm(dim=1)
        chosen[k] = distance.masked_fill(taken, torch.inf).argmin()
        taken[chosen[k]] = True
        total = total + features[chosen[k]]
    return chosen
