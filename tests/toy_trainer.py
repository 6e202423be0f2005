"""A Trainer for toy sequences: on the CPU, and silent."""

import lightning.pytorch as pl

from lightning_sparse_cl import TaskSchedule


def trainer(*callbacks, epochs=2, **kwargs):
    options = dict(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    return pl.Trainer(callbacks=[TaskSchedule(epochs), *callbacks], **(options | kwargs))
