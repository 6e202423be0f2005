"""Networks that map images to features; the head is added by the method. Input channels come from the data."""

from lightning_sparse_cl.backbones.resnet import ResNet18
from lightning_sparse_cl.backbones.small import SmallCNN, SmallMLP

__all__ = ["ResNet18", "SmallCNN", "SmallMLP"]
