"""The result of a run: a table on the screen, ``metrics.json`` and a picture of the accuracy matrix on disk."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_sparse_cl.callbacks.anytime import AnytimeAccuracy
from lightning_sparse_cl.callbacks.averaging import AVERAGING
from lightning_sparse_cl.callbacks.capacity import ModelCapacity
from lightning_sparse_cl.callbacks.claims import Claim
from lightning_sparse_cl.callbacks.compact_pick_grow import CompactPickGrow
from lightning_sparse_cl.callbacks.evaluation import SCENARIOS, ContinualEvaluation
from lightning_sparse_cl.callbacks.flops import FlopsCounter
from lightning_sparse_cl.callbacks.footprint import MemoryFootprint
from lightning_sparse_cl.callbacks.run_description import run_description
from lightning_sparse_cl.callbacks.run_folder import run_folder
from lightning_sparse_cl.callbacks.schedule import TaskSchedule, position
from lightning_sparse_cl.callbacks.sparse_growth import SparseGrowth
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier
from lightning_sparse_cl.callbacks.stable_units import StableUnits
from lightning_sparse_cl.callbacks.subnetworks import TaskSubnetworks
from lightning_sparse_cl.callbacks.tables import TITLES, print_report, print_tested
from lightning_sparse_cl.callbacks.task_callback import TaskCallback
from lightning_sparse_cl.callbacks.task_line import learnt_line
from lightning_sparse_cl.callbacks.time_left import SequenceTime
from lightning_sparse_cl.callbacks.trainer_parts import first_callback, parts_of, task_data
from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.sparsity import Masks, Subnetworks
from lightning_sparse_cl.sparsity.layers import network_of
from lightning_sparse_cl.whole_file import whole_file


class Measure(Protocol):
    """A callback that tells in the end what it has measured."""

    def summary(self) -> dict[str, Any]:
        """Figures by name, as they are written to ``metrics.json``."""


MEASURES: dict[str, type[Measure]] = {
    "flops": FlopsCounter, "memory": MemoryFootprint, "size": ModelCapacity, "subnetworks": TaskSubnetworks,
    "growth": SparseGrowth, "units": StableUnits, "stages": CompactPickGrow, "anytime": AnytimeAccuracy,
}  # fmt: skip


class RunReport(TaskCallback):
    """Collects what the other callbacks measured, when the fit ends.

    Writes ``metrics.json`` and ``accuracy_matrix.png`` to the folder of the run
    (:func:`~lightning_sparse_cl.callbacks.run_folder.run_folder`) and prints a table; if the run has no folder, it only
    prints. All accuracies are fractions in the file and percent in the table; what is not defined is null. Keys:
    ``name``, ``method`` (its classes), ``data`` (its class), ``settings`` (hyper-parameters by dotted name, also of the
    objective, the callbacks, the data and the optimiser, and the ``epochs`` of the tasks), ``digests`` (of the data,
    and of the network's shapes), ``class_il`` and ``task_il`` (each ``matrix``, ``baseline``, ``acc_seen``, ``acc``,
    ``incremental_acc``, ``bwt``, ``fwt``, ``forgetting``; with
    ``before_pruning`` also ``class_il_before`` and ``task_il_before``), ``sparsity`` (zeros among the weights of all
    masked layers), ``density_per_layer`` (non-zeros of every weight matrix and kernel; both by the mask of the last
    task where masks are learnt), ``flops``, ``memory`` and ``size`` (the summaries of :class:`FlopsCounter`,
    :class:`MemoryFootprint` and :class:`ModelCapacity`),
    ``subnetworks`` and ``growth`` (of :class:`TaskSubnetworks` and :class:`SparseGrowth`, also drawn to
    ``subnetworks.png``), ``units`` and ``stages`` (of :class:`StableUnits` and :class:`CompactPickGrow`), ``anytime``
    (of :class:`AnytimeAccuracy`), ``held_out`` (accuracy of each task on its validation samples, if there are any),
    ``seconds`` (of training and evaluation, pauses left out), ``task_seconds`` (of each task; null for tasks of an
    earlier fit), ``figure`` (what is measured on each task: accuracy, or
    mAP, R² or mIoU where labels are of another kind), ``class_names``, ``classes`` (the names of each task's classes),
    ``seed``, ``commit`` (of the working folder, with ``+changes`` if files differ from it; null outside of Git),
    ``versions``, ``machine``, ``finished``.

    A fit that is stopped, by a signal or an exception, leaves ``metrics.json`` with what it had measured: ``finished``
    is false, and ``stopped_at`` tells the ``task``, the ``epoch`` within it (both from 0) and the ``step``. A run that
    is resumed and ends writes the figures of the whole run.

    Where the output is no terminal, a line is printed whenever a task has been learnt.

    Args:
        folder: where to write instead of the folder of the run.
        name: what comparisons call the run: ``name`` in the file. If None, they call it by its method.
        show: whether to print the table, and a line for each task.
    """

    changes_nothing = True
    after = (ModelCapacity, ContinualEvaluation, Sparsifier, *AVERAGING)

    def __init__(self, folder: str | None = None, name: str | None = None, show: bool = True) -> None:
        self.folder, self.name, self.show = folder, name, show
        self._folder: Path | None = None
        self._mine = Claim(Path("metrics.json"))  # not taken
        self._seconds = 0.0
        self._learnt_at: dict[int, float] = {}  # seconds when each task had been learnt
        self._described: dict[str, Any] = {}
        """What the run is."""
        self._started: float | None = None
        self._is_training = False  # between the first batch of this process and the end
        self._time = SequenceTime()
        self._finished: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._seconds, self._started, self._is_training, self._time = 0.0, None, False, SequenceTime()
            self._learnt_at, self._described = {}, {}
            self._folder = run_folder(trainer) if self.folder is None else Path(self.folder)
            if self._folder is not None and trainer.is_global_zero and not trainer.loggers:
                self._claim(self._folder)

    def _claim(self, folder: Path) -> None:
        """Loggers give each run a folder; without one, two runs at once may have been told the same."""
        folder.mkdir(parents=True, exist_ok=True)
        self._mine.release()
        self._mine = Claim(folder / "metrics.json")
        if not self._mine.take():
            raise ValueError(
                f"{folder}: another run is writing its files there; give this one a logger, or a default_root_dir of "
                "its own"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and not self._described:  # now, before the network grows
            self._described = run_description(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._is_training = True
        self._time.begin(trainer)

    @property
    def seconds(self) -> float:
        """Time spent in the fit so far, before it was resumed included."""
        return self._seconds + (0.0 if self._started is None else time.monotonic() - self._started)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "learnt_at": dict(self._learnt_at)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seconds, self._learnt_at = state["seconds"], dict(state.get("learnt_at", {}))

    def on_after_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        self._learnt_at[task] = self.seconds
        if self.show and trainer.is_global_zero and not sys.stdout.isatty():  # on a terminal the bar tells it
            self._time.update(trainer)
            print(learnt_line(trainer, task, self._time), flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seconds, self._started, self._is_training = self.seconds, None, False
        if not trainer.is_global_zero or parts_of(trainer).fast_dev_run:
            return
        scheduled = first_callback(trainer, TaskSchedule) is not None
        finished = task_data(trainer).finished if scheduled else True  # a callback may have stopped the fit before
        self._finished = metrics = self.collect(trainer, pl_module) | _state(trainer, finished)
        if self._folder is None:
            return
        _write(metrics, self._folder)
        matrices = {TITLES[s]: metrics[s]["matrix"] for s in SCENARIOS if s in metrics}
        if matrices:
            from lightning_sparse_cl.callbacks.picture import draw_matrices

            draw_matrices(matrices, self._folder / "accuracy_matrix.png", metrics.get("classes", ()))
        if metrics.get("subnetworks", {}).get("density"):
            from lightning_sparse_cl.callbacks.picture import draw_subnetworks

            path = self._folder / "subnetworks.png"
            draw_subnetworks(metrics["subnetworks"], metrics.get("growth"), path, metrics.get("classes", ()))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._tell_of_stop(trainer, pl_module)
        self._mine.release()

    def _tell_of_stop(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        was_training, self._is_training = self._is_training, False
        if not was_training or not trainer.is_global_zero or parts_of(trainer).fast_dev_run or self._folder is None:
            return
        try:
            _write(self.collect(trainer, pl_module) | _state(trainer, finished=False), self._folder)
        except Exception as error:  # the one that stopped the fit is the one to see
            rank_zero_info(f"RunReport: no metrics.json of the stopped run, {type(error).__name__}: {error}")
            return
        with contextlib.suppress(OSError):  # the output is not read any more
            print(f"stopped; what was measured until then is in {self._folder / 'metrics.json'}", flush=True)

    @rank_zero_only
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._finished and self.show:  # now, after the bar has left the screen
            print_report(self._finished, is_written=self._folder is not None)
            print(f"results in {self._folder}" if self._folder else "no files written: the run has no folder")
        self._finished = None
        self._mine.release()

    @rank_zero_only
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        figures = {name: value.item() for name, value in trainer.callback_metrics.items()}
        known = _classes(trainer)
        print_tested(figures, classes=known.get("classes", ()), figure=known.get("figure", "accuracy"))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_test_end(trainer, pl_module)

    def collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The contents of ``metrics.json``."""
        metrics: dict[str, Any] = {}
        for callback in parts_of(trainer).callbacks:
            if isinstance(callback, ContinualEvaluation):
                metrics |= {name: matrix.summary() for name, matrix in callback.matrices.items()}
                metrics |= {"held_out": callback.held_out} if callback.held_out else {}
            for name, measure in MEASURES.items():
                if isinstance(callback, measure):
                    metrics[name] = callback.summary()
        weights = {n: p for n, p in network_of(pl_module).named_parameters() if p.ndim > 1}
        alive = {n: int(p.count_nonzero()) for n, p in weights.items()}
        masked = list(Masks.of(pl_module))
        learnt = Subnetworks.of(pl_module)
        if not masked and len(learnt):  # masks that are learnt are those of a task
            last = learnt.tasks[-1].masks
            alive |= {n: int(learnt.mask(len(learnt) - 1, n).sum()) for n in last}
            masked = list(last)
        total = sum(weights[n].numel() for n in masked)
        metrics = {
            "name": self.name,
            **self._described,
            **metrics,
            **_classes(trainer),
        }
        return metrics | {
            "sparsity": 1 - sum(alive[n] for n in masked) / total if total else 0.0,
            "density_per_layer": {n: alive[n] / p.numel() for n, p in weights.items()},
            "seconds": round(self.seconds, 3),
            "task_seconds": self._task_seconds(),
        }

    def _task_seconds(self) -> list[float | None]:
        """Of each task from its start, or that of the fit, to its end; None for tasks that an earlier fit learnt."""
        ends, last = [self._learnt_at.get(task) for task in range(max(self._learnt_at, default=-1) + 1)], 0.0
        found: list[float | None] = []
        for end in ends:
            found.append(None if end is None else round(end - last, 3))
            last = last if end is None else end
        return found


def _classes(trainer: pl.Trainer) -> dict[str, Any]:
    """Names of the data's classes, and of those that each task has, and what is measured; nothing without tasks."""
    data = parts_of(trainer).datamodule
    if not isinstance(data, TaskDataModule):
        return {}
    described = data.description()
    return {
        "figure": data.target.figure,
        "class_names": list(data.class_names),
        "classes": described.names_of_tasks(),
    }


def _state(trainer: pl.Trainer, finished: bool) -> dict[str, Any]:
    """Whether the run is finished, and where it stood if it is not."""
    if finished:
        return {"finished": True}
    now = position(trainer)
    return {"finished": False, "stopped_at": {"task": now.task, "epoch": now.epoch, "step": trainer.global_step}}


def _write(metrics: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "metrics.json") as part:
        part.write_text(json.dumps(metrics, indent=2) + "\n")
