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
        named = [self.metrics.get("name"), self.method, self.data, self.settings, self.metrics["processes"]]
        return json.dumps(named, sort_keys=True)


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
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"compare {folder}: there is no such folder")
        paths |= dict.fromkeys(sorted(path.resolve() for path in folder.rglob("metrics.json")))
    found: dict[tuple[str, int], Run] = {}
    left_out: list[str] = []
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):  # the newest last
        try:
            run = _read(path)
        except ValueError as error:
            left_out.append(f"{path}: {error}")
            continue
        if (older := found.pop((run.what, run.seed), None)) is not None:
            left_out.append(f"{older.folder}: {run.folder} is a newer run of the same")
        found[run.what, run.seed] = run
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
    needed = ("method", "data", "settings", "seed", "processes", "finished")
    if not isinstance(metrics, dict) or any(key not in metrics for key in needed):
        raise ValueError("an older version wrote this file, or another program")
    if not metrics["finished"]:
        raise ValueError("this run was stopped")
    return Run(path.parent, metrics)
