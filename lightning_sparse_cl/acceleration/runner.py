"""Stands in for calls of a network, or of the parts of it that can be traced."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from lightning_sparse_cl.acceleration.choices import Choices
from lightning_sparse_cl.acceleration.layer import Layer, is_taken
from lightning_sparse_cl.acceleration.program import Program
from lightning_sparse_cl.acceleration.tracing import is_transformed, plain_state, trace
from lightning_sparse_cl.acceleration.whole import WholeNetwork


class Owner(Protocol):
    """The accelerated model, as far as runners know it."""

    choices: Choices
    in_one_call: bool
    """Whether inference of a whole network is to be one call."""

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The layers with kernels, by name."""

    def takes_calls(self) -> bool:
        """Whether calls are computed by kernels now."""


class Runner:
    """Stands in for the call of a part of the model: runs it by kernels where these compute the same, else as it is.

    Args:
        owner: the model, whose layers and choices it uses.
        part: the part that is called.
        name: name of the part in the model.
    """

    def __init__(self, owner: Owner, part: nn.Module, name: str) -> None:
        self.owner, self.part = owner, part
        prefix = f"{name}." if name else ""
        self._layers = {n.removeprefix(prefix): m for n, m in owner.layers.items() if n.startswith(prefix)}
        self._network = part
        if name in owner.layers:  # a layer by itself
            self._network, self._layers = nn.Sequential(part), {"0": owner.layers[name]}
        self._modules = list(part.modules())
        leaf = fx.Tracer().is_leaf_module
        self._traced = [m for m in self._network.modules() if not leaf(m, "") or m is self._network]
        self._programs: dict[tuple[Any, ...], Program | None] = {}
        self._said: Counter[str] = Counter()
        self._whole = WholeNetwork(self._network, self._layers.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the surrounding code: its graph cannot contain the kernels
            return self._uncompiled(args, kwargs)
        return self._call(args, kwargs)

    @torch.compiler.disable
    def _uncompiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.owner.takes_calls():
            return self.part._call_impl(*args, **kwargs)
        reason = self._unfit(args, kwargs)
        if reason is not None:
            self._said[reason] += 1
            if self._said[reason] == 10:  # not at once: a measurement may hook in for a call or two
                warnings.warn(f"accelerate: {type(self.part).__name__} is run as it is, {reason}", stacklevel=3)
            return self.part._call_impl(*args, **kwargs)
        changed = any(layer.changed for layer in self._layers.values()) or "forward" in self.part.__dict__
        if changed or args[0].numel() == 0 or is_transformed(args[0]):
            return self.part._call_impl(*args, **kwargs)
        program = self._program()
        if program is None or len(args) != len(program.inputs):
            return self.part._call_impl(*args, **kwargs)
        run = self._by_whole(program) if self._is_inference(*args) else program
        if not (self.part._forward_hooks or self.part._forward_pre_hooks):
            return run(*args)
        self.part.forward = run  # between the hooks of the part itself
        try:
            return self.part._call_impl(*args)
        finally:
            del self.part.forward

    def _is_inference(self, x: Tensor, *others: Tensor) -> bool:
        """Whether the whole network may run in one call."""
        if torch.is_grad_enabled():
            self._whole.forget()  # an optimiser that writes to ``weight.data`` leaves no trace
            return False
        still = self.owner.in_one_call and not others and x.ndim == 4 and not torch.is_autocast_enabled("cpu")
        return still and not any(m.training for m in self._modules)

    def _by_whole(self, program: Program) -> Callable[[Tensor], Any]:
        return lambda x: self._whole(x, program)

    def _unfit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why the kernels cannot take this call, or None."""
        if kwargs or not args or any(type(a) not in (Tensor, nn.Parameter) for a in args):
            return "called with arguments that are not tensors"
        if any(a.device.type != "cpu" or not is_taken(a.dtype) for a in args):
            return f"given {', '.join(f'{a.dtype} on {a.device}' for a in args)} and not torch.float32 on cpu"
        hooked = (m._forward_hooks or m._forward_pre_hooks for m in self._modules[1:])
        followed = (m._backward_hooks or m._backward_pre_hooks for m in self._modules)
        if any(hooked) or any(followed) or _has_any_global_hook():
            return "while modules in it have hooks"
        return None

    def _program(self) -> Program | None:
        """The program for the network as it is now. None if it cannot be traced."""
        state = tuple(plain_state(m) for m in self._traced)
        if state not in self._programs:
            if len(self._programs) == 16:  # something changes all the time
                return None
            graph = trace(self._network)
            made = None if graph is None else Program(self._network, graph, self._layers, self.owner.choices)
            self._programs[state] = made
        return self._programs[state]


def traceable(model: nn.Module, layers: Mapping[str, Layer], name: str) -> list[tuple[str, nn.Module]]:
    """The largest parts that can be traced and have layers with kernels, by name."""
    inside = [n for n in layers if n == name or n.startswith(f"{name}." if name else "")]
    if not inside:
        return []
    callable_ = type(model).forward is not nn.modules.module._forward_unimplemented
    if name in layers or (callable_ and trace(model) is not None):
        return [(name, model)]
    parts = ((f"{name}.{n}" if name else n, child) for n, child in model.named_children())
    return [found for n, child in parts for found in traceable(child, layers, n)]


def _has_any_global_hook() -> bool:
    """Whether any hook for all modules is registered."""
    kinds = ("backward_pre_hooks", "backward_hooks", "forward_hooks", "forward_pre_hooks")
    return any(getattr(nn.modules.module, f"_global_{kind}") for kind in kinds)
