"""Convolutions in channels_last, where that is safe."""

from __future__ import annotations

import torch
from torch import nn


def channels_last_(network: nn.Module) -> nn.Module:
    """Keep the weights of 2-D convolutions in ``channels_last``, in place: on CPUs up to 1.4 times as fast.

    A network with a strided 1x1 convolution of fewer than 16 input channels is left as it is: oneDNN writes past its
    workspace in that layer's weight gradient (uxlfoundation/oneDNN issue 6035: wrong gradients, or a crash).
    """
    for m in network.modules():
        if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels < 16:
            return network
    return nn.utils.convert_conv2d_weight_memory_format(network, torch.channels_last)
