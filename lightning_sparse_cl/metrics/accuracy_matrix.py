"""The accuracy matrix R of continual learning and the figures read off it (Lopez-Paz & Ranzato, 2017)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class AccuracyMatrix(Metric):
    """R[i, j]: accuracy, or another metric, on task j after task i. Rows are filled one at a time.

    :meth:`update` counts hits of the row being measured, :meth:`close_row` reduces them over processes and stores the
    row, the same on every rank. ``baseline`` is the row of the untrained network, which forward transfer needs. What
    was not measured is nan, and left out of the means: columns of tasks whose test data are gone, and of tasks that
    were not known yet.

    Args:
        stages: number of rows T, tasks trained on one after the other.
        tasks: number of columns, tasks tested on (the same as ``stages``, but in joint training).
        measure: makes the metric by which one task is measured, updated with outputs and labels. If None, accuracy.
    """

    hits: Tensor
    total: Tensor

    def __init__(
        self, stages: int, tasks: int | None = None, measure: Callable[[], Metric | None] | None = None
    ) -> None:
        super().__init__()
        tasks = tasks or stages
        made = [] if measure is None else [measure() for _ in range(tasks)]
        self.metrics = nn.ModuleList(metric for metric in made if metric is not None)
        """Of each task; empty for accuracy."""
        self.add_state("hits", torch.zeros(tasks, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(tasks, dtype=torch.long), dist_reduce_fx="sum")
        self.R = torch.full((stages, tasks), torch.nan)
        self.baseline = torch.full((tasks,), torch.nan)

    def update(self, logits: Tensor, target: Tensor, task: int) -> None:
        """Count the hits of ``logits`` (B, C), or of labels (B,), on ``target`` (B,), samples of ``task``."""
        if self.metrics:
            cast(Metric, self.metrics[task]).update(logits, target)
            self.total[task] += len(target)
            return
        labels = logits.argmax(1) if logits.ndim > 1 else logits
        self.hits[task] += (labels == target).sum()
        self.total[task] += len(target)

    def add(self, counted: Tensor, task: int) -> None:
        """Add to a task's hits and samples: a tensor of the two."""
        self.hits[task] += counted[0]
        self.total[task] += counted[1]

    def counted(self, task: int) -> Tensor:
        """A task's hits and samples in the row being measured, of this process; a copy."""
        return torch.stack([self.hits[task], self.total[task]])

    def compute(self) -> Tensor:
        """The row being measured: accuracy on each task (T,), nan where nothing was seen."""
        if not self.metrics:
            return self.hits / self.total
        row = torch.full_like(self.total, torch.nan, dtype=torch.float32)
        for task, count in enumerate(self.total.tolist()):  # of all processes
            if count:
                row[task] = cast(Metric, self.metrics[task]).compute()
        return row

    def close_row(self, i: int | None) -> Tensor:
        """Store the measured row as R[i], or as the baseline if ``i`` is None, and start the next."""
        row = self.compute().cpu().view(-1)  # torchmetrics makes one entry a scalar
        if i is None:
            self.baseline = row
        else:
            self.R[i] = row
        self.reset()
        for metric in self.metrics:
            cast(Metric, metric).reset()
        return row

    def restore(self, R: Tensor, baseline: Tensor) -> None:
        """Take what was measured before, perhaps of fewer tasks: further ones come after them."""
        self.R[: R.shape[0], : R.shape[1]] = R
        self.baseline[: len(baseline)] = baseline

    def summary(self) -> dict[str, float | list[Any] | None]:
        """``matrix``, ``baseline``, ``acc_seen`` after each task, and :meth:`figures`; all are fractions.

        If one is not defined, None.
        """
        lists = {"matrix": _listed(self.R), "baseline": _listed(self.baseline), "acc_seen": _listed(acc_seen(self.R))}
        return lists | self.figures()

    def figures(self) -> dict[str, float | None]:
        """``acc``, ``incremental_acc``, ``bwt``, ``fwt``, ``forgetting`` as fractions. If one is not defined, None."""
        figures = {
            "acc": average_accuracy(self.R),
            "incremental_acc": acc_seen(self.R).nanmean(),
            "bwt": backward_transfer(self.R),
            "fwt": forward_transfer(self.R, self.baseline),
            "forgetting": forgetting(self.R),
        }
        return {name: None if value.isnan() else value.item() for name, value in figures.items()}

    def plot(self, val: Tensor | None = None, ax: Any = None) -> Any:
        """Draw R as a heat map with percent in its cells: row = after task, column = on task; needs matplotlib.

        Args:
            val: R (stages, tasks) as fractions. If None, this matrix's own.
            ax: the axes to draw on. If None, those of a new figure.

        Returns:
            The figure and the axes, as the ``plot`` of any torchmetrics metric.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        from lightning_sparse_cl.comparing.plots import draw_matrix

        return draw_matrix((self.R if val is None else val).tolist(), ax)

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v:.3f}" for k, v in self.figures().items() if v is not None)
        return f"AccuracyMatrix({self.R.shape[0]} stages, {self.R.shape[1]} tasks{', ' * bool(shown)}{shown})"


def acc_seen(R: Tensor) -> Tensor:
    """Mean accuracy over the tasks learnt so far, after each task (stages,); its last entry is ACC.

    It is the curve that papers draw. nan after tasks that were not measured.
    """
    stages, tasks = R.shape
    seen = torch.ones_like(R, dtype=torch.bool).tril(tasks - stages)  # joint training learns all in one stage
    return R.double().masked_fill(~seen, torch.nan).nanmean(1)


def average_accuracy(R: Tensor) -> Tensor:
    """ACC: mean over tasks after the last one that has been measured (EsaCL eq 4.22)."""
    return _measured(R)[-1].double().nanmean()


def backward_transfer(R: Tensor) -> Tensor:
    """BWT: mean over j < T of R[T, j] - R[j, j]; negative when tasks are forgotten. nan for fewer than two tasks."""
    R = _measured(R).double()
    learned = R.diagonal()[: len(R) - 1]
    return (R[-1, : len(learned)] - learned).nanmean()


def forward_transfer(R: Tensor, baseline: Tensor) -> Tensor:
    """FWT: mean over j > 1 of R[j - 1, j] - b[j], with b the measured accuracy of the untrained network."""
    R = _measured(R).double()
    return (R.diagonal(1)[: len(R) - 1] - baseline[1 : len(R)]).nanmean()


def forgetting(R: Tensor) -> Tensor:
    """Mean over j < T of the best earlier accuracy on task j minus the last (Chaudhry et al., 2018)."""
    R = _measured(R).double()
    old = R[:, : max(len(R) - 1, 0)]
    if R.shape[0] < 2:
        return R.new_tensor(torch.nan)
    seen = torch.tril(torch.ones_like(old, dtype=torch.bool))[:-1] & ~old[:-1].isnan()
    best = old[:-1].masked_fill(~seen, -torch.inf).amax(0)
    return (best - old[-1])[seen.any(0)].nanmean()


def _measured(R: Tensor) -> Tensor:
    """The rows, up to the last in which anything was measured."""
    measured = (~R.isnan()).any(1).nonzero()
    return R[: int(measured[-1]) + 1] if len(measured) else R.new_full((1, R.shape[1]), torch.nan)


def _listed(x: Tensor) -> list[Any]:
    return [_listed(row) for row in x] if x.ndim > 1 else [None if v != v else round(v, 6) for v in x.tolist()]
