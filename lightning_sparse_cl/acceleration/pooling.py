"""Which nodes of a traced network are pooling or means that need no change of layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F


def is_mean(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node is a mean over all pixels."""
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return module.output_size in (1, (1, 1))
    if node.target is F.adaptive_avg_pool2d:
        return node.args[1:] in ((1,), ((1, 1),)) and not node.kwargs
    if node.target not in ("mean", torch.mean):
        return False
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, list | tuple) and sorted(d % 4 for d in dims) == [2, 3]


def keeps_pixels(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether (B, C) stays (B, C, 1, 1)."""
    if node.target in ("mean", torch.mean):
        return bool(node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2]))
    return True


def window_of(node: fx.Node, module: nn.Module | None) -> tuple[Callable[..., Tensor], int] | None:
    """The function and window of a pooling whose windows do not overlap, or None."""
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        k, s, p = (v if isinstance(v, int) else v[0] if len(set(v)) == 1 else -1 for v in _pool(module))
        usual = getattr(module, "dilation", 1) == 1 and not getattr(module, "return_indices", False)
        usual = usual and getattr(module, "divisor_override", None) is None
        if k == s > 0 and p == 0 and usual:
            return (F.max_pool2d if isinstance(module, nn.MaxPool2d) else F.avg_pool2d), k
    elif node.target in (F.max_pool2d, F.avg_pool2d) and len(node.args) == 2 and isinstance(node.args[1], int):
        k = node.args[1]
        if node.kwargs in ({}, {"stride": k}, {"stride": None}):
            return node.target, k
    return None


def _pool(module: nn.Module) -> tuple[Any, Any, Any]:
    return module.kernel_size, module.stride, module.padding
