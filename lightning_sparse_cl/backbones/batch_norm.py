"""Batch-norm and modes in passes beside the training pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def in_eval(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in eval mode; afterwards each part is in its former mode."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training


@contextmanager
def batch_norm_still(module: nn.Module, still: bool = True) -> Iterator[None]:
    """Inside, batch-norm normalises by the batch as in training, but its running statistics stay as they are."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if still else []
    norms = [m for m in norms if m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def norms(module: nn.Module) -> dict[str, nn.Module]:
    """The batch-norm layers, by name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def norm_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of batch-norm, by name."""
    return {
        f"{name}.{n}": t
        for name, norm in norms(module).items()
        for n, t in (*norm.named_parameters(), *norm.named_buffers())
    }
