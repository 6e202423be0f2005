"""Batch-norm in passes beside the training pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def batch_norm_still(module: nn.Module, still: bool = True) -> Iterator[None]:
    """Batch-norm normalises by the batch as in training, but its running statistics stay as they are."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if still else []
    norms = [m for m in norms if m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
