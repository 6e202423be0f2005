"""The layout of the kernels: the same pixel of many images side by side."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from lightning_sparse_cl.kernels.build import lanes


class Grid(NamedTuple):
    """How a batch is laid out in the lanes of vectors: images are cut into ``rows`` x ``columns`` equal parts.

    A blocked tensor is (groups, C, H / rows, W / columns, lanes): a group is ``lanes / (rows * columns)`` images.
    """

    images: int
    rows: int = 1
    columns: int = 1

    @property
    def each(self) -> int:
        """Images in a group."""
        return lanes() // (self.rows * self.columns)

    @property
    def groups(self) -> int:
        return -(-self.images // self.each)

    @classmethod
    def of(cls, images: int, height: int, width: int, down: int = 1) -> Grid:
        """The grid for a batch: small batches fill the lanes with parts of each image.

        Args:
            images: number of images.
            height: height of an image, in pixels.
            width: width of an image, in pixels.
            down: product of the strides that follow: parts have whole pixels after all of them.
        """
        rows = columns = 1
        while images * rows * columns < lanes():
            if rows <= columns and height % (2 * rows * down) == 0:
                rows *= 2
            elif width % (2 * columns * down) == 0 and rows * columns * 2 <= lanes():
                columns *= 2
            elif height % (2 * rows * down) == 0:
                rows *= 2
            else:
                break
        return cls(images, rows, columns)

    def block(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to (groups, C, H / rows, W / columns, lanes)."""
        b, c, h, w = x.shape
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, self.groups * self.each - b)) if b % self.each else x
        parts = (self.groups, self.each, c, self.rows, h // self.rows, self.columns, w // self.columns)
        x = x.reshape(parts).permute(0, 2, 4, 6, 1, 3, 5)
        return x.reshape(self.groups, c, parts[4], parts[6], lanes()).contiguous()

    def unblock(self, x: Tensor) -> Tensor:
        """The inverse; the result is channels_last, which costs no more."""
        g, c, h, w, _ = x.shape
        parts = x.view(g, c, h, w, self.each, self.rows, self.columns).permute(0, 4, 5, 2, 6, 3, 1)
        whole = parts.reshape(g * self.each, h * self.rows, w * self.columns, c)
        return whole[: self.images].permute(0, 3, 1, 2)


class Blocked:
    """A tensor in blocks, and the grid in which images lie there."""

    def __init__(self, data: Tensor, grid: Grid) -> None:
        self.data, self.grid = data, grid

    def plain(self) -> Tensor:
        return self.grid.unblock(self.data)
