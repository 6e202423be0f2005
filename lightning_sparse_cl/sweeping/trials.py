"""Trials of a sweep on disk, and how one of them is run."""

from __future__ import annotations

import contextlib
import json
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_sparse_cl.callbacks.evaluation import SCENARIOS, ContinualEvaluation
from lightning_sparse_cl.callbacks.trainer_parts import first_callback, task_data
from lightning_sparse_cl.cli.errors import one_line
from lightning_sparse_cl.metrics.accuracy_matrix import acc_seen
from lightning_sparse_cl.sweeping.space import Trial
from lightning_sparse_cl.whole_file import whole_file

RECORD, LOG = "trial.json", "log.txt"
LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")
"""Lightning's, which hold on to the standard error that there was when they were made."""
Tell = Callable[[dict[str, float]], None]
Fit = Callable[[Sequence[str], Path, Sequence[pl.Callback]], Any]
"""Runs ``sparsecl fit`` with arguments, a folder for its runs, and further callbacks."""


class TellAfterTask(pl.Callback):
    """Gives the figures so far to a function whenever a task has been learnt, but for the last.

    Args:
        tell: gets ``tasks``, how many have been learnt, and what :class:`ContinualEvaluation` logs then.
    """

    changes_nothing = True

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self.last: dict[str, float] = {}
        """The latest figures."""

    def on_after_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        """A task has been learnt and measured."""
        self.last = {"tasks": task + 1.0, "of": float(task_data(trainer).num_tasks)}
        if (evaluation := first_callback(trainer, ContinualEvaluation)) is not None:
            for scenario in evaluation.scenarios:
                matrix = evaluation.matrices[scenario]
                known = {k: v for k, v in matrix.figures().items() if v is not None}
                known["acc_seen"] = float(acc_seen(matrix.R)[task])
                self.last |= {f"{scenario}/{name}": value for name, value in known.items()}
        if not task_data(trainer).finished:
            self.tell(self.last)


def record_of(folder: Path) -> dict[str, Any]:
    """What is known of a trial: ``args``, ``values``, ``state`` and ``figures``. If it never began, nothing."""
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}


def write_record(folder: Path, trial: Trial, state: str, **more: Any) -> None:
    """Keep what is known of a trial: ``begun``, ``finished``, ``stopped early`` or ``failed``."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / RECORD) as part:
        record = {"state": state, "args": trial.args, "values": trial.values, **more}
        part.write_text(json.dumps(record, indent=1) + "\n")


def is_over(root: Path, trial: Trial) -> bool:
    """Whether a trial was finished, or stopped because it was not good enough.

    Raises:
        ValueError: if its folder is of a trial with other arguments.
    """
    found = record_of(root / trial.name)
    if found and found["args"] != trial.args:
        differing = sorted(set(found["args"]) ^ set(trial.args))
        raise ValueError(
            f"sweep.folder={root}: {trial.name} was begun with other arguments ({', '.join(differing[:4])}); use "
            "another folder"
        )
    return found.get("state") in ("finished", "stopped early")


def run_trial(trial: Trial, root: Path, fit: Fit, tell: Tell = lambda figures: None) -> dict[str, float]:
    """Run a trial, or go on with it where it was stopped, and keep a record of it.

    What it prints goes to ``log.txt`` in its folder.

    Args:
        trial: what to run.
        root: the sweep's folder.
        fit: how.
        tell: see :class:`TellAfterTask`.

    Returns:
        The last figures; of a trial that is over, those of its record.
    """
    folder = root / trial.name
    if is_over(root, trial):
        return record_of(folder)["figures"]
    write_record(folder, trial, "begun")
    telling = TellAfterTask(tell)
    args = ["fit", *trial.args, "--trainer.enable_progress_bar=false", "--ckpt_path=last"]
    try:
        with (folder / LOG).open("a") as log, _printing_to(log):
            try:
                fit(args, folder, [telling])
                if not (figures := telling.last or _figures_in(folder)):
                    raise ValueError(f"{trial.name}: the run left no finished metrics.json in {folder}")
            except Exception:
                traceback.print_exc(file=log)
                raise
    except Exception as error:
        told = one_line(error) or f"{type(error).__name__}: {' '.join(str(error).split())}"
        write_record(folder, trial, "failed", error=told)
        raise
    write_record(folder, trial, "finished", figures=figures)
    return figures


@contextlib.contextmanager
def _printing_to(log: Any) -> Iterator[None]:
    found = (handler for name in LOGGERS for handler in logging.getLogger(name).handlers)
    handlers = [handler for handler in found if isinstance(handler, logging.StreamHandler)]
    before = [handler.setStream(log) for handler in handlers]
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        for handler, stream in zip(handlers, before):
            if stream is not None:
                handler.setStream(stream)


def _figures_in(folder: Path) -> dict[str, float]:
    """Of the finished run in a trial's folder: one whose process died between its last task and its record."""
    for path in sorted(folder.glob("*/metrics.json"), reverse=True):
        metrics = json.loads(path.read_text())
        if metrics["finished"]:
            parts = {s: metrics[s] for s in SCENARIOS if s in metrics}
            found = {f"{s}/{k}": v for s, part in parts.items() for k, v in part.items() if isinstance(v, float)}
            found |= {f"{s}/acc_seen": part["acc_seen"][-1] for s, part in parts.items()}
            tasks = float(max((len(part["matrix"]) for part in parts.values()), default=0))
            return {"tasks": tasks, "of": tasks} | found
    return {}


def told(figures: Mapping[str, float]) -> str:
    """Figures in a few words, for a progress bar."""
    shown = [f"{figures[name]:.1%}" for name in ("class_il/acc_seen", "task_il/acc_seen") if name in figures]
    return f"task {figures.get('tasks', 0):.0f}/{figures.get('of', 0):.0f}, {' / '.join(shown)}" if figures else ""
