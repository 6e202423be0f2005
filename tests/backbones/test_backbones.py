"""Sizes of the backbones, and that they take their shape from the data."""

import pytest
import torch
from torch import nn

from lightning_sparse_cl import ResNet18, SmallCNN, SmallMLP


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
