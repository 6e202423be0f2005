"""ResNet for small images (He et al., 2016; the CIFAR form used by DER++, SparCL and EsaCL)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, 1x1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with a 3x3 stride-1 stem and no max-pool; four stages of two blocks, widths w, 2w, 4w, 8w.

    With width 64, three input channels and a linear head of 10 classes it has 11,173,962 parameters. The number of
    input channels comes from the data: the stem is lazy.

    Args:
        width: w, channels of the stem and of the first stage.
        stem: ``"3x3"``, stride 1; or ``"7x7"``, stride 2, which "Continual Dynamic Sparse Training" uses.

    Raises:
        ValueError: if ``width`` is not positive, or ``stem`` is neither.
    """

    def __init__(self, width: int = 64, stem: Literal["3x3", "7x7"] = "3x3") -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"ResNet18(width={width}): a stage has at least one channel")
        if stem not in ("3x3", "7x7"):
            raise ValueError(f"ResNet18(stem={stem!r}): stem is '3x3' or '7x7'")
        self.width, self._stem = width, stem
        kernel, stride = (3, 1) if stem == "3x3" else (7, 2)
        self.stem = nn.LazyConv2d(width, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(BasicBlock(i, o, stride), BasicBlock(o, o, 1))
                for i, o, stride in zip(widths, widths[1:], (1, 2, 2, 2), strict=False)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to features (B, 8w)."""
        return self.stages(F.relu(self.bn(self.stem(x)))).mean((2, 3))
