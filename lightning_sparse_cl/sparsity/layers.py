"""Which weights of a network are pruned, and which stay dense."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

from torch import nn


def weight_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and linear layers by the names of their weights, in module order."""
    return {
        f"{name}.weight" if name else "weight": layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear)
    }


def network_of(module: nn.Module) -> nn.Module:
    """What maps images to logits in a module: its property ``network``, as methods here have one, or all of it."""
    return module.network if isinstance(getattr(type(module), "network", None), property) else module


def sparse_weights(module: nn.Module, dense: Sequence[str] | None = None) -> list[str]:
    """Names of the convolution and linear weights to prune, in module order.

    Args:
        module: any network; of a method its backbone and head, not what an objective adds.
        dense: shell patterns of parameter names that stay dense, for example ``["*stem*", "head.weight"]``; an empty
            list prunes every layer. None is the profile that SparCL's code uses for ResNet-18: the first layer, the
            last layer and 1x1 convolutions stay dense.

    Raises:
        ValueError: if a pattern matches no weight, or nothing is left to prune.
    """
    layers = weight_layers(network_of(module))
    names = list(layers)
    if dense is None:
        pointwise = [n for n, m in layers.items() if not isinstance(m, nn.Linear) and m.weight[0, 0].numel() == 1]
        keep = {*names[:1], *names[-1:], *pointwise}
    else:
        for pattern in dense:
            if not any(fnmatch(n, pattern) for n in names):
                raise ValueError(f"dense={pattern!r} matches none of the weights: {', '.join(names)}")
        keep = {n for n in names for pattern in dense if fnmatch(n, pattern)}
    sparse = [n for n in names if n not in keep]
    if not sparse:
        raise ValueError(f"no weight is left to prune: all of {', '.join(names) or 'nothing'} stay dense")
    return sparse
