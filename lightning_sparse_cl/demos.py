"""Toy tasks and a stock LightningModule, for the README, notebooks and tests."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse_cl.data import SplitTensors


def toy_tasks(num_tasks: int = 3, per_class: int = 40, size: int = 8, **kwargs: Any) -> SplitTensors:
    """Tasks of two classes each: noisy images (1, size, size) around a random prototype per class.

    Args:
        num_tasks: number of tasks.
        per_class: training samples per class; there are half as many test samples.
        size: side of an image.
        **kwargs: those of :class:`~lightning_sparse_cl.TaskDataModule`.
    """
    generator = torch.Generator().manual_seed(0)
    classes = 2 * num_tasks
    prototypes = torch.rand(classes, 1, size, size, generator=generator)

    def sample(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(classes).repeat_interleave(n)
        noise = torch.rand(len(labels), 1, size, size, generator=generator)
        return (255 * (0.7 * prototypes[labels] + 0.3 * noise)).byte(), labels

    return SplitTensors(sample(per_class), sample(per_class // 2), num_tasks=num_tasks, **({"batch_size": 16} | kwargs))


class PlainClassifier(pl.LightningModule):
    """A LightningModule with automatic optimisation that knows nothing of this package."""

    def __init__(self, classes: int = 6, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
