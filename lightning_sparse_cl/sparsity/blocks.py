"""Blocks of weights that live and die together: a by b neighbouring outputs and inputs of a layer."""

from __future__ import annotations

from collections.abc import Sequence
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


SINGLE = Block()
"""Each weight by itself."""


def top_blocks(x: Tensor, k: int, block: Block) -> Tensor:
    """True on the weights of the ``k`` blocks with the largest sums of ``x`` (O, I, ...), none of them negative."""
    sums = block.sums(x)
    mask = torch.zeros(sums.numel(), dtype=torch.bool, device=x.device)
    mask[sums.reshape(-1).topk(min(k, sums.numel()), sorted=False).indices] = True
    return block.spread(mask.view(sums.shape))
