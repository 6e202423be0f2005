"""Which weights of a network are pruned, and which stay dense."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

Chosen = Sequence[str | type[nn.Module]]
"""Weights, chosen by shell patterns of their names, or by the type of their layer or its name."""

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
SHORTCUT = re.compile(r"short_?cut|down_?sample|skip|identity|residual", re.IGNORECASE)


class NothingToPrune(ValueError):
    """No weight is left to prune."""


def weight_layers(module: nn.Module) -> dict[str, _ConvNd | nn.Linear]:
    """The convolutions and linear layers by the names of their weights, in module order."""
    return {
        f"{name}.weight" if name else "weight": layer
        for name, layer in module.named_modules()
        if isinstance(layer, _ConvNd | nn.Linear)
    }


def network_of(module: nn.Module) -> nn.Module:
    """The part of a module that maps images to logits: its property ``network``, as in methods here, or all of it."""
    if not isinstance(getattr(type(module), "network", None), property):
        return module
    network, own = module.network, dict(module.named_modules())
    if isinstance(network, nn.Module) and all(own.get(n) is m for n, m in network.named_modules() if n):
        return network
    return module  # another class may give this name to something else


def sparse_weights(module: nn.Module, dense: Chosen | None = None, sparse: Chosen | None = None) -> list[str]:
    """Names of the weights to prune, in module order; a weight that several layers share has its first name.

    Entries of ``dense`` and ``sparse`` are shell patterns of weight names (``"head.weight"``, ``"*.in_proj_weight"``),
    types of layers (``nn.Embedding``) or shell patterns of their names (``"Conv1D"``).

    Args:
        module: any network; of a method, only its backbone and head count, not what an objective adds.
        dense: weights that stay dense; an empty list prunes every weight. If None, the first and the last layer stay
            dense, and 1x1 convolutions that are shortcuts (by a name such as ``downsample`` or ``shortcut``). For
            ResNet-18 that is the profile of SparCL's code.
        sparse: weights that are pruned: any parameters with two or more dimensions, even one that requires no gradient
            if a pattern names it. If None, the weights that multiply their input and require a gradient: those of
            linear layers, convolutions of any dimension, recurrent layers, attention's projections, and other layers
            with a 2-D ``weight``, but not embeddings.

    Raises:
        ValueError: if an entry matches no weight, nothing is left to prune, or a weight to prune is reparametrised.
    """
    network = network_of(module)
    found = prunable(network)
    names = list(found) if sparse is None else _matching("sparse", sparse, _matrices(network))
    if dense is None:
        first, last = _first_and_last(network, found)
        kept = {first, last, *(n for n in names if _is_shortcut(n, found.get(n)))} if sparse is None else set()
    else:
        kept = set(_matching("dense", dense, _matrices(network)))
    aliases = _aliases(network)
    kept_tensors = {aliases[name] for name in kept if name in aliases}
    chosen: dict[int | str, str] = {}
    for name in names:
        tensor = aliases.get(name, name)
        if name in kept or tensor in kept_tensors:
            continue
        if not _is_trained(network, name) and not _is_named(name, sparse or ()):
            continue
        chosen.setdefault(tensor, name)
    if not chosen:
        why = "all stay dense or require no gradient" if names else "there is none"
        raise NothingToPrune(
            f"no weight is left to prune: of {', '.join(names) or 'linear, convolutional, recurrent weights'} {why}; "
            "`sparse` takes others by a pattern of their names"
        )
    for name in chosen.values():
        path, _, own = name.rpartition(".")
        weight = dict.get(network.get_submodule(path)._parameters, own)
        if isinstance(weight, UninitializedParameter):
            raise ValueError(
                f"{name} has no size yet, as its layer is lazy; send a batch through the module before the fit"
            )
        if (how := reparametrised(network, name)) is not None:
            raise ValueError(
                f"{name} is {how}, and has no plain weight to prune; undo it before the fit (by {UNDO[how]}), or keep "
                f"it dense: dense=[..., {name!r}]"
            )
    return list(chosen.values())


def prunable(network: nn.Module) -> dict[str, nn.Module]:
    """The weights that multiply the input of their layer, by name in module order, with their layers."""
    return {f"{name}.{own}" if name else own: layer for name, layer in network.named_modules() for own in _own(layer)}


def _own(layer: nn.Module) -> list[str]:
    """Names of the weights of a layer that can be pruned without being named."""
    if isinstance(layer, _ConvNd | nn.Linear | nn.Bilinear):
        return ["weight"]
    own = dict.keys(layer._parameters)
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        return [name for name in own if name.startswith("weight")]
    if isinstance(layer, nn.MultiheadAttention):
        return [name for name in own if name.endswith("proj_weight") and dict.get(layer._parameters, name) is not None]
    weight = dict.get(layer._parameters, "weight")
    plain = weight is not None and not isinstance(weight, UninitializedParameter) and weight.ndim == 2
    return ["weight"] if plain and not isinstance(layer, (*EMBEDDINGS, _NormBase, nn.LayerNorm)) else []


UNDO = {
    "reparametrised by torch.nn.utils.parametrize": "torch.nn.utils.parametrize.remove_parametrizations",
    "reparametrised by weight_norm": "torch.nn.utils.remove_weight_norm",
    "reparametrised by torch.nn.utils.prune or spectral_norm": "torch.nn.utils.prune.remove or remove_spectral_norm",
    "computed by its layer": "making it a parameter",
}
"""What undoes each form in which a weight is not a parameter."""


def reparametrised(network: nn.Module, name: str) -> str | None:
    """How a weight is made of other tensors, or None if it is a plain parameter."""
    path, _, own = name.rpartition(".")
    layer = network.get_submodule(path)
    if dict.get(layer._parameters, own) is not None:
        return None
    if parametrize.is_parametrized(layer, own):
        return "reparametrised by torch.nn.utils.parametrize"
    if f"{own}_v" in layer._parameters:
        return "reparametrised by weight_norm"
    if f"{own}_orig" in layer._parameters:
        return "reparametrised by torch.nn.utils.prune or spectral_norm"
    return "computed by its layer"


def _matching(field: str, wanted: Chosen, weights: dict[str, nn.Module]) -> list[str]:
    """Those of ``weights`` that any entry names, by pattern or type of layer."""

    def fits(entry: str | type[nn.Module], name: str, layer: nn.Module) -> bool:
        if isinstance(entry, str):
            return fnmatch(name, entry) or fnmatch(type(layer).__name__, entry)
        return isinstance(layer, entry)

    if isinstance(wanted, str) or not isinstance(wanted, Sequence):
        raise ValueError(f"{field}={wanted!r}: a list of patterns and types of layers")
    for entry in wanted:
        if not isinstance(entry, str) and not (isinstance(entry, type) and issubclass(entry, nn.Module)):
            raise ValueError(f"{field}={list(wanted)!r}: {entry!r} is neither a pattern nor a type of layers")
        if not any(fits(entry, *weight) for weight in weights.items()):
            raise ValueError(f"{field}={entry!r} matches none of the weights: {', '.join(weights)}")
    return [name for name, layer in weights.items() if any(fits(entry, name, layer) for entry in wanted)]


def _matrices(network: nn.Module) -> dict[str, nn.Module]:
    """Every parameter of two or more dimensions, and the weights of reparametrised layers, with their layers."""
    found = {}
    for prefix, layer in ((f"{n}." if n else "", m) for n, m in network.named_modules()):
        for own in dict.fromkeys([*layer._parameters, *_own(layer)]):
            weight = dict.get(layer._parameters, own)
            lazy = isinstance(weight, UninitializedParameter)
            if own in _own(layer) or (weight is not None and not lazy and weight.ndim > 1):
                found[prefix + own] = layer
    return found


def _first_and_last(network: nn.Module, found: dict[str, nn.Module]) -> tuple[str, str]:
    """The first layer, which may be an embedding, and the last one that is prunable and trained."""
    kinds = ((n, m) for n, m in _matrices(network).items() if n in found or isinstance(m, EMBEDDINGS))
    trained = (name for name in reversed(found) if _is_trained(network, name))  # a frozen copy may come after it
    return next((name for name, _ in kinds), ""), next(trained, "")


def _is_named(name: str, entries: Chosen) -> bool:
    return any(isinstance(entry, str) and fnmatch(name, entry) for entry in entries)


def _is_shortcut(name: str, layer: nn.Module | None) -> bool:
    return isinstance(layer, _ConvNd) and set(layer.kernel_size) == {1} and SHORTCUT.search(name) is not None


def _is_trained(network: nn.Module, name: str) -> bool:
    path, _, own = name.rpartition(".")
    weight = dict.get(network.get_submodule(path)._parameters, own)
    return weight is None or weight.requires_grad  # one that is reparametrised is refused by name


def _aliases(network: nn.Module) -> dict[str, int]:
    """Which tensor goes by each name."""
    return {
        f"{name}.{own}" if name else own: id(weight)
        for name, layer in network.named_modules()
        for own, weight in dict.items(layer._parameters)
        if weight is not None
    }
