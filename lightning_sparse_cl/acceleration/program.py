"""A network run on blocked activations: traced once, and executed layer by layer or fused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_sparse_cl.acceleration.choices import Choices
from lightning_sparse_cl.acceleration.layer import Layer
from lightning_sparse_cl.acceleration.pooling import is_mean, keeps_pixels, window_of
from lightning_sparse_cl.acceleration.rows import images_as_rows, rows_as_images
from lightning_sparse_cl.acceleration.steps import Step, fuse, is_relu, is_sum, moves
from lightning_sparse_cl.kernels.functions import Convolution, Norm
from lightning_sparse_cl.kernels.layout import Blocked, Grid


class Program:
    """Runs a traced network with sparse layers; everything without a kernel is called as it is, on plain tensors.

    Under autocast the kernels compute in float32, and what leaves them is of autocast's type, as what torch computes.

    Args:
        module: the network.
        graph: its graph, see :func:`~lightning_sparse_cl.acceleration.tracing.trace`.
        layers: those with kernels, by name.
        choices: which of them use the kernels. If None, all do.
    """

    def __init__(
        self, module: nn.Module, graph: fx.Graph, layers: Mapping[str, Layer], choices: Choices | None = None
    ) -> None:
        self.module = module
        self.choices = choices
        self.modules = dict(module.named_modules())
        self.layers = {n.target: layers[n.target] for n in graph.nodes if n.op == "call_module" and n.target in layers}
        self.steps = fuse(graph, self.modules, self.layers)
        self.inputs = [node for node in graph.nodes if node.op == "placeholder"]
        last: dict[fx.Node, int] = {}
        for i, step in enumerate(self.steps):
            last |= {node: i for part in step.whole for node in part.all_input_nodes}
        self.dead = [[node for node, at in last.items() if at == i] for i in range(len(self.steps))]

    def __call__(self, *inputs: Tensor) -> Any:
        values: dict[fx.Node, Any] = dict(zip(self.inputs, inputs, strict=True))
        for step, dead in zip(self.steps, self.dead, strict=True):
            if step.node.op == "output":
                return fx.node.map_arg(step.node.args[0], lambda n: plain(values[n]))
            if step.source is not None:
                values[step.node] = self._layer(step, values[step.source], values)
            else:
                values[step.node] = self._other(step.node, values)
            for node in dead:
                values.pop(node, None)
        raise AssertionError("a graph has an output")

    def _layer(self, step: Step, given: Blocked | Tensor, values: dict[fx.Node, Any]) -> Any:
        """A layer or batch-norm and what follows it, by kernels if they can take the input."""
        layer, norm = step.layer, step.norm
        x = self._taken(step, given)
        if x is None or (layer and norm and norm.num_features != layer.weight.shape[0]):
            return self._as_it_is(step, values)
        if norm is not None and not moves(norm):  # no longer: an average of weights is about to count batches
            return self._as_it_is(step, values)
        data, grid, add = x.data, x.grid, None
        rows = plain(given).shape if layer is not None and isinstance(layer.module, nn.Linear) else None
        pattern = None if layer is None else layer.pattern_for(x)
        shape = data.shape if pattern is None else pattern.out_shape(data, grid)
        if step.add is not None:
            add = _like(values[step.add] if rows is None else _as_images(values[step.add], rows), shape, grid)
            if add is None:  # it needs broadcasting
                return self._as_it_is(step, values)
        batch = norm is not None and norm.training
        if batch and grid.images * grid.rows * grid.columns * shape[2] * shape[3] == 1:
            return self._as_it_is(step, values)  # torch refuses it
        if layer is not None and pattern is not None:
            if not batch and not torch.is_grad_enabled():
                weights, bias = layer.folded(pattern, norm)
                data = pattern.forward(data.contiguous(), weights, grid, bias, add, step.relu)
                return _shaped(data, grid, rows)
            data = Convolution.apply(data, layer.values(pattern), layer.bias, pattern, grid)
        if norm is not None and batch:
            running = (norm.running_mean, norm.running_var) if norm.track_running_stats else (None, None)
            if norm.track_running_stats and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
            how = (add, step.relu, grid, norm.eps, norm.momentum, running)
            return Blocked(Norm.apply(data, norm.weight, norm.bias, *how), grid)
        if norm is not None:
            flat = data.permute(0, 1, 4, 2, 3).flatten(2)  # batch-norm takes (N, C, L)
            about = (norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
            flat = F.batch_norm(flat, *about)
            data = flat.unflatten(2, (data.shape[4], *data.shape[2:4])).permute(0, 1, 3, 4, 2)
        data = data if add is None else data + add
        return _shaped(F.relu(data) if step.relu else data, grid, rows)

    def _taken(self, step: Step, given: Blocked | Tensor) -> Blocked | None:
        """The input of a step as blocks, or None if torch computes the step."""
        layer, norm = step.layer, step.norm
        if layer is None:  # converting for a batch-norm alone does not pay
            if not isinstance(given, Blocked) or norm is None or given.data.shape[1] != norm.num_features:
                return None
            return given
        if isinstance(layer.module, nn.Linear):
            given = plain(given)
        if not layer.takes(given) or not (self.choices is None or self.choices.sparse(layer, given)):
            return None
        return self._blocked(given, layer)

    def _blocked(self, x: Blocked | Tensor, layer: Layer) -> Blocked:
        """The input in a grid whose parts the layer keeps whole."""
        if isinstance(x, Blocked) and layer.keeps(x):
            return x
        found = x.plain() if isinstance(x, Blocked) else x.float()
        images = rows_as_images(found) if isinstance(layer.module, nn.Linear) else found
        grid = layer.grid(images)
        return Blocked(grid.block(images), grid)

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
        if is_relu(node, self.modules):
            return Blocked(F.relu(x), grid)
        if isinstance(module, nn.Identity):
            return blocked[0]
        if is_sum(node) and len(blocked) == 2 and blocked[0].grid == blocked[1].grid:
            return Blocked(x + blocked[1].data, grid)
        if is_mean(node, module):
            g, c = x.shape[:2]
            mean = x.mean((2, 3)).view(g, c, grid.each, -1).mean(3).transpose(1, 2).reshape(-1, c)
            mean = _typed(mean[: grid.images])
            return mean[:, :, None, None] if keeps_pixels(node, module) else mean
        window = window_of(node, module)
        if window is not None and x.shape[2] % window[1] == 0 and x.shape[3] % window[1] == 0:
            pool, size = window
            flat = x.permute(0, 1, 4, 2, 3).flatten(0, 1)  # (N, C, H, W) in channels_last, with lanes for channels
            flat = pool(flat, size)
            return Blocked(flat.unflatten(0, x.shape[:2]).permute(0, 1, 3, 4, 2).contiguous(), grid)
        return self._run(node, values)

    def _run(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """The value of a node, computed by torch."""
        args: Any = fx.node.map_arg(node.args, lambda n: plain(values[n]))
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: plain(values[n]))
        target: Any = node.target
        if node.op == "call_module":
            module, layer = self.modules[target], self.layers.get(target)
            if layer is not None and layer.compact is not None and not kwargs:
                return layer.dense(*args)
            return type(module).forward(module, *args, **kwargs)  # it has no hooks, and its call may lead here
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "call_function":
            return target(*args, **kwargs)
        found: Any = self.module  # get_attr
        for part in target.split("."):
            found = getattr(found, part)
        return found


def plain(value: Any) -> Any:
    """A value as torch has it, no longer blocked."""
    return _typed(value.plain()) if isinstance(value, Blocked) else value


def _typed(computed: Tensor) -> Tensor:
    """What a kernel has computed, in the type in which torch would have."""
    return computed.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else computed


def _shaped(data: Tensor, grid: Grid, rows: Sequence[int] | None) -> Blocked | Tensor:
    """The output of a layer: rows again for a linear layer, whose input had the shape ``rows``."""
    return Blocked(data, grid) if rows is None else _typed(images_as_rows(grid.unblock(data), rows))


def _as_images(value: Blocked | Tensor, rows: Sequence[int]) -> Blocked | Tensor:
    """A value to add to the rows of a linear layer, laid out as they are, if it has as many."""
    return rows_as_images(value) if isinstance(value, Tensor) and value.shape[:-1] == rows[:-1] else value


def _like(value: Blocked | Tensor, shape: tuple[int, ...], grid: Grid) -> Tensor | None:
    """The value blocked in this grid, if it has this shape."""
    if not isinstance(value, Blocked) or value.grid != grid:
        value = plain(value)
        if not isinstance(value, Tensor) or value.ndim != 4 or len(value) != grid.images:
            return None
        if torch.is_autocast_enabled("cpu"):
            if value.dtype == torch.float32:  # torch's sum would be of this type, and not of autocast's
                return None
            value = value.float()
        if any(n % p for n, p in zip(value.shape[2:], grid[1:])):
            return None
        value = Blocked(grid.block(value), grid)
    return value.data if value.data.shape == shape and value.data.dtype == torch.float32 else None
