"""Crop and flip are compared with every window that there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_sparse_cl.data import ImageTransform

IMAGE = torch.arange(1, 3 * 4 * 5 + 1, dtype=torch.uint8).view(3, 4, 5)  # no pixel twice, none zero


def windows(image: Tensor, pad: int, flip: bool) -> set[bytes]:
    """All crops of the zero-padded image, and those of its mirror image."""
    c, h, w = image.shape
    found = set()
    for source in [image, image.flip(2)] if flip else [image]:
        padded = torch.zeros(c, h + 2 * pad, w + 2 * pad, dtype=image.dtype)
        padded[:, pad : pad + h, pad : pad + w] = source
        for top in range(2 * pad + 1):
            for left in range(2 * pad + 1):
                found.add(padded[:, top : top + h, left : left + w].contiguous().numpy().tobytes())
    return found


@pytest.mark.parametrize("crop, flip", [(1, True), (2, False), (0, True)])
def test_augmented_images_are_all_windows_and_nothing_else(crop: int, flip: bool) -> None:
    torch.manual_seed(0)
    transform = ImageTransform([0.0] * 3, [1 / 255] * 3, crop, flip)  # leaves the pixels' values
    out = transform(IMAGE.expand(1000, -1, -1, -1), augment=True).round().to(torch.uint8)
    assert {x.numpy().tobytes() for x in out} == windows(IMAGE, crop, flip)


def test_normalises_by_channel_and_leaves_floats_alone() -> None:
    transform = ImageTransform([0.1, 0.2, 0.3], [0.5, 0.6, 0.7], crop=1, flip=True)
    out = transform(IMAGE[None])
    for c, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.6), (0.3, 0.7)]):
        torch.testing.assert_close(out[0, c], (IMAGE[c].float() / 255 - mean) / std)
    assert out.dtype == torch.float32
    x = torch.randn(2, 3, 4, 5)
    assert transform(x, augment=True) is x
