"""A Trainer for toy sequences: on the CPU, and silent; and options for short runs of the command line."""

import lightning.pytorch as pl

from lightning_sparse_cl import TaskSchedule


def trainer(*callbacks, epochs=2, **kwargs):
    options = dict(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    return pl.Trainer(callbacks=[TaskSchedule(epochs), *callbacks], **(options | kwargs))


def shortened(config):
    """What a configuration needs in order to make sense for one or two epochs a task."""
    interval, cutoff = "--model.init_args.{}.init_args.interval=1", "--model.init_args.removal.init_args.cutoff=1"
    if "cl_lsg" in str(config):
        growth = "--model.init_args.growth.init_args."  # one epoch of each stage
        return [f"{growth}reuse_epochs=1", f"{growth}target=1.1"]
    return [interval.format("masking"), interval.format("removal"), cutoff] if "sparcl" in str(config) else []
