"""A copy of a network at some moment, kept to be put back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_sparse_cl.sparsity.enforcement import Enforcement
from lightning_sparse_cl.sparsity.masks import Masks


def kept_network(parts: Sequence[nn.Module], masks: Masks) -> dict[str, Any]:
    """Copies of all tensors of ``parts``, and of the alive masks, in a form that checkpoints take.

    They are the same on all processes: call it on all of them.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for buffer in (b for part in parts for b in part.buffers()):
            torch.distributed.broadcast(buffer, 0)  # batch-norm's, which DDP brings in step at the next forward
    states = [{name: tensor.detach().clone() for name, tensor in part.state_dict().items()} for part in parts]
    return {"states": states, "alive": masks.alive}


@torch.no_grad()
def put_back(parts: Sequence[nn.Module], masks: Masks, kept: dict[str, Any]) -> None:
    """Restore the same ``parts`` as they were when they were kept. Frozen weights stay frozen."""
    for part, state in zip(parts, kept["states"], strict=True):
        for name, tensor in part.state_dict().items():
            tensor.copy_(state[name])
    for name in masks.alive.keys() - kept["alive"].keys():
        masks.set_alive(name, None)
    for name, mask in kept["alive"].items():
        masks.set_alive(name, mask.to(masks.module.get_parameter(name).device))
    Enforcement.of(masks.module).apply_to_averages()
