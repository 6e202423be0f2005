"""Modules that compute differently while they are observed, and how to observe them all the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def steps_aside(module: nn.Module) -> bool:
    """Whether a module is compiled or accelerated, and so computes differently while a dispatch mode is active."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """``dict(module.named_parameters())``, unnoticed by code that has swapped their values temporarily."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, part in module.named_modules():
        for name, parameter in _own(part).items():
            if parameter is not None:
                found.setdefault(id(parameter), (f"{prefix}.{name}" if prefix else name, parameter))
    return dict(found.values())


def _own(module: nn.Module) -> dict[str, nn.Parameter | None]:
    own = module._parameters
    return dict(dict.items(own) if isinstance(own, dict) else own.items())  # bypasses a subclass of dict


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy that is neither compiled nor accelerated and has the same weights."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        memo[id(part._parameters)] = _own(part)
        if part._compiled_call_impl is not None:
            memo[id(part._compiled_call_impl)] = None
    return copy.deepcopy(module, memo)
