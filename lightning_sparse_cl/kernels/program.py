"""A network run on blocked activations: traced once, and executed layer by layer or fused."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_sparse_cl.kernels.functions import Convolution, Gather, Norm
from lightning_sparse_cl.kernels.layout import Grid
from lightning_sparse_cl.kernels.pattern import Geometry, Pattern

ADDS = {operator.add, operator.iadd, torch.add}
RELUS = {F.relu, torch.relu}
IN_PLACE = {"iadd", "isub", "imul", "itruediv"}


class Layer:
    """A convolution or linear layer, its pattern, and where its values come from.

    Args:
        name: of the layer in the network.
        module: the layer.
        mask: of the weight's shape, True where alive; None if it is not masked.
    """

    def __init__(self, name: str, module: nn.Conv2d | nn.Linear, mask: Tensor | None) -> None:
        self.name, self.module = name, module
        self.weight = module.weight
        conv = isinstance(module, nn.Conv2d)
        self.geometry = Geometry(module.stride[0], module.padding[0]) if conv else Geometry()
        self.compact: nn.Parameter | None = None
        """The values that are trained in place of the weight, if they are."""
        self.remask(mask)

    def remask(self, mask: Tensor | None) -> None:
        """Follow a change of the mask; its lists are made when they are needed."""
        self.mask = mask
        self.density = 1.0 if mask is None else mask.count_nonzero().item() / mask.numel()
        self._pattern: Pattern | None = None
        self._still: tuple[object, Tensor] | None = None
        self._folded: tuple[object, Tensor, Tensor] | None = None
        self.chosen: dict[tuple[object, ...], bool] = {}
        """What :class:`Choices` has found for it."""

    @property
    def bias(self) -> Tensor | None:
        return dict.get(self.module._parameters, "bias")  # to ask for it would end compact training

    @property
    def changed(self) -> bool:
        """Whether the module has another weight for now, as in ``torch.func.functional_call``, or of another type."""
        weight = dict.get(self.module._parameters, "weight")
        return weight is not self.weight or weight.dtype != torch.float32 or weight.device.type != "cpu"

    @property
    def keeps_size(self) -> bool:
        """Whether it pads so that parts of an image stay parts of it."""
        return 2 * self.geometry.padding + 1 == (self.weight.shape[2] if self.weight.ndim == 4 else 1)

    def grid(self, x: Tensor) -> Grid:
        """In which to lay images (B, C, H, W) for it, and for what may follow until images are 4x4."""
        h, w = x.shape[2:]
        stride = self.geometry.stride
        if not self.keeps_size or h % stride or w % stride:
            return Grid(len(x))
        return Grid.of(len(x), h, w, max(stride, min(h, w) // 4))

    @property
    def pattern(self) -> Pattern:
        if self._pattern is None or self._pattern.strides != self.weight.stride():
            weight = self.weight.detach()
            mask = torch.ones_like(weight, dtype=torch.bool) if self.mask is None else self.mask
            self._pattern = Pattern(mask, weight, self.geometry)
        return self._pattern

    def values(self) -> Tensor:
        """The values (n,), with a gradient if one is wanted."""
        if self.compact is not None:
            return self.compact
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return Gather.apply(self.weight, self.pattern)
        if self._still is None or self._still[0] != self._at:
            with torch.inference_mode(False):  # it is kept for who takes gradients
                self._still = self._at, self.pattern.gather(self.weight.detach())
        return self._still[1]

    @property
    def _at(self) -> tuple[int, int]:
        """Another one whenever the values are others."""
        weight = self.weight if self.compact is None else self.compact
        return weight._version, weight.data_ptr()

    def folded(self, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None]:
        """Values and bias with which the layer does its batch-norm, too, in eval mode."""
        values = self.values().detach()
        if norm is None:
            return values, self.bias
        parts = (self.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        at = [self._at, *(None if t is None else (t._version, t.data_ptr()) for t in parts)]
        if self._folded is None or self._folded[0] != at:
            scale = torch.rsqrt(norm.running_var + norm.eps)
            scale = scale if norm.weight is None else scale * norm.weight.detach()
            shift = -norm.running_mean if self.bias is None else self.bias.detach() - norm.running_mean
            shift = shift * scale if norm.bias is None else shift * scale + norm.bias.detach()
            whole = scale.view(-1, *(1,) * (self.weight.ndim - 1)).expand_as(self.weight)
            whole = torch.empty_like(self.weight).copy_(whole)
            self._folded = at, values * self.pattern.gather(whole), shift
        return self._folded[1:]


def unsupported(module: nn.Module) -> str | None:
    """Why there is no kernel for a layer, or None."""
    if type(module) is nn.Linear:
        return None
    if type(module) is not nn.Conv2d:
        return f"a {type(module).__name__}"
    k, s, p = module.kernel_size, module.stride, module.padding
    if module.groups != 1:
        return f"{module.groups} groups"
    if k not in ((1, 1), (3, 3)):
        return f"a kernel of {k[0]}x{k[1]} pixels"
    if s not in ((1, 1), (2, 2)):
        return f"stride {s}"
    if module.dilation != (1, 1):
        return f"dilation {module.dilation}"
    if isinstance(p, str) or p[0] != p[1] or not p[0] < k[0] or module.padding_mode != "zeros":
        return f"padding {p!r}, {module.padding_mode}"
    if module.weight.dtype != torch.float32 or module.weight.device.type != "cpu":
        return f"weights in {module.weight.dtype} on {module.weight.device}"
    return None


def rewrites(graph: fx.Graph, module: nn.Module) -> bool:
    """Whether an operation in place changes a value that is used again, as if it had not been computed anew."""
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
        if in_place and any(len(n.users) > 1 or n.op == "placeholder" for n in node.all_input_nodes[:1]):
            return True
    return False


class Blocked:
    """A tensor in blocks, and the grid in which images lie there."""

    def __init__(self, data: Tensor, grid: Grid) -> None:
        self.data, self.grid = data, grid

    def plain(self) -> Tensor:
        return self.grid.unblock(self.data)


class Choices:
    """Measures, once for each layer and shape, whether the kernels are faster than torch, and remembers it.

    Args:
        measure: False is: they are.
    """

    def __init__(self, measure: bool = True) -> None:
        self.measure = measure
        self.taken: dict[str, bool] = {}
        """Whether the kernels are used, by what was measured."""
        self._dense: set[str] = set()

    def sparse(self, layer: Layer, x: Tensor | Blocked) -> bool:
        """Whether to use the kernels for a layer and its input, forward and, where gradients are taken, backward."""
        if not self.measure:
            return True
        grads, threads = torch.is_grad_enabled(), torch.get_num_threads()
        shape = (x.data.shape, x.grid) if isinstance(x, Blocked) else x.shape
        if (shape, grads, threads) in layer.chosen:
            return layer.chosen[shape, grads, threads]
        images, h, w = (x.grid.images, *_pixels(x)) if isinstance(x, Blocked) else (len(x), *(*x.shape[2:], 1, 1)[:2])
        about = (tuple(layer.weight.shape), tuple(layer.geometry), images, h, w, round(layer.density, 2), grads)
        key = f"{about} {threads}"
        if key not in self.taken:
            sparse, dense = _measure(layer, x, grads)
            self.taken[key] = sparse <= dense
        layer.chosen[shape, grads, threads] = self.taken[key]
        if grads and not self.taken[key]:
            self._dense.add(layer.name)
        return self.taken[key]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": dict(self.taken), "dense": sorted(self._dense)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Decide as before, so that what is computed is the same."""
        self.taken |= state.get("taken", {})
        self._dense |= set(state.get("dense", ()))

    def dense(self, layer: Layer) -> bool:
        """Whether torch was the faster in training."""
        return layer.name in self._dense


