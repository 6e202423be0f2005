"""Function distance regularisation (Benjamin et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sparse_cl.backbones.batch_norm import in_eval
from lightning_sparse_cl.nests import split
from lightning_sparse_cl.objectives.base import coefficient
from lightning_sparse_cl.objectives.memory import BalancedMemory, Exemplars
from lightning_sparse_cl.objectives.replay import Replay

ROUNDING = 1e-6
"""Smaller distances are float32 rounding, as at a task's start without augmentation: their gradient is noise."""


class FDR(Replay):
    """Hold the function where earlier tasks left it: L = CE(x, y) + alpha * E ||softmax(z) - softmax(z*)||_2.

    z* are the logits of an exemplar at the end of its task, in eval mode, not augmented; every task has an equal share
    of the memory, drawn at random. (The released code takes two optimiser steps per batch and does not use its alpha.)

    Args:
        memory: number of exemplars.
        replay_batch_size: number of exemplars replayed in each step.
        alpha: weight of the distance.
        single_head: see :class:`CrossEntropy`.
        forward: see :class:`Replay`.

    Raises:
        ValueError: if ``alpha`` is negative, or there are more tasks than exemplars.
    """

    keeps_logits = True
    memory: BalancedMemory
    takes = ("classes",)

    def __init__(
        self,
        memory: int = 500,
        replay_batch_size: int = 32,
        alpha: float = 0.3,
        single_head: bool = False,
        forward: Literal["separate", "joint"] = "separate",
    ) -> None:
        super().__init__(BalancedMemory(memory, by="task"), replay_batch_size, single_head, forward)
        self.alpha = coefficient(self, "alpha", alpha)

    def replay_losses(self, logits: Sequence[Tensor], replay: Sequence[Exemplars]) -> list[Tensor]:
        stored = replay[0].logits
        assert stored is not None  # keeps_logits
        apart = torch.linalg.vector_norm(logits[0].float().softmax(1) - stored.softmax(1), dim=1)
        return [self.alpha * apart.where(apart > ROUNDING, 0)]

    def on_task_start(self, trainer: Any, pl_module: Any, task: int) -> None:
        super().on_task_start(trainer, pl_module, task)
        self.memory.room_for(trainer.datamodule.num_tasks, self)

    @torch.no_grad()
    def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
        raw, labels = trainer.datamodule.stored(self.memory.size)
        with in_eval(pl_module):
            logits = torch.cat([pl_module(trainer.datamodule.prepare(x, augment=False)) for x in split(raw, 256)])
        self.memory.admit(raw, labels, task, logits)
