"""Networks that map images to features; the head is added by the method. Input channels come from the data."""

from lightning_sparse_cl.backbones.resnet import ResNet18
from lightning_sparse_cl.backbones.small import MLP, SmallCNN

__all__ = ["MLP", "ResNet18", "SmallCNN"]
