"""Runs on disk: what each of them was, and what came out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ELSEWHERE = ("root", "download", "num_workers", "folder", "dirpath", "in_memory")
"""Last parts of settings that say where files are or how they are read, not what was learnt."""


METRICS = "metrics.json"
NEEDED = {
    "method": str, "data": str | None, "settings": dict, "digests": dict, "seed": int, "processes": int,
    "finished": bool,
}  # fmt: skip
"""Entries of the file of a run, and their types."""
LISTS = {"matrix", "acc_seen"}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: where its ``metrics.json`` is.
        metrics: the contents of that file.
    """

    folder: Path
    metrics: Mapping[str, Any] = field(repr=False)

    @property
    def method(self) -> str:
        """What its method is called."""
        return self.metrics["method"]

    @property
    def data(self) -> str:
        """The class of its data."""
        return self.metrics["data"] or "data"

    @property
    def seed(self) -> int:
        """Of its random numbers."""
        return self.metrics["seed"]

    @property
    def settings(self) -> dict[str, Any]:
        """Its hyper-parameters by dotted name, without those that say where files are."""
        return {k: v for k, v in self.metrics["settings"].items() if k.rpartition(".")[2] not in ELSEWHERE}

    @property
    def what(self) -> str:
        """All that two runs have in common if they differ in their seeds alone."""
        parts = [self.metrics[key] for key in ("name", "method", "data", "digests", "processes")]
        return json.dumps([*parts, self.settings], sort_keys=True)

    @property
    def tested_on(self) -> str:
        """What two runs have in common if their test data have the same tasks."""
        return json.dumps([self.data, self.metrics["classes"]])


@dataclass(frozen=True)
class Found:
    """What lies below some folders."""

    runs: list[Run]
    """One for each configuration and seed."""
    left_out: list[str]
    """Other files, and why they are not taken."""


def find_runs(folders: Iterable[str | os.PathLike]) -> Found:
    """The finished runs below folders, in the order of their paths.

    Of several runs of one configuration with one seed, the newest stays: a run that was resumed has several folders.

    Args:
        folders: searched to any depth for ``metrics.json``.

    Raises:
        ValueError: if a folder is not there, or no finished run is found.
    """
    paths: dict[Path, None] = {}
    trials: dict[Path, None] = {}
    for folder in map(Path, folders):
        if folder.name == METRICS and folder.is_file():
            folder = folder.parent
        if not folder.is_dir():
            raise ValueError(f"compare {folder}: there is no such folder")
        trials |= dict.fromkeys(sorted(path.resolve() for path in folder.rglob("trial.json")))
        paths |= dict.fromkeys(sorted(path.resolve() for path in folder.rglob(METRICS)))
    found: dict[tuple[str, int], Run] = {}
    left_out: list[str] = []
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):  # the newest last
        try:
            run = _read(path)
        except ValueError as error:
            left_out.append(f"{path}: {error}")
            continue
        if (older := found.pop((run.what, run.seed), None)) is not None:
            left_out.append(f"{older.folder}: {run.folder} is newer, with the same configuration and seed {run.seed}")
        found[run.what, run.seed] = run
    left_out += filter(None, map(_unfinished, trials))
    if not found:
        folders_told = ", ".join(map(str, folders))
        raise ValueError(f"compare {folders_told}: no finished run" + "".join(f"; {line}" for line in left_out[:3]))
    return Found(sorted(found.values(), key=lambda run: str(run.folder)), left_out)


def _read(path: Path) -> Run:
    """A finished run.

    Raises:
        ValueError: if it is none; why, without the path.
    """
    try:
        metrics = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"this file is not readable ({type(error).__name__})") from error
    if not isinstance(metrics, dict) or not all(isinstance(metrics.get(k), kind) for k, kind in NEEDED.items()):
        raise ValueError("an older version wrote this file, or another program")
    metrics = {"name": None, "classes": [], **metrics}
    for scenario in ("class_il", "task_il"):
        if scenario in metrics and not (isinstance(metrics[scenario], dict) and metrics[scenario].keys() >= LISTS):
            raise ValueError(f"its {scenario} is no accuracy matrix with its figures")
    if not isinstance(metrics["classes"], list):
        raise ValueError("its classes are no list")
    if not metrics["finished"]:
        raise ValueError("this run was stopped")
    return Run(path.parent, metrics)


def _unfinished(path: Path) -> str | None:
    """Why a trial of a sweep has no finished run. If it has one, None."""
    try:
        trial = json.loads(path.read_text())
        state = trial["state"]
    except (OSError, ValueError, TypeError, KeyError):
        return f"{path}: this file is not readable"
    if state == "finished":
        return None
    return f"{path.parent}: this trial {SAID.get(state, 'was begun, and is not finished')}{trial.get('error') or ''}"


SAID = {"failed": "failed: ", "stopped early": "was stopped early"}
