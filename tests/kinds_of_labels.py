"""Two tasks of each kind of label, which a small network learns."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Adam
from torch.utils.data import Dataset, TensorDataset

import lightning_sparse_cl as scl

KINDS = ("multi_label", "real_numbers", "class_maps")
TRUE = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def one(kind: str, task: int, count: int, seed: int) -> TensorDataset:
    """Each task has two of four labels, numbers of other inputs, or two of four classes."""
    generator = torch.Generator().manual_seed(seed + 10 * task)
    x = torch.randn(count, 8, generator=generator)
    own = torch.tensor([task == 0, task == 0, task == 1, task == 1])
    if kind == "multi_label":
        return TensorDataset(x, ((x @ TRUE > 1) & own).float())
    if kind == "real_numbers":
        x[:, :4] += 2 * task
        return TensorDataset(x, (x @ TRUE)[:, :2])
    x = torch.randn(count, 3, 6, 6, generator=generator)
    x[:, 2] = task
    y = (x[:, 0] > 0).long() + 2 * task
    y[:, 0, 0] = 255
    return TensorDataset(x, y)


def data(kind: str, **kwargs: Any) -> scl.TaskDatasets:
    sets: list[list[Dataset]] = [[one(kind, t, count, seed) for t in (0, 1)] for count, seed in ((160, 0), (64, 1))]
    return scl.TaskDatasets(*sets, target=kind, **({"batch_size": 16} | kwargs))


class PerPixel(nn.Sequential):
    """Features (B, D, H, W)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(nn.LazyConv2d(width, 3, padding=1), nn.LeakyReLU(), nn.Conv2d(width, width, 1), nn.LeakyReLU())


def backbone(kind: str, width: int = 32) -> nn.Module:
    return PerPixel(width) if kind == "class_maps" else scl.SmallMLP((width, width))


def module(kind: str, objective: scl.Objective | None = None, **kwargs: Any) -> scl.ContinualModule:
    return scl.ContinualModule(backbone(kind), objective, **({"optimizer": partial(Adam, lr=0.005)} | kwargs))
