"""Which classes make up each task: equal numbers of them, other numbers, or classes by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sparse_cl.data.labels import is_number, whole

WAYS = ({"num_tasks"}, {"base", "increment"}, {"sizes"}, {"tasks"})
"""The arguments that say what the tasks are."""


@dataclass(frozen=True)
class ClassTasks:
    """The classes of a source that make up each task.

    Args:
        classes: the classes of each task, as the source numbers them.
        total: number of the source's classes.
    """

    classes: list[list[int]]
    total: int

    @property
    def order(self) -> list[int]:
        """The source's class for each label: labels count classes in the order in which the tasks meet them."""
        return list(dict.fromkeys(chain(*self.classes)))

    def labels(self, of_source: Tensor) -> Tensor:
        """Labels (N,) for the source's labels (N,); classes in no task get the label after the last."""
        order = torch.tensor(self.order)
        label = torch.full((self.total,), len(order))
        label[order] = torch.arange(len(order))
        return label[of_source]

    def turns(self) -> Tensor:
        """How many earlier tasks have the class (tasks, classes + 1); -1 where the task itself does not."""
        label = {c: i for i, c in enumerate(self.order)}
        turns, times = torch.full((len(self.classes), len(label) + 1), -1), [0] * len(label)
        for task, classes in enumerate(self.classes):
            for i in (label[c] for c in classes):
                turns[task, i], times[i] = times[i], times[i] + 1
        return turns

    def members(self, labels: Tensor, share: bool) -> list[Tensor]:
        """Which samples (N,) each task has.

        Args:
            labels: as :meth:`labels` gives them.
            share: whether the k tasks of a class share its samples: the first has samples 0, k, 2k, ... of the class,
                the second 1, k + 1, .... Otherwise each has all of them.
        """
        turns = self.turns()
        here = [turn[labels] for turn in turns]
        if not share or turns.max() == 0:
            return [turn >= 0 for turn in here]
        counts, order = labels.bincount(minlength=turns.shape[1]), labels.argsort(stable=True)
        place = torch.empty_like(labels)  # of a sample within its class
        place[order] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
        next_up = place % (turns.amax(0) + 1).clamp_min(1)[labels]
        return [turn == next_up for turn in here]


def refuse_other_than_one(owner: str, given: dict[str, Any]) -> None:
    """Raise ValueError, naming ``owner``, unless the arguments given are one of the :data:`WAYS`."""
    if set(given) in WAYS:
        return
    rule = "tasks are given by one of num_tasks, base with increment, sizes, and tasks; leave the others out, or null"
    if given and set(given) < {"base", "increment"}:
        rule = "base and increment go together"
    raise ValueError(f"{owner}({', '.join(f'{name}={_short(value)}' for name, value in given.items())}): {rule}")


def task_sizes(
    owner: str, classes: int, num_tasks: int | None, base: int | None, increment: int | None,
    sizes: Sequence[int] | None,
) -> list[int]:  # fmt: skip
    """How many classes each task has.

    Raises:
        ValueError: unless every class is in one task, and every task has a class.
    """
    if num_tasks is not None:
        divisors = _divisors(classes)
        if num_tasks not in divisors:
            raise ValueError(
                f"{owner}(num_tasks={num_tasks}): {classes} classes divide into {_either(divisors)} tasks; unequal "
                "ones are given by sizes"
            )
        return [classes // num_tasks] * num_tasks
    if base is not None and increment is not None:
        if not 1 <= base < classes:
            raise ValueError(
                f"{owner}(base={base}): of {classes} classes the first task has at least 1 and leaves at least 1"
            )
        if increment not in (divisors := _divisors(classes - base)):
            raise ValueError(
                f"{owner}(base={base}, increment={increment}): the {classes - base} classes after the first "
                f"{base} divide into increments of {_either(divisors)}"
            )
        return [base, *[increment] * ((classes - base) // increment)]
    assert sizes is not None  # one way is given
    listed = isinstance(sizes, Sequence) and not isinstance(sizes, str)
    found = [whole(size) or 0 for size in sizes] if listed else []
    if min(found, default=0) < 1 or sum(found) != classes:
        raise ValueError(
            f"{owner}(sizes={_short(sizes)}): a list of each task's number of classes, at least 1 and {classes} in all"
            + (f", not {sum(found)}" if all(found) and found else "")
        )
    return found


def in_order(sizes: Sequence[int], order: Sequence[int]) -> ClassTasks:
    """Tasks of these sizes, with the classes in this order."""
    ends = np.cumsum([0, *sizes]).tolist()
    return ClassTasks([list(order[start:end]) for start, end in pairwise(ends)], len(order))


def refuse_no_lists(owner: str, tasks: Sequence[Sequence[str | int]]) -> None:
    """Raise ValueError unless ``tasks`` is a list of lists with at least one entry each."""
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not len(tasks):
        raise ValueError(f"{owner}(tasks={_short(tasks)}): a list of tasks, each a list of classes")
    for t, task in enumerate(tasks):
        if isinstance(task, str) or not isinstance(task, Sequence) or not len(task):
            raise ValueError(f"{owner}(tasks[{t}]={_short(task)}): a task is a list of at least one class")


def named(owner: str, tasks: Sequence[Sequence[str | int]], names: Sequence[str]) -> ClassTasks:
    """The classes by name or label.

    Args:
        owner: for errors.
        tasks: the classes of each task, checked by :func:`refuse_no_lists`. If a class of the source is named by a
            number, numbers are names; otherwise they are the source's labels.
        names: names of the source's classes.

    Raises:
        ValueError: if a class is unknown, or is twice in a task.
    """
    at = {name: c for c, name in enumerate(names)}
    by_number = at if any(is_number(name) for name in names) else {str(c): c for c in range(len(names))}
    kind = "name" if by_number is at else f"name or label 0-{len(names) - 1}"
    found: list[list[int]] = []
    for t, task in enumerate(tasks):
        where = f"{owner}(tasks[{t}]={_short(task)})"
        found.append([])
        for given in task:
            number = None if isinstance(given, str | bool) else whole(given)
            c = at.get(given) if isinstance(given, str) else by_number.get(str(number))
            if c is None:
                shown = ", ".join(map(repr, names[:10])) + ", ..." * (len(names) > 10)
                raise ValueError(f"{where}: no class is called {given!r}; give a {kind}: {shown}")
            if c in found[t]:
                raise ValueError(f"{where}: class {names[c]!r} is in the task twice; each class is in a task once")
            found[t].append(c)
    return ClassTasks(found, len(names))


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _either(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return " or ".join(filter(None, [", ".join(most), last]))


def _short(value: Any) -> str:
    """A value, shortened for an error of one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."
