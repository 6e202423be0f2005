"""Networks that map samples to features; the head is added by the method. Input channels come from the data."""

from lightning_sparse_cl.backbones.mobilenet import SmallImageMobileNetV2
from lightning_sparse_cl.backbones.pretrained import Timm, Transformers
from lightning_sparse_cl.backbones.resnet import ResNet18
from lightning_sparse_cl.backbones.series import SeriesCNN, SeriesGRU
from lightning_sparse_cl.backbones.small import SmallCNN, SmallMLP
from lightning_sparse_cl.backbones.text import TextTransformer
from lightning_sparse_cl.backbones.vgg import VGG16, LeNet5

__all__ = [
    "VGG16",
    "LeNet5",
    "ResNet18",
    "SeriesCNN",
    "SeriesGRU",
    "SmallCNN",
    "SmallImageMobileNetV2",
    "SmallMLP",
    "TextTransformer",
    "Timm",
    "Transformers",
]
