"""Rows of a linear layer as images: the layer is a convolution of 1x1 pixels, and those kernels run it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from lightning_sparse_cl.kernels.build import lanes

SIDE = 4
"""Side of the square of pixels for which the kernels read a weight once."""


def rows_as_images(x: Tensor) -> Tensor:
    """Rows (..., D), such as tokens (B, T, D), as images (N, D, 4, 4), filled up with zeros.

    If there are fewer than 16 rows for each lane of a vector, images are (N, D, 1, 1). On 2,048 rows the kernels are
    four to eight times as fast with images of 4x4 pixels as with those of one.
    """
    rows = x.reshape(-1, x.shape[-1])
    side = SIDE if len(rows) >= SIDE**2 * lanes() else 1
    if len(rows) % side**2:
        rows = F.pad(rows, (0, 0, 0, -len(rows) % side**2))
    return rows.view(-1, side, side, rows.shape[1]).permute(0, 3, 1, 2)


def images_as_rows(images: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse: images (N, D', h, w) to rows (..., D'), as many as ``shape`` (..., D) has."""
    rows = images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])
    return rows[: math.prod(shape[:-1])].view(*shape[:-1], images.shape[1])
