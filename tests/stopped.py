"""A fit that is stopped at a step and resumed ends as one that was not."""

from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import toy_tasks


class Stop(Exception):
    pass


class StopAt(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise Stop


def assert_resumes(make: Callable[[], pl.LightningModule], step: int, epochs: int, folder, **data) -> None:
    """Weights, scores, buffers and the tasks' subnetworks have the same bits; ``step`` counts from the first task's."""

    def run(folder, *more, ckpt_path=None):
        pl.seed_everything(0, verbose=False)
        module, checkpoint = make(), scl.SequenceCheckpoint(folder, save_last=True, every_n_train_steps=1)
        parts = (scl.RandomState(), checkpoint, *more)
        trainer(*parts, epochs=epochs, enable_checkpointing=True).fit(module, toy_tasks(3, **data), ckpt_path=ckpt_path)
        return module

    whole = run(folder / "whole")
    with pytest.raises(Stop):
        run(folder / "stopped", StopAt(step))
    resumed = run(folder / "stopped", ckpt_path=folder / "stopped" / "last.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    tasks = [scl.Subnetworks.of(module).tasks for module in (whole, resumed)]
    for a, b in zip(*tasks, strict=True):
        assert all(torch.equal(a.masks[n], b.masks[n]) for n in a.masks)
        assert all(torch.equal(a.own[n], b.own[n]) for n in a.own)
