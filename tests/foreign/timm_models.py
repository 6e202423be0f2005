"""timm: the architectures of its own tests, which are the real classes at a small width."""

import pytest
from foreign.case import Case, classifier, images


def _build(architecture, **options):
    timm = pytest.importorskip("timm")
    return classifier(timm.create_model(architecture, num_classes=4, **options)), images(64)


CASES = [
    Case(
        "timm ResNet",
        "timm",
        lambda: _build("test_resnet"),  # zero_init_last=True is timm's default
    ),
    Case("timm ResNet, zero_init_last=False", "timm", lambda: _build("test_resnet", zero_init_last=False)),
    Case("timm ViT", "timm", lambda: _build("test_vit", img_size=64)),
    Case("timm ConvNeXt", "timm", lambda: _build("test_convnext")),
    Case("timm EfficientNet", "timm", lambda: _build("test_efficientnet")),
]
