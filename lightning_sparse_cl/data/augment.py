"""Image transforms for whole batches on the device: uint8 in, normalised float out, with a random draw per sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ImageTransform(nn.Module):
    """Random crop with padding, random horizontal flip, then scaling and normalisation.

    Args:
        mean, std: per channel, on the scale 0-1.
        crop: zero padding in pixels before a random crop back to size; 0 is none.
        flip: mirror half of the samples.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], crop: int = 0, flip: bool = False) -> None:
        super().__init__()
        self.crop, self.flip = crop, flip
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.register_buffer("scale", 1 / (255 * torch.tensor(std)).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", (torch.tensor(mean) / torch.tensor(std)).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor, augment: bool = False) -> Tensor:
        """Images (B, C, H, W), uint8, to float of the same shape; augmented only on request. Floats pass unchanged."""
        if x.is_floating_point():
            return x
        if augment and (self.crop or self.flip):
            x = self._augment(x)
        return (x * self.scale.to(x.device)).sub_(self.shift.to(x.device))

    def normalisation(self) -> dict[str, list[float]]:
        """The arguments ``mean`` and ``std``."""
        return {"mean": list(self.mean), "std": list(self.std)}

    def _augment(self, x: Tensor) -> Tensor:
        """Cut a window from each padded image or its mirror image: one copy, from a view of all windows."""
        b, c, h, w = x.shape
        x = nn.functional.pad(x, [self.crop] * 4)
        if self.flip:
            x = torch.cat([x, x.flip(3)])
        x = x.contiguous()
        image, channel, row, _ = x.stride()
        first = torch.arange(b, device=x.device) * image  # where each sample's window begins
        if self.flip:
            first += torch.randint(2, (b,), device=x.device) * (b * image)
        if self.crop:
            top, left = torch.randint(2 * self.crop + 1, (2, b), device=x.device)
            first += top * row + left
        places = (len(x) - 1) * image + 2 * self.crop * (row + 1) + 1
        windows = x.as_strided((places, c, h, w), (1, channel, row, 1))
        return windows.index_select(0, first)
