"""Samples of any kind are nests of tensors: a tensor, or a dict, tuple or list of nests.

A batch is a nest whose tensors have the same first size, the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Nest = Any
"""A tensor, or a dict, tuple or list of nests."""


def each(function: Callable[..., Any], nest: Nest, *others: Nest) -> Nest:
    """Apply ``function`` to each tensor, together with the tensors of ``others`` at the same place; returns a nest."""
    if isinstance(nest, Tensor):  # the usual case: ten times as fast
        return function(nest, *others)
    return pytree.tree_map(function, nest, *others)


def tensors(nest: Nest) -> list[Tensor]:
    """The tensors of a nest."""
    return [nest] if isinstance(nest, Tensor) else pytree.tree_leaves(nest)


def named(nest: Nest) -> dict[str, Tensor]:
    """The tensors of a nest by their keys, joined by dots; a nest that is itself a tensor has the key ``""``."""
    return {".".join(keys): tensor for keys, tensor in _paths(nest)}


def _paths(nest: Nest) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(nest, Mapping):
        inside: Any = nest.items()
    elif isinstance(nest, tuple | list):
        inside = enumerate(nest)
    else:
        yield (), nest
        return
    for key, part in inside:
        yield from (((str(key), *keys), tensor) for keys, tensor in _paths(part))


def count(batch: Nest) -> int:
    """Number of samples in a batch."""
    return len(tensors(batch)[0])


def rows(batch: Nest, at: Any) -> Nest:
    """Those samples of a batch that an index, a slice, a mask or indices (n,) choose."""
    return each(lambda tensor: tensor[at], batch)


def joined(batches: Sequence[Nest]) -> Nest:
    """One batch of several."""
    return each(lambda *parts: torch.cat(parts), *batches)


def split(batch: Nest, size: int) -> Iterator[Nest]:
    """The batch in parts of ``size`` samples; the last one may be smaller."""
    return (rows(batch, slice(i, i + size)) for i in range(0, count(batch), size))


def layout(batch: Nest) -> Nest:
    """The batch without its samples: shapes and types of tensors, on the CPU."""
    return each(lambda tensor: torch.empty(0, *tensor.shape[1:], dtype=tensor.dtype), batch)


def gathered(batch: Nest, at: Tensor) -> Nest:
    """The samples at indices (n,), copied."""
    return each(lambda tensor: tensor.index_select(0, at), batch)


def stacked(views: Sequence[Nest]) -> Nest:
    """A batch whose tensors have the views in their second dimension."""
    return each(lambda *parts: torch.stack(parts, 1), *views)


def filled(nest: Nest, with_tensors: Sequence[Tensor]) -> Nest:
    """The nest with other tensors, in the order of :func:`tensors`."""
    if isinstance(nest, Tensor):
        return with_tensors[0]
    return pytree.tree_unflatten(list(with_tensors), pytree.tree_structure(nest))


def moved(batch: Nest, device: torch.device) -> Nest:
    """The batch on a device."""
    return each(lambda tensor: tensor.to(device), batch)


def described(batch: Nest) -> dict[str, str]:
    """Type and shape of one sample's tensors, by their keys: ``{"": "uint8 (3, 32, 32)"}``."""
    return {k: f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape[1:])}" for k, t in named(batch).items()}


def in_words(kinds: dict[str, str]) -> str:
    """What :func:`described` gives, in a line: ``ids: int64 (32,), mask: bool (32,)``."""
    return ", ".join(f"{key}: {kind}" if key else kind for key, kind in kinds.items())


def layout_of_one(sample: Nest) -> Nest:
    """:func:`layout` of batches of such samples."""
    return each(lambda tensor: torch.empty(0, *tensor.shape, dtype=tensor.dtype), sample)


def as_nest(value: Any, name: str) -> Nest:
    """Turn a nest of tensors, numpy arrays and numbers into one of tensors; mappings become dicts with sorted keys.

    Raises:
        ValueError: which names ``name``, if the nest contains anything else, or nothing.
    """
    if isinstance(value, Mapping):
        made: Any = {key: as_nest(value[key], f"{name}[{key!r}]") for key in ordered(value, name)}
    elif isinstance(value, tuple | list) and any(isinstance(v, Tensor | np.ndarray | Mapping | tuple) for v in value):
        made = tuple(as_nest(part, f"{name}[{i}]") for i, part in enumerate(value))
    else:
        try:
            if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
                return torch.from_numpy(np.ascontiguousarray(value, value.dtype.newbyteorder("=")))
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError, KeyError):  # a table raises KeyError
            kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            raise ValueError(f"{name}: a tensor, an array of numbers or a number is expected, got a {kind}") from None
    if not made:
        raise ValueError(f"{name}: there is no tensor in it")
    return made


def ordered(value: Mapping[Any, Any], name: str) -> list[str]:
    """The keys of a dict in alphabetical order, so that its order never matters.

    Raises:
        ValueError: which names ``name``, if a key is not a text, or contains a dot, which joins the keys of nests.
    """
    for key in value:
        if not isinstance(key, str) or "." in key:
            raise ValueError(f"{name}: keys are texts without dots, got {key!r}")
    return sorted(value)


def refuse_other_kind(one: str, sample: Nest, other: str, first: Nest) -> None:
    """Raise ValueError unless keys, shapes and types agree; it calls the samples ``one`` and ``other``."""
    both = isinstance(sample, Tensor) and isinstance(first, Tensor)
    if both and sample.shape == first.shape and sample.dtype == first.dtype:  # the usual case
        return
    kinds, known = described(layout_of_one(sample)), described(layout_of_one(first))
    if kinds == known and type(sample) is type(first):
        return
    if kinds == known:
        raise ValueError(f"{one} are of the type {type(sample).__name__}, {other} {type(first).__name__}")
    if set(kinds) == set(known):
        key = next(key for key in known if kinds[key] != known[key])
        kinds, known = {key: kinds[key]}, {key: known[key]}
    raise ValueError(f"{one} are {in_words(kinds)}, {other} {in_words(known)}; all must be equal")


def is_image(layout: Nest) -> bool:
    """Whether samples are one tensor (C, H, W), uint8 or float."""
    known = isinstance(layout, Tensor) and layout.ndim == 4
    return known and (layout.dtype == torch.uint8 or layout.is_floating_point())


def is_padded(layout: Nest) -> bool:
    """Whether samples are series of different lengths: ``{"series": (C, T), "length": ()}``."""
    if not isinstance(layout, dict) or set(layout) != {"series", "length"}:
        return False
    return isinstance(layout["series"], Tensor) and layout["series"].ndim == 3


def within(length: Tensor, series: Tensor) -> Tensor:
    """Which steps of series (B, C, T) are before their ends ``length`` (B,), as a mask (B, 1, T)."""
    return (torch.arange(series.shape[2], device=series.device) < length.view(-1, 1)).unsqueeze(1)
