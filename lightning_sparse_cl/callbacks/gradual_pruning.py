"""Magnitude pruning step by step inside each task (Zhu & Gupta, 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl

from lightning_sparse_cl.callbacks.pruning import OneShotPruning
from lightning_sparse_cl.callbacks.schedule import position
from lightning_sparse_cl.sparsity.blocks import SINGLE
from lightning_sparse_cl.sparsity.distributions import Distribution
from lightning_sparse_cl.sparsity.layers import Chosen
from lightning_sparse_cl.sparsity.scores import check_number


def cubic(u: float, start: float, end: float) -> float:
    """From ``start`` at u = 0 to ``end`` at u = 1, fast at first: end + (start - end) (1 - u)^3."""
    return end + (start - end) * (1 - min(max(u, 0.0), 1.0)) ** 3


class GradualPruning(OneShotPruning):
    """Raise the sparsity along a cubic while a task trains ("To prune, or not to prune", Zhu & Gupta, 2017).

    From the part ``start`` of a task to the part ``until`` the smallest weights of every layer are pruned, ``times``
    times at equal intervals; the sparsity is s (1 - (1 - u)^3) at the part u of the way. The rest of the task trains
    the sparse network. Pruned weights stay zero, as they are the smallest the next time. If a task ends early, the
    missing pruning is done at its end. Otherwise it behaves like :class:`OneShotPruning`.

    Args:
        sparsity: zero fraction at the end, in [0, 1).
        start: part of the task before which nothing is pruned, in [0, ``until``).
        until: part of the task after which nothing is pruned, in (``start``, 1].
        times: how often weights are pruned.
        of: see :class:`OneShotPruning`.
        dense: weights that stay dense; see :class:`Sparsifier`.
        sparse: weights that are pruned; see :class:`Sparsifier`.
        ranking: see :class:`OneShotPruning`.
        distribution: see :class:`ScorePruning`.
        last: whether the sequence's last task is pruned, too.
        block: see :class:`ScorePruning`.

    Raises:
        ValueError: if an argument is out of range, or the end of the task is not known.
    """

    def __init__(
        self,
        sparsity: float,
        start: float = 0.0,
        until: float = 0.75,
        times: int = 10,
        of: Literal["free", "share"] = "free",
        dense: Chosen | None = None,
        sparse: Chosen | None = None,
        ranking: Literal["layer", "global"] = "layer",
        distribution: Distribution = "uniform",
        last: bool = True,
        block: Sequence[int] | str = SINGLE,
    ) -> None:
        super().__init__(sparsity, of, dense, sparse, ranking, distribution, last=last, block=block)
        for name, value in (("start", start), ("until", until)):
            check_number("GradualPruning", name, value)
        if not 0 <= start < until <= 1:
            raise ValueError(f"GradualPruning(start={start}, until={until}): parts of a task, 0 <= start < until <= 1")
        check_number("GradualPruning", "times", times, whole=True)
        if times < 1:
            raise ValueError(f"GradualPruning(times={times}): a whole number, at least 1")
        self.start, self.until, self.times = start, until, times
        self._done = 0
        """How often the running task has been pruned."""

    @property
    def inside(self) -> str | None:
        return f"until={self.until}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._done = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if position(trainer).progress is None:
            raise ValueError(
                f"GradualPruning(until={self.until}): the end of the training is not known; "
                "give Trainer(max_steps=...) or Trainer(max_epochs=...)"
            )

    def density(self, trainer: pl.Trainer) -> float:
        return 1 - cubic(self._done / self.times, 0.0, self.sparsity)

    def due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        if self._spares(trainer):
            return False
        way = ((position(trainer).progress or 0.0) - self.start) / (self.until - self.start)
        reached = min(int(way * self.times + 1e-9), self.times)
        due, self._done = reached > self._done, max(reached, self._done)
        return due

    def is_pruned(self, pl_module: pl.LightningModule) -> bool:
        return self._done == self.times and super().is_pruned(pl_module)

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        super().on_task_start(trainer, pl_module, task)
        self._done = 0

    def prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any = None) -> None:
        if batch is None:  # the task ends
            self._done = self.times
        super().prune(trainer, pl_module, batch)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._done = state["done"]
