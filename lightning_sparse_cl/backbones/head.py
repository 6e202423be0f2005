"""The linear layer of all classes, each of which is drawn by itself."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PixelHead(nn.Linear):
    """A linear layer for each pixel: features (B, D, H, W) to logits (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@torch.no_grad()
def draw_head(head: nn.Linear, seed: int, classes: Iterable[int] | None = None) -> None:
    """Draw a layer that maps features (B, D) to logits (B, num_classes), class by class.

    Weights and bias of a class are uniform in ``[-D**-0.5, D**-0.5]``, as ``nn.Linear`` draws them. They depend only on
    the seed and the number of the class: a class begins with the same weights whether the classes after it are known
    from the beginning or come later.

    Args:
        head: the layer.
        seed: seed of the random numbers.
        classes: the classes to draw. If None, all.
    """
    bound = head.in_features**-0.5
    for c in range(head.out_features) if classes is None else classes:
        generator = torch.Generator().manual_seed((seed + (c + 1) * 0x9E3779B97F4A7C15) % 2**63)
        row = torch.empty(head.in_features + 1).uniform_(-bound, bound, generator=generator)
        head.weight[c], head.bias[c] = row[:-1], row[-1]


def logits_among(classes: Tensor, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logits (B, num_classes) of some classes, -inf for the others: the same bits however many others there are.

    Args:
        classes: their labels (n,).
        features: (B, D).
        weight: weight of the head, (num_classes, D).
        bias: bias of the head, (num_classes,).
    """
    rows = F.linear(features, weight[classes], bias[classes])
    return rows.new_full((len(rows), len(weight)), -torch.inf).index_copy(1, classes, rows)
