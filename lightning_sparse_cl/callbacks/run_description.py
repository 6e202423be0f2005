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

from lightning_sparse_cl.callbacks.identity import settings, settings_of_data
from lightning_sparse_cl.callbacks.schedule import TaskSchedule
from lightning_sparse_cl.callbacks.trainer_parts import first_callback, parts_of
from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.version import __version__

COMPOSED, PLAIN = "ContinualModule", "CrossEntropy"
"""The method that is nothing but its parts, and the objective without a memory."""


def run_description(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """Of a fit: ``method``, ``data``, ``settings``, ``processes``, ``seed``, ``commit``, ``versions``, ``machine``."""
    data, schedule = parts_of(trainer).datamodule, first_callback(trainer, TaskSchedule)
    found = settings(trainer, pl_module)
    if isinstance(data, TaskDataModule):
        found |= settings_of_data(data)
        if schedule is not None:
            epochs = [schedule.epochs_of(task) for task in range(data.num_tasks)]
            found["epochs"] = epochs[0] if len(set(epochs)) == 1 else epochs
    policies = [type(policy).__name__ for policy in getattr(pl_module, "policies", ())]
    return {
        "method": method_name(type(pl_module).__name__, found.get("objective"), policies),
        "data": None if data is None else type(data).__name__,
        "settings": found,
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
