"""The command line: a stock LightningCLI with the callbacks that every task sequence needs."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

import lightning_sparse_cl as scl
from lightning_sparse_cl.callbacks.launchers import is_requeued, join_after_restart, launched
from lightning_sparse_cl.checkpoint_file import read_checkpoint
from lightning_sparse_cl.cli import shipped
from lightning_sparse_cl.cli.config import RunConfig, refuse_repeated_keys
from lightning_sparse_cl.cli.errors import too_large
from lightning_sparse_cl.cli.last import newest_run, plain
from lightning_sparse_cl.cli.profile import ProfilingTrainer
from lightning_sparse_cl.cli.values import refuse_nonsense
from lightning_sparse_cl.cli.version_folder import claimed, run_name

NOBODY_CAN_ACT_ON = (
    ".*does not have many workers.*",  # the data are in memory
    ".*isinstance.treespec, LeafSpec.*",  # Lightning against a newer torch
    "The dirpath has changed from.*",  # a resumed run has a folder of its own
    ".*Checkpoint directory .* exists and is not empty.*",  # as it should, where a run goes on
    ".*`weights_only`.*",
    "LightningCLI's args parameter is intended.*",  # names of shipped configurations are replaced by their files
    "(?s).*(deprecated in v4|JsonargparseDeprecationWarning).*",  # Lightning against a newer jsonargparse
    ".*Consider setting `persistent_workers=True`.*",  # loaders are made anew in every epoch
    "Total length of `DataLoader` across ranks is zero.*",  # test data of some tasks are not there
    ".*the number of training batches .* is smaller than the logging interval.*",
)


HELP = """Sparse continual learning: train one network on a sequence of tasks, with a fraction of its weights.

  sparsecl configs                             the configurations that come with the package
  sparsecl fit -c split_digits/esacl           train one (--ckpt_path last goes on with a run that was stopped)
  sparsecl test -c split_digits/esacl --ckpt_path last
  sparsecl fit -c split_digits/esacl --print_config        everything that can be set
  sparsecl fit --model.help EsaCL              the options of a method; --data.help likewise
  sparsecl compare runs                        many runs in one table, with tests and pictures
  sparsecl sweep -c space.yaml                 many runs by one command
  sparsecl predict --data photos/ --ckpt_path FILE         classify the images of a folder
  sparsecl export --ckpt_path FILE             a trained network for torch, ONNX or the runtime in C++
  sparsecl profile RUN                         what each way to run a trained network costs
"""
MOST_THREADS = 1024
"""Above it, a number is taken for a mistake."""


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the lines of the description as they are."""


