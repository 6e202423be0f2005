"""segmentation-models-pytorch: a class for every pixel."""

import pytest
import torch
from foreign.case import BATCH, BATCHES, Case, classifier, tensors


def _build():
    smp = pytest.importorskip("segmentation_models_pytorch")
    unet = smp.Unet("tu-test_resnet", encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8), classes=3)
    n = BATCH * BATCHES
    return classifier(unet), tensors(torch.randn(n, 3, 32, 32), torch.randint(3, (n, 32, 32)))


CASES = [
    Case(
        "segmentation-models-pytorch U-Net",
        "segmentation-models-pytorch",
        _build,
    )
]
