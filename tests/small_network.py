"""A network of features and a head, and tasks of a few 2x2 images, as objectives ask for them."""

from collections import OrderedDict
from types import SimpleNamespace

import torch
from torch import nn


class Net(nn.Module):
    """Features of 2x2 images are their pixels, times a weight each; three classes."""

    def __init__(self, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.head = nn.Linear(4, classes)

    @property
    def network(self):
        return nn.Sequential(OrderedDict(backbone=self.backbone, head=self.head))

    def forward(self, x, features=False):
        found = self.backbone(x)
        return (self.head(found), found) if features else self.head(found)


class Data(SimpleNamespace):
    """One task after the other, as objectives ask for them."""

    num_tasks = 2

    def __init__(self, images, labels, classes=3):
        super().__init__(images=images, labels=labels, classes=classes)

    def live(self):
        return torch.zeros(self.classes, dtype=torch.bool).index_fill(0, self.labels.unique(), True)

    def stored(self, count=None):
        return self.images[:count], self.labels[:count]

    def samples(self, count=None):
        yield self.prepare(self.images[:count]), self.labels[:count]

    def prepare(self, images, augment=True):
        return images / 128 - 1


def images(n, seed=0):
    return torch.randint(256, (n, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def learnt(objective, *labels):
    """The objective after a task for each of ``labels``, with a network that has moved since."""
    model = Net()
    objective.build(model.network, torch.empty(0, 1, 2, 2, dtype=torch.uint8), seed=0)
    for task, y in enumerate(labels):
        data = Data(images(len(y), task), torch.tensor(y))
        trainer = SimpleNamespace(datamodule=data, optimizers=[])
        objective.on_task_start(trainer, model, task)
        objective.on_task_end(trainer, model, task)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def weights(model):
    return torch.cat([p.reshape(-1) for p in model.network.parameters()])
