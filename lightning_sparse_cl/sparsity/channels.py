"""Which layers share channels, and the smaller network that is left when some of them are not read."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_sparse_cl.backbones.memory_format import channels_last_

MIXING = (nn.Conv2d, nn.Linear)
SAME = (
    nn.ReLU, nn.ReLU6, nn.Identity, nn.Dropout, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.GELU,
    nn.SiLU, nn.Hardswish, nn.LeakyReLU,
)  # fmt: skip
SAME_FUNCTIONS = {
    F.relu, F.relu6, torch.relu, torch.flatten, torch.mean, F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d,
    F.dropout, F.gelu, F.silu,
}  # fmt: skip
SAME_METHODS = {"mean", "flatten", "relu", "contiguous"}
ADDING = {operator.add, operator.iadd, torch.add}


def graph_of(network: nn.Module) -> fx.Graph:
    """The graph that ``torch.fx`` traces of a network in its present mode.

    Raises:
        ValueError: if it cannot be traced.
    """
    try:
        with torch.compiler.set_stance("force_eager"), torch._dynamo.config.patch(error_on_nested_fx_trace=False):
            return fx.Tracer().trace(network)  # also where a part is compiled
    except Exception as error:  # any module may come, and tracing runs its code
        raise ValueError(f"{type(network).__name__}: its graph cannot be traced: {error}") from error


@dataclass
class Channels:
    """The channels of a network: sets of them, each shared by the layers that write, normalise or read it.

    Layers whose outputs are added write the same set. Made by :meth:`of`.
    """

    sizes: list[int] = field(default_factory=list)
    """Channels of each set."""
    reads: dict[str, int] = field(default_factory=dict)
    """The set that a convolution or linear layer reads, by the layer's name."""
    writes: dict[str, int] = field(default_factory=dict)
    """The set that it writes."""
    along: dict[str, int] = field(default_factory=dict)
    """The set of a batch-norm or depthwise convolution, which treats each channel alone."""
    input: int = 0
    output: int = 0

    @classmethod
    def of(cls, network: nn.Module) -> Channels:
        """Follow the channels through the graph that ``torch.fx`` traces.

        Raises:
            ValueError: if the network cannot be traced, or has an operation that may mix channels in another way.
        """
        graph = graph_of(network)
        found, modules = cls(), dict(network.named_modules())
        at: dict[fx.Node | None, int] = {}
        flat: dict[fx.Node | None, bool] = {}  # whether a value is (B, D), not (B, C, H, W)
        for node in graph.nodes:
            first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
            source, flat[node] = at.get(first), flat.get(first, False) or _flattens(node, modules)
            if node.op == "placeholder":
                if not found.sizes:
                    at[node] = found._new(0)
            elif node.op == "output":
                found.output = source if source is not None else 0
            elif node.op == "call_module" and source is not None:
                at[node] = found._through(node.target, modules[node.target], source, flat[node])
            elif node.op == "call_function" and node.target in ADDING and len(node.all_input_nodes) == 2:
                one, other = (at[n] for n in node.all_input_nodes)
                if len({flat[n] for n in node.all_input_nodes}) > 1:
                    raise ValueError(f"{type(network).__name__}: channels cannot be followed through {node.name}")
                found._join(one, other)
                at[node] = min(one, other)
                at = {n: min(one, other) if s == max(one, other) else s for n, s in at.items()}
            elif source is not None and _keeps_channels(node):
                at[node] = source
            else:
                raise ValueError(f"{type(network).__name__}: channels cannot be followed through {node.format_node()}")
        return found._renumbered()

    def _new(self, size: int) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def _renumbered(self) -> Channels:
        """Without the sets that were joined to others."""
        users = (self.reads, self.writes, self.along)
        number = {
            s: i for i, s in enumerate(sorted({s for u in users for s in u.values()} | {self.input, self.output}))
        }
        reads, writes, along = ({name: number[s] for name, s in u.items()} for u in users)
        sizes = [self.sizes[s] for s in number]
        return Channels(sizes, reads, writes, along, number[self.input], number[self.output])

    def _through(self, name: str, module: nn.Module, source: int, flat: bool) -> int:
        if isinstance(module, SAME) and (getattr(module, "start_dim", 1), getattr(module, "end_dim", -1)) == (1, -1):
            return source
        if name in self.reads or name in self.along:
            raise ValueError(f"channels cannot be followed through {name}, which is used twice")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or _depthwise(module):
            self.along[name] = source
            return source
        reads_flat, size = isinstance(module, nn.Linear), self.sizes[source]
        if (
            not isinstance(module, MIXING)
            or getattr(module, "groups", 1) != 1
            or reads_flat != flat
            or (size and module.weight.shape[1] % size)
            or nn.utils.parametrize.is_parametrized(module)
        ):
            raise ValueError(f"channels cannot be followed through {name}, a {type(module).__name__}")
        self.reads[name] = source
        if not self.sizes[source]:  # the input
            self.sizes[source] = module.weight.shape[1]
        self.writes[name] = self._new(module.weight.shape[0])
        return self.writes[name]

    def _join(self, one: int, other: int) -> None:
        kept, gone = min(one, other), max(one, other)
        if self.sizes[one] != self.sizes[other]:
            raise ValueError(f"channels cannot be followed: {self.sizes[one]} are added to {self.sizes[other]}")
        for users in (self.reads, self.writes, self.along):
            users |= {name: kept for name, s in users.items() if s == gone}


