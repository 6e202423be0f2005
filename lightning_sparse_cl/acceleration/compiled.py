"""Which modules run as code that ``torch.compile`` or TorchScript has made of them."""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType

import torch
from torch import nn


def find_compiled(model: nn.Module, parts: Sequence[str]) -> str | None:
    """The first compiled module among the parts of a model, the modules in them, and the modules around them.

    Compiled are modules that ``torch.compile`` has wrapped, even if Lightning has unwrapped them again, those whose
    ``compile()`` was called, those with a compiled method, and scripted ones, unless a part only contains them.

    Args:
        model: any network.
        parts: names of submodules, ``""`` for the model itself.

    Returns:
        The module's name, ``""`` for the model itself, or None if there is none.
    """
    for name, module in model.named_modules():
        around = any(_inside(part, name) for part in parts)
        within = any(_inside(name, part) for part in parts)
        scripted = isinstance(module, torch.jit.ScriptModule)
        if (around and scripted) or ((around or within) and not scripted and _is_compiled(module)):
            return name
    return None


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module itself is compiled, apart from what it contains."""
    if module._compiled_call_impl is not None:
        return True
    return any(_made_by_dynamo(v) for found in (module, *type(module).__mro__) for v in vars(found).values())


def _made_by_dynamo(value: object) -> bool:
    """``torch.compiler.disable`` leaves the same mark as ``torch.compile``, and one of its own."""
    marks = vars(value) if isinstance(value, FunctionType) else {}
    return "_torchdynamo_orig_callable" in marks and "_torchdynamo_disable" not in marks


def _inside(name: str, part: str) -> bool:
    """Whether a module is the module ``part`` or in it, by their names."""
    return name == part or name.startswith(f"{part}." if part else "")
