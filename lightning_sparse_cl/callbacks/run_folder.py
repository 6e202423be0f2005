"""Where the files of a run belong."""

from __future__ import annotations

import os
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The folder of this very run, the same on every process; two runs of one logger have two.

    With a logger (the first, if there are several) it is the folder in which Lightning makes ``checkpoints``: the
    ``log_dir`` of :class:`CSVLogger` and :class:`TensorBoardLogger`, and ``save_dir/name/version`` of any other.
    Without a logger it is the Trainer's ``default_root_dir``, unless that is the working directory, its default.

    Call it on all processes, when loggers have begun their run: in a callback's ``setup`` or later.

    Args:
        trainer: the trainer.

    Returns:
        The folder, which need not exist, or None if it was not said where files belong.
    """
    folder: str | None
    if not trainer.loggers:
        told = Path(trainer.default_root_dir).resolve() != Path.cwd()
        folder = trainer.default_root_dir if told else None
    elif isinstance(logger := trainer.loggers[0], CSVLogger | TensorBoardLogger):
        folder = logger.log_dir
    else:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        root = trainer.default_root_dir if logger.save_dir is None else logger.save_dir
        folder = os.path.join(root, str(logger.name), version)
    folder = trainer.strategy.broadcast(folder)
    return None if folder is None else Path(folder)
