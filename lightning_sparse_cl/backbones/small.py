"""Small backbones for digits and quick experiments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


class SmallCNN(nn.Sequential):
    """Four 3x3 convolutions with batch-norm, one max-pool in the middle, features flattened after a 2x2 average grid.

    Args:
        width: channels of the first two convolutions; the last two have twice as many.

    Raises:
        ValueError: if ``width`` is not positive.
    """

    def __init__(self, width: int = 32) -> None:
        if width < 1:
            raise ValueError(f"SmallCNN(width={width}): a convolution has at least one channel")

        def block(conv: nn.Module, outputs: int) -> list[nn.Module]:
            return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

        super().__init__(
            *block(nn.LazyConv2d(width, 3, padding=1, bias=False), width),
            *block(nn.Conv2d(width, width, 3, padding=1, bias=False), width),
            nn.MaxPool2d(2),
            *block(nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), 2 * width),
            *block(nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False), 2 * width),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.width = width


class SmallMLP(nn.Sequential):
    """Fully connected layers with ReLU on the flattened image.

    Args:
        hidden: width of each hidden layer.

    Raises:
        ValueError: if there is none, or one is empty.
    """

    def __init__(self, hidden: Sequence[int] = (256, 256)) -> None:
        if not hidden or min(hidden) < 1:
            raise ValueError(f"SmallMLP(hidden={hidden}): at least one layer, each of at least one unit")
        layers: list[nn.Module] = [nn.Flatten(), nn.LazyLinear(hidden[0]), nn.ReLU()]
        for i, o in pairwise(hidden):
            layers += [nn.Linear(i, o), nn.ReLU()]
        super().__init__(*layers)
        self.hidden = list(hidden)
