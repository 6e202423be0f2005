"""The accuracy that a task should reach, given as a number or by other runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def check_target(owner: str, target: float | list[float] | str | list[str]) -> None:
    """Raise ValueError unless ``target`` is an accuracy that is not negative, a file, or a list of either."""
    given = target if isinstance(target, list) else [target]
    numbers = [v for v in given if isinstance(v, int | float) and not isinstance(v, bool)]
    if not given or len(numbers) not in (0, len(given)) or not all(isinstance(v, str) or v in numbers for v in given):
        raise ValueError(f"{owner}(target={target!r}): an accuracy or a run's metrics.json, or a list of either")
    if not all(value >= 0 for value in numbers):
        raise ValueError(f"{owner}(target={target}): an accuracy is a fraction, at least 0")


def targets_of(owner: str, target: float | list[float] | str | list[str], num_tasks: int) -> list[float]:
    """The target of each task; see :class:`~lightning_sparse_cl.SparseGrowth`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if these are not targets, their number is not that of the tasks, or a file has none.
    """
    check_target(owner, target)
    given: list[Any] = list(target) if isinstance(target, list) else [target]
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
            "tasks, or one per task, or runs of all tasks with a val_fraction"
        )
    return found
