"""Sizes of the backbones, and that they take their shape from the data."""

import copy

import pytest
import torch
from torch import nn

from lightning_sparse_cl import ResNet18, SmallCNN, SmallMLP
from lightning_sparse_cl.backbones.memory_format import channels_last_


@pytest.mark.parametrize(("classes", "parameters"), [(10, 11_173_962), (100, 11_220_132)])
def test_resnet18_has_the_parameters_of_the_published_network(classes, parameters):
    model = nn.Sequential(ResNet18(), nn.Linear(512, classes))
    model(torch.zeros(2, 3, 8, 8))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("backbone", [ResNet18(4), SmallCNN(4), SmallMLP((16, 8))])
@pytest.mark.parametrize("shape", [(1, 8, 8)])
def test_features_are_vectors(backbone, shape):
    features = backbone.eval()(torch.randn(3, *shape))
    assert features.ndim == 2 and len(features) == 3


def test_channels_come_from_the_data():
    for channels, size in ((1, 8), (3, 32), (4, 17)):
        assert ResNet18(4)(torch.randn(2, channels, size, size)).shape == (2, 32)


@pytest.mark.parametrize(("width", "converted"), [(8, False), (16, True)])  # 8: oneDNN's workspace would be overrun
def test_channels_last_changes_the_format_and_no_gradient(width, converted, monkeypatch):
    monkeypatch.setattr("torch.nn.functional.relu", torch.tanh)  # at a kink, rounding would change whole gradients
    plain = nn.Sequential(ResNet18(width), nn.Linear(8 * width, 3))
    plain(torch.zeros(2, 3, 64, 64))
    fast = channels_last_(copy.deepcopy(plain))
    weight = fast[0].stages[1][0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == converted
    x = torch.randn(4, 3, 64, 64)
    for network in (plain, fast):
        network(x).square().sum().backward()
    for a, b in zip(plain.parameters(), fast.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 1e-4 * a.grad.norm()
