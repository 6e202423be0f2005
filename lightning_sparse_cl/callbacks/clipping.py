"""Gradient clipping that also works under manual optimisation."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer


class GradientClipping(pl.Callback):
    """Scale the gradient to a norm of at most ``max_norm``, over all parameters, before every optimiser step.

    Frank-Wolfe steps look at the order of magnitudes only, so that scaling changes what they accumulate.

    Args:
        max_norm: largest 2-norm, > 0.

    Raises:
        ValueError: if ``max_norm`` is not positive.
    """

    def __init__(self, max_norm: float) -> None:
        if not max_norm > 0:
            raise ValueError(f"GradientClipping(max_norm={max_norm}): the largest norm is > 0")
        self.max_norm = max_norm

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.max_norm)
