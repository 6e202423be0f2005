"""What a network computes at inference, as a list of layers that a runtime without Python can run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_sparse_cl.acceleration.pooling import is_mean
from lightning_sparse_cl.acceleration.steps import is_sum
from lightning_sparse_cl.acceleration.tracing import trace

KINDS = ("convolution", "linear", "affine", "add", "clamp", "max_pool", "mean_pool", "mean", "unit")
"""Kinds of layers, as spnet.cpp numbers them."""
POOLING = (
    "kernel_size", "stride", "padding", "ceil_mode", "dilation", "return_indices", "count_include_pad",
    "divisor_override",
)  # fmt: skip
SAME = (nn.Identity, nn.Dropout, nn.Dropout2d)
UNIT = {"p": 2.0, "dim": 1, "eps": 1e-12, "out": None}
"""The arguments with which vectors are scaled to length one."""
SAME_TARGETS = {"contiguous", F.dropout}


@dataclass(frozen=True)
class Layer:
    """One layer. Value 0 is the network's input; layer i makes value i + 1.

    What it computes from ``input`` is added to the value ``other``, then rectified, then clamped.
    """

    kind: str
    input: int
    inputs: int
    """Channels, or features of a linear layer."""
    outputs: int
    other: int | None = None
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    rectified: bool = False
    low: float = -math.inf
    high: float = math.inf
    weight: Tensor | None = None
    """(outputs, inputs / groups, kernel, kernel) or (outputs, inputs)."""
    scale: Tensor | None = None
    """(outputs,), for an affine layer."""
    bias: Tensor | None = None
    """(outputs,)."""


def layers_of(network: nn.Module, shape: Sequence[int]) -> list[Layer]:
    """What a network computes in eval mode: batch-norm is folded into the layer before it.

    Args:
        network: maps images (B, C, H, W) to (B, D) or (B, C', H', W'). Its own hooks are left out, those of its parts
            refused.
        shape: (C, H, W) of an image.

    Raises:
        ValueError: if the network cannot be traced, or does something that no runtime layer does; the error names it.
    """
    hooked = next((name for name, module in network.named_modules() if name and _has_hooks(module)), None)
    if hooked is not None:
        raise ValueError(
            f"{type(network).__name__}: {hooked} has hooks, or a forward of its own, which would be left out; use "
            "torch.export (.pt2)"
        )
    training = {m: m.training for m in network.modules()}
    network.eval()
    try:
        graph = trace(network)
        if graph is None:
            raise ValueError(
                f"{type(network).__name__}: what it computes cannot be traced: control flow, random draws, values that "
                "are written over, or arguments with defaults; use torch.export (.pt2)"
            )
        return _Description(network, graph, tuple(shape)).layers
    finally:
        for module, was in training.items():
            module.training = was


def refuse_hooks(network: nn.Module) -> None:
    """Refuse hooks of the network itself, which would be left out.

    Raises:
        ValueError: if it has some, or a forward of its own.
    """
    if _has_hooks(network):
        name = type(network).__name__
        raise ValueError(f"{name}: it has hooks, which would be left out; use torch.export (.pt2)")


def _has_hooks(module: nn.Module) -> bool:
    """Whether a call of a module does more than its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__


class _Description:
    """Walks through a traced network."""

    def __init__(self, network: nn.Module, graph: fx.Graph, shape: tuple[int, ...]) -> None:
        self.name = type(network).__name__
        self.modules = dict(network.named_modules())
        self.layers: list[Layer] = []
        self.values: dict[fx.Node, int] = {}
        self.shapes = _shapes(network, graph, shape)
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        if len(inputs) != 1:
            raise ValueError(f"{self.name}: it takes {len(inputs)} inputs; a runtime network takes images alone")
        self.values[inputs[0]] = 0
        for node in graph.nodes:
            if node.op == "output":
                found = node.args[0]
                if not isinstance(found, fx.Node) or self.values[found] != len(self.layers):
                    raise ValueError(f"{self.name}: it gives more than one output; a runtime network gives one")
            elif node.op != "placeholder":
                self.values[node] = self._value(node)

    def _value(self, node: fx.Node) -> int:
        """The number of the value that a node computes."""
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        if is_sum(node):
            return self._add(node)
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or len(node.all_input_nodes) != 1:
            raise self._refusal(node)
        drops = node.target is F.dropout and (*node.args[2:3], node.kwargs.get("training", False)) != (False,)
        if drops:
            raise self._refusal(node, "it drops at random in eval mode, too, unless training=self.training is given")
        if type(module) in SAME or node.target in SAME_TARGETS or self._flattens(node, module):
            return self.values[source]
        if isinstance(module, nn.Conv2d | nn.Linear):
            return self._mix(node, module, source)
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            return self._norm(node, module, source)
        if type(module) is nn.ReLU or node.target in (F.relu, torch.relu, "relu", "relu_"):
            return self._then(source, rectified=True)
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
            return self._then(source, low=float(module.min_val), high=float(module.max_val))
        if node.target is F.relu6:
            return self._then(source, low=0.0, high=6.0)
        if is_mean(node, module):
            return self._new(Layer("mean", self.values[source], *2 * (self.shapes[source][1],)))
        if node.target is F.normalize:
            given = dict(zip(UNIT, node.args[1:])) | dict(node.kwargs)
            if UNIT | given != UNIT or len(self.shapes[source]) != 2:
                raise self._refusal(node, "vectors can only be scaled to length one with the usual p, dim and eps")
            return self._new(Layer("unit", self.values[source], *2 * (self._unflattened(self.values[source])[0],)))
        window = self._window(node, module, source)
        if window is None:
            raise self._refusal(node)
        kind, (kernel, stride, padding) = window
        channels = self.shapes[source][1]
        about = Layer(kind, self.values[source], channels, channels)
        return self._new(replace(about, kernel=kernel, stride=stride, padding=padding))

    def _mix(self, node: fx.Node, module: nn.Conv2d | nn.Linear, source: fx.Node) -> int:
        weight = module.weight.detach().float().cpu()
        bias = torch.zeros(len(weight)) if module.bias is None else module.bias.detach().float().cpu()
        shape, given = self.shapes[source], self.values[source]
        if isinstance(module, nn.Linear):
            if len(shape) != 2:
                raise self._refusal(node, "it is applied to more than a vector for each image")
            return self._new(Layer("linear", given, shape[1], len(weight), weight=weight, bias=bias))
        about = {"kernel": module.kernel_size, "stride": module.stride, "dilation": module.dilation}
        padding = (0, 0) if module.padding == "valid" else module.padding
        if isinstance(padding, str) or module.padding_mode != "zeros":
            raise self._refusal(node, f"its padding is {module.padding!r}, {module.padding_mode}")
        for name, pair in {**about, "padding": padding}.items():
            if len(set(pair)) > 1:
                raise self._refusal(node, f"its {name} is {pair}, and a runtime layer's is one number")
        sizes: dict[str, Any] = {name: pair[0] for name, pair in {**about, "padding": padding}.items()}
        layer = Layer("convolution", given, shape[1], len(weight), groups=module.groups, weight=weight, bias=bias)
        return self._new(replace(layer, **sizes))

    def _norm(self, node: fx.Node, module: nn.BatchNorm2d | nn.BatchNorm1d, source: fx.Node) -> int:
        if module.running_mean is None or module.running_var is None:
            raise self._refusal(node, "it has no running statistics")
        scale = torch.rsqrt(module.running_var.double() + module.eps)
        scale = scale if module.weight is None else scale * module.weight.detach().double()
        shift = -module.running_mean.double() * scale
        shift = (shift if module.bias is None else shift + module.bias.detach().double()).cpu()
        scale, given = scale.cpu(), self.values[source]
        if math.prod(self._unflattened(given)[1:]) > 1 and len(self.shapes[source]) == 2:
            raise self._refusal(node, "it normalises flattened pixels")
        before = self._fusable(source)
        if before is not None and before.weight is not None and not _done(before):
            assert before.bias is not None
            weight = before.weight.double() * scale.view(-1, *[1] * (before.weight.ndim - 1))
            bias = before.bias.double() * scale + shift
            self.layers[given - 1] = replace(before, weight=weight.float(), bias=bias.float())
            return given
        channels = len(scale)
        return self._new(Layer("affine", given, channels, channels, scale=scale.float(), bias=shift.float()))

    def _add(self, node: fx.Node) -> int:
        one, other = sorted(node.all_input_nodes, key=lambda n: self.values[n])
        if self.shapes[one] != self.shapes[other]:
            raise self._refusal(node, f"it adds {self.shapes[one]} to {self.shapes[other]}")
        before = self._fusable(other)
        if before is not None and before.kind == "convolution" and not _done(before):
            self.layers[self.values[other] - 1] = replace(before, other=self.values[one])
            return self.values[other]
        channels = self._unflattened(self.values[one])[0]
        return self._new(Layer("add", self.values[one], channels, channels, other=self.values[other]))

    def _then(self, source: fx.Node, **how: Any) -> int:
        """Rectify or clamp a value: the layer that makes it does it, too, unless it is read elsewhere."""
        before, given = self._fusable(source), self.values[source]
        if before is not None and before.kind not in ("max_pool", "mean_pool", "mean", "unit") and not _clamped(before):
            self.layers[given - 1] = replace(before, **how)
            return given
        channels = self._unflattened(given)[0]
        return self._new(Layer("clamp", given, channels, channels, **how))

    def _fusable(self, node: fx.Node) -> Layer | None:
        """The layer that makes a node's value, if nothing else reads the value."""
        value = self.values[node]
        aliases = [n for n, v in self.values.items() if v == value]
        users = {user for n in aliases for user in n.users} - set(aliases)
        return self.layers[value - 1] if value and len(users) == 1 else None

    def _new(self, layer: Layer) -> int:
        self.layers.append(layer)
        return len(self.layers)

    def _unflattened(self, value: int) -> tuple[int, ...]:
        """(C, H, W) of a value; a vector has one pixel."""
        shape = next(self.shapes[n][1:] for n, v in self.values.items() if v == value)
        return shape if len(shape) == 3 else (*shape, 1, 1)

    def _flattens(self, node: fx.Node, module: nn.Module | None) -> bool:
        """Whether the node turns each image into a vector, or leaves it as it is."""
        if isinstance(module, nn.Flatten):
            whole = (module.start_dim, module.end_dim) == (1, -1)
        else:
            whole = node.target in (torch.flatten, "flatten") and (*node.args[1:], *node.kwargs.values()) == (1,)
        return whole

    def _window(
        self, node: fx.Node, module: nn.Module | None, source: fx.Node
    ) -> tuple[str, tuple[int, int, int]] | None:
        """Kind and (kernel, stride, padding) of a pooling, or None."""
        size = self.shapes[source][2:]
        given: dict[str, Any] = {}
        if isinstance(module, nn.AdaptiveAvgPool2d) or node.target is F.adaptive_avg_pool2d:
            wanted = module.output_size if isinstance(module, nn.AdaptiveAvgPool2d) else node.args[1]
            pair = tuple(wanted) if isinstance(wanted, list | tuple) else (wanted, wanted)
            if len(size) != 2 or None in pair or any(n % m for n, m in zip(size, pair)):
                return None
            kernels = {n // m for n, m in zip(size, pair)}
            return None if len(kernels) > 1 else ("mean_pool", (min(kernels), min(kernels), 0))
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            kind = "max_pool" if isinstance(module, nn.MaxPool2d) else "mean_pool"
            given = {name: getattr(module, name) for name in POOLING if hasattr(module, name)}
        elif node.target in (F.max_pool2d, F.avg_pool2d):
            kind = "max_pool" if node.target is F.max_pool2d else "mean_pool"
            given = dict(zip(("kernel_size", "stride", "padding"), node.args[1:])) | dict(node.kwargs)
            if len(node.args) > 4:
                return None
        else:
            return None
        usual = given.get("dilation", 1) in (1, (1, 1))
        usual &= given.get("divisor_override") is None and not given.get("return_indices")
        sizes = [given["kernel_size"], given.get("stride") or given["kernel_size"], given.get("padding", 0)]
        flat: list[Any] = [v[0] if isinstance(v, tuple | list) and len(set(v)) == 1 else v for v in sizes]
        if not usual or not all(isinstance(v, int) for v in flat):
            return None
        if given.get("ceil_mode") and any((n + 2 * flat[2] - flat[0]) % flat[1] for n in size):
            return None
        if kind == "mean_pool" and flat[2] and not given.get("count_include_pad", True):
            return None
        return kind, (flat[0], flat[1], flat[2])

    def _refusal(self, node: fx.Node, why: str = "no layer of the runtime computes it") -> ValueError:
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        name = getattr(node.target, "__name__", str(node.target))
        what = f"{node.target} ({type(module).__name__})" if module is not None else f"the operation {name}"
        return ValueError(f"{self.name}: {what} cannot be exported: {why}; use torch.export (.pt2)")


def _clamped(layer: Layer) -> bool:
    return layer.rectified or layer.low > -math.inf or layer.high < math.inf


def _done(layer: Layer) -> bool:
    """Whether a layer's output has already been rectified, clamped or added."""
    return layer.other is not None or _clamped(layer)


def _shapes(network: nn.Module, graph: fx.Graph, shape: tuple[int, ...]) -> dict[fx.Node, tuple[int, ...]]:
    """The shape of every node's value for one image."""

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            found[n] = tuple(value.shape) if isinstance(value, Tensor) else ()
            return value

    found: dict[fx.Node, tuple[int, ...]] = {}
    example = next(network.parameters(), torch.zeros(0)).detach()
    with torch.no_grad():
        Noting(fx.GraphModule(network, graph)).run(example.new_zeros(1, *shape))
    return found
