"""Networks of 2:4 sparsity in the format that NVIDIA's sparse tensor cores multiply."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def to_semi_structured(network: nn.Module) -> nn.Module:
    """A copy of a network, for inference, whose linear layers of 2:4 sparsity hold half of their weights.

    A policy with ``block="2:4"`` and ``sparsity=0.5`` makes such layers. Layers with sides that are no multiples of 64
    stay as they are, and so do convolutions, for which torch has no such product.

    Args:
        network: on a CUDA device of compute capability 8.0 or newer, with weights in float16 or bfloat16.

    Returns:
        The copy, in eval mode; its layers have ``torch.sparse.SparseSemiStructuredTensor`` as weights.

    Raises:
        ValueError: if it is no module, no linear layer has 2:4 sparsity, or weights are of another type or elsewhere.
    """
    if not isinstance(network, nn.Module):
        raise ValueError(f"to_semi_structured: {type(network).__name__} is no nn.Module; give the network itself")
    made = copy.deepcopy(network).eval().requires_grad_(False)
    layers = dict(two_of_four(made))
    if not layers:
        raise ValueError(
            f"to_semi_structured: no linear layer of {type(network).__name__} with sides of multiples of 64 has two of "
            "each four neighbouring inputs alive; train it with block='2:4' and sparsity=0.5"
        )
    for name, layer in layers.items():
        weight, full = layer.weight, f"{name}.weight" if name else "weight"
        capable = weight.is_cuda and torch.cuda.get_device_capability(weight.device) >= (8, 0)
        if not capable or weight.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"to_semi_structured: {full} is {weight.dtype} on {weight.device}; it must be torch.float16 or "
                "torch.bfloat16 on a CUDA device of compute capability 8.0 or newer"
            )
        layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight), requires_grad=False)
    return made


def two_of_four(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers, by name, that tensor cores can multiply: at most two of every four inputs are not zero."""
    for name, module in network.named_modules():
        if type(module) is nn.Linear and _is_two_of_four(module.weight):
            yield name, module


def _is_two_of_four(weight: Tensor) -> bool:
    if any(side % 64 for side in weight.shape):
        return False
    return bool((weight.unflatten(1, (-1, 4)) != 0).sum(2).le(2).all())
