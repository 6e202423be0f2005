"""What weights are ranked in: blocks that live and die together, or groups of which a fixed number is alive (n:m)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """A block is ``outputs`` by ``inputs`` neighbouring channels at one position of a kernel.

    Its weights share one index, so that a sparse kernel reads an index, or an input, once for several weights.
    """

    outputs: int = 1
    inputs: int = 1

    @classmethod
    def of(cls, owner: str, value: Sequence[int]) -> Block:
        """From two numbers.

        Args:
            owner: the name of the class that asks, for the error.
            value: outputs and inputs of a block.

        Raises:
            ValueError: if they are not two whole numbers of at least 1.
        """
        whole = isinstance(value, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
        if not whole or len(value) != 2 or min(value) < 1:
            raise ValueError(f"{owner}(block={value!r}): outputs and inputs of a block, such as [2, 2]")
        return cls(*value)

    @property
    def size(self) -> int:
        """Weights of a block."""
        return self.outputs * self.inputs

    def check(self, owner: str, name: str, shape: Sequence[int]) -> None:
        """Raise ValueError unless a weight is made of whole blocks."""
        if shape[0] % self.outputs or shape[1] % self.inputs:
            raise ValueError(
                f"{owner}(block={list(self)}): {name} has {shape[0]} outputs and {shape[1]} inputs, which are no whole "
                "blocks; keep it dense by `dense`, or use another block"
            )

    def whole(self, count: float) -> int:
        """The number of weights of the nearest number of whole blocks, at least one block."""
        return self.size * max(1, round(count / self.size))

    def rated(
        self, x: Mapping[str, Tensor], among: Mapping[str, Tensor], taken: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """By what blocks are ranked, from the scores of weights.

        Args:
            x: scores of the weights that are ranked together, by name.
            among: the weights that are chosen from.
            taken: those that stay alive in any case, beside ``among``; names may be missing.
        """
        return {name: self.sums(score) for name, score in x.items()}

    def parts(self, x: Tensor) -> Tensor:
        """A view of a weight (O, I, ...) as (O / a, a, I / b, b, ...)."""
        return x.unflatten(0, (-1, self.outputs)).unflatten(2, (-1, self.inputs))

    def sums(self, x: Tensor) -> Tensor:
        """The sum over each block (O / a, I / b, ...) of a weight (O, I, ...)."""
        return x if self.size == 1 else self.parts(x).sum((1, 3))

    def all(self, mask: Tensor) -> Tensor:
        """Whether all weights of each block are in ``mask`` (O, I, ...)."""
        return mask if self.size == 1 else self.parts(mask).all(3).all(1)

    def spread(self, mask: Tensor) -> Tensor:
        """The weights (O, I, ...) of the blocks in ``mask`` (O / a, I / b, ...)."""
        if self.size == 1:
            return mask
        return mask.repeat_interleave(self.outputs, 0).repeat_interleave(self.inputs, 1)


@dataclass(frozen=True)
class NofM:
    """``n`` of each ``m`` neighbouring inputs of an output are alive, at every position of a kernel.

    2:4 is what NVIDIA's sparse tensor cores multiply (Mishra et al. 2021, arXiv:2104.08378). Where weights are ranked
    together, the n best of every group come first, by their scores; then the next best of every group, and so on. So
    every group has ``n`` if ``n / m`` of all weights are kept; if fewer are kept, they are the best wherever they are.
    Weights that stay alive in any case fill places of their group.
    """

    n: int
    m: int

    @property
    def size(self) -> int:
        return 1

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def check(self, owner: str, name: str, shape: Sequence[int]) -> None:
        """Raise ValueError unless a weight is made of whole groups."""
        if shape[1] % self.m:
            raise ValueError(
                f"{owner}(block='{self}'): {name} has {shape[1]} inputs, which is not a multiple of {self.m}; keep it "
                "dense by `dense`"
            )

    def holds(self, mask: Tensor) -> bool:
        """Whether exactly n of each m are in a mask."""
        return bool((mask.unflatten(1, (-1, self.m)).sum(2) == self.n).all())

    def whole(self, count: float) -> int:
        """The nearest whole number, at least 1."""
        return max(1, round(count))

    def rated(
        self, x: Mapping[str, Tensor], among: Mapping[str, Tensor], taken: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """A fraction below 1 that grows with a weight's score among all of ``x``, minus its places beyond the first n.

        In a group come first the weights that are ``taken``, then those ``among`` which is chosen, by score.
        """
        order = torch.cat([score.detach().reshape(-1) for score in x.values()]).argsort(stable=True)
        share = torch.empty(len(order), dtype=torch.float64, device=order.device)
        share[order] = torch.arange(len(order), dtype=torch.float64, device=order.device) / len(order)
        parts = share.split([score.numel() for score in x.values()])
        rated = {}
        for (name, score), part in zip(x.items(), parts, strict=True):
            own, pool = part.view(score.shape), among[name]
            key = own + pool if name not in taken else own + pool + 2 * taken[name]
            places = key.unflatten(1, (-1, self.m)).argsort(dim=2, descending=True).argsort(dim=2).flatten(1, 2)
            rated[name] = own - (places - self.n + 1).clamp(min=0)
        return rated

    def all(self, mask: Tensor) -> Tensor:
        return mask

    def spread(self, mask: Tensor) -> Tensor:
        return mask


def unit(owner: str, value: Sequence[int] | str | NofM, sparsity: float) -> Block | NofM:
    """What weights are ranked in, from ``[outputs, inputs]`` or ``"n:m"``.

    Args:
        owner: the name of the class that asks, for the error.
        value: the argument.
        sparsity: the zero fraction, which must be that of n:m to three digits.

    Raises:
        ValueError: if it is neither, or n of m are another sparsity.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        return Block.of(owner, value)
    found = re.fullmatch("([1-9][0-9]*):([1-9][0-9]*)", str(value))
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError(
            f"{owner}(block={value!r}): outputs and inputs of a block, such as [2, 2], or n:m in quotes, such as '2:4'"
        )
    n_of_m = NofM(int(found[1]), int(found[2]))
    if abs(n_of_m.sparsity - sparsity) > 1e-3:
        raise ValueError(
            f"{owner}(sparsity={sparsity}, block='{value}'): {value} is a sparsity of {n_of_m.sparsity:.4g}"
        )
    return n_of_m


SINGLE = Block()
"""Each weight by itself."""


def top_blocks(x: Tensor, k: int, block: Block) -> Tensor:
    """True on the weights of the ``k`` blocks with the largest sums of ``x`` (O, I, ...), none of them negative."""
    sums = block.sums(x)
    mask = torch.zeros(sums.numel(), dtype=torch.bool, device=x.device)
    mask[sums.reshape(-1).topk(min(k, sums.numel()), sorted=False).indices] = True
    return block.spread(mask.view(sums.shape))
