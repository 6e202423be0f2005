"""What every objective of continual learning offers: a loss, and a memory if it has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Terms = dict[str, Any]
"""``per_sample`` (B,): loss of each sample of the current batch; ``rest``: replay and penalty terms, a scalar;
``logits`` (B, C) of the current batch."""


class Objective(nn.Module):
    """Base of the objectives. State lives in buffers, which checkpoints hold.

    An objective is called once for every pass of a training step. What it draws at random for the step is drawn
    beforehand, by :meth:`draw`, so that both passes of SAM see the same.
    """

    def build(self, input_shape: Sequence[int], num_classes: int, seed: int, dtype: torch.dtype = torch.uint8) -> None:
        """Allocate what depends on the data: shape and type of a stored image, number of classes.

        Called once, before a checkpoint is restored.
        """

    replayed = 0
    """Exemplars of the last :meth:`draw`, for who counts what a step costs."""

    def draw(self, prepare: Callable[[Tensor], Tensor]) -> Any:
        """What the step replays, if anything; ``prepare`` augments and normalises stored images."""
        return None

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, replay: Any) -> Terms:
        """The loss terms of one pass.

        Args:
            model: maps images (B, C, H, W) to logits (B, num_classes).
            x: images of the current batch, or of the samples of it that the pass keeps.
            y: labels (B,).
            replay: what :meth:`draw` gave, or None to leave replay out.
        """
        raise NotImplementedError

    def observe(self, raw: Tensor, y: Tensor, logits: Tensor, task: int) -> None:
        """Called after the update with the whole batch as stored, and its logits from before the update."""

    def on_task_start(self, model: nn.Module, task: int, live: Tensor) -> None:
        """The first batch of ``task``, which has the classes ``live`` (num_classes,), comes next."""

    def on_task_end(self, model: nn.Module, task: int) -> None:
        """The last batch of ``task`` has been learnt, and the weights are pruned and frozen."""


class CrossEntropy(Objective):
    """Cross-entropy on the current batch and nothing else: fine-tuning.

    Args:
        single_head: only the current task's classes compete in the loss of the current batch. Old classes are then
            not pushed down by it, which counters the bias towards recent ones. SparCL's code trains so (with replay
            among all classes); its paper, DER++ and ER do not say it.
    """

    def __init__(self, single_head: bool = False) -> None:
        super().__init__()
        self.single_head = single_head

    def build(self, input_shape: Sequence[int], num_classes: int, seed: int, dtype: torch.dtype = torch.uint8) -> None:
        if self.single_head:
            self.register_buffer("live", torch.ones(num_classes, dtype=torch.bool))

    def on_task_start(self, model: nn.Module, task: int, live: Tensor) -> None:
        if self.single_head:
            self.live.copy_(live)

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, replay: Any) -> Terms:
        logits = model(x)
        return {"per_sample": self.current_loss(logits, y), "rest": logits.new_zeros(()), "logits": logits}

    def current_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Loss (B,) of the current batch's samples from logits (B, C) and labels (B,)."""
        if self.single_head:
            logits = logits.masked_fill(~self.live, -torch.inf)
        return F.cross_entropy(logits, y, reduction="none")


def coefficient(owner: object, name: str, value: float) -> float:
    """A loss coefficient, checked. Raises ValueError if negative."""
    if not value >= 0:
        raise ValueError(f"{type(owner).__name__}({name}={value}): a loss coefficient is >= 0")
    return value
