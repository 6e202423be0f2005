"""Networks for exports, and the bytes that they become."""

from __future__ import annotations

import struct
from collections.abc import Callable
from zlib import crc32

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.runtime.description import layers_of
from lightning_sparse_cl.runtime.file import HEADER, SUMMED_FROM, spnet_bytes


class PreActivation(nn.Module):
    """Batch-norm before convolutions, a value read three times, and a sum of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.wide, self.one, self.other = nn.Conv2d(8, 8, 1), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.norm(x))
        x = F.relu(self.conv(y) + self.wide(y) + x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.one(x) + F.relu6(self.other(x))


def plain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(7))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "SmallCNN": (lambda: plain(scl.SmallCNN(8)), (3, 16, 16)),
    "SmallCNN of digits": (lambda: plain(scl.SmallCNN(32)), (1, 8, 8)),
    "ResNet18": (lambda: plain(scl.ResNet18(8)), (3, 32, 32)),
    "VGG16": (lambda: plain(scl.VGG16(8)), (3, 32, 32)),
    "MobileNetV2": (lambda: plain(scl.SmallImageMobileNetV2(0.5)), (3, 32, 32)),
    "LeNet5": (lambda: plain(scl.LeNet5()), (1, 28, 28)),
    "SmallMLP": (lambda: plain(scl.SmallMLP([64, 32])), (3, 6, 5)),
    "pre-activation": (PreActivation, (3, 12, 12)),
    "5x5, odd sizes": (lambda: plain(nn.Conv2d(2, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)), (2, 15, 9)),
    "7x7, stride 2, pooling 3x3": (
        lambda: plain(nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)), (3, 32, 32)),
    "dilation, groups": (
        lambda: plain(nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)),
        (4, 16, 16),
    ),
    "no padding, stride 3": (lambda: plain(nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 5, 3, 3)), (3, 14, 11)),
    "averages": (
        lambda: plain(nn.Conv2d(3, 6, 3, padding=1), nn.AvgPool2d(3, 2, 1), nn.Hardtanh(-0.1, 0.2)), (3, 8, 8)),
    "a map": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)), (3, 8, 8)),
}  # fmt: skip


def network(name: str, sparsity: float = 0.8) -> tuple[nn.Module, tuple[int, int, int]]:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        net(torch.randn(2, *shape))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5), module.bias.normal_(0, 0.1)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.numel() > 100:
                module.weight.mul_(torch.rand_like(module.weight) >= sparsity)
    return net, shape


def assert_close(found: Tensor, net: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        wanted = net.double()(x.double()).flatten(1)
    net.float()
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def data_of(name: str = "pre-activation") -> bytes:
    net, shape = network(name)
    return spnet_bytes(layers_of(net, shape), shape, names=["a", "b"])


def signed(body: bytes) -> bytes:
    """With the checksum of what it is now."""
    magic, version, _, _, *_ = HEADER.unpack(body[: HEADER.size])
    return struct.pack("<8s3Q", magic, version, len(body), crc32(body[SUMMED_FROM:])) + body[SUMMED_FROM:]


def trained() -> tuple[scl.ContinualModule, scl.TaskDataModule]:
    pl.seed_everything(0, verbose=False)
    module, data = scl.EsaCL(scl.SmallCNN(8), scl.DERpp(20, 8), 0.8), scl.SplitDigits(5, batch_size=16)
    trainer(epochs=1, enable_checkpointing=False, limit_train_batches=4).fit(module, data)
    return module, data
