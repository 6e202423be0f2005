"""What a case of another package's module is, and the plain LightningModule around a network of another package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH, BATCHES = 4, 4
"""Samples of a batch, batches of an epoch."""


@dataclass(frozen=True)
class Case:
    """A module of another package, with random weights and data, and what is expected of policies on it."""

    name: str
    package: str
    """The distribution whose version the table names."""
    build: Callable[[], tuple[pl.LightningModule, Any]]
    """The module and the loader it is trained with; skips where the package is not installed."""
    loss: Callable[[pl.LightningModule, Any], Tensor] | None = None
    """Given to the policies that rank by a loss."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Words of the error with which a policy is refused, by its name; "*" stands for every policy."""
    is_copied: bool = True
    """Whether ``copy.deepcopy`` takes the module after a fit; torch refuses one that keeps losses with their graphs."""

    def words(self, policy: str) -> str | None:
        """The words with which the policy is refused. If it works, None."""
        return self.refused.get(policy, self.refused.get("*"))


class Supervised(pl.LightningModule):
    """A network and a loss of (output, target), as anybody would write it."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def classifier(model: nn.Module) -> Supervised:
    """With the cross-entropy."""
    return Supervised(model, nn.functional.cross_entropy)


def images(size: int, classes: int = 4, channels: int = 3) -> DataLoader:
    """Noise (N, channels, size, size) with class labels."""
    n = BATCH * BATCHES
    return DataLoader(
        TensorDataset(torch.randn(n, channels, size, size), torch.arange(n) % classes), batch_size=BATCH, shuffle=True
    )


def tensors(*columns: Tensor) -> DataLoader:
    """Batches of the given tensors, each (N, ...)."""
    return DataLoader(TensorDataset(*columns), batch_size=BATCH, shuffle=True)
