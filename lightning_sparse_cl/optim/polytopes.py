"""The K-sparse polytope: feasible set of EsaCL and of Frank-Wolfe pruning (Pokutta et al., 2020, arXiv:2010.07243)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sparse_cl.sparsity.blocks import SINGLE, Block, top_blocks


@dataclass(frozen=True)
class KSparsePolytope:
    """C(K, r): the convex hull of all vectors with exactly K entries equal to +r or -r.

    It is the L1 ball of radius r*K cut by the cube of half-width r (EsaCL, text before eq 3.9).

    With blocks, the non-zeros of a vertex are those of K / b whole blocks of b weights. Eq 3.13 then takes the blocks
    with the largest L1 norms of m, so that the weights contract to few blocks, which are pruned at no cost. (This is
    not in the paper. Its vertices contract to single weights, and what is left is lost if these are pruned in blocks.)

    Args:
        k: number K of non-zeros of a vertex, at least 1; with blocks, the nearest number of whole ones counts.
        radius: r, magnitude of a vertex's non-zeros.
        block: outputs and inputs of a block. Only matrices and kernels of whole blocks have some.

    Raises:
        ValueError: if ``k`` < 1 or ``radius`` < 0.
    """

    k: int
    radius: float
    block: Block = SINGLE

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"KSparsePolytope(k={self.k}): a vertex has at least one non-zero, k >= 1")
        if not self.radius >= 0:
            raise ValueError(f"KSparsePolytope(radius={self.radius}): the radius is >= 0")

    def lmo(self, m: Tensor) -> Tensor:
        """Linear minimisation oracle, argmin over v in C(K, r) of <m, v> (eq 3.13).

        Eq 3.13 says "the largest K coordinates of m"; the minimiser needs the largest *magnitudes* |m|.

        Args:
            m: gradient or momentum, any shape, at least K entries.

        Returns:
            The vertex v, of m's shape: -r*sign(m) on the K largest |m|, 0 elsewhere. Entries with m = 0 stay 0.
        """
        if m.is_cpu and int(m.count_nonzero()) <= self.k:  # as where masks leave K weights: there is nothing to rank
            return m.sign().mul_(-self.radius)
        size = m.abs()
        if self.block.size > 1:
            return top_blocks(size, max(1, round(self.k / self.block.size)), self.block) * m.sign().mul_(-self.radius)
        vertex, n = torch.zeros_like(size), size.numel()
        top = largest(size.as_strided((n,), (1,)), min(self.k, n))  # in memory order: channels_last
        vertex.as_strided((n,), (1,)).index_fill_(0, top, -self.radius)
        return vertex.mul_(m.sign())

    def scale_in(self, w: Tensor) -> Tensor:
        """The largest multiple of ``w``, at most ``w`` itself, that lies in the polytope."""
        tiny = torch.finfo(w.dtype).tiny
        cube = self.radius / w.abs().max().clamp_min(tiny)
        ball = self.radius * self.k / w.abs().sum().clamp_min(tiny)
        return w * torch.minimum(cube, ball).clamp_max(1.0)


LARGE = 2**16
"""Below this number of values, ``topk`` is as fast."""
SAMPLED = 64
"""One value in this many is looked at to guess the K-th largest."""


def largest(values: Tensor, k: int) -> Tensor:
    """Indices (k,) of the ``k`` largest of ``values`` (n,), none of them negative, in any order.

    For small parts of large layers it takes a fraction of the time of ``topk`` on CPUs: a sample gives a bound that is
    most likely below the k-th largest value, and only what reaches it is ranked.
    """
    sample = values[::SAMPLED]
    likely = int(1.2 * k / SAMPLED) + 8
    if values.is_cpu and len(values) >= LARGE and likely < len(sample):
        least = sample.topk(likely, sorted=False).values.min()
        candidates = (values >= least if least > 0 else values).nonzero().squeeze(1)
        if len(candidates) >= k:
            return candidates[values[candidates].topk(k, sorted=False).indices]
    return values.topk(k, sorted=False).indices
