"""Where the non-zeros of a masked weight are, in the order in which the kernels run through them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sparse_cl.kernels.build import call, library, numbers
from lightning_sparse_cl.kernels.layout import Grid

FLAT, NEXT, AROUND, STRIDED = range(4)  # pixels that a tile reads beyond itself: none, 1, 2; 2 at stride 2


Call = tuple[ctypes.Array[ctypes.c_int64], Tensor, tuple[int, ...]]
"""Numbers and offsets for a kernel, and the shape of what it writes."""


class Geometry(NamedTuple):
    """One convolution: what its mask does not show."""

    stride: int = 1
    padding: int = 0


class Pattern:
    """The lists of one masked weight: forward and, transposed, for the gradient of the input.

    Input channels come in blocks whose windows fill the first cache; each block lists the non-zeros of every output
    channel. The values of the non-zeros are a vector (n,) in this order, see :meth:`gather`.

    Args:
        mask: (out, in, k, k) or (out, in), True where a weight is alive. k is 1 or 3.
        like: the weight, whose memory format :meth:`gather` reads.
        geometry: stride 1 or 2, and padding 0 to k - 1.
        side: 1 or 2 if parts of the output are no larger than that; 4 if the output is one tile, with nothing but
            padding around it; otherwise 3. It decides how many channels a block has.

    Raises:
        ValueError: if mask and weight differ in shape, or there are no kernels for it.
    """

    def __init__(self, mask: Tensor, like: Tensor, geometry: Geometry, side: int = 3) -> None:
        k = mask.shape[2] if mask.ndim == 4 else 1
        if mask.shape != like.shape:
            raise ValueError(f"Pattern: the mask has shape {tuple(mask.shape)}, the weight {tuple(like.shape)}")
        if k not in (1, 3) or mask.shape[2:] not in ((), (k, k)) or geometry.stride not in (1, 2):
            raise ValueError(f"Pattern: no kernel for weights {tuple(mask.shape)} at stride {geometry.stride}")
        if not 0 <= geometry.padding < k:
            raise ValueError(f"Pattern(padding={geometry.padding}): padding is 0 to {k - 1}")
        self.shape, self.kernel, self.geometry = like.shape, k, geometry
        self.strides = like.stride()
        self.out, self.inputs = mask.shape[:2]
        stride, padding = geometry
        mask = mask.contiguous().view(torch.uint8)
        self.entries = int(mask.count_nonzero())
        if k == 1:
            self.mode, self.back_mode, self.origin = FLAT, FLAT, 0
        elif stride == 1:
            self.mode, self.back_mode, self.origin = AROUND, AROUND, padding - 2
        else:
            self.mode, self.back_mode, self.origin = STRIDED, NEXT, -1 if padding == 0 else 0
        density = self.entries / max(1, mask.numel())
        block, back_block = (library().block(m, side, density) for m in (self.mode, self.back_mode))
        self.block, self.back_block = min(block, self.inputs), min(back_block, self.out)
        blocks, back_blocks = -(-self.inputs // self.block), -(-self.out // self.back_block)
        parts = 9 if self.mode == AROUND else 1  # parts of a list, see sparse.cpp
        self.pointers = torch.empty(blocks * self.out * parts + 1, dtype=torch.int32)
        self.back_pointers = torch.empty(back_blocks * stride**2 * self.inputs * parts + 1, dtype=torch.int32)
        self._code, self._back_code = (torch.empty(self.entries, dtype=torch.uint16) for _ in range(2))
        self.index, self.back_from = (torch.empty(self.entries, dtype=torch.int32) for _ in range(2))
        lists = (self.pointers, self._code, self.index, self.back_pointers, self._back_code, self.back_from)
        sizes = (self.out, self.inputs, k, stride, padding, self.block, self.back_block)
        call("build_lists", mask, numbers(*[*self.strides, 0, 0][:4]), *sizes, *lists)
        self._places: dict[tuple[int, bool], Tensor] = {}
        self._calls: dict[tuple[Any, ...], Call] = {}
        self._orders: dict[int, tuple[Pattern, Tensor]] = {}

    def gather(self, weight: Tensor) -> Tensor:
        """The values (n,) of the non-zeros of a tensor like the weight."""
        out = torch.empty(self.entries)
        weight = self._as_listed(weight)
        call("gather", weight, self.index, self.entries, out)
        return out

    def reordered(self, values: Tensor, other: Pattern) -> Tensor:
        """Values (n,) in the order of another pattern of the same mask."""
        if id(other) not in self._orders:
            here = torch.empty(int(self.index.max()) + 1 if self.entries else 0, dtype=torch.long)
            here[self.index.long()] = torch.arange(self.entries)
            self._orders[id(other)] = other, here[other.index.long()]
        return values[self._orders[id(other)][1]]

    def scatter(self, values: Tensor, weight: Tensor) -> None:
        """Put values (n,) into a tensor like the weight; nothing else in it changes."""
        own = self._as_listed(weight)
        call("scatter", values, self.index, self.entries, own)
        if own is not weight:
            weight.copy_(own)

    def whole(self, values: Tensor, like: Tensor) -> Tensor:
        """Values (n,) in a tensor like the weight that is zero elsewhere."""
        whole = torch.zeros_like(like)
        self.scatter(values, whole)
        return whole

    def _as_listed(self, weight: Tensor) -> Tensor:
        """The weight with the strides and type of the lists; its own may have changed since."""
        if weight.stride() == self.strides and weight.dtype == torch.float32 and weight.device.type == "cpu":
            return weight
        return torch.empty_strided(self.shape, self.strides).copy_(weight)

    def forward(
        self,
        x: Tensor,
        values: Tensor,
        grid: Grid,
        bias: Tensor | None = None,
        add: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """Convolution of blocked x with the values, plus ``bias`` (out,), plus a blocked ``add``, rectified."""
        about, offsets, shape = self._known(("forward", x.shape, grid), self._forward)
        y = x.new_empty(shape)
        call("sparse_convolve", self.mode, about, x, self.pointers, offsets, values, bias, add, int(relu), y)
        return y

    def input_gradient(self, dy: Tensor, values: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
        """The gradient of the blocked input, of ``size`` (h, w), from the gradient of the output."""
        about, offsets, shape = self._known(("back", dy.shape, grid, tuple(size)), self._back)
        back = self.back_values(values)
        dx = dy.new_empty(shape)
        call("sparse_convolve", self.back_mode, about, dy, self.back_pointers, offsets, back, None, None, 0, dx)
        return dx

    def weight_gradient(self, x: Tensor, dy: Tensor, grid: Grid) -> Tensor:
        """The gradient (n,) of the values."""
        about, offsets, _ = self._known(("forward", x.shape, grid), self._forward)
        dvalues = torch.empty(self.entries)
        call("sparse_correlate", self.mode, about, x, dy, self.pointers, offsets, dvalues)
        return dvalues

    def back_values(self, values: Tensor) -> Tensor:
        """The values in the order of the transposed lists."""
        back = torch.empty(self.entries)
        call("gather", values, self.back_from, self.entries, back)
        return back

    def out_shape(self, x: Tensor, grid: Grid) -> tuple[int, ...]:
        """The shape of the blocked output, for blocked x."""
        return self._known(("forward", x.shape, grid), self._forward)[2]

    def _known(self, key: tuple[Any, ...], find: Callable[..., Call]) -> Call:
        """What a kernel needs to know about one shape, computed once."""
        if key not in self._calls:
            self._calls[key] = find(*key[1:])
        return self._calls[key]

    def _forward(self, x: torch.Size, grid: Grid) -> Call:
        stride, padding = self.geometry
        groups, inputs, *here, lanes = x
        size = [((n * p + 2 * padding - self.kernel) // stride + 1) // p for n, p in zip(here, grid[1:])]
        step = stride if self.kernel == 1 else 1
        if min(size) < 1 or (grid[1:] != (1, 1) and any(n % stride for n in here)):
            raise ValueError(f"Pattern: {tuple(x)} in {grid} has no whole output at stride {stride}")
        where = (*size, *size, self.out, -padding, -padding, step, 1, self.block, *grid)
        about = numbers(groups, inputs, self.out, *here, *where)
        return about, self._offsets(max(size), False), (groups, self.out, *size, lanes)

    def _back(self, dy: torch.Size, grid: Grid, size: tuple[int, int]) -> Call:
        stride = self.geometry.stride
        groups, _, *here, lanes = dy
        tiles = [-(-n // stride) for n in size]
        where = (*tiles, *size, self.inputs, self.origin, self.origin, 1, stride, self.back_block, *grid)
        about = numbers(groups, self.out, stride**2 * self.inputs, *here, *where)
        return about, self._offsets(max(tiles), True), (groups, self.inputs, *size, lanes)

    def _offsets(self, side: int, back: bool) -> Tensor:
        """Places in the packed window, whose size depends on the output's size."""
        side = min(side, 3)
        if (side, back) not in self._places:
            code, mode = (self._back_code, self.back_mode) if back else (self._code, self.mode)
            block = self.back_block if back else self.block
            found = torch.empty_like(code)
            about = (int(back), *self.geometry, self.origin, block)
            call("place", code, self.entries, self.kernel, mode, side, *about, found)
            self._places[side, back] = found
        return self._places[side, back]
