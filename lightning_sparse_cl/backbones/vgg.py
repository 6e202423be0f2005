"""VGG and LeNet: convolutions, then fully connected layers. Input channels and image size come from the data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

PLAN = (1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M")


class VGG16(nn.Sequential):
    """VGG-16 with batch-norm for small images (Simonyan & Zisserman, 2015): 13 3x3 convolutions, hidden layers.

    For 32x32 images and width 64 it has 33,584,832 weights, without the head: the VGG16-BN of CPG and CL-LSG.
    ``hidden=()`` is the VGG-like network of sparse-training papers, where the head follows the last convolution.

    Args:
        width: channels of the first two convolutions; later ones have 2, 4 and 8 times as many.
        hidden: widths of the fully connected layers. If None, two layers of 64 times ``width``, which is 4096 at full
            size.

    Raises:
        ValueError: if ``width`` or a hidden layer is empty.
    """

    def __init__(self, width: int = 64, hidden: Sequence[int] | None = None) -> None:
        hidden = [64 * width] * 2 if hidden is None else list(hidden)
        if width < 1 or min(hidden, default=1) < 1:
            raise ValueError(f"VGG16(width={width}, hidden={hidden}): a layer has at least one channel")
        layers: list[nn.Module] = []
        for times in PLAN:
            if isinstance(times, str):
                layers += [nn.MaxPool2d(2, ceil_mode=True)]
            else:
                conv = nn.LazyConv2d(times * width, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(times * width), nn.ReLU()]
        layers += [nn.Flatten()]
        for width_ in hidden:
            layers += [nn.LazyLinear(width_), nn.ReLU()]
        super().__init__(*layers)
        self.width, self.hidden = width, hidden


class LeNet5(nn.Sequential):
    """LeNet-5 as CL-LSG and APD use it: two 5x5 convolutions of 20 and 50 channels, fully connected 800 and 500.

    Args:
        width: channels of the first convolution; the others are 2.5, 40 and 25 times as wide.

    Raises:
        ValueError: if ``width`` is not positive.
    """

    def __init__(self, width: int = 20) -> None:
        if width < 1:
            raise ValueError(f"LeNet5(width={width}): a layer has at least one channel")
        a, b, c, d = width, 5 * width // 2, 40 * width, 25 * width
        super().__init__(
            nn.LazyConv2d(a, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.LazyLinear(c), nn.ReLU(), nn.Linear(c, d), nn.ReLU(),
        )  # fmt: skip
        self.width = width
