"""Anytime accuracy: what a learner knows at any moment of a stream, not only at its end."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_sparse_cl.callbacks.averaging import averaged
from lightning_sparse_cl.callbacks.evaluation import measuring
from lightning_sparse_cl.callbacks.outputs import logits_of, of_classes
from lightning_sparse_cl.callbacks.task_callback import TaskCallback
from lightning_sparse_cl.callbacks.trainer_parts import task_data
from lightning_sparse_cl.metrics import AccuracyMatrix
from lightning_sparse_cl.nests import moved


class AnytimeAccuracy(TaskCallback):
    """Class-IL accuracy every n steps on the tasks that have begun, and its mean over the run.

    The mean is the area under the curve of accuracy over samples, A_AUC of Koh et al. (2022), for a stream
    (``stream=True`` of the data); with announced tasks it is measured in the same way. Each measurement is a pass over
    the test sets of these tasks.

    Args:
        every_n_steps: steps between measurements.

    Raises:
        ValueError: if ``every_n_steps`` is not positive.
        TypeError: if the data are not a :class:`TaskDataModule`.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"AnytimeAccuracy(every_n_steps={every_n_steps!r}): a whole number of steps, at least 1")
        self.every_n_steps = every_n_steps
        self.steps: list[int] = []
        """Steps that had been taken at each measurement."""
        self.accuracies: list[float] = []
        """At each measurement, the mean of the target's metric, mostly accuracy, over the tasks that had begun."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            task_data(trainer, self)
            self.steps, self.accuracies = [], []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps:
            return
        data = task_data(trainer)
        begun = data.begun(batch_idx) if data.stream else len(data.classes) if data.joint else data.task + 1
        begun = int(trainer.strategy.reduce(torch.tensor(begun, device=pl_module.device), reduce_op="max"))
        measure = partial(data.target.measure, data.num_classes)
        figures = AccuracyMatrix(1, len(data.classes), measure).to(pl_module.device)
        with averaged(trainer, pl_module), measuring(trainer, pl_module):
            for task, loader in enumerate(data.test_dataloader()[:begun]):
                for x, y in loader:
                    x = data.prepare(moved(x, pl_module.device), augment=False)
                    logits = logits_of(pl_module(x), pl_module, y.ndim == 3)
                    figures.update(of_classes(logits, data.num_classes, pl_module), y.to(pl_module.device), task)
        self.steps.append(trainer.global_step)
        self.accuracies.append(float(figures.close_row(0)[:begun].nanmean()))
        pl_module.log("anytime/class_il", self.accuracies[-1], rank_zero_only=True)

    def summary(self) -> dict[str, Any]:
        """``steps``, ``class_il`` at each of them, and ``mean``, which is None if nothing was measured."""
        mean = sum(self.accuracies) / len(self.accuracies) if self.accuracies else None
        return {"steps": self.steps, "class_il": self.accuracies, "mean": mean}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "accuracies": self.accuracies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.accuracies = list(state["steps"]), list(state["accuracies"])
