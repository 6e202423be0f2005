"""Logits out of whatever a module's ``forward`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def logits_of(output: Any, module: nn.Module, maps: bool = False) -> Tensor:
    """The logits (B, C) in what ``module`` returned.

    They are the output itself, its entry or attribute ``logits`` or ``out``, the only tensor of a dict, or the first
    tensor of a tuple.

    Args:
        output: what was returned.
        module: for errors.
        maps: whether logits are (B, C, H, W).

    Raises:
        TypeError: if there are none, or they are not of that shape.
    """
    shape = "(B, C, H, W)" if maps else "(B, C)"
    if isinstance(output, Mapping):
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        name = next((name for name in ("logits", "out") if name in output), None)  # out: torchvision's segmentation
        found = output[name] if name is not None else tensors[0] if len(tensors) == 1 else None
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, tuple | list):
        found = next((value for value in output if isinstance(value, Tensor)), None)
    else:
        found = output
    if isinstance(found, Tensor) and found.ndim == (4 if maps else 2):
        return found
    raise TypeError(
        f"{type(module).__name__}: its forward must give logits {shape}, alone, as `logits` or first in a tuple, but "
        f"it returned {_described(output if found is None else found)}"
    )


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} of {', '.join(map(str, output)) or 'nothing'}"
    return "None" if output is None else f"a {type(output).__name__}"


def of_classes(logits: Tensor, classes: int, module: nn.Module) -> Tensor:
    """The logits (B, classes, ...) of the data's classes, without the further outputs of a larger head of ``module``.

    Raises:
        ValueError: if there are fewer logits than classes.
    """
    if logits.shape[1] < classes:
        raise ValueError(
            f"{type(module).__name__}: its forward gives {logits.shape[1]} logits, but the data have {classes} classes"
        )
    return logits[:, :classes]
