"""A constructor's arguments as bytes: everything but the weights, which a checkpoint has anyway."""

from __future__ import annotations

import builtins
import functools
import inspect
import io
import pickle
import sys
import types
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from lightning_sparse_cl.callbacks.identity import without_parser

TRUSTED = (
    "lightning_sparse_cl.backbones.", "lightning_sparse_cl.callbacks.", "lightning_sparse_cl.data.",
    "lightning_sparse_cl.demos.", "lightning_sparse_cl.methods.", "lightning_sparse_cl.metrics.",
    "lightning_sparse_cl.objectives.", "lightning_sparse_cl.optim.", "lightning_sparse_cl.sparsity.",
    "lightning.pytorch.callbacks.", "torch.nn.", "torch.optim.", "torch.utils.hooks.", "torchvision.models.",
    "torchvision.ops.", "collections.",
)  # fmt: skip
"""How the names of modules begin whose classes are made from a file without asking."""
PLAIN = {bool, int, float, complex, str, bytes, bytearray, tuple, list, dict, set, frozenset, range, slice}
FUNCTIONS = ("torch.nn.functional", "torch._C._nn")
"""Modules whose functions are taken from a file: they compute, and do nothing else."""


class Untrusted(ValueError):
    """A file names classes that are not made from files without asking."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


def to_bytes(value: Any) -> bytes:
    """The bytes from which :func:`from_bytes` makes a value again.

    When a torch module is made again, its parameters and saved buffers, which a ``state_dict`` has, are zero. Those of
    modules inside other values, such as callbacks, are kept: nothing else may hold them.

    Raises:
        Exception: if the value cannot be pickled, a lambda for example.
    """
    file, pickler = io.BytesIO(), _WeightlessPickler if isinstance(value, nn.Module) else _Pickler
    torch.save(value, file, pickle_module=types.SimpleNamespace(Pickler=pickler, __name__=pickle.__name__))
    return file.getvalue()


def from_bytes(kept: bytes, weights_only: bool = True) -> Any:
    """The value that :func:`to_bytes` was given.

    Args:
        kept: what :func:`to_bytes` has returned.
        weights_only: make only objects of known classes, which include torch's own list; otherwise of any class.

    Raises:
        Untrusted: if the value has objects of other classes.
    """
    if not weights_only:
        return torch.load(io.BytesIO(kept), weights_only=False)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(kept))
    found = {name: _trusted(name) for name in sorted(names)}
    if unknown := [name for name, thing in found.items() if thing is None]:
        raise Untrusted(unknown)
    with torch.serialization.safe_globals(list(found.values())):
        return torch.load(io.BytesIO(kept), weights_only=True)


def class_named(name: str) -> Any:
    """A class by its full name: of this package, of torch, or of a module that is imported. None if there is none."""
    module, _, last = name.rpartition(".")
    return getattr(_module(module) if f"{module}.".startswith(TRUSTED) else sys.modules.get(module), last, None)


def _module(name: str) -> types.ModuleType | None:
    try:
        return import_module(name)
    except ImportError:  # of another version
        return None


def _trusted(name: str) -> Any:
    """The class or function of this name if it is one that a file may name, else None."""
    module, _, last = name.rpartition(".")
    if module in ("builtins", "__builtin__"):
        found = getattr(builtins, last, None)
        return found if found in PLAIN else None
    if name.startswith(f"{__name__}."):
        return {f.__name__: f for f in (_blank, _lazy)}.get(last)
    if name == "functools.partial":
        return functools.partial
    if not f"{module}.".startswith(TRUSTED) and module not in FUNCTIONS:
        return None
    found = getattr(_module(module), last, None)
    home = getattr(found, "__module__", None) or ""  # a module also has names that are defined elsewhere
    if inspect.isclass(found):
        return found if f"{home}.".startswith(TRUSTED) else None
    return found if inspect.isroutine(found) and home in FUNCTIONS else None


class _Pickler(pickle.Pickler):
    """Also takes what the parser of the command line makes, and lazy layers, without the numbers of their hooks, which
    count all hooks of the process."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, functools.partial):
            return without_parser(value).__reduce__()
        if isinstance(value, LazyModuleMixin):
            return _lazy, (type(value), _without_hooks(value))
        return NotImplemented


class _WeightlessPickler(_Pickler):
    """Leaves out the values that a ``state_dict`` holds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._saved: dict[int, Tensor] = {}

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            left_out = value._non_persistent_buffers_set
            tensors = [*value._parameters.values(), *(b for n, b in value._buffers.items() if n not in left_out)]
            self._saved |= {id(tensor): tensor for tensor in tensors if tensor is not None}
        if isinstance(value, Tensor) and id(value) in self._saved and not is_lazy(value):
            return _blank, (tuple(value.shape), value.dtype, isinstance(value, nn.Parameter), value.requires_grad)
        return super().reducer_override(value)


def _blank(shape: tuple[int, ...], dtype: torch.dtype, is_parameter: bool, requires_grad: bool) -> Tensor:
    zeros = torch.zeros(shape, dtype=dtype)
    return nn.Parameter(zeros, requires_grad) if is_parameter else zeros


def _without_hooks(layer: Any) -> dict[str, Any]:
    """The state of a lazy layer without the hooks by which it takes its sizes."""
    own = {layer._load_hook.id, layer._initialize_hook.id}
    state = {name: part for name, part in vars(layer).items() if name not in ("_load_hook", "_initialize_hook")}
    for name in ("_load_state_dict_pre_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        state[name] = type(state[name])((i, hook) for i, hook in state[name].items() if i not in own)
    return state


def _lazy(cls: type, state: dict[str, Any]) -> nn.Module:
    """A lazy layer of this state, with its hooks."""
    if not issubclass(cls, LazyModuleMixin) or not issubclass(cls, nn.Module):
        raise pickle.UnpicklingError(f"{cls.__name__} is no lazy layer")
    layer: Any = cls.__new__(cls)
    layer.__setstate__(state)
    layer._load_hook = layer._register_load_state_dict_pre_hook(layer._lazy_load_hook)
    layer._initialize_hook = layer.register_forward_pre_hook(layer._infer_parameters, with_kwargs=True)
    return layer
