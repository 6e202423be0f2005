"""The answers of frozen subnetworks to the test samples, kept so that none is asked twice."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler

from lightning_sparse_cl.callbacks.outputs import of_classes
from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.data.loader import ShareSampler
from lightning_sparse_cl.metrics import AccuracyMatrix
from lightning_sparse_cl.nests import Nest, count, moved
from lightning_sparse_cl.sparsity.bits import digest
from lightning_sparse_cl.sparsity.subnetworks import Subnetwork, Subnetworks, starts_with

Largest = tuple[Tensor, Tensor]
"""The largest logit of each sample (B,), and its class, the lowest among equals."""


class KeptAnswers:
    """Measures a module of learnt subnetworks again and again, and asks each of them once.

    The figures are those of :meth:`Subnetworks.combined` over the answers of all subnetworks, bit for bit. Two numbers
    are kept per test sample, the largest logit of the networks asked so far and its class; and for each learnt task,
    how many samples of its own test set its network gets right. They stay on their device and in their process, and are
    not part of checkpoints.

    Everything is forgotten, and all networks are asked again, if one of them is no longer the same: it was replaced,
    the shared weights that it uses have changed, or batch-norm that all share has changed
    (``TaskSubnetworks("shared")``, with which every evaluation asks all networks). Test samples that come in another
    order each time are always sent through all networks, as are all samples if tasks are inferred jointly.
    """

    def __init__(self) -> None:
        self._asked: list[Subnetwork] = []
        self._digests: dict[str, Tensor] = {}
        """Digests of what the subnetworks that were asked take from the module."""
        self._largest: dict[tuple[int, int], Largest] = {}
        """The largest logits, by test set and batch."""
        self._own: dict[int, Tensor] = {}
        """Hits and samples of each learnt task on its own test set, in Task-IL."""

    def measure(
        self, learnt: Subnetworks, data: TaskDataModule, live: Tensor, matrices: Mapping[str, AccuracyMatrix]
    ) -> None:
        """Count the hits on all test sets.

        Args:
            learnt: the subnetworks of a module in eval mode; at least one.
            data: gives the test sets.
            live: which classes (T, num_classes) each test set has.
            matrices: where to count, by scenario; names begin with ``class_il`` or ``task_il``.
        """
        if not self._asked or not self._is_valid(learnt):
            learnt.drop_networks()
            self._asked, self._digests, self._largest, self._own = [], {}, {}, {}
        device = next(learnt.module.parameters()).device
        known = torch.zeros(live.shape[1], dtype=torch.bool, device=device)
        known[learnt.known()] = True
        outputs = len(learnt.module.get_parameter(learnt.head[0]))
        # As in combined(): a head may have more outputs than classes.
        some_unknown = len(learnt.known()) < outputs and learnt.asks_running(learnt.tasks)
        class_il, task_il = (
            [matrix.to(device) for name, matrix in matrices.items() if name.startswith(scenario)]
            for scenario in ("class_il", "task_il")
        )
        for task, loader in enumerate(data.test_dataloader()):
            own, others = self._own.get(task), ~live[task].to(device)
            if own is not None:
                for matrix in task_il:
                    matrix.add(own, task)
                if not class_il:
                    continue
            in_order = _is_in_order(loader)
            for number, (x, y) in enumerate(loader):
                x, y = data.prepare(moved(x, device), augment=False), y.to(device)
                batch = _Batch(learnt, x, task, known, some_unknown)
                if learnt.inference.together:
                    for matrix in class_il:
                        matrix.update(
                            of_classes(learnt.combined(x, learnt.answers(x)), len(known), learnt.module), y, task
                        )
                elif class_il:
                    largest = batch.largest(self._largest.get((task, number)), len(self._asked))
                    if in_order:
                        self._largest[task, number] = largest
                    for matrix in class_il:
                        matrix.update(batch.labels(largest), y, task)
                for matrix in task_il if own is None else ():
                    matrix.update(batch.of_task().masked_fill(others, -torch.inf), y, task)
            if own is None and task < len(learnt):
                self._own[task] = task_il[0].counted(task)
        self._asked, self._digests = list(learnt.tasks), _digests(learnt)

    def _is_valid(self, learnt: Subnetworks) -> bool:
        if not starts_with(learnt.tasks, self._asked):
            return False
        now = _digests(learnt, len(self._asked))
        return now.keys() == self._digests.keys() and all(torch.equal(now[n], d) for n, d in self._digests.items())


class _Batch:
    """The answers to images (B, C, H, W) of a task's test set; each network is asked once.

    Args:
        learnt: the subnetworks.
        x: the samples.
        task: the task of the test set.
        known: which classes (num_classes,) any subnetwork has.
        some_unknown: whether some output of the head has no known class, so that the network being trained answers.
    """

    def __init__(self, learnt: Subnetworks, x: Nest, task: int, known: Tensor, some_unknown: bool) -> None:
        self._learnt, self._x, self._task, self._known, self._some_unknown = learnt, x, task, known, some_unknown
        self._own: Tensor | None = None

    @cached_property
    def _running(self) -> Tensor:
        """Logits of the network that is being trained."""
        return of_classes(self._learnt.running(self._x), len(self._known), self._learnt.module)

    def _answer(self, task: int) -> Tensor:
        """Logits of a task's subnetwork; -inf for classes that it does not have."""
        answer = self._learnt.combined(self._x, self._learnt.answers(self._x, task), task)
        answer = of_classes(answer, len(self._known), self._learnt.module)
        if task == self._task:
            self._own = answer
        return answer

    def of_task(self) -> Tensor:
        """Logits of the task's subnetwork, or of the network that is being trained if it has none."""
        if self._task >= len(self._learnt):
            return self._running
        return self._answer(self._task) if self._own is None else self._own

    def largest(self, kept: Largest | None, asked: int) -> Largest:
        """The largest logits of all subnetworks; ``kept`` has those of the first ``asked``."""
        dtype = self._running.dtype if self._some_unknown else None  # if None, the type of the answers
        if kept is None or len(kept[0]) != count(self._x) or dtype not in (None, kept[0].dtype):
            kept, asked = None, 0
        for task in range(asked, len(self._learnt)):
            answer = self._answer(task)
            dtype = dtype or answer.dtype
            if kept is not None and kept[0].dtype != dtype:
                return self.largest(None, 0)
            kept = _larger(kept, answer.to(dtype))
        assert kept is not None  # there is a subnetwork
        return kept

    def labels(self, largest: Largest) -> Tensor:
        """Labels (B,) in Class-IL, by the largest logits of all subnetworks: the same that argmax finds in
        :meth:`Subnetworks.combined`.
        """
        if not self._some_unknown:
            return largest[1]
        return _larger(largest, self._running.masked_fill(self._known, -torch.inf))[1]


def _larger(kept: Largest | None, logits: Tensor) -> Largest:
    """The largest among the kept logits and logits (B, C), as argmax would find it in both together."""
    label = logits.argmax(1)
    value = logits.gather(1, label[:, None]).squeeze(1)
    if kept is None:
        return value, label
    old, was = kept
    nan, was_nan = value.isnan(), old.isnan()  # which argmax takes for the largest
    stays = (old > value) | (was_nan & ~nan) | (((old == value) | (was_nan & nan)) & (was < label))
    return torch.where(stays, old, value), torch.where(stays, was, label)


def _is_in_order(loader: Any) -> bool:
    """Whether a loader is known to give the same batches every time."""
    batches = getattr(loader, "batch_sampler", None)
    return type(batches) is BatchSampler and isinstance(batches.sampler, ShareSampler | SequentialSampler)


def _digests(learnt: Subnetworks, tasks: int | None = None) -> dict[str, Tensor]:
    return {name: digest(tensor) for name, tensor in learnt.from_module(tasks).items()}
