"""The accuracy that a task is to reach, given as a figure or by other runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def check_target(owner: str, target: float | list[float] | str | list[str]) -> None:
    """Raises ValueError if an accuracy is negative."""
    for value in target if isinstance(target, list) else [target]:
        if not isinstance(value, str) and not value >= 0:
            raise ValueError(f"{owner}(target={target}): an accuracy is a fraction, at least 0")


def targets_of(owner: str, target: float | list[float] | str | list[str], num_tasks: int) -> list[float]:
    """The target of each task; see :class:`~lightning_sparse_cl.SparseGrowth`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there are not as many targets as tasks, or a file has none.
    """
    given: list[Any] = list(target) if isinstance(target, list) else [target]
    if not given:
        raise ValueError(f"{owner}(target=[]): no target")
    if len({isinstance(value, str) for value in given}) > 1:
        raise ValueError(f"{owner}(target={target}): accuracies or files, not both")
    if not isinstance(given[0], str):
        found = [float(v) for v in (given if isinstance(target, list) else given * num_tasks)]
    else:
        runs = []
        for path in given:
            if not Path(path).is_file():
                raise FileNotFoundError(f"{owner}(target={path!r}): there is no such file; give a run's metrics.json")
            try:
                runs.append([float(value) for value in json.loads(Path(path).read_text())["held_out"]])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{owner}(target={path!r}): no metrics.json with held_out accuracies; run with a val_fraction"
                ) from error
        found = [max(values) for values in zip(*runs)]
    if len(found) != num_tasks:
        raise ValueError(
            f"{owner}(target={target}): {len(found)} held-out accuracies for {num_tasks} tasks; give one for all "
            "or one a task, or runs of all tasks with a val_fraction"
        )
    return found
