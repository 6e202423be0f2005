"""A Trainer for toy sequences: on the CPU, and silent; and options for short runs of the command line."""

import lightning.pytorch as pl

from lightning_sparse_cl import TaskSchedule


def trainer(*callbacks, epochs=2, **kwargs):
    options = dict(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    return pl.Trainer(callbacks=[TaskSchedule(epochs), *callbacks], **(options | kwargs))


SHORTER = {
    "cl_lsg": {"growth.init_args.reuse_epochs": 1, "growth.init_args.target": 1.1},  # one epoch of each stage
    "sparcl": {
        "masking.init_args.interval": 1, "removal.init_args.interval": 1, "removal.init_args.cutoff": 1,
        "gradients.init_args.interval": 4,
    },
    "continual_dst": {"growth.init_args.interval": 4},
    "esacl_efficient": {"prune_epoch": 1},
    "packnet": {"pruning.init_args.retrain": 1},
    "cpg": {
        "stages.init_args.learn": 1, "stages.init_args.compact": 1, "stages.init_args.ramp": 1,
        "stages.init_args.retrain": 0, "stages.init_args.steps": [0.5], "stages.init_args.sizes": [1.0],
        "stages.init_args.target": 0.0, "stages.init_args.fits": 0.0,
    },
    "nispa": {"units.init_args.phase": 1},
    "lps": {"rho": [0.1], "admm": 1, "retrain": 1},
}  # fmt: skip
"""What a configuration needs in order to make sense for one or two epochs of few steps a task, by part of its name."""
TWO_EPOCHS = ("cl_lsg", "cpg", "esacl_efficient", "lps", "nispa", "packnet")
"""Parts of the names of those that need two."""


def epochs_of(config):
    """As few as make sense for a configuration of that path or name."""
    return 2 if any(name in str(config) for name in TWO_EPOCHS) else 1


def shortened(config):
    """Options of the command line."""
    return [
        f"--model.init_args.{name}={value}"
        for method, values in SHORTER.items() if method in str(config)
        for name, value in values.items()
    ]  # fmt: skip
