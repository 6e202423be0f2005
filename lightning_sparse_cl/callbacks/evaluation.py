"""Measure every task after every task: the accuracy matrix, Class-IL and Task-IL together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_sparse_cl.callbacks.averaging import averaged
from lightning_sparse_cl.callbacks.kept_answers import KeptAnswers
from lightning_sparse_cl.callbacks.outputs import logits_of, of_classes
from lightning_sparse_cl.callbacks.trainer_parts import batches_trained
from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.metrics import AccuracyMatrix
from lightning_sparse_cl.metrics.accuracy_matrix import acc_seen
from lightning_sparse_cl.nests import Nest, moved
from lightning_sparse_cl.sparsity import Subnetworks

SCENARIOS = ("class_il", "task_il")


class ContinualEvaluation(pl.Callback):
    """Accuracy on every task's test data, with the weights as the task leaves them (pruned, frozen).

    Where a callback averages the weights (Lightning's ``WeightAveraging``), the average is measured, as in Lightning's
    own validation, for that is what checkpoints hold.

    Class-IL takes the largest logit of all the data's classes, of those not seen yet too; Task-IL the largest among the
    classes of the sample's task, on the same head and from the same forward pass. A head may have more outputs than the
    data have classes: those beyond are no classes, and never win. (Where each task has a subnetwork of its own,
    by :class:`TaskSubnetworks`, Task-IL asks that of the sample's task, Class-IL all of them.) Before training the
    untrained network is measured on every task, the baseline of forward transfer.

    Subnetworks of learnt tasks answer the same for ever, so that a fit asks each once, when it has been learnt, and
    keeps the answers (:class:`~lightning_sparse_cl.callbacks.kept_answers.KeptAnswers`): an evaluation costs one pass
    over the test sets, however many tasks have been learnt, and a second one of the network being trained for tasks and
    classes that none has learnt. A resumed fit asks all once. ``trainer.test`` has no answers to go by: in Class-IL it
    sends every image through every subnetwork, T passes over the test sets of T tasks.

    Works with any LightningModule whose ``forward`` maps images to logits (alone, or as
    :func:`~lightning_sparse_cl.callbacks.outputs.logits_of` finds them): it runs its own passes over the data module's
    test loaders, so that neither a ``validation_step`` nor a validation loop is needed, and resuming never meets a
    half-measured task. ``trainer.test`` and ``trainer.validate`` report the same figures for the weights given.

    After each task it logs, per scenario, ``class_il/acc`` (over all tasks), ``class_il/acc_seen`` (over the tasks
    learnt so far, the curve that papers draw), ``incremental_acc`` (the mean of that curve), ``bwt``, ``fwt`` and
    ``forgetting``; and, to every logger, ``class_il/task_0``, ``class_il/task_1``, ..., the accuracy on each task.

    Args:
        before_pruning: also measure just before each task's end changes the weights: the cost of pruning.
        class_il: False measures Task-IL alone, which sends an image through the subnetwork of its task only.
        tasks: what ``trainer.test`` and ``trainer.validate`` look at: tasks by number, counted from 0, or by the name
            of a class that they have. Other tasks are not tested, shown or logged. If None, all. A fit measures all.

    Raises:
        TypeError: if the trainer has no :class:`TaskDataModule`, or there are no logits in what ``forward`` returns.
        ValueError: if there are fewer logits than classes, or ``tasks`` names none or an unknown one.
    """

    def __init__(
        self, before_pruning: bool = False, class_il: bool = True, tasks: list[str | int] | None = None
    ) -> None:
        if tasks is not None and not tasks:
            raise ValueError("ContinualEvaluation(tasks=[]): at least one task is tested; leave tasks out for all")
        self.before_pruning = before_pruning
        self.tasks = tasks
        self.scenarios = SCENARIOS if class_il else ("task_il",)
        self.matrices: dict[str, AccuracyMatrix] = {}
        """R by scenario; of the network before pruning under ``class_il_before`` and ``task_il_before``."""
        self.tested: dict[str, AccuracyMatrix] = {}
        """The single row of the last ``trainer.test`` or ``trainer.validate``, by scenario."""
        self.held_out: list[float] = []
        """Task-IL accuracy of each task on its own held-out samples when it was learnt, if there are any."""
        self._loaded: dict[str, Any] | None = None
        self._kept = KeptAnswers()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        data = _data(trainer)
        self._kept = KeptAnswers()
        data.tested, measure = None, partial(data.target.measure, data.num_classes)
        if stage == "fit":
            self._loaded, self.held_out = None, []
            names = [*self.scenarios, *(f"{s}_before" for s in self.scenarios if self.before_pruning)]
            self.matrices = {name: AccuracyMatrix(data.num_tasks, len(data.classes), measure) for name in names}
        else:
            if self.tasks is not None and stage in ("test", "validate"):
                data.tested = _chosen(self.tasks, data)
            self.tested = {name: AccuracyMatrix(1, len(data.classes), measure) for name in self.scenarios}
        self._live = torch.zeros(len(data.classes), data.num_classes, dtype=torch.bool)
        for task, labels in enumerate(data.classes):
            self._live[task, labels] = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._loaded is not None:
            self.held_out = list(self._loaded.get("held_out", []))
            for name, matrix in ((n, m) for n, m in self.matrices.items() if n in self._loaded):
                matrix.restore(**self._loaded[name])
        elif self.matrices["task_il"].baseline.isnan().all():
            self._measure(trainer, pl_module, None)

    def on_before_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        if self.before_pruning:
            self._measure(trainer, pl_module, task, "_before")

    def on_after_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        self._measure(trainer, pl_module, task)
        if _data(trainer).val_fraction:
            learnt = Subnetworks.of(pl_module)
            known = (lambda x: learnt.combined(x, learnt.answers(x, task), task)) if len(learnt) else pl_module
            self.held_out.append(held_out_accuracy(trainer, pl_module, known))
        figures: dict[str, float] = {}
        for scenario in self.scenarios:
            matrix = self.matrices[scenario]
            figures |= {f"{scenario}/{f}": v for f, v in matrix.figures().items() if v is not None}
            figures |= {f"{scenario}/acc_seen": v for v in acc_seen(matrix.R)[task : task + 1].tolist() if v == v}
            _draw_curves({f"{scenario}/task_{t}": v for t, v in enumerate(matrix.R[task].tolist()) if v == v}, trainer)
        pl_module.log_dict(figures, on_step=False, on_epoch=True, sync_dist=True)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, row: int | None, suffix: str = "") -> None:
        data, matrices = _data(trainer), {s: self.matrices[s + suffix] for s in self.scenarios}
        learnt = Subnetworks.of(pl_module)
        with averaged(trainer, pl_module), measuring(trainer, pl_module):
            if len(learnt):
                self._kept.measure(learnt, data, self._live, matrices)
            else:
                for task, loader in enumerate(data.test_dataloader()):
                    for x, y in loader:
                        x = data.prepare(moved(x, pl_module.device), augment=False)
                        self._count(data, pl_module, x, y.to(pl_module.device), task, matrices)
        for matrix in matrices.values():
            matrix.close_row(row)

    def _count(
        self, data: TaskDataModule, pl_module: pl.LightningModule, x: Nest, y: Tensor, task: int,
        matrices: Mapping[str, AccuracyMatrix], logits: Tensor | None = None,
    ) -> None:  # fmt: skip
        learnt, live = Subnetworks.of(pl_module), self._live[task].to(y.device)
        if len(learnt):
            answers = learnt.answers(x, None if "class_il" in self.scenarios else task)
            known = learnt.combined(x, answers, task)
            logits = learnt.combined(x, answers) if "class_il" in self.scenarios else known
        else:
            known = logits = logits_of(pl_module(x), pl_module, y.ndim == 3) if logits is None else logits
        known, logits = (of_classes(part, live.numel(), pl_module) for part in (known, logits))
        for scenario, matrix in matrices.items():
            of_task = scenario.startswith("task_il")
            scores = data.target.among(known, live) if of_task else logits
            matrix.to(y.device).update(scores, y, task)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._kept = KeptAnswers()

    # -- trainer.test and trainer.validate ---------------------------------------------------------------------

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        x, y = batch
        logits = outputs["logits"] if isinstance(outputs, dict) and "logits" in outputs else None
        data = _data(trainer)
        self._count(data, pl_module, x, y, data.tasks_tested[dataloader_idx], self.tested, logits)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for scenario in self.scenarios:
            row, chosen = self.tested[scenario].close_row(0), _data(trainer).tasks_tested
            tasks = {f"{scenario}/task_{t}": row[t] for t in chosen}
            pl_module.log_dict(tasks | {f"{scenario}/acc": row[chosen].nanmean()}, sync_dist=True)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer, *args)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_test_epoch_end(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(data := getattr(trainer, "datamodule", None), TaskDataModule):
            data.tested = None

    def state_dict(self) -> dict[str, Any]:
        matrices = {name: {"R": m.R, "baseline": m.baseline} for name, m in self.matrices.items()}
        return matrices | {"held_out": list(self.held_out)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state


def _draw_curves(figures: dict[str, float], trainer: pl.Trainer) -> None:
    """Log what may be thousands of figures at once, which the module's own ``log`` would reduce one by one."""
    for logger in trainer.loggers:
        logger.log_metrics(figures, step=batches_trained(trainer))


def _data(trainer: pl.Trainer) -> TaskDataModule:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, TaskDataModule):
        raise TypeError(
            f"ContinualEvaluation: the trainer's datamodule is a {type(data).__name__}, not a TaskDataModule"
        )
    return data


def _chosen(tasks: list[str | int], data: TaskDataModule) -> list[int]:
    """Tasks by number or by the name of a class, as numbers in ascending order.

    Raises:
        ValueError: if there is no such task or class.
    """
    found: set[int] = set()
    names = [[data.class_names[label] for label in labels] for labels in data.classes]
    for wanted in tasks:
        if isinstance(wanted, int):
            having = [wanted] if 0 <= wanted < len(names) else []
            known = f"tasks are 0-{len(names) - 1}"
        else:
            having = [task for task, called in enumerate(names) if wanted in called]
            known = "classes are " + ", ".join(data.class_names[:5]) + ", ..." * (len(data.class_names) > 5)
        if not having:
            raise ValueError(f"ContinualEvaluation(tasks={tasks}): there is no {wanted!r}; {known}")
        found.update(having)
    return sorted(found)


@contextmanager
def measuring(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Inside, a module that trains answers in eval mode, without gradients, in the Trainer's precision."""
    was_training = pl_module.training
    pl_module.eval()
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        yield
    pl_module.train(was_training)


def held_out_accuracy(trainer: pl.Trainer, pl_module: pl.LightningModule, logits: Callable[[Tensor], Any]) -> float:
    """:func:`accuracy_on` the running task's held-out samples."""
    data = _data(trainer)
    held_out = ((data.prepare(moved(x, pl_module.device), augment=False), y) for x, y in data.val_dataloader()[0])
    return accuracy_on(trainer, pl_module, logits, held_out)


def accuracy_on(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    logits: Callable[[Tensor], Any],
    batches: Iterable[tuple[Nest, Tensor]],
) -> float:
    """Accuracy, or the target's metric, on samples of the running task, among the task's classes.

    It is of the samples of all processes.

    Args:
        trainer: the trainer, in ``fit``.
        pl_module: put in eval mode for it.
        logits: maps a batch to logits (B, num_classes), or to what holds them.
        batches: network input and labels.
    """
    data = _data(trainer)
    live = data.live().to(pl_module.device)
    figure = AccuracyMatrix(1, 1, partial(data.target.measure, data.num_classes)).to(pl_module.device)
    with measuring(trainer, pl_module):
        for x, y in batches:
            x, y = moved(x, pl_module.device), y.to(pl_module.device)
            known = of_classes(logits_of(logits(x), pl_module, y.ndim == 3), live.numel(), pl_module)
            figure.update(data.target.among(known, live), y, 0)
    return float(figure.close_row(0))
