"""ADMM: values are drawn to a set that is easy to project onto, such as tensors with k entries (Boyd et al., 2011)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Projection = Callable[[str, Tensor], Tensor]
"""Maps a tensor's name and the tensor to the nearest point in that tensor's set."""


class ADMM(nn.Module):
    """The alternating direction method of multipliers, for any loss L that something else descends on::

        W <- argmin L(W) + rho/2 ||W - Z + U||^2,   Z <- project(W + U),   U <- U + W - Z

    Z and U are buffers, so that checkpoints hold them.
    """

    def build(self, values: Mapping[str, Tensor]) -> None:
        """Allocate Z and U for W = ``values``, by name."""
        self._names = list(values)
        for i, value in enumerate(values.values()):
            self.register_buffer(f"Z_{i}", torch.zeros_like(value))
            self.register_buffer(f"U_{i}", torch.zeros_like(value))

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Z and U by name."""
        return {name: (self.get_buffer(f"Z_{i}"), self.get_buffer(f"U_{i}")) for i, name in enumerate(self._names)}

    @torch.no_grad()
    def begin(self, values: Mapping[str, Tensor], project: Projection) -> None:
        """Start: Z is the projection of W, and U zero."""
        for name, (z, u) in self.pairs().items():
            z.copy_(project(name, values[name]))
            u.zero_()

    @torch.no_grad()
    def update(self, values: Mapping[str, Tensor], project: Projection) -> None:
        """One step of Z and U."""
        for name, (z, u) in self.pairs().items():
            z.copy_(project(name, values[name] + u))
            u.add_(values[name] - z)

    def distance(self, values: Mapping[str, Tensor]) -> Tensor:
        """1/2 ||W - Z + U||^2, a scalar, summed over all tensors."""
        return sum(((values[name] - z + u) ** 2).sum() / 2 for name, (z, u) in self.pairs().items())  # type: ignore[return-value]  # not empty
