"""torchvision: transformers for images."""

import pytest
from foreign.case import Case, classifier, images


def _vit():
    models = pytest.importorskip("torchvision.models")
    vit = models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=4
    )
    return classifier(vit), images(16)


def _swin():
    models = pytest.importorskip("torchvision.models")
    swin = models.SwinTransformer(
        patch_size=[2, 2], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=4
    )
    return classifier(swin), images(16)


CASES = [
    Case(
        "torchvision ViT",  # its head starts at zero
        "torchvision",
        _vit,
    ),
    Case("torchvision Swin", "torchvision", _swin),
]
