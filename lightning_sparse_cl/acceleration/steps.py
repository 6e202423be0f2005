"""The steps of a traced network: which operations are done together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_sparse_cl.acceleration.layer import Layer
from lightning_sparse_cl.acceleration.tracing import ADDS

RELUS = {F.relu, torch.relu}


@dataclass
class Step:
    """One operation: a node of the graph, or several that are done together and end at ``node``."""

    node: fx.Node
    """The node whose value the step computes."""
    source: fx.Node | None = None
    """The input of a layer or batch-norm."""
    layer: Layer | None = None
    norm: nn.BatchNorm2d | None = None
    add: fx.Node | None = None
    """What is added after the batch-norm."""
    relu: bool = False
    whole: list[fx.Node] = field(default_factory=list)
    """The nodes of the step, in order."""


def fuse(graph: fx.Graph, modules: Mapping[str, nn.Module], layers: Mapping[str, Layer]) -> list[Step]:
    """The steps of a graph: a layer, batch-norm, sum and ReLU in a row are one step.

    Args:
        graph: the graph of a network.
        modules: modules of the network, by name.
        layers: those with kernels, by name.
    """
    steps: list[Step] = []
    done: set[fx.Node] = set()
    at = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == "placeholder" or node in done:
            continue
        step = Step(node, whole=[node])
        layer, norm = _layer_of(node, layers), norm_of(node, modules)
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if isinstance(source, fx.Node) and (layer is not None or norm is not None):
            step.source, step.layer, step.norm = source, layer, norm
            if layer is None or isinstance(layer.module, nn.Conv2d):
                _extend(step, modules, done)
        done |= set(step.whole)
        steps.append(step)
    return sorted(steps, key=lambda s: at[s.node])  # by then, what is added has been computed


def _extend(step: Step, modules: Mapping[str, nn.Module], done: set[fx.Node]) -> None:
    """Extend a step by the nodes that follow it, as long as nothing else reads the values between."""
    while (following := _only_user(step.node)) is not None and following not in done:
        norm = norm_of(following, modules)
        if norm is not None and step.norm is None and not step.relu and step.add is None:
            step.norm = norm
        elif step.add is None and not step.relu and is_sum(following):
            step.add = next(n for n in following.all_input_nodes if n is not step.node)
        elif not step.relu and is_relu(following, modules):
            step.relu = True
        else:
            break
        step.node = following
        step.whole.append(following)


def _layer_of(node: fx.Node, layers: Mapping[str, Layer]) -> Layer | None:
    return layers.get(str(node.target)) if node.op == "call_module" else None


def norm_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.BatchNorm2d | None:
    """The batch-norm that a node calls, if the kernels compute it."""
    module = modules[str(node.target)] if node.op == "call_module" else None
    return module if isinstance(module, nn.BatchNorm2d) and moves(module) else None


def moves(module: nn.BatchNorm2d) -> bool:
    """Whether it is a plain batch-norm, whose statistics, if they move, move by its momentum."""
    return type(module) is nn.BatchNorm2d and module.momentum is not None and module.running_mean is not None


def is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    return node.target in RELUS or (node.op == "call_method" and node.target == "relu")


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds two values, and nothing else."""
    return node.op == "call_function" and node.target in ADDS and len(node.all_input_nodes) == 2 and not node.kwargs


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
