"""What a run is: its method, data, hyper-parameters, seed, code and machine, as ``metrics.json`` holds them."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar
from lightning.pytorch.cli import SaveConfigCallback

from lightning_sparse_cl.callbacks.acceleration import SparseAcceleration
from lightning_sparse_cl.callbacks.anytime import AnytimeAccuracy
from lightning_sparse_cl.callbacks.capacity import ModelCapacity
from lightning_sparse_cl.callbacks.evaluation import ContinualEvaluation
from lightning_sparse_cl.callbacks.finite import FiniteLoss
from lightning_sparse_cl.callbacks.flops import FlopsCounter
from lightning_sparse_cl.callbacks.footprint import MemoryFootprint
from lightning_sparse_cl.callbacks.identity import describe, digest, settings, settings_of_data
from lightning_sparse_cl.callbacks.schedule import TaskSchedule
from lightning_sparse_cl.callbacks.state import RandomState
from lightning_sparse_cl.callbacks.task_callback import TaskCallback
from lightning_sparse_cl.callbacks.trainer_parts import first_callback, parts_of
from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.version import __version__

COMPOSED, PLAIN = "ContinualModule", "CrossEntropy"
"""The method that is nothing but its parts, and the objective without a memory."""


CHANGE_NOTHING = (
    Checkpoint, ProgressBar, ModelSummary, LearningRateMonitor, DeviceStatsMonitor, RandomState, FlopsCounter,
    MemoryFootprint, ModelCapacity, AnytimeAccuracy, ContinualEvaluation, FiniteLoss, SparseAcceleration, TaskSchedule,
    SaveConfigCallback,
)  # fmt: skip
"""Callbacks that only measure, save or show, or that are described elsewhere: they do not set runs apart. Others say
so by an attribute ``changes_nothing``.
"""


def run_description(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """Of a fit: ``method``, ``data``, ``settings``, ``digests``, ``processes``, ``seed``, ``commit``, ``versions`` and
    ``machine``.

    The digests tell apart what settings cannot describe: the ``data`` by what they hold, without the order of the
    tasks, and the ``network`` by the shapes that its weights have now.
    """
    data, schedule = parts_of(trainer).datamodule, first_callback(trainer, TaskSchedule)
    idle = [c for c in parts_of(trainer).callbacks if isinstance(c, CHANGE_NOTHING) or hasattr(c, "changes_nothing")]
    without = {type(callback).__name__ for callback in idle}
    found = {k: v for k, v in settings(trainer, pl_module).items() if k.partition(".")[0] not in without}
    for callback in parts_of(trainer).callbacks:
        if callback not in idle and not isinstance(callback, TaskCallback):
            describe(callback, type(callback).__name__, found)
    found |= {f"trainer.{key}": getattr(trainer, key) for key in ("limit_train_batches", "overfit_batches")}
    digests = {"network": digest((name, *p.shape) for name, p in pl_module.named_parameters())}
    if isinstance(data, TaskDataModule):
        found |= settings_of_data(data)
        digests["data"] = digest(sorted(data.fingerprints))
        if schedule is not None:
            epochs = [schedule.epochs_of(task) for task in range(data.num_tasks)]
            found["epochs"] = epochs[0] if len(set(epochs)) == 1 else epochs
    policies = [type(policy).__name__ for policy in getattr(pl_module, "policies", ())]
    return {
        "method": method_name(type(pl_module).__name__, found.get("objective"), policies),
        "data": None if data is None else type(data).__name__,
        "settings": found,
        "digests": digests,
        "processes": trainer.world_size,
        "seed": torch.initial_seed(),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "lightning_sparse_cl": __version__,
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {trainer.strategy.root_device}",
    }


def method_name(method: str, objective: str | None, policies: Iterable[str]) -> str:
    """``EsaCL-DERpp``, ``PackNet``, ``DERpp-RigL``: what a method is called in folders, files and tables.

    Args:
        method: its class.
        objective: the class of its objective, if it has one.
        policies: the classes of its callbacks; they are named where the method is but their composition.
    """
    if objective is None or (method != COMPOSED and objective == PLAIN):
        return method
    return "-".join([objective, *policies] if method == COMPOSED else [method, objective])


def commit() -> str | None:
    """The commit of the working folder, with "+changes" if tracked files differ from it; None outside of Git."""
    try:
        told = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        head = subprocess.run(["git", "rev-parse", "HEAD"], **told).stdout.strip()  # type: ignore[call-overload]  # one set of options for both
        changes = subprocess.run(["git", "status", "--porcelain", "-uno"], **told).stdout.strip()  # type: ignore[call-overload]  # likewise
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+changes" if changes else head
