"""Which networks can be traced and run from their graph, and then compute the same."""

from __future__ import annotations

import inspect
import operator
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_sparse_cl.sparsity.channels import graph_of

ADDS = {operator.add, operator.iadd, torch.add}
IN_PLACE = {"iadd", "isub", "imul", "itruediv"}


def trace(network: nn.Module) -> fx.Graph | None:
    """The graph of a network, or None if running it would not be the same as calling the network.

    Control flow, arguments with defaults, random draws, switches of autograd or autocast inside, values that are
    overwritten, and modules that count or keep something when called do not survive tracing.
    """
    signature = inspect.signature(type(network).forward).parameters.values()
    if any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature):
        return None
    before, draws = [dict(m.__dict__) for m in network.modules()], (random.getstate(), torch.get_rng_state())
    with switched() as modes:
        try:
            graph = graph_of(network)
        except ValueError:
            graph = None
    same = random.getstate() == draws[0] and torch.equal(torch.get_rng_state(), draws[1]) and not modes
    random.setstate(draws[0])
    torch.set_rng_state(draws[1])
    for module, attributes in zip(network.modules(), before):
        if module.__dict__.keys() != attributes.keys() or any(
            v is not attributes[k] for k, v in module.__dict__.items()
        ):
            module.__dict__.clear()
            module.__dict__.update(attributes)
            same = False
    if graph is None or not same or rewrites(graph, network):
        return None
    out = next(n for n in graph.nodes if n.op == "output").args[0]
    return graph if isinstance(out, fx.Node) or (isinstance(out, tuple) and all(map(_is_node, out))) else None


@contextmanager
def switched() -> Iterator[list[bool]]:
    """Notes whether any code inside switches gradients or autocast on or off."""
    seen: list[bool] = []
    gradients, autocast = torch._C._set_grad_enabled, torch.set_autocast_enabled

    def noted(real: Callable[..., None]) -> Callable[..., None]:
        def set_(*arguments: Any) -> None:
            seen.append(True)
            real(*arguments)

        return set_

    torch._C._set_grad_enabled, torch.set_autocast_enabled = noted(gradients), noted(autocast)
    try:
        yield seen
    finally:
        torch._C._set_grad_enabled, torch.set_autocast_enabled = gradients, autocast


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def plain_state(module: nn.Module) -> tuple[Any, ...]:
    """What a forward method may depend on: flags, numbers, and which modules there are."""
    own = module.__dict__
    flags = tuple(v for v in own.values() if type(v) in (bool, int, float, str))
    return flags, tuple(map(id, own["_modules"].values()))


def is_transformed(x: Tensor) -> bool:
    """Whether torch.func, a tracer or a dispatch mode observes the computation."""
    if torch._C._get_tracing_state() is not None:
        return True
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or torch._C._len_torch_dispatch_stack() > 0


def rewrites(graph: fx.Graph, module: nn.Module) -> bool:
    """Whether an operation in place changes a value that is used again."""
    modules = dict(module.named_modules())
    for node in graph.nodes:
        if node.op == "call_module":
            in_place = getattr(modules[node.target], "inplace", False)
        elif node.op == "call_method":
            in_place = node.target.endswith("_") and not node.target.endswith("__")
        else:
            named = getattr(node.target, "__name__", "")
            in_place = node.op == "call_function" and (named.endswith("_") or named in IN_PLACE)
            in_place = in_place or bool(node.kwargs.get("inplace", False))
        first = node.all_input_nodes[:1]
        if in_place and any(len(n.users) > 1 or not _is_fresh(n, modules) for n in first):
            return True
    norms = [n.target for n in graph.nodes if n.op == "call_module" and isinstance(modules[n.target], nn.BatchNorm2d)]
    return len(norms) > len(set(norms))  # whose statistics move twice, in an order that must be kept


def _is_fresh(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a value is a tensor of its own, and not another tensor under a new name."""
    made = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)
    return node.target in ADDS or (node.op == "call_module" and isinstance(modules[str(node.target)], made))
