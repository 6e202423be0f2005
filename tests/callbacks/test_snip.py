"""SNIP ranks by the gradient at the start, where there is one."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_sparse_cl import SNIP, Masks


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_weights_without_any_gradient_are_not_pruned_by_their_position(ranking):
    module = BoringModel()
    module.layer = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    nn.init.zeros_(module.layer[3].weight)  # so that no gradient comes behind it
    before = [p.clone() for p in module.parameters()]
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=2, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[SNIP(0.5, ranking)],
    )  # fmt: skip
    words = r"SNIP: \|w dL/dw\| is zero all over layer.1.weight, layer.2.weight, so there is nothing to rank"
    with pytest.raises(ValueError, match=words):
        trainer.fit(module)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    assert not Masks.of(module).alive
