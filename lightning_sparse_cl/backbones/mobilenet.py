"""MobileNetV2 for small images, from torchvision."""

from __future__ import annotations

from torch import nn
from torchvision.models import MobileNetV2

SETTING = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]


class SmallImageMobileNetV2(nn.Sequential):
    """torchvision's MobileNetV2 (Sandler et al., 2018) with stride 1 in the stem and in the second stage.

    An image of 32x32 keeps 4x4 positions at the end, as in the CIFAR forms of the network. Features are the mean over
    them, 1280 wide.

    Args:
        width: factor on the channels of every layer (on those of the features only if above 1).
    """

    def __init__(self, width: float = 1.0) -> None:
        if width <= 0:
            raise ValueError(f"SmallImageMobileNetV2(width={width}): the factor on all widths is positive")
        features = MobileNetV2(width_mult=width, inverted_residual_setting=SETTING).features
        features[0][0] = nn.LazyConv2d(features[0][0].out_channels, 3, 1, 1, bias=False)
        super().__init__(features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.width = width