def compact(
    network: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    outputs: Sequence[int] | Tensor | None = None,
) -> nn.Module:
    """A copy without the channels that no layer reads; it computes the same, and is trained like any other.

    A channel is read if some layer that is itself read has a non-zero weight for it. The channel's own weights do not
    matter: batch-norm turns zero weights into a constant.

    Args:
        network: maps images (B, C, H, W) to (B, D).
        masks: masks of weights by name, True where alive (``Masks.alive``). If None, weights that are not zero are
            alive.
        outputs: which of the D outputs to keep, in this order. If None, all.

    Returns:
        The smaller network. If its channels cannot be followed (see :meth:`Channels.of`), only the outputs are cut.

    Raises:
        ValueError: if a mask belongs to no weight of the network, or has another shape than its weight.
    """
    network = copy.deepcopy(network)
    weights = dict(network.named_parameters())
    for name, mask in (masks or {}).items():
        if name not in weights or weights[name].shape != mask.shape:
            of = f"{tuple(weights[name].shape)}" if name in weights else "not there"
            raise ValueError(f"compact: the mask of {name!r} has shape {tuple(mask.shape)}, the weight is {of}")
        weights[name].data.mul_(mask)
    last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1] if outputs is not None else None
    try:
        channels = Channels.of(network)
    except ValueError:
        if last is not None:
            _cut(last, torch.as_tensor(outputs), 0)
        return network
    modules = dict(network.named_modules())
    read = [torch.zeros(size, dtype=torch.bool) for size in channels.sizes]
    read[channels.input][:] = True
    if outputs is None:
        read[channels.output][:] = True
    else:
        read[channels.output][torch.as_tensor(outputs)] = True
    changed = True
    while changed:
        changed = False
        for name, source in channels.reads.items():
            weight = modules[name].weight.detach()[read[channels.writes[name]].to(modules[name].weight.device)]
            used = (weight != 0).sum(0).view(len(read[source]), -1).any(1).cpu()
            changed |= bool((used & ~read[source]).any())
            read[source] |= used
    for mask in read:
        if not mask.any():
            mask[0] = True  # a layer has at least one channel
    kept = [mask.nonzero().squeeze(1) for mask in read]
    if outputs is not None:
        kept[channels.output] = torch.as_tensor(outputs)
    for name, source in channels.along.items():
        _cut(modules[name], kept[source], 0)
    for name, source in channels.reads.items():
        layer, target = modules[name], channels.writes[name]
        if not read[target].all() or target == channels.output:
            _cut(layer, kept[target], 0)
        if not read[source].all():
            wide = read[source].repeat_interleave(layer.weight.shape[1] // len(read[source]))
            _cut(layer, wide.nonzero().squeeze(1), 1)
    return channels_last_(network)


def _keeps_channels(node: fx.Node) -> bool:
    """Whether a function or method treats every channel alone and keeps them where they are."""
    known = SAME_FUNCTIONS if node.op == "call_function" else SAME_METHODS if node.op == "call_method" else ()
    if node.target not in known:
        return False
    dims = node.args[1:2] or [v for k, v in node.kwargs.items() if k in ("dim", "start_dim")]
    if node.target in (torch.mean, "mean"):
        given = dims[0] if dims and isinstance(dims[0], list | tuple) else node.args[1:]
        return set(given) in ({2, 3}, {-1, -2})
    return node.target not in (torch.flatten, "flatten") or (*node.args[1:], *node.kwargs.values()) == (1,)


def _flattens(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the output of the node is (B, D)."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.Flatten)
    return node.target in (torch.mean, torch.flatten, "mean", "flatten")


def _depthwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1


@torch.no_grad()
def _cut(layer: nn.Module, kept: Tensor, dim: int) -> None:
    """Keep these channels of a layer's own tensors, on its outputs (dim 0) or inputs (dim 1)."""
    for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        if tensor.ndim > dim:
            smaller = tensor.index_select(dim, kept.to(tensor.device))
            if isinstance(tensor, nn.Parameter):
                setattr(layer, name, nn.Parameter(smaller, tensor.requires_grad))
            else:
                setattr(layer, name, smaller)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        layer.num_features = len(kept)
    elif _depthwise(layer):
        layer.in_channels = layer.out_channels = layer.groups = len(kept)
    else:
        names = ("out_features", "in_features") if isinstance(layer, nn.Linear) else ("out_channels", "in_channels")
        setattr(layer, names[dim], len(kept))
