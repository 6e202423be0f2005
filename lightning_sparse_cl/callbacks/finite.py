"""Turns a loss that is not finite into an error that says where it occurred."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_sparse_cl.callbacks.trainer_parts import parts_of

EVERY = 1000
"""Steps between checks, unless a checkpoint or an epoch's end comes first."""


class FiniteLoss(pl.Callback):
    """Stop at a loss that is infinite or not a number; no checkpoint is written with such a loss or such weights.

    Nothing is read back from the device within a step: losses are collected there and checked, with the weights, before
    checkpoints, when an epoch's batches are over, and every 1,000 steps.

    Raises:
        ValueError: naming task, epoch and step.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[int, Tensor]] = []  # with their steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._losses = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._losses.append((trainer.global_step, loss.detach()))
        if trainer.is_last_batch or (batch_idx + 1) % EVERY == 0:
            self._check(trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self._check(trainer, pl_module)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        wrong = []
        if self._losses:
            steps, losses = zip(*self._losses, strict=True)
            finite = torch.stack(losses).isfinite().tolist()
            wrong = [step for step, fine in zip(steps, finite, strict=True) if not fine]
        weights = [p.detach() for p in pl_module.parameters()]
        if not torch.stack([n.isfinite() for n in torch._foreach_norm(weights)]).all():
            wrong.append(trainer.global_step)  # the update itself went wrong, as the next loss would show
        if trainer.strategy.reduce_boolean_decision(bool(wrong), all=False):
            task = getattr(parts_of(trainer).datamodule, "task", 0)
            raise ValueError(
                "FiniteLoss: loss or weights are no longer finite: "
                f"task {task}, epoch {trainer.current_epoch}, step {min(wrong, default=trainer.global_step)}; "
                "checkpoints are from before that. A smaller learning rate may help"
            )
        self._losses = []
