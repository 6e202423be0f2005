"""A network without the channels that no layer reads computes the same, and is as small as it can be."""

import pytest
import torch
from torch import nn

from lightning_sparse_cl import VGG16, LeNet5, ResNet18, SmallCNN, SmallImageMobileNetV2, SmallMLP
from lightning_sparse_cl.sparsity.channels import Channels, compact

NETWORKS = [
    lambda: ResNet18(8),
    lambda: VGG16(8),
    lambda: LeNet5(10),
    lambda: SmallImageMobileNetV2(0.5),
    lambda: SmallCNN(8),
    SmallMLP,
]


@pytest.mark.parametrize(
    "make", NETWORKS, ids=["ResNet18", "VGG16", "LeNet5", "SmallImageMobileNetV2", "SmallCNN", "SmallMLP"]
)
@torch.no_grad()
def test_half_the_channels_unread(make):
    torch.manual_seed(0)
    backbone, x = make(), torch.randn(8, 3, 32, 32)
    features = backbone(x).shape[1]  # in training mode: batch-norm statistics that are not 0 and 1
    full = nn.Sequential(backbone, nn.Linear(features, 10)).eval()
    for norm in (m for m in full.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.bias)  # a channel of zero weights is not zero
    channels = Channels.of(full)
    for name, source in channels.reads.items():
        if source != channels.input:
            weight = full.get_submodule(name).weight
            per_channel = weight.shape[1] // channels.sizes[source]
            weight[:, (torch.arange(channels.sizes[source]) % 2 == 1).repeat_interleave(per_channel)] = 0
    before = {n: t.clone() for n, t in full.state_dict().items()}
    small = compact(full, outputs=[7, 1])
    torch.testing.assert_close(small(x), full(x)[:, [7, 1]])
    assert all(torch.equal(before[n], t) for n, t in full.state_dict().items())
    for name, target in channels.writes.items():
        want = 2 if target == channels.output else -(-channels.sizes[target] // 2)
        assert small.get_submodule(name).weight.shape[0] == want, name
    for name, source in channels.reads.items():
        if source != channels.input:
            per_channel = full.get_submodule(name).weight.shape[1] // channels.sizes[source]
            assert small.get_submodule(name).weight.shape[1] == -(-channels.sizes[source] // 2) * per_channel


def test_a_network_that_cannot_be_followed_keeps_its_channels():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 6)

        def forward(self, x):
            return self.head(self.conv(x).flip(1).mean((2, 3)))

    class ByName(Odd):
        def forward(self, x):
            return self.head(self.conv(input=x).mean((2, 3)))

    for odd in (Odd(), ByName()):
        x = torch.randn(2, 3, 8, 8)
        with pytest.raises(ValueError, match="channels cannot be followed through"):
            Channels.of(odd)
        assert torch.equal(compact(odd)(x), odd(x))
        torch.testing.assert_close(compact(odd, outputs=[4, 0])(x), odd(x)[:, [4, 0]])


@pytest.mark.parametrize(
    "layers",
    [
        lambda conv: nn.Sequential(conv, conv),  # used twice
        lambda conv: nn.Sequential(conv, nn.Flatten(0)),
        lambda conv: nn.Sequential(conv, nn.GroupNorm(2, 4)),
        lambda conv: nn.Sequential(conv, nn.Conv2d(4, 4, 3, groups=2)),
    ],
)
def test_what_may_mix_channels_is_refused(layers):
    with pytest.raises(ValueError, match="channels cannot be followed"):
        Channels.of(layers(nn.Conv2d(4, 4, 3, padding=1)))


def test_a_mean_over_channels_is_refused():
    class Mean(nn.Module):
        def __init__(self, dims):
            super().__init__()
            self.conv, self.dims = nn.Conv2d(3, 4, 3), dims

        def forward(self, x):
            return self.conv(x).mean(self.dims)

    assert Channels.of(Mean((2, 3))).sizes == [3, 4]
    for dims in (1, (1, 2), (0,)):
        with pytest.raises(ValueError, match="channels cannot be followed"):
            Channels.of(Mean(dims))
