"""A loss that is not a number is an error that names its place."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


class FiniteLoss(pl.Callback):
    """Stop at a loss that is infinite or not a number; no checkpoint is written with such a loss or such weights.

    Nothing is read back from the device within a step: where the first such loss was is kept on the device and looked
    at, with the weights, before checkpoints and when an epoch's batches are over.

    Raises:
        ValueError: with task, epoch and step.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first = torch.full((), torch.iinfo(torch.int64).max, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._first = torch.where(loss.isfinite(), self._first, self._first.clamp_max(trainer.global_step))
        if trainer.is_last_batch:
            self._check(trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self._check(trainer, pl_module)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = torch.iinfo(torch.int64).max if self._first is None else int(self._first)
        weights = [p.detach() for p in pl_module.parameters()]
        if not torch.stack([n.isfinite() for n in torch._foreach_norm(weights)]).all():
            step = min(step, trainer.global_step)  # the update itself went wrong; the loss would show it next
        if trainer.strategy.reduce_boolean_decision(step <= trainer.global_step, all=False):
            task = getattr(trainer.datamodule, "task", 0)
            raise ValueError(
                "FiniteLoss: loss or weights are not finite any more: "
                f"task {task}, epoch {trainer.current_epoch}, step {min(step, trainer.global_step)}; "
                "checkpoints are from before that. A smaller learning rate may help"
            )
