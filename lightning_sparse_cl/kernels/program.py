"""A network run on blocked activations: traced once, and executed layer by layer or fused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_sparse_cl.kernels.choices import Choices
from lightning_sparse_cl.kernels.functions import Convolution, Norm
from lightning_sparse_cl.kernels.layer import Layer
from lightning_sparse_cl.kernels.layout import Blocked, Grid
from lightning_sparse_cl.kernels.tracing import ADDS

RELUS = {F.relu, torch.relu}


@dataclass
class Step:
    """One operation: a node of the graph, or several that are done together and end at ``node``."""

    node: fx.Node
    """Whose value this is."""
    source: fx.Node | None = None
    """The input of a layer or batch-norm."""
    layer: Layer | None = None
    norm: nn.BatchNorm2d | None = None
    add: fx.Node | None = None
    """What is added after the batch-norm."""
    relu: bool = False
    whole: list[fx.Node] = field(default_factory=list)
    """The nodes of which it is made, in order."""


class Program:
    """Runs a traced network with sparse layers; everything it has no kernel for is called as it is, on plain tensors.

    Args:
        module: the network.
        graph: of it, see :func:`~lightning_sparse_cl.kernels.tracing.trace`.
        layers: those with kernels, by name.
        choices: which of them use the kernels; None is all.
    """

    def __init__(
        self, module: nn.Module, graph: fx.Graph, layers: Mapping[str, Layer], choices: Choices | None = None
    ) -> None:
        self.module = module
        self.choices = choices
        self.modules = dict(module.named_modules())
        self.layers = {n.target: layers[n.target] for n in graph.nodes if n.op == "call_module" and n.target in layers}
        self.steps = self._fuse(graph)
        self.inputs = [node for node in graph.nodes if node.op == "placeholder"]
        last: dict[fx.Node, int] = {}
        for i, step in enumerate(self.steps):
            last |= {node: i for part in step.whole for node in part.all_input_nodes}
        self.dead = [[node for node, at in last.items() if at == i] for i in range(len(self.steps))]

    def _fuse(self, graph: fx.Graph) -> list[Step]:
        """Layer, batch-norm, sum and ReLU that follow each other are one step."""
        steps, done = [], set()
        at = {node: i for i, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            if node.op == "placeholder" or node in done:
                continue
            step = Step(node, whole=[node])
            known = node.op == "call_module" and (node.target in self.layers or self._is_norm(node))
            if known and len(node.args) == 1 and not node.kwargs:
                step.source = node.args[0]
                if node.target in self.layers:
                    step.layer = self.layers[node.target]
                else:
                    step.norm = self.modules[node.target]
                while (following := _only_user(step.node)) is not None and following not in done:
                    if step.norm is None and not step.relu and step.add is None and self._is_norm(following):
                        step.norm = self.modules[following.target]
                    elif step.add is None and not step.relu and self._is_sum(following):
                        step.add = next(n for n in following.all_input_nodes if n is not step.node)
                    elif not step.relu and self._is_relu(following):
                        step.relu = True
                    else:
                        break
                    step.node = following
                    step.whole.append(following)
                if isinstance(step.layer and step.layer.module, nn.Linear):
                    step = Step(node, node.args[0], step.layer, whole=[node])
            done |= set(step.whole)
            steps.append(step)
        return sorted(steps, key=lambda s: at[s.node])  # what is added is there by then

    def _is_norm(self, node: fx.Node) -> bool:
        return node.op == "call_module" and _moves(self.modules[node.target])

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.modules[node.target]) is nn.ReLU
        return node.target in RELUS or (node.op == "call_method" and node.target == "relu")

    def _is_sum(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node.target in ADDS and len(node.all_input_nodes) == 2 and not node.kwargs

    # -- running -----------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Tensor) -> Any:
        values: dict[fx.Node, Any] = dict(zip(self.inputs, inputs, strict=True))
        for step, dead in zip(self.steps, self.dead, strict=True):
            if step.node.op == "output":
                return fx.node.map_arg(step.node.args[0], lambda n: plain(values[n]))
            if step.source is not None:
                values[step.node] = self._layer(step, values)
            else:
                values[step.node] = self._other(step.node, values)
            for node in dead:
                values.pop(node, None)
        raise AssertionError("a graph has an output")

    def _layer(self, step: Step, values: dict[fx.Node, Any]) -> Any:
        """A layer or batch-norm and what follows it, by kernels if there are any for what has come."""
        layer, norm, given = step.layer, step.norm, values[step.source]
        if layer is not None and isinstance(layer.module, nn.Linear):
            given = plain(given)
        if layer is None:  # a batch-norm alone is not worth a conversion
            x = given if isinstance(given, Blocked) and given.data.shape[1] == norm.num_features else None
        elif layer.takes(given):
            used = self.choices is None or self.choices.sparse(layer, given)
            x = self._blocked(given, layer) if used else None
        else:
            x = None
        if x is None or (layer and norm and norm.num_features != layer.weight.shape[0]):
            return self._as_it_is(step, values)
        if norm is not None and not _moves(norm):  # any more: an average of weights is about to count batches
            return self._as_it_is(step, values)
        data, grid, add = x.data, x.grid, None
        pattern = None if layer is None else layer.pattern_for(x)
        shape = data.shape if layer is None else pattern.out_shape(data, grid)
        if step.add is not None:
            add = _like(values[step.add], shape, grid)
            if add is None:  # something that is broadcast
                return self._as_it_is(step, values)
        batch = norm is not None and norm.training
        if batch and grid.images * grid.rows * grid.columns * shape[2] * shape[3] == 1:
            return self._as_it_is(step, values)  # torch refuses it
        if layer is not None and not batch and not torch.is_grad_enabled():
            weights, bias = layer.folded(pattern, norm)
            data = pattern.forward(data.contiguous(), weights, grid, bias, add, step.relu)
            return self._shaped(step, data, grid)
        if layer is not None:
            data = Convolution.apply(data, layer.values(pattern), layer.bias, pattern, grid)
        if batch:
            running = (norm.running_mean, norm.running_var) if norm.track_running_stats else (None, None)
            if norm.track_running_stats:
                norm.num_batches_tracked.add_(1)
            how = (add, step.relu, grid, norm.eps, norm.momentum, running)
            return Blocked(Norm.apply(data, norm.weight, norm.bias, *how), grid)
        if norm is not None:
            flat = data.permute(0, 1, 4, 2, 3).flatten(2)  # batch-norm takes (N, C, L)
            about = (norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
            flat = F.batch_norm(flat, *about)
            data = flat.unflatten(2, (data.shape[4], *data.shape[2:4])).permute(0, 1, 3, 4, 2)
        data = data if add is None else data + add
        return self._shaped(step, F.relu(data) if step.relu else data, grid)

    def _shaped(self, step: Step, data: Tensor, grid: Grid) -> Blocked | Tensor:
        linear = step.layer is not None and isinstance(step.layer.module, nn.Linear)
        return grid.unblock(data).flatten(1) if linear else Blocked(data, grid)

    def _blocked(self, x: Blocked | Tensor, layer: Layer) -> Blocked:
        """In a grid whose parts the layer keeps whole."""
        if isinstance(x, Blocked):
            parts = [n % layer.geometry.stride == 0 for n in x.data.shape[2:4]]
            if x.grid[1:] == (1, 1) or (layer.keeps_size and all(parts)):
                return x
        x = plain(x)
        x = x[:, :, None, None] if x.ndim == 2 else x
        grid = layer.grid(x)
        return Blocked(grid.block(x), grid)

    def _as_it_is(self, step: Step, values: dict[fx.Node, Any]) -> Any:
        """Every node of the step by torch, on plain tensors."""
        own = dict(values)
        for node in step.whole:
            own[node] = self._run(node, own)
        return own[step.node]

    def _other(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """ReLU, sums, pooling and means stay blocked; for anything else tensors become plain."""
        found = [values.get(n) for n in node.all_input_nodes]
        blocked = [v for v in found if isinstance(v, Blocked)]
        if not blocked:
            return self._run(node, values)
        x, grid = blocked[0].data, blocked[0].grid
        module = self.modules[node.target] if node.op == "call_module" else None
        if self._is_relu(node):
            return Blocked(F.relu(x), grid)
        if isinstance(module, nn.Identity):
            return blocked[0]
        if self._is_sum(node) and len(blocked) == 2 and blocked[0].grid == blocked[1].grid:
            return Blocked(x + blocked[1].data, grid)
        if _is_mean(node, module):
            g, c = x.shape[:2]
            mean = x.mean((2, 3)).view(g, c, grid.each, -1).mean(3).transpose(1, 2).reshape(-1, c)[: grid.images]
            return mean[:, :, None, None] if _keeps(node, module) else mean
        window = _halves(node, module)
        if window is not None and x.shape[2] % window[1] == 0 and x.shape[3] % window[1] == 0:
            pool, size = window
            flat = x.permute(0, 1, 4, 2, 3).flatten(0, 1)  # (N, C, H, W) in channels_last, with lanes for channels
            flat = pool(flat, size)
            return Blocked(flat.unflatten(0, x.shape[:2]).permute(0, 1, 3, 4, 2).contiguous(), grid)
        return self._run(node, values)

    def _run(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """As torch does it."""
        args, kwargs = (fx.node.map_arg(a, lambda n: plain(values[n])) for a in (node.args, node.kwargs))
        if node.op == "call_module":
            module, layer = self.modules[node.target], self.layers.get(node.target)
            if layer is not None and layer.compact is not None and not kwargs:
                return layer.dense(*args)
            return type(module).forward(module, *args, **kwargs)  # it has no hooks, and this may stand in for its call
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)
        found: Any = self.module  # get_attr
        for part in node.target.split("."):
            found = getattr(found, part)
        return found


def plain(value: Any) -> Any:
    """A tensor as torch has it."""
    return value.plain() if isinstance(value, Blocked) else value


def _like(value: Blocked | Tensor, shape: tuple[int, ...], grid: Grid) -> Tensor | None:
    """Blocked in the same way, if it has the shape."""
    if not isinstance(value, Blocked) or value.grid != grid:
        value = plain(value)
        if not isinstance(value, Tensor) or value.ndim != 4 or len(value) != grid.images:
            return None
        if any(n % p for n, p in zip(value.shape[2:], grid[1:])):
            return None
        value = Blocked(grid.block(value), grid)
    return value.data if value.data.shape == shape and value.data.dtype == torch.float32 else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _moves(module: nn.Module) -> bool:
    """Whether it is a batch-norm whose statistics, if they move, move by its momentum."""
    return type(module) is nn.BatchNorm2d and module.momentum is not None and module.running_mean is not None


def _is_mean(node: fx.Node, module: nn.Module | None) -> bool:
    """A mean over all pixels."""
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return module.output_size in (1, (1, 1))
    if node.target is F.adaptive_avg_pool2d:
        return node.args[1:] in ((1,), ((1, 1),)) and not node.kwargs
    if node.target not in ("mean", torch.mean):
        return False
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, list | tuple) and sorted(d % 4 for d in dims) == [2, 3]


def _keeps(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether (B, C) stays (B, C, 1, 1)."""
    if node.target in ("mean", torch.mean):
        return bool(node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2]))
    return True


def _halves(node: fx.Node, module: nn.Module | None) -> tuple[Callable, int] | None:
    """The function and window of a pooling whose windows do not overlap, or None."""
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        k, s, p = (v if isinstance(v, int) else v[0] if len(set(v)) == 1 else -1 for v in _pool(module))
        usual = getattr(module, "dilation", 1) == 1 and not getattr(module, "return_indices", False)
        usual = usual and getattr(module, "divisor_override", None) is None
        if k == s > 0 and p == 0 and usual:
            return (F.max_pool2d if isinstance(module, nn.MaxPool2d) else F.avg_pool2d), k
    elif node.target in (F.max_pool2d, F.avg_pool2d) and len(node.args) == 2 and isinstance(node.args[1], int):
        k = node.args[1]
        if node.kwargs in ({}, {"stride": k}, {"stride": None}):
            return node.target, k
    return None


def _pool(module: nn.Module) -> tuple[Any, Any, Any]:
    return module.kernel_size, module.stride, module.padding
