"""A stock LightningModule around a multilayer perceptron, and streams of random data: nothing of this package's."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

PRUNED = ("net.2.weight", "net.4.weight")
"""What the default leaves to prune: all but the first and the last layer."""


class Mlp(pl.LightningModule):
    """20-64-64-64-4, twelve batches of eight."""

    batches = 12

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        n = 8 * self.batches
        x = torch.randn(n, 20, generator=generator)
        return DataLoader(TensorDataset(x, torch.randint(4, (n,), generator=generator)), 8)


class Stream(IterableDataset):
    """No length: an epoch ends when it ends."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(2)
        for _ in range(12):
            yield torch.randn(8, 20, generator=generator), torch.randint(4, (8,), generator=generator)


class Streaming(Mlp):
    def train_dataloader(self):
        return DataLoader(Stream(), None)


class TwoOptimizers(Mlp):
    """Steps the two halves of its layers in turn, by hand, as a GAN does; both in each batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self):
        halves = self.net[:3], self.net[3:]
        return [torch.optim.Adam(half.parameters(), 1e-2) for half in halves]


def fit(module, *callbacks, epochs=4, ckpt_path=None, **options):
    """A fit with checkpoints; the Trainer."""
    quiet = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(callbacks=list(callbacks), **(dict(max_epochs=epochs) | quiet | options))
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer
