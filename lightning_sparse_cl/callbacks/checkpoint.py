"""Checkpoints of a task sequence, the finished one included."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


class SequenceCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint`` that also leaves the finished run, consolidated, in ``last.ckpt``.

    Lightning saves every n steps *or* at epoch ends, so that with ``every_n_train_steps`` the last task's pruning would
    be missing from every file. All arguments are those of ``ModelCheckpoint``.
    """

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        super().on_train_end(trainer, pl_module)
        if self.save_last and self.dirpath:
            trainer.save_checkpoint(Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}.ckpt", self.save_weights_only)
