"""Normalisation by the data themselves."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from lightning_sparse_cl.data.augment import ImageTransform
from lightning_sparse_cl.data.loader import ImageTensors, length


def standardised(data: Dataset, crop: int = 0, flip: bool = False) -> ImageTransform:
    """Normalisation by the mean and deviation of the images, or of an evenly spaced sample of 2,000 if there are more.

    The sample depends on the number of images alone. Floats pass unchanged.
    """
    n = min(length(data), 2000)
    sample = torch.arange(n) * length(data) // n
    if isinstance(data, ImageTensors):
        images = data.images[sample]
    else:
        images = torch.stack([data[i][0] for i in sample.tolist()])
    if images.is_floating_point():
        return ImageTransform([0.0] * images.shape[1], [1.0] * images.shape[1])
    pixels = images.transpose(0, 1).flatten(1).float() / 255
    return ImageTransform(pixels.mean(1).tolist(), pixels.std(1).clamp_min(1e-3).tolist(), crop, flip)
