"""The command line: a stock LightningCLI with the callbacks that every task sequence needs."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import lightning_sparse_cl as scl


class SparseCLI(LightningCLI):
    """LightningCLI with ``--schedule``, ``--evaluation`` and ``--checkpoint`` beside ``--model`` and ``--data``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(scl.TaskSchedule, "schedule")
        parser.add_lightning_class_args(scl.ContinualEvaluation, "evaluation")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True})


def main(args: ArgsType = None) -> SparseCLI:
    """Entry point of ``sparsecl`` and ``python -m lightning_sparse_cl``; ``args`` stands in for the command line."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data are in memory
    return SparseCLI(
        pl.LightningModule,
        scl.TaskDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=args,
        seed_everything_default=0,
        trainer_defaults={
            "max_epochs": -1,  # the schedule knows when to stop
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}},
            "callbacks": [scl.RandomState(), scl.PassCounter(), scl.TaskProgressBar(), scl.RunReport()],
        },
    )


if __name__ == "__main__":
    main()
