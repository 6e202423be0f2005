"""The module's own loss, by which policies rank weights."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning, LambdaCallback
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_sparse_cl import DynamicGradientMasking, Masks


class Collects(BoringModel):
    """Keeps the losses of its steps with their graphs, as is common where an epoch's end looks at them."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        self.outputs = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        self.outputs.append(loss)
        return loss


def trainer(*callbacks, max_epochs):
    return pl.Trainer(
        accelerator="cpu", max_epochs=max_epochs, limit_train_batches=3, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks],
    )  # fmt: skip


def test_a_module_that_holds_tensors_with_graphs_is_ranked_by_its_own_loss():
    module = Collects()
    trainer(DynamicGradientMasking(0.5, interval=1), max_epochs=1).fit(module)
    assert len(module.outputs) == 3  # those of the passes that rank are a copy's
    assert all(loss.grad_fn is not None for loss in module.outputs)
    assert not Masks.of(module).updated  # all are updated again


class Later(BaseFinetuning):
    """Trains the last layer for an epoch, and then all."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.layer[:2])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.layer[:2], optimizer)


def test_nothing_is_ranked_before_there_is_something_to_mask():
    module, held = Collects(), []
    policy = DynamicGradientMasking(0.5, interval=1)
    look = LambdaCallback(on_train_epoch_end=lambda trainer, module: held.append(list(Masks.of(module).updated)))
    trainer(Later(), policy, look, max_epochs=2).fit(module)
    assert held == [[], ["layer.1.weight"]]
