"""torch and Lightning alone: two optimisers in manual optimisation, recurrent networks, regression."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from foreign.case import BATCH, BATCHES, Case, Supervised, classifier, tensors
from torch import Tensor, nn

N = BATCH * BATCHES


class GAN(pl.LightningModule):
    """As in Lightning's documentation of manual optimisation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
        self.discriminator = nn.Sequential(
            nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1)
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def losses(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """Of the discriminator and of the generator."""
        fake = self(torch.randn(len(real), 8, device=real.device))
        right, wrong = self.discriminator(real), self.discriminator(fake.detach())
        bce = nn.functional.binary_cross_entropy_with_logits
        d = bce(right, torch.ones_like(right)) + bce(wrong, torch.zeros_like(wrong))
        return d, bce(self.discriminator(fake), torch.ones_like(right))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (real,) = batch
        g_opt, d_opt = self.optimizers()
        self.toggle_optimizer(d_opt)
        d_loss, _ = self.losses(real)
        d_opt.zero_grad()
        self.manual_backward(d_loss)
        d_opt.step()
        self.untoggle_optimizer(d_opt)
        self.toggle_optimizer(g_opt)
        _, g_loss = self.losses(real)
        g_opt.zero_grad()
        self.manual_backward(g_loss)
        g_opt.step()
        self.untoggle_optimizer(g_opt)
        self.log_dict({"g_loss": g_loss, "d_loss": d_loss})

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=1e-3),
            torch.optim.Adam(self.discriminator.parameters(), lr=1e-3),
        ]


class Recurrent(nn.Module):
    """Words, a recurrent layer, the mean over time, classes."""

    def __init__(self, layer: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.layer = layer(16, 24, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(48, 4)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(words))[0].mean(1))


def _recurrent(layer):
    return classifier(Recurrent(layer)), tensors(torch.randint(50, (N, 6)), torch.arange(N) % 4)


def _regression():
    mlp = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    x = torch.randn(N, 10)
    return Supervised(mlp, nn.functional.mse_loss), tensors(x, x[:, :3] * math.pi)


def _gan():
    return GAN(), tensors(torch.randn(N, 16))


NO_LOSS = "GAN optimises by itself, so its training_step cannot be asked for a loss alone; give"

CASES = [
    Case("LSTM classifier", "torch", lambda: _recurrent(nn.LSTM)),
    Case("GRU classifier", "torch", lambda: _recurrent(nn.GRU)),
    Case("regression, targets (N, 3)", "torch", _regression),
    Case(
        "GAN, two optimisers",
        "lightning",
        _gan,
        refused={
            name: NO_LOSS
            for name in (
                "SNIP",
                "TaskAwareDynamicMasking",
                "DynamicGradientMasking, OneShotPruning",
                "DynamicGradientMasking, SET",
            )
        },
    ),
    Case(
        "GAN, two optimisers, loss= given",
        "lightning",
        _gan,
        loss=lambda module, batch: sum(module.losses(batch[0])),
    ),
]
