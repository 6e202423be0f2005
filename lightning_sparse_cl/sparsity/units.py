"""Units of a network, its neurons and channels: how active they are, and the connections between sets of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse_cl.sparsity.channels import Channels


class UnitActivity:
    """Measures what each unit passes on: the mean magnitude of its outputs as other layers read them.

    The network is run inside a ``with`` block, as often as one likes::

        with UnitActivity(network, channels) as activity:
            network(x)
        activity.means()

    A channel's outputs are averaged over its pixels. What comes between a layer and its reader, such as batch-norm,
    ReLU and pooling, is part of the unit.

    Args:
        network: maps a batch of samples to outputs.
        channels: the channels of the network.
    """

    def __init__(self, network: nn.Module, channels: Channels) -> None:
        self.network, self.channels = network, channels
        device = next(network.parameters()).device
        self.sums = [torch.zeros(size, dtype=torch.float64, device=device) for size in channels.sizes]
        """Sums for each set of units, over samples and readers."""
        self.counts = [0] * len(channels.sizes)

    def __enter__(self) -> UnitActivity:
        self._hooks = [
            self.network.get_submodule(name).register_forward_pre_hook(partial(self._add, units))
            for name, units in self.channels.reads.items()
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _add(self, units: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        read: Tensor = inputs[0].detach()
        of_each = read.reshape(len(read), self.channels.sizes[units], -1).abs().mean(2)
        self.sums[units] += of_each.sum(0, dtype=torch.float64)
        self.counts[units] += len(read)

    def means(self) -> list[Tensor]:
        """The mean activities of each set of units, (n,); zero where nothing reads them."""
        return [total / max(count, 1) for total, count in zip(self.sums, self.counts, strict=True)]


def most_active(activity: Tensor, share: float) -> Tensor:
    """True at the smallest set of units (n,) that has at least ``share`` of all activity, and at least one unit."""
    falling, order = activity.double().sort(descending=True, stable=True)
    count = int((falling.cumsum(0) < share * falling.sum() * (1 - 1e-12)).sum()) + 1
    chosen = torch.zeros_like(activity, dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen


def connections(channels: Channels, name: str, weight: Tensor, to: Sequence[Tensor], of: Sequence[Tensor]) -> Tensor:
    """Which entries of a weight connect units of one choice to units of another, of the weight's shape.

    Args:
        channels: the channels of the network.
        name: name of the weight.
        weight: the weight, of a convolution or a linear layer. A depthwise convolution connects units to themselves.
        to: which units the connections lead to: a boolean (n,) for each set of ``channels``.
        of: where they come from.
    """
    layer = name.removesuffix(".weight")
    if layer in channels.along:
        units = to[channels.along[layer]] & of[channels.along[layer]]
        return expanded(units.view(-1, 1), weight)
    sources = of[channels.reads[layer]]
    sources = sources.repeat_interleave(weight.shape[1] // len(sources))
    return expanded(to[channels.writes[layer]][:, None] & sources, weight)


def expanded(kernels: Tensor, weight: Tensor) -> Tensor:
    """A mask of kernels (C_out, C_in) as one of the weight's shape."""
    return kernels.view(*kernels.shape, *[1] * (weight.ndim - 2)).expand_as(weight)


def kernelwise(mask: Tensor) -> Tensor:
    """A mask of a weight's shape as one of its kernels (C_out, C_in): on where any entry is."""
    return mask.flatten(2).any(2) if mask.ndim > 2 else mask
