"""``sparsecl profile``: what a trained network costs, by each way to run it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import lightning_sparse_cl as scl
from lightning_sparse_cl.cli.export import CALIBRATION, ExportingTrainer, restore, some_samples


class ProfilingTrainer(ExportingTrainer):
    """A Trainer with ``profile``, a subcommand beside ``export``."""

    def profile(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str = "last",
        output: str = "profile",
        task: int | None = None,
        ways: list[str] | None = None,
        samples: int | None = None,
        seconds: float = 0.5,
        weights_only: bool | None = None,
    ) -> None:
        """Measure size, memory, time and accuracy of the trained network, by each way to run it.

        See :func:`~lightning_sparse_cl.profile_model`. Each way has the threads of ``--threads``, or torch's.

        Args:
            model: the method.
            datamodule: whose test data are answered, and some of whose training data calibrate models of int8.
            ckpt_path: a checkpoint, or "last": the newest run of this configuration.
            output: the folder to write to.
            task: answer among the classes of this task alone, counted from 0. If None, among all.
            ways: of :func:`~lightning_sparse_cl.profile_model`. If None, all.
            samples: how many test samples, about. If None, all.
            seconds: for how long each way is timed in each round.
            weights_only: as for ``torch.load``. If None, True.

        Raises:
            ValueError: if the checkpoint is damaged, of another version or method, or cannot be exported.
        """
        restore(model, ckpt_path, weights_only)
        if not isinstance(datamodule, scl.TaskDataModule):
            raise ValueError(f"profile(data={type(datamodule).__name__}): it takes the data of a task sequence")
        datamodule.setup()
        if task is not None and not 0 <= task < len(datamodule.test_sets):
            raise ValueError(f"profile(task={task}): tasks are counted from 0, and there are {datamodule.num_tasks}")
        tested = datamodule.test_sets if task is None else datamodule.test_sets[task : task + 1]
        inputs, labels = some_samples(tested, samples)
        if inputs is None:
            raise ValueError(f"profile(data={type(datamodule).__name__}): a sample is one tensor in what is exported")
        calibration = some_samples(datamodule.train_sets, CALIBRATION)[0]
        shown = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*shown, transient=True) as bar:
            line = bar.add_task("")
            rows = scl.profile_model(
                model, inputs, labels, output, calibration, task, ways, torch.get_num_threads(), seconds,
                lambda text: bar.update(line, description=text),
            )  # fmt: skip
        print(f"{len(rows)} ways in {output}")


def in_run(args: Sequence[str]) -> list[str]:
    """A command line with the configuration and the checkpoint of a run, where it begins with the run's folder.

    Raises:
        ValueError: if the folder has none.
    """
    if args[:1] != ["profile"] or len(args) < 2 or args[1].startswith("-"):
        return list(args)
    run, rest = Path(args[1]), list(args[2:])
    config = run / "config.yaml"
    if not config.is_file():
        raise ValueError(f"profile {run}: it is no folder of a run, which has a config.yaml")
    defaults = {"--ckpt_path": run / "checkpoints" / "last.ckpt", "--output": run / "profile"}
    given = {word.partition("=")[0] for word in rest}
    return ["profile", "-c", str(config), *(f"{k}={v}" for k, v in defaults.items() if k not in given), *rest]