class SparseCLI(LightningCLI):
    """LightningCLI with ``--schedule``, ``--evaluation`` and ``--checkpoint`` beside ``--model`` and ``--data``."""

    def __init__(self, *args: Any, folder: str | os.PathLike | None = None, **kwargs: Any) -> None:
        self._claimed: list[Path] = []
        self._folder = folder
        try:
            super().__init__(*args, **kwargs)
        except Exception as error:
            config = getattr(self, "config", {}).get(getattr(self, "subcommand", ""))
            if config is None or (line := too_large(error, config.as_dict())) is None:
                raise
            raise ValueError(line) from error
        finally:
            for folder in self._claimed:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()  # of a run that never began

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(scl.TaskSchedule, "schedule")
        parser.add_lightning_class_args(scl.ContinualEvaluation, "evaluation")
        parser.add_lightning_class_args(scl.SequenceCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True})
        parser.add_argument(
            "--continue_from",
            type=str | None,
            help="a checkpoint whose sequence goes on: `fit` learns the tasks that it has not learnt yet",
        )
        parser.add_argument("--threads", type=int | None, help="CPU threads of torch; small networks need one")
        parser.add_argument("--compile", type=bool, default=False, help="run the backbone under torch.compile")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return LightningCLI.subcommands() | {name: {"model", "datamodule"} for name in ("export", "profile")}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, _with_files(sys.argv[1:] if args is None else args))
        config = self.config[self.config.subcommand]
        refuse_nonsense(config.as_dict())
        for path in (config.ckpt_path, config.continue_from if config.ckpt_path is None else None):
            if path not in (None, "last", "best", "hpc") and "://" not in path:
                read_checkpoint(path, mmap=True)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.threads is not None:
            if not 1 <= config.threads <= MOST_THREADS:
                raise ValueError(f"--threads={config.threads}: from 1 to {MOST_THREADS}")
            torch.set_num_threads(config.threads)
        logger = config.trainer.logger
        if self._folder is not None and getattr(logger, "init_args", {}).get("save_dir") != str(self._folder):
            raise ValueError(
                f"trainer.logger: this run's files belong in {self._folder}, where its logger is; leave the logger out"
            )
        if "verbose" in config:  # Lightning's table repeats every figure for every task; RunReport prints them once
            config.verbose = False

    def instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        with claimed(config.trainer.logger, run_name(config.model, config.data)) as self._claimed:
            super().instantiate_classes()

    def before_fit(self) -> None:
        """``--ckpt_path last`` is the newest run of this very configuration; for a fit, a new one if there is none."""
        config = self.config_init[self.subcommand]
        if config.compile:
            getattr(self.model, "backbone", self.model).compile()
        training, given = self.subcommand == "fit", config.ckpt_path
        again = training and is_requeued()
        if given != "last" and not again:
            self._continue()
            if given is None and config.continue_from is not None and self.subcommand != "fit":
                raise ValueError(
                    f"--continue_from={config.continue_from}: that is for fit; {self.subcommand} takes --ckpt_path"
                )
            if given is None and self.subcommand in ("validate", "test", "predict"):
                rank_zero_warn(f"{self.subcommand}: without --ckpt_path these are figures of an untrained network")
            return
        if again:
            rank_zero_info("SLURM runs this job again: it goes on from its last checkpoint")
        found = newest_run(self._checkpoint_folders(), plain(self.config[self.subcommand]), training)
        if found is None and not training:
            raise FileNotFoundError("--ckpt_path=last: no intact last.ckpt of this configuration")
        if found is not None:
            config.ckpt_path = str(found)
        elif given == "last":
            config.ckpt_path = None
            rank_zero_info("--ckpt_path=last: starts anew")
        self._continue()

    def _continue(self) -> None:
        """``--continue_from``, unless this very run is to be resumed."""
        config = self.config_init[self.subcommand]
        if self.subcommand != "fit" or config.continue_from is None or config.ckpt_path is not None:
            return
        if not isinstance(self.model, scl.ContinualModule):
            raise ValueError(
                f"--continue_from={config.continue_from}: a {type(self.model).__name__} is no ContinualModule, whose "
                "network and memory grow with the classes"
            )
        self.model.go_on_from(config.continue_from)

    def after_fit(self) -> None:
        """An open sequence ends when there is no further task."""
        while isinstance(self.datamodule, scl.OpenTasks) and self.datamodule.more():
            self.trainer.fit(self.model, self.datamodule)

    before_validate = before_test = before_predict = before_export = before_profile = before_fit

    def _checkpoint_folders(self) -> list[Path]:
        """Where this command's runs have their checkpoints: as ``ModelCheckpoint`` puts them for any logger."""
        if (told := self.config_init[self.subcommand].checkpoint.dirpath) is not None:
            return [Path(told)]
        searched = [(Path(self.trainer.default_root_dir), "checkpoints")]
        for logger in self.trainer.loggers:
            root = Path(logger.save_dir or self.trainer.default_root_dir)
            searched += [(root, f"{below}checkpoints") for below in ("", "*/", "*/*/")]
            searched.append((root / str(logger.name), "*/checkpoints"))  # a name may have several parts
        return [folder for root, pattern in searched for folder in root.glob(pattern)]

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = self.config_init[self.subcommand].trainer
        listed = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]  # one, or None
        own_bar = any(isinstance(c, ProgressBar) for c in listed)
        if trainer.enable_progress_bar is not False and not own_bar:
            self.trainer_defaults["callbacks"].insert(0, scl.TaskProgressBar())
        if trainer.devices == "auto" and (started := launched()) is not None:
            trainer.devices, trainer.num_nodes = started.per_node, started.nodes
        made = super().instantiate_trainer(**kwargs)
        if made.world_size > 1:
            join_after_restart(made.strategy.root_device)
        return made


OF_THE_PARSER: dict[str, Any] = {
    "exit_on_error": False,
    "prog": "sparsecl",
    "description": HELP,
    "formatter_class": _HelpFormatter,
    "version": f"lightning_sparse_cl {scl.__version__}",
}


def _with_files(args: ArgsType) -> ArgsType:
    """Arguments with the files of shipped configurations for their names; files are looked at.

    Raises:
        ValueError: if a file repeats a key.
    """
    if not isinstance(args, list):
        return args
    args = list(args)
    for i, word in enumerate(args):
        option, equals, value = word.partition("=")
        if option not in shipped.OPTIONS or not (equals or i + 1 < len(args)):
            continue
        path = shipped.find(value if equals else args[i + 1])
        args[i if equals else i + 1] = f"{option}={path}" if equals else path
        if Path(path).is_file():
            refuse_repeated_keys(Path(path))
    return args


def main(
    args: ArgsType = None, folder: str | os.PathLike | None = None, callbacks: Sequence[pl.Callback] = ()
) -> SparseCLI:
    """Parse, run, and return the finished CLI.

    Args:
        args: stands in for the command line.
        folder: where runs have their ``version_N``, unless a logger is configured. If None, in ``runs``, below the name
            of the method and the data.
        callbacks: further ones for the Trainer.
    """
    save_dir = {"save_dir": "runs"} if folder is None else {"save_dir": str(folder), "name": ""}
    for pattern in NOBODY_CAN_ACT_ON:
        warnings.filterwarnings("ignore", pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    given = args if isinstance(args, list) else sys.argv[1:]
    return SparseCLI(
        pl.LightningModule,
        scl.TaskDataModule,
        save_config_callback=RunConfig,
        trainer_class=ProfilingTrainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=args,
        parser_kwargs={command: {"exit_on_error": False} for command in SparseCLI.subcommands()} | OF_THE_PARSER,
        folder=folder,
        seed_everything_default=0,
        auto_configure_optimizers=False,  # a method brings its optimiser
        trainer_defaults={
            "max_epochs": -1,  # the schedule knows when to stop
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "log_every_n_steps": 10,
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": save_dir},
            "callbacks": [
                scl.RandomState(),
                scl.FlopsCounter(),
                scl.MemoryFootprint(),
                scl.FiniteLoss(),
                scl.ModelCapacity(),
                scl.RunReport(name=shipped.run_name(given)),
                *callbacks,
            ],
        },
    )


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
