"""Normalisation by the data themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_sparse_cl.data.augment import ImageTransform
from lightning_sparse_cl.data.loader import SampleTensors, length
from lightning_sparse_cl.nests import Nest, is_image, is_padded, joined, rows, within


class Standardisation(nn.Module):
    """Standardises each channel of series (B, C, T), or column of tables (B, C), by a given mean and deviation.

    Series may be padded: ``{"series": (B, C, T), "length": (B,)}``; what follows their ends stays zero.

    Args:
        mean, std: per channel. If both are empty, samples of any kind pass unchanged.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, mean: Sequence[float] = (), std: Sequence[float] = ()) -> None:
        super().__init__()
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.register_buffer("shift", torch.tensor(self.mean), persistent=False)
        self.register_buffer("scale", 1 / torch.tensor(self.std), persistent=False)

    def forward(self, x: Nest) -> Nest:
        """Floats of the same shape."""
        if not self.mean:
            return x
        if isinstance(x, dict):
            return x | {"series": self(x["series"]) * within(x["length"], x["series"])}
        shape = [-1, *[1] * (x.ndim - 2)]
        if x.dtype == torch.float64:  # such as timestamps, which vary little compared with their size
            shift, scale = (x.new_tensor(values).view(shape) for values in (self.mean, self.std))
            return ((x - shift) / scale).float()
        return (x.float() - self.shift.view(shape)) * self.scale.view(shape)

    def normalisation(self) -> dict[str, list[float]]:
        """The arguments ``mean`` and ``std``."""
        return {"mean": list(self.mean), "std": list(self.std)}


Normalisation = ImageTransform | Standardisation


def standardised(data: Dataset, crop: int = 0, flip: bool = False) -> Normalisation:
    """Normalisation by the mean and deviation of all samples, or of an evenly spaced sample of 2,000 if there are more.

    uint8 images are normalised per channel; series (C, T), padded ones included, and tables (C,), uint8 or float, per
    channel or column. Anything else passes unchanged: float images, integers of other types, such as tokens, and dicts
    and tuples of tensors. The sample depends on the number of samples alone.
    """
    n = min(length(data), 2000)
    at = torch.arange(n) * length(data) // n
    if isinstance(data, SampleTensors):
        samples = rows(data.inputs, at.to(data.labels.device))
    else:
        samples = joined([rows(data[i][0], None) for i in at.tolist()])
    if is_image(samples) and samples.dtype == torch.uint8:
        pixels = samples.transpose(0, 1).flatten(1).float() / 255
        return ImageTransform(pixels.mean(1).tolist(), pixels.std(1).clamp_min(1e-3).tolist(), crop, flip)
    if is_image(samples):
        return ImageTransform([0.0] * samples.shape[1], [1.0] * samples.shape[1])
    if is_padded(samples):
        steps = within(samples["length"], samples["series"])
        values = samples["series"].transpose(0, 1)[:, steps.squeeze(1)]
    elif is_row_or_series(samples):
        values = samples.transpose(0, 1).flatten(1)
    else:
        return Standardisation()
    mean, std = values.double().mean(1), values.double().std(1)
    rounding = 1e-13 if values.dtype == torch.float64 else 1e-6
    std = std.where(std > rounding * mean.abs(), 1.0)  # if constant up to rounding, or of one sample
    return Standardisation(mean.tolist(), std.tolist())


def normaliser(
    of: Nest, mean: Sequence[float], std: Sequence[float], crop: int = 0, flip: bool = False
) -> Normalisation:
    """The normalisation of samples of the layout ``of``."""
    return ImageTransform(mean, std, crop, flip) if is_image(of) else Standardisation(mean, std)


def is_row_or_series(of: Nest) -> bool:
    """Whether samples are one tensor (C,) or (C, T), uint8 or float."""
    known = isinstance(of, Tensor) and of.ndim in (2, 3)
    return known and (of.dtype == torch.uint8 or of.is_floating_point())
