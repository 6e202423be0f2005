"""The layers of a network that have kernels, and their masks."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_sparse_cl.acceleration.layer import Layer, unsupported
from lightning_sparse_cl.acceleration.masks import FixedMasks, FollowedMasks
from lightning_sparse_cl.sparsity.layers import weight_layers
from lightning_sparse_cl.sparsity.masks import Masks


class SparseLayers:
    """The layers with kernels in the given parts of a network; :meth:`follow` keeps their masks up to date.

    Args:
        model: the network.
        masks: see :func:`~lightning_sparse_cl.acceleration.accelerate`.
        parts: names of submodules, ``""`` for the model itself.

    Raises:
        ValueError: if the masks do not fit the network.
    """

    def __init__(self, model: nn.Module, masks: Masks | Mapping[str, Tensor] | None, parts: Sequence[str]) -> None:
        self.with_kernels: dict[str, Layer] = {}
        self.left: dict[str, str] = {}
        """Layers without kernels, and why."""
        self._told: set[str] = set()
        around = masks.module if isinstance(masks, Masks) else model
        uses = Counter(id(p) for m in around.modules() for p in m._parameters.values())
        for weight, module in weight_layers(model).items():
            name = weight.removesuffix("weight").removesuffix(".")
            if not any(name == part or name.startswith(f"{part}." if part else "") for part in parts):
                continue
            reason = unsupported(module) or ("a shared weight" if uses[id(module.weight)] > 1 else None)
            if reason is None:
                assert isinstance(module, nn.Conv2d | nn.Linear), "no other layers have kernels"
                self.with_kernels[name] = Layer(name, module, None)
            else:
                self.left[name] = reason
        self.masks: FollowedMasks | FixedMasks
        if isinstance(masks, Masks):
            self.masks = FollowedMasks(masks, model)
        else:
            names = (weight_name(name) for name in (*self.with_kernels, *self.left))
            self.masks = FixedMasks(masks, model, names)

    @property
    def masked(self) -> bool:
        """Whether any layer with kernels has a mask."""
        return any(layer.mask is not None for layer in self.with_kernels.values())

    def follow(self) -> None:
        """Take the masks as they are now."""
        if self.masks.changed():
            for name, layer in self.with_kernels.items():
                mask = self.masks.get(weight_name(name))
                if mask is not layer.mask:
                    layer.remask(mask)
            self._tell()

    def _tell(self) -> None:
        """Warn once of each masked layer that has no kernel."""
        masked = self.masks.names()
        new = [n for n in self.left if weight_name(n) in masked and n not in self._told]
        self._told.update(new)
        if new:
            told = ", ".join(f"{name or 'the model'} ({self.left[name]})" for name in new)
            warnings.warn(f"accelerate: no kernels for {told}; these layers are run as they are", stacklevel=6)


def weight_name(layer: str) -> str:
    """The name of a layer's weight."""
    return f"{layer}.weight" if layer else "weight"
