"""Image transforms for whole batches on the device: uint8 in, normalised float out, every sample its own draw."""

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

    def __init__(self, mean: Sequence[float], std: Sequence[float], crop: int = 0, flip: bool = False) -> None:
        super().__init__()
        self.crop, self.flip = crop, flip
        self.register_buffer("scale", 1 / (255 * torch.tensor(std)).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", (torch.tensor(mean) / torch.tensor(std)).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor, augment: bool = False) -> Tensor:
        """Images (B, C, H, W), uint8, to float of the same shape; augmented only if asked. Floats pass unchanged."""
        if x.is_floating_point():
            return x
        if augment and (self.crop or self.flip):
            x = self._augment(x)
        return x * self.scale - self.shift

    def _augment(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        device = x.device
        rows = torch.arange(h, device=device).expand(b, h)
        cols = torch.arange(w, device=device).expand(b, w)
        if self.flip:
            cols = torch.where(torch.rand(b, 1, device=device) < 0.5, w - 1 - cols, cols)
        if self.crop:
            x = nn.functional.pad(x, [self.crop] * 4)
            shift = torch.randint(2 * self.crop + 1, (2, b, 1), device=device)
            rows, cols = rows + shift[0], cols + shift[1]
        sample = torch.arange(b, device=device).view(b, 1, 1, 1)
        channel = torch.arange(x.shape[1], device=device).view(1, -1, 1, 1)
        return x[sample, channel, rows[:, None, :, None], cols[:, None, None, :]]
