"""The result of a run: a table on the screen, ``metrics.json`` and a picture of the accuracy matrix on disk."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any, Protocol

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from lightning_sparse_cl.callbacks.averaging import AVERAGING
from lightning_sparse_cl.callbacks.capacity import ModelCapacity
from lightning_sparse_cl.callbacks.evaluation import SCENARIOS, ContinualEvaluation
from lightning_sparse_cl.callbacks.flops import FlopsCounter
from lightning_sparse_cl.callbacks.footprint import MemoryFootprint
from lightning_sparse_cl.callbacks.sparse_growth import SparseGrowth
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier
from lightning_sparse_cl.callbacks.subnetworks import TaskSubnetworks
from lightning_sparse_cl.callbacks.task_callback import TaskCallback
from lightning_sparse_cl.callbacks.trainer_parts import parts_of
from lightning_sparse_cl.sparsity import Masks
from lightning_sparse_cl.sparsity.layers import network_of


class Measure(Protocol):
    """A callback that tells in the end what it has measured."""

    def summary(self) -> dict[str, Any]:
        """Figures by name, as they are written to ``metrics.json``."""


MEASURES: dict[str, type[Measure]] = {
    "flops": FlopsCounter, "memory": MemoryFootprint, "size": ModelCapacity, "subnetworks": TaskSubnetworks,
    "growth": SparseGrowth,
}  # fmt: skip
TITLES = {"class_il": "Class-IL", "task_il": "Task-IL"}


class RunReport(TaskCallback):
    """Collects what the other callbacks measured, when the fit ends.

    Writes ``metrics.json`` and ``accuracy_matrix.png`` to the logger's folder (or the trainer's root folder) and prints
    a table. All accuracies are fractions in the file and percent in the table; what is not defined is null. Keys:
    ``class_il`` and ``task_il`` (each ``matrix``, ``baseline``, ``acc``, ``bwt``, ``fwt``, ``forgetting``; with
    ``before_pruning`` also ``class_il_before`` and ``task_il_before``), ``sparsity`` (zeros among the weights of all
    masked layers), ``density_per_layer`` (non-zeros of every weight matrix and kernel), ``flops``, ``memory`` and
    ``size`` (the summaries of :class:`FlopsCounter`, :class:`MemoryFootprint` and :class:`ModelCapacity`),
    ``subnetworks`` and ``growth`` (of :class:`TaskSubnetworks` and :class:`SparseGrowth`, also drawn to
    ``subnetworks.png``), ``held_out`` (accuracy of each task on its validation samples, if there are any), ``seconds``
    (of training and evaluation, pauses left out), ``seed``, ``versions``, ``machine``.
    """

    after = (ModelCapacity, Sparsifier, *AVERAGING)

    def __init__(self) -> None:
        self._seconds = 0.0
        self._started: float | None = None
        self._finished: tuple[dict[str, Any], Path] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent in the fit so far, before it was resumed included."""
        return self._seconds + (0.0 if self._started is None else time.monotonic() - self._started)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seconds = state["seconds"]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seconds, self._started = self.seconds, None
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked on every process: Lightning broadcasts it
        if not trainer.is_global_zero or parts_of(trainer).fast_dev_run:
            return
        metrics = self.collect(trainer, pl_module)
        folder.mkdir(parents=True, exist_ok=True)
        half_written = folder / "metrics.json.tmp"
        half_written.write_text(json.dumps(metrics, indent=2) + "\n")
        os.replace(half_written, folder / "metrics.json")
        matrices = {TITLES[s]: metrics[s]["matrix"] for s in SCENARIOS if s in metrics}
        if matrices:
            from lightning_sparse_cl.callbacks.picture import draw_matrices

            draw_matrices(matrices, folder / "accuracy_matrix.png")
        if metrics.get("subnetworks", {}).get("density"):
            from lightning_sparse_cl.callbacks.picture import draw_subnetworks

            draw_subnetworks(metrics["subnetworks"], metrics.get("growth"), folder / "subnetworks.png")
        self._finished = metrics, folder

    @rank_zero_only
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._finished:  # now, after the bar has left the screen
            metrics, folder = self._finished
            print_report(metrics)
            print(f"results in {folder}")
        self._finished = None

    @rank_zero_only
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        figures = {k: v.item() for k, v in trainer.callback_metrics.items()}
        tasks = sum(k.startswith("task_il/task_") for k in figures)
        table = Table(title="Accuracy on task, %", title_justify="left")
        for column in ("", *(str(t + 1) for t in range(tasks)), "ACC"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for scenario in (s for s in SCENARIOS if f"{s}/acc" in figures):
            row = [figures[f"{scenario}/{name}"] for name in (*(f"task_{t}" for t in range(tasks)), "acc")]
            table.add_row(TITLES[scenario], *map(_percent, row))
        console = Console()
        console.width = max(console.width, 20 + 8 * tasks)
        console.print(table)

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
        total = sum(weights[n].numel() for n in masked)
        return metrics | {
            "sparsity": 1 - sum(alive[n] for n in masked) / total if total else 0.0,
            "density_per_layer": {n: alive[n] / p.numel() for n, p in weights.items()},
            "seconds": round(self.seconds, 3),
            "processes": trainer.world_size,
            "seed": torch.initial_seed(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "lightning": lightning.__version__,
            },
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {trainer.strategy.root_device}",
        }


def print_report(metrics: dict[str, Any], console: Console | None = None) -> None:
    """Print what ``metrics.json`` holds as rich tables: accuracies in percent, spending against plain training."""
    tasks = max((len(metrics[s]["baseline"]) for s in SCENARIOS if s in metrics), default=0)
    console = console or Console()
    console.width = max(console.width, 12 + 8 * tasks)  # a narrow terminal wraps, but no figure is cut
    for scenario in SCENARIOS:
        if scenario not in metrics:
            continue
        result = metrics[scenario]
        table = Table(title=f"{TITLES[scenario]} accuracy, %", title_justify="left")
        table.add_column("after task")
        for task in range(len(result["baseline"])):
            table.add_column(str(task + 1), justify="right")
        rows = [("none", result["baseline"])] + [(str(i + 1), r) for i, r in enumerate(result["matrix"])]
        for name, row in rows:
            table.add_row(name, *(_percent(v) for v in row))
        console.print(table)
    summary = Table(title="Summary", title_justify="left")
    for column in ("", *(TITLES[s] for s in SCENARIOS if s in metrics)):
        summary.add_column(column, justify="right" if column else "left")
    names = {"acc": "ACC", "bwt": "BWT", "fwt": "FWT", "forgetting": "forgetting"}
    for key, name in names.items():
        summary.add_row(name, *(_percent(metrics[s][key]) for s in SCENARIOS if s in metrics))
    if "task_il_before" in metrics:
        summary.add_row(
            "ACC before the last pruning", *(_percent(metrics[f"{s}_before"]["acc"]) for s in SCENARIOS if s in metrics)
        )
    console.print(summary)
    lines = Table.grid(padding=(0, 2))
    lines.add_row("sparsity of the pruned layers", f"{100 * metrics['sparsity']:.2f} %")
    shared, growth = metrics.get("subnetworks"), metrics.get("growth")
    if shared and shared["used"]:
        lines.add_row("weights used by any task", f"{100 * shared['used'][-1]:.2f} % of one network's")
    if growth:
        grew = ", ".join(str(t + 1) for t, g in enumerate(growth["grew"]) if g) or "none"
        lines.add_row("  allocated", f"{100 * growth['allocated'][-1]:.2f} % (grew in tasks: {grew})")
    flops, memory, size = (metrics.get(name, {}) for name in ("flops", "memory", "size"))
    if flops.get("dense"):  # modules that do not call themselves are not counted
        lines.add_row("samples served", f"{flops['samples']:,}")
        for direction in ("forward", "backward"):
            ratio = flops[direction] / max(1, flops["samples"])
            lines.add_row(f"samples sent {direction}", f"{flops[direction]:,} ({ratio:.2f} x plain training)")
        share = 100 * flops["training"] / flops["dense"]
        lines.add_row("training FLOPs", f"{flops['training']:.3g} ({share:.1f} % of dense training on all data)")
        lines.add_row("  as SparCL's tables count", f"{flops['papers']:.3g}")
        if flops["scoring"]:
            share = 100 * flops["scoring"] / flops["dense"]
            lines.add_row("  to find masks, in addition", f"{flops['scoring']:.3g} ({share:.1f} %)")
    if "formula" in memory:
        lines.add_row(
            "memory, SparCL's formula", f"{memory['formula'] / 1e6:.1f} MB (dense {memory['dense'] / 1e6:.1f})"
        )
    if "peak" in memory:
        lines.add_row(f"memory, peak of the {memory['source']}", f"{memory['peak'] / 1e6:.1f} MB")
    if size:
        lines.add_row("network on disk", f"{size['bytes'] / 1e6:.2f} MB (dense {size['dense_bytes'] / 1e6:.2f})")
    lines.add_row("time", f"{metrics['seconds']:.1f} s")
    console.print(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
