"""The command line: a stock LightningCLI with the callbacks that every task sequence needs."""

from __future__ import annotations

import re
import sys
import traceback
import warnings
import zipfile
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import torch.optim
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_sparse_cl as scl
from lightning_sparse_cl.sparsity.layers import network_of


class ExportingTrainer(pl.Trainer):
    """A Trainer with ``export``, a subcommand beside ``fit`` and ``test``."""

    def export(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str = "last",
        output: str = "model.pt2",
    ) -> None:
        """Write the trained network, without dead channels, as a program that torch runs alone.

        ``torch.export.load(output).module()`` maps images (B, C, H, W), normalised as in training, to logits of all
        classes.

        Args:
            model: the method.
            datamodule: not needed.
            ckpt_path: a checkpoint, or "last": the newest run of this configuration.
            output: the file to write.

        Raises:
            ValueError: if the checkpoint has one subnetwork for each task, or classifies by a memory.
        """
        checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
        if checkpoint.get("subnetworks") or isinstance(getattr(model, "objective", None), scl.ICaRL):
            raise ValueError(
                f"export: a {type(model).__name__} of this checkpoint is no single network; load it with "
                "load_from_checkpoint and export each that you need by export_network"
            )
        if "built_for" not in checkpoint:
            raise ValueError(f"export: {ckpt_path} is of a {type(model).__name__}; use export_network(network, path)")
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        shape = checkpoint["built_for"]["input_shape"]
        left = scl.export_network(network_of(model), output, shape)
        print(f"{output}: maps images {('B', *shape)} to logits; {left:,} weights, some of them zero")


class SparseCLI(LightningCLI):
    """LightningCLI with ``--schedule``, ``--evaluation`` and ``--checkpoint`` beside ``--model`` and ``--data``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(scl.TaskSchedule, "schedule")
        parser.add_lightning_class_args(scl.ContinualEvaluation, "evaluation")
        parser.add_lightning_class_args(scl.SequenceCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True})
        parser.add_argument("--threads", type=int | None, help="CPU threads of torch; small networks need one")
        parser.add_argument("--compile", type=bool, default=False, help="run the backbone under torch.compile")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return LightningCLI.subcommands() | {"export": {"model", "datamodule"}}

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.threads is not None:
            if config.threads < 1:
                raise ValueError(f"--threads={config.threads}: at least one")
            torch.set_num_threads(config.threads)
        if "verbose" in config:  # Lightning's table repeats every figure for every task; RunReport prints them once
            config.verbose = False

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        path = self.config[self.config.subcommand].ckpt_path
        if path is not None and path not in ("last", "best", "hpc") and (fault := damage(path)):
            raise ValueError(f"--ckpt_path={path}: this file {fault}")

    def before_fit(self) -> None:
        """``--ckpt_path last`` is the newest run of this very configuration."""
        config = self.config_init[self.subcommand]
        if config.compile:
            getattr(self.model, "backbone", self.model).compile()
        if config.ckpt_path != "last":
            return
        folder = config.checkpoint.dirpath
        if folder is None:
            config.ckpt_path = str(newest_run(self.trainer.logger, self.config[self.subcommand]))
        elif not list(Path(folder).glob("last*.ckpt")):
            raise FileNotFoundError(f"--ckpt_path=last: there is no last.ckpt in {folder}")

    before_validate = before_test = before_predict = before_export = before_fit

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = self.config_init[self.subcommand].trainer
        listed = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]  # one, or None
        own_bar = any(isinstance(c, ProgressBar) for c in listed)
        if trainer.enable_progress_bar is not False and not own_bar:
            self.trainer_defaults["callbacks"].insert(0, scl.TaskProgressBar())
        return super().instantiate_trainer(**kwargs)


def newest_run(logger: Any, config: Any) -> Path:
    """``last.ckpt`` of the newest run in ``logger``'s folder that has the model, data and schedule of ``config``.

    Raises:
        FileNotFoundError: if there is none.
    """
    runs = Path(logger.save_dir or ".", logger.name or "") if logger is not None else Path()
    wanted = _sought(config)
    found = []
    for path in (*runs.glob("*/checkpoints/last.ckpt"), *runs.glob("checkpoints/last.ckpt")):
        beside = path.parents[1] / "config.yaml"
        if beside.is_file() and _sought(yaml.safe_load(beside.read_text())) == wanted:
            found.append(path)
    if not found:
        raise FileNotFoundError(f"--ckpt_path=last: no run under {runs} has this configuration and a last.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime)


def _sought(config: Namespace | dict[str, Any]) -> dict[str, Any]:
    """What makes two runs the same. Not the batch of a process: their number may have changed."""
    parts = {key: config.get(key) for key in ("seed_everything", "model", "data", "schedule")}
    parts = yaml.safe_load(yaml.safe_dump(Namespace(**parts).as_dict()))  # a copy, as it is written to files
    (parts["data"] or {}).get("init_args", {}).pop("batch_size", None)
    return parts


def damage(path: str) -> str | None:
    """What is wrong with a checkpoint file, or None. Sums are checked: ``torch.load`` reads altered bytes silently."""
    if not Path(path).is_file():
        return "is not there"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        return f"is truncated, altered or no checkpoint ({type(error).__name__})"
    if broken is not None:
        return f"is altered: the checksum of {broken} does not match"
    return None if "state_dict" in found else "is no checkpoint of Lightning"


def main(args: ArgsType = None) -> SparseCLI:
    """Parse, run, and return the finished CLI; ``args`` stands in for the command line."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data are in memory
    return SparseCLI(
        pl.LightningModule,
        scl.TaskDataModule,
        trainer_class=ExportingTrainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=args,
        parser_kwargs={command: {"exit_on_error": False} for command in SparseCLI.subcommands()}
        | {"exit_on_error": False},
        save_config_kwargs={"overwrite": True},  # a resumed run may go on in its folder
        seed_everything_default=0,
        auto_configure_optimizers=False,  # a method brings its optimiser
        trainer_defaults={
            "max_epochs": -1,  # the schedule knows when to stop
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "log_every_n_steps": 10,
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}},
            "callbacks": [
                scl.RandomState(),
                scl.FlopsCounter(),
                scl.MemoryFootprint(),
                scl.FiniteLoss(),
                scl.ModelCapacity(),
                scl.RunReport(),
            ],
        },
    )


def run() -> None:
    """The console script: like :func:`main`; what the user can mend is told in one line, with exit status 1."""
    try:
        main()
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        sys.exit(f"sparsecl: error: {line}")


def one_line(error: BaseException) -> str | None:
    """What to tell of an error that this package, Lightning, an optimiser or the parser found in the input.

    None for a fault with a traceback to read.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    checkers = [Path(module.__path__[0]) for module in (scl, torch.optim, lightning)]
    for link in chain:
        raised_in = Path(traceback.extract_tb(link.__traceback__)[-1].filename if link.__traceback__ else "")
        if isinstance(link, ValueError | OSError) and any(raised_in.is_relative_to(folder) for folder in checkers):
            return " ".join(str(link).split())
    if isinstance(error, MisconfigurationException):
        return str(error)
    if isinstance(error, ArgumentError):
        key = ".".join(re.findall(r'[Pp]arser key "([\w.]+)"', str(error)))
        reason = str(chain[-1]).strip().splitlines()[0]
        reason = reason.replace("Expected a dot import path string:", "no class is called")
        return f"{key}: {reason}" if key and key not in reason else reason
    return None


if __name__ == "__main__":
    run()
