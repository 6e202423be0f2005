"""Inference of a whole network in one call, for as long as its weights stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse_cl.acceleration.layer import Layer
from lightning_sparse_cl.kernels.build import KernelsUnavailable
from lightning_sparse_cl.runtime.flat import FlatNetwork

MOST = 4
"""Shapes of inputs that are planned for."""


class WholeNetwork:
    """Takes calls of a network from the second on with the same weights and shape, if the runtime has all its layers.

    Args:
        network: what is called.
        layers: those with kernels.
    """

    def __init__(self, network: nn.Module, layers: Iterable[Layer]) -> None:
        self._network, self._layers = network, list(layers)
        self.forget()

    def forget(self) -> None:
        """The weights may be others now, without a trace."""
        self._at: Any = None
        self._seen: list[torch.Size] = []
        self._flat: dict[torch.Size, FlatNetwork | None] = {}

    def __call__(self, x: Tensor, otherwise: Callable[[Tensor], Any]) -> Any:
        """The outputs for a batch (B, C, H, W), without gradients; of ``otherwise`` where they are not known here."""
        at = [(t._version, t.data_ptr()) for m in self._network.modules() for t in _tensors(m)]
        if at != self._at:
            self.forget()
            self._at = at
        if x.shape in self._seen:
            flat = self._flat.get(x.shape[1:])
            return otherwise(x) if flat is None else flat(x)
        found = otherwise(x)
        if len(self._seen) < MOST:
            self._seen.append(x.shape)
            if x.shape[1:] not in self._flat:
                self._flat[x.shape[1:]] = (
                    self._made(x.shape[1:]) if isinstance(found, Tensor) and found.ndim == 2 else None
                )
        return found

    def _made(self, shape: torch.Size) -> FlatNetwork | None:
        for layer in self._layers:
            if layer.mask is not None and layer.weight.detach()[~layer.mask].count_nonzero():
                return None  # values that the mask leaves out
        try:
            with torch.inference_mode(False):
                return FlatNetwork.of(self._network, shape)
        except (ValueError, KernelsUnavailable):  # it has something that the runtime cannot
            return None


def _tensors(module: nn.Module) -> list[Tensor]:
    own = [*dict.values(module._parameters), *module._buffers.values()]
    return [t for t in own if t is not None]
