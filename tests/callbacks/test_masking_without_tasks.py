"""Task-aware dynamic masking in a fit that is one task."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_sparse_cl import Masks, TaskAwareDynamicMasking


class Signs(BoringModel):
    """Trains on the signs of its inputs, and remembers the batches that its steps were given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8), nn.Linear(8, 2))

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch.sign()

    def training_step(self, batch, batch_idx):
        BATCHES.append((batch.dtype, float(batch.abs().max())))
        return super().training_step(batch, batch_idx)


BATCHES = []  # of all copies


def fit(**kwargs):
    module = Signs()
    trainer = pl.Trainer(
        accelerator="cpu", limit_train_batches=4, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **kwargs,
        callbacks=[TaskAwareDynamicMasking(0.5, interval=1, p_intra=0.2)],
    )  # fmt: skip
    trainer.fit(module)
    return module


def test_nothing_is_exchanged_after_the_last_step_of_max_steps():
    """Weights that grow then would stay zero."""
    module = fit(max_steps=10)
    ((name, alive),) = Masks.of(module).alive.items()
    assert module.get_parameter(name)[alive].all()


def test_what_is_measured_are_the_batches_of_the_training():
    """In its precision, and after the module's own hook on them."""
    BATCHES.clear()
    fit(max_epochs=3, precision="bf16-true")
    assert len(BATCHES) == 3 * 4 + 2 * 4  # the steps, and the epochs measured between them
    assert set(BATCHES) == {(torch.bfloat16, 1.0)}
