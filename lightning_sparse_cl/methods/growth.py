"""What a network of some classes knows, as the state of one with more classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def grown(found: Mapping[str, Any], larger: nn.Module) -> dict[str, Any]:
    """The state of a module, in a larger one of the same kind that has just been built.

    New classes come last everywhere: in every tensor the old values are the leading block, bit for bit, and the rest
    stays as it was built. Buffers that a part names in ``per_weight``, which hold a value for each of its
    ``weight_names``, one weight after the other, are grown weight by weight.

    Args:
        found: the ``state_dict`` of the module with fewer classes.
        larger: the module with more classes.
    """
    own = larger.state_dict()
    state = {name: _leading(value, own[name]) if name in own else value for name, value in found.items()}
    for path, part in larger.named_modules():
        for buffer in getattr(part, "per_weight", ()):
            name = f"{path}.{buffer}"
            shapes = [[s[weight].shape for weight in part.weight_names] for s in (found, own)]
            before, now = (
                values.split([shape.numel() for shape in sizes])
                for values, sizes in zip((found[name], own[name]), shapes, strict=True)
            )
            pieces = [
                _leading(old.view(small), new.view(large))
                for old, new, small, large in zip(before, now, *shapes, strict=True)
            ]
            state[name] = torch.cat([piece.flatten() for piece in pieces])
    return state


def grown_masks(found: Mapping[str, Mapping[str, Tensor]], larger: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Likewise for the state of :class:`Masks`: new weights are alive and updated, and not frozen."""
    rest = {"alive": True, "updated": True, "frozen": False}
    return {
        kind: {
            name: _leading(mask, torch.full(larger.get_parameter(name).shape, rest[kind])) if kind in rest else mask
            for name, mask in masks.items()
        }
        for kind, masks in found.items()
    }


@torch.no_grad()
def _leading(old: Any, new: Any) -> Any:
    """``new`` with ``old`` in its leading block."""
    if not isinstance(old, Tensor) or old.shape == new.shape or old.ndim != new.ndim:
        return old
    whole = new.detach().clone()
    whole[tuple(slice(n) for n in old.shape)] = old.to(whole)
    return whole
