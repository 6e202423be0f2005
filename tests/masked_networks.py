"""Masked networks of many shapes, and what accelerated ones are compared with."""

import torch
from torch import nn
from torch.nn import functional as F

import lightning_sparse_cl as scl
from lightning_sparse_cl.sparsity import Masks, enforce


class Odd(nn.Module):
    """What there are no kernels for, and control flow that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2), nn.Conv2d(8, 8, 3, groups=2),
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.Conv2d(8, 12, 3, padding=2, stride=2),
        )  # fmt: skip
        self.last = nn.Linear(12, 5)

    def forward(self, x):
        x = self.convs(x)
        if x.mean() > 1e9:
            x = -x
        return self.last(F.max_pool2d(x, 2).amax((2, 3)))


class Branches(nn.Module):
    """Sums, norms and pools in the orders that fusing must not mistake for others."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1, bias=i == 3) for i in (3, 8, 8))
        self.norm, self.same = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)

    def forward(self, x):
        x = self.a(x)
        y = self.b(self.norm(x).relu())
        y = F.relu(y + x) + y
        z = self.same(self.c(y)) + y
        return F.avg_pool2d(z + z, 2).mean((2, 3))


class InPlace(nn.Module):
    """A sum with what an in-place ReLU has changed."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.a(x)
        y = self.b(self.relu(x))
        return (y + x).mean((2, 3))


class Shared(nn.Module):
    """One layer called twice, and one weight in two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.linear, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.linear.weight

    def forward(self, x):
        x = self.c(self.b(self.b(self.a(x)).relu()))
        return self.tied(self.linear(x.mean((2, 3))))


NETWORKS = {
    "shared": Shared,
    "in place": InPlace,
    "resnet": lambda: scl.ResNet18(8),
    "vgg": lambda: scl.VGG16(4),
    "cnn": lambda: scl.SmallCNN(8),
    "mlp": lambda: scl.SmallMLP((32, 32)),
    "lenet": lambda: scl.LeNet5(),
    "mobilenet": lambda: scl.SmallImageMobileNetV2(0.5),
    "odd": Odd,
    "branches": Branches,
}


def network(name, side=16):
    torch.manual_seed(0)
    net = NETWORKS[name]()
    net.eval()(torch.zeros(2, 3, side, side))
    masks = {n: torch.rand_like(p) < 0.3 for n, p in net.named_parameters() if p.ndim > 1}
    with torch.no_grad():
        for n, p in net.named_parameters():
            p.mul_(masks.get(n, 1))
        net.train()(torch.randn(16, 3, side, side))
    return net, masks


def enforced(net, masks, optimizer):
    """The masks of the network, kept through every step."""
    own = Masks.of(net)
    for name, mask in masks.items():
        own.set_alive(name, mask)
    enforce(net, optimizer)
    return own


def difference(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-9)).item()
