"""SNIP ranks by the gradient at the start, where there is one."""

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_sparse_cl import SNIP, Masks


def fit(ranking):
    module = BoringModel()
    module.layer = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    nn.init.zeros_(module.layer[3].weight)  # so that no gradient comes behind it
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=2, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[SNIP(0.5, ranking)],
    )  # fmt: skip
    try:
        trainer.fit(module)
    finally:
        masks = Masks.of(module).alive
    return before, masks


def test_where_there_is_no_gradient_yet_the_largest_weights_are_kept_and_that_is_said():
    with pytest.warns(UserWarning, match="zero all over layer.1.weight, layer.2.weight.*the largest weights are kept"):
        before, masks = fit("layer")
    for name, mask in masks.items():
        assert int(mask.sum()) == 32
        assert before[name][mask].abs().min() >= before[name][~mask].abs().max()


def test_ranked_together_they_would_all_be_lost():
    with pytest.raises(ValueError, match=r"zero all over layer\.1\.weight, layer\.2\.weight, which would lose all"):
        fit("global")