def _pixels(x: Blocked) -> tuple[int, int]:
    return x.data.shape[2] * x.grid.rows, x.data.shape[3] * x.grid.columns


@torch.enable_grad()
def _measure(layer: Layer, x: Tensor | Blocked, grads: bool) -> tuple[float, float]:
    """Seconds of a layer by the kernels and by torch, each with the changes of layout that it needs here."""
    linear = isinstance(layer.module, nn.Linear)
    grid = x.grid if isinstance(x, Blocked) else Grid(len(x)) if linear else layer.grid(x)
    values, weight = (t.detach().requires_grad_(grads) for t in (layer.pattern.gather(layer.weight), layer.weight))
    there = (x.data if isinstance(x, Blocked) else x).detach().clone().requires_grad_(grads)

    def sparse() -> Tensor:
        given = (
            grid.block(there[:, :, None, None]) if linear else there if isinstance(x, Blocked) else grid.block(there)
        )
        y = Convolution.apply(given, values, None, layer.pattern, grid)
        return grid.unblock(y).flatten(1) if linear else y

    def dense() -> Tensor:
        given = grid.unblock(there) if isinstance(x, Blocked) else there
        return F.linear(given, weight) if linear else grid.block(F.conv2d(given, weight, None, *layer.geometry))

    times: dict[Callable, list[float]] = {sparse: [], dense: []}
    for _ in range(4):
        for run, taken in times.items():
            start = time.perf_counter()
            y = run()
            if grads:
                y.backward(y.detach())
            taken.append(time.perf_counter() - start)
    return min(times[sparse]), min(times[dense])


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
        graph: of it, see :func:`~lightning_sparse_cl.sparsity.channels.graph_of`.
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
            if node.op == "call_module" and (node.target in self.layers or self._is_norm(node)):
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
        norm = self.modules.get(node.target) if node.op == "call_module" else None
        return type(norm) is nn.BatchNorm2d and norm.momentum is not None and norm.running_mean is not None

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
        if layer is None:
            x = given if isinstance(given, Blocked) else None  # a batch-norm alone is not worth the conversion
        else:
            x = self._blocked(given, layer) if self.choices is None or self.choices.sparse(layer, given) else None
        if x is None:
            return self._as_it_is(step, values)
        data, grid, add = x.data, x.grid, None
        if step.add is not None:
            shape = data.shape if layer is None else layer.pattern.out_shape(data, grid)
            add = _like(values[step.add], shape, grid)
            if add is None:  # something that is broadcast
                return self._as_it_is(step, values)
        batch = norm is not None and norm.training
        if layer is not None and not batch and not torch.is_grad_enabled():
            weights, bias = layer.folded(norm)
            data = layer.pattern.forward(data.contiguous(), weights, grid, bias, add, step.relu)
            return self._shaped(step, data, grid)
        if layer is not None:
            data = Convolution.apply(data, layer.values(), layer.bias, layer.pattern, grid)
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

    def _blocked(self, x: Blocked | Tensor, layer: Layer) -> Blocked | None:
        """In a grid whose parts the layer keeps whole; None if it is of a kind that the layer does not take blocked."""
        linear = isinstance(layer.module, nn.Linear)
        if isinstance(x, Blocked) and not linear:
            parts = [n % layer.geometry.stride == 0 for n in x.data.shape[2:4]]
            if x.grid[1:] == (1, 1) or (layer.keeps_size and all(parts)):
                return x
        x = plain(x)
        if x.ndim != (2 if linear else 4):
            return None
        x = x[:, :, None, None] if linear else x
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
            module = self.modules[node.target]
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
        if value.ndim != 4 or len(value) != grid.images or any(n % p for n, p in zip(value.shape[2:], grid[1:])):
            return None
        value = Blocked(grid.block(value), grid)
    return value.data if value.data.shape == shape else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


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
    elif node.target in (F.max_pool2d, F.avg_pool2d, torch.max_pool2d) and len(node.args) == 2:
        k = node.args[1]
        if (
            isinstance(k, int)
            and set(node.kwargs.values()) <= {None, False, k, 1}
            and node.kwargs.get("padding", 0) == 0
        ):
            stride = node.kwargs.get("stride")
            if stride in (None, k) and node.kwargs.get("dilation", 1) == 1:
                return node.target, k
    return None


def _pool(module: nn.Module) -> tuple[Any, Any, Any]:
    return module.kernel_size, module.stride, module.padding
