"""The classes of a source divided into tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from lightning_sparse_cl.data.class_tasks import (
    ClassTasks,
    in_order,
    named,
    refuse_no_lists,
    refuse_other_than_one,
    task_sizes,
)
from lightning_sparse_cl.data.loader import SampleTensors
from lightning_sparse_cl.data.source_tasks import SourceTasks
from lightning_sparse_cl.data.sources import Source
from lightning_sparse_cl.nests import Nest, rows

Order = int | list[int] | None


class ClassSplit(SourceTasks):
    """The classes of a source divided into tasks, in one of four ways::

        num_tasks: 5                         equal tasks
        base: 50, increment: 10              a large first task, then equal ones
        sizes: [4, 2, 2, 2]                  tasks of these numbers of classes
        tasks: [[cat, dog], [truck, ship]]   these classes

    These are separate arguments, not one argument of many types, so that a line of a configuration says what it means
    and a parser refuses a wrong type. To override a file that has ``num_tasks`` from the command line:
    ``--data.init_args.num_tasks=null --data.init_args.sizes='[4,2,2,2]'``.

    Labels count the classes in the order in which the tasks meet them: with c classes in each task, task t has the
    labels t*c ... (t+1)*c - 1.

    Args:
        source: the samples.
        num_tasks: a divisor of the number of classes. If None, and no other way is given, the data set's usual number,
            if there is one: 5, or 10 for Tiny ImageNet, Mini-ImageNet and CIFAR-100.
        class_order: the order in which the source's classes are met: a list, or an integer as the seed of a random
            order. If None, the natural one, or, where a sequence goes on, first the classes that it has learnt. Not
            with ``tasks``, which have an order already.
        base: number of classes in the first task.
        increment: number of classes in each further task, including the last.
        sizes: number of classes in each task.
        tasks: classes of each task, by name or by the source's label. If names are numbers, a number is taken as a
            name. Classes in no task are left out, with a warning. A class may be in k tasks: each has every k-th of its
            training samples, and all its test samples.
        kwargs: see :class:`TaskDataModule`.

    Raises:
        ValueError: if the tasks are given in none or several of the ways, the classes do not divide into them, a class
            is unknown, is twice in a task, or has fewer training samples than tasks, or the order is not a valid one.
    """

    usual_tasks: int | None = 5
    """Number of tasks by default."""

    def __init__(
        self,
        source: Source,
        num_tasks: int | None = None,
        class_order: Order = None,
        *,
        base: int | None = None,
        increment: int | None = None,
        sizes: list[int] | None = None,
        tasks: list[list[str | int]] | None = None,
        **kwargs: Any,
    ) -> None:
        name, n = type(self).__name__, source.num_classes
        if all(way is None for way in (num_tasks, base, increment, sizes, tasks)):
            num_tasks = self.usual_tasks
        ways = {"num_tasks": num_tasks, "base": base, "increment": increment, "sizes": sizes, "tasks": tasks}
        refuse_other_than_one(name, {way: value for way, value in ways.items() if value is not None})
        if tasks is not None:
            refuse_no_lists(name, tasks)
            if class_order is not None:
                raise ValueError(
                    f"{name}(class_order={class_order}): tasks have an order of their own; leave class_order out"
                )
        counts = None if tasks is not None else task_sizes(name, n, num_tasks, base, increment, sizes)
        super().__init__(source, len(tasks or counts or ()), **kwargs)
        given = class_order if class_order is None or isinstance(class_order, int) else list(class_order)
        order = list(range(n)) if class_order is None else class_order
        if isinstance(order, int):
            order = np.random.RandomState(order).permutation(n).tolist()
        if sorted(order) != list(range(n)):
            raise ValueError(
                f"{type(self).__name__}(class_order={class_order}): the order lists each of the {n} classes "
                f"0-{n - 1} once"
            )
        self._in_natural_order = class_order is None
        self._class_order = given  # as it is told in reports
        self.class_order: list[int] = order
        """The source's class for each label, once the data are loaded."""
        self.sizes = counts
        self.tasks = tasks

    def load(self) -> tuple[list[Dataset], list[Dataset]]:
        self._members = self._found()
        self.class_order = self._members.order
        return super().load()

    def names(self) -> list[str]:
        names = self.source.names()
        return [names[c] for c in self.class_order]

    def _found(self) -> ClassTasks:
        """The classes of each task; those that the user names are known only once the source has been fetched."""
        known = [] if self.known is None else self.known.class_names
        if self.sizes is not None:
            if known and self._in_natural_order:  # classes learnt before come first, as before
                names = self.source.names()
                self.class_order = sorted(
                    range(len(names)), key=lambda c: (known.index(names[c]) if names[c] in known else len(known), c)
                )
            return in_order(self.sizes, self.class_order)
        assert self.tasks is not None  # one way is given
        name, names = type(self).__name__, self.source.names()
        found = named(name, self.tasks, names)
        others = sorted(set(range(len(names))) - set(found.order))
        if left_out := [repr(names[c]) for c in others if names[c] not in known]:
            shown = ", ".join(left_out[:5]) + ", ..." * (len(left_out) > 5)
            rank_zero_warn(f"{name}: {len(left_out)} of {len(names)} classes are in no task and left out: {shown}")
        return found

    def divide(self, inputs: Nest, labels: Tensor) -> list[SampleTensors]:
        labels = self._members.labels(labels)
        return [SampleTensors(rows(inputs, at), labels[at]) for at in self._members.members(labels, share=False)]

    def divide_training(self, inputs: Nest, labels: Tensor) -> list[SampleTensors]:
        labels = self._members.labels(labels)
        times, counts = self._members.turns().amax(0) + 1, labels.bincount(minlength=len(self.class_order) + 1)
        if len(scarce := ((counts < times) & (times > 1)).nonzero()):
            c = int(scarce[0])
            raise ValueError(
                f"{type(self).__name__}(tasks=...): class {self.source.names()[self.class_order[c]]!r} has "
                f"{int(counts[c])} training samples for {int(times[c])} tasks; each takes at least one"
            )
        return [SampleTensors(rows(inputs, at), labels[at]) for at in self._members.members(labels, share=True)]
