"""When tasks begin and end: the one clock of a task sequence."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_sparse_cl.callbacks.going_on import enlarge_state, go_on, remembered
from lightning_sparse_cl.callbacks.identity import (
    MAY_CHANGE,
    epochs_complete,
    identity,
    note_other_settings,
    refuse_another_objective,
    refuse_another_run,
    refuse_epochs,
    refuse_other_tasks,
    sequence_of,
)
from lightning_sparse_cl.callbacks.launchers import launched
from lightning_sparse_cl.callbacks.task_callback import announce, arrange
from lightning_sparse_cl.callbacks.trainer_parts import callbacks_of, first_callback, parts_of, task_data
from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.data.learnt import RECORD
from lightning_sparse_cl.sparsity.enforcement import Enforcement


class Position(NamedTuple):
    """Where a fit stands in its task; a fit without a task sequence is a single task."""

    task: int
    epoch: int
    """Number of complete epochs of the task."""
    epochs: float
    """Number of epochs planned for the task; infinite if not given."""
    over: bool
    """Whether the running epoch is the task's last: as planned, or because something has already ended the task."""
    progress: float | None
    """The part of the task that has been trained, in [0, 1]. None if its end is not known."""


def position(trainer: pl.Trainer) -> Position:
    """The position now. Everything that depends on time asks for it anew, so that no counter can get out of step.

    ``progress`` is the part before the running batch: ask before its step, not after.
    """
    data, now, loop = parts_of(trainer).datamodule, trainer.current_epoch, trainer.fit_loop.epoch_loop
    schedule = first_callback(trainer, TaskSchedule)
    if schedule is None or not isinstance(data, TaskDataModule):
        task, epoch = 0, now
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else math.inf
        over = now + 1 >= epochs or 0 < trainer.max_steps <= trainer.global_step or trainer.should_stop
    else:
        task, epoch, epochs = data.task, data.epoch_in_task, schedule.epochs_of(data.task)
        over = epoch + 1 >= epochs or data.starts[-1] > now
    batches = trainer.num_training_batches  # infinite for a stream of unknown length, which only counts whole epochs
    running: Any = loop.batch_progress.current  # its annotation is a base class without this count
    inside = running.processed / batches if 0 < batches < math.inf else 0.0
    progress = None if math.isinf(epochs) else (epoch + inside) / epochs
    if trainer.max_steps > 0 and schedule is None:
        ends = trainer.global_step / trainer.max_steps
        progress = ends if progress is None else max(ends, progress)
    return Position(task, epoch, epochs, over, progress)


class TaskSchedule(pl.Callback):
    """Runs a task sequence inside one ``trainer.fit`` and announces where tasks begin and end.

    Callbacks, the module and its objective may define the hooks of
    :class:`~lightning_sparse_cl.task_hooks.TaskHooks`, ``on_task_start``, ``on_before_task_end``, ``on_task_end`` and
    ``on_after_task_end``, with the arguments ``(trainer, pl_module, task)``.

    Between start and end lie exactly the task's batches for every callback, wherever it stands in the list: the
    schedule moves itself after the others (but before checkpoints, which see the consolidated weights), and puts
    callbacks in the order that they declare (see :class:`~lightning_sparse_cl.TaskCallback`).

    A task also ends early, with the running epoch, when a callback calls ``trainer.datamodule.end_task()`` (before the
    epoch's validation, or after it, as :class:`TaskEarlyStopping` does). The last task's end stops the fit.

    Args:
        epochs: epochs per task: one number for all tasks, or one per task.
        restart_schedulers: whether the module's own learning-rate schedulers, which Lightning steps under automatic
            optimisation, start again with every task. If None, they go on through all tasks, and a warning says so.

    Raises:
        ValueError: if a number of epochs is not positive, or does not fit the data or the Trainer.
        TypeError: if the trainer has no :class:`TaskDataModule`.
    """

    def __init__(self, epochs: int | list[int] = 1, restart_schedulers: bool | None = None) -> None:
        if min(epochs if isinstance(epochs, Sequence) else [epochs], default=0) < 1:
            raise ValueError(f"TaskSchedule(epochs={epochs}): a task takes at least one epoch")
        if restart_schedulers not in (None, True, False):
            raise ValueError(f"TaskSchedule(restart_schedulers={restart_schedulers!r}): True, False or None")
        self.epochs, self.restart_schedulers = epochs, restart_schedulers
        self._at_start: list[tuple[dict[str, Any], list[Any]]] = []  # state and learning rates of each scheduler
        self._found: dict[str, Any] | None = None  # the identity in the checkpoint that the fit goes on from
        self._learnt: list[int] = []  # epochs of the tasks learnt before this fit
        self.begun = self.ended = -1
        """The last task that was started, and the last that was consolidated."""

    announces_tasks = True

    def epochs_of(self, task: int) -> int:
        """Epochs planned for ``task``."""
        if task < len(self._learnt):
            return self._learnt[task]
        if not isinstance(self.epochs, Sequence):
            return self.epochs
        return self.epochs[task - self._first_listed]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        data, parts = task_data(trainer, self), parts_of(trainer)
        if stage != "fit":
            return
        self.begun, self.ended, self._at_start, self._found = -1, -1, [], None
        self._learnt = [] if data.learnt is None else data.learnt.epochs
        self._first_listed = 0
        if (started := launched()) and started.per_node * started.nodes != trainer.world_size:
            raise ValueError(
                f"Trainer: {started.by} started {started.per_node * started.nodes} processes, but this Trainer is one "
                f"of {trainer.world_size}: each would train a run of its own. "
                f"Use Trainer(devices={started.per_node}, num_nodes={started.nodes})"
            )
        if trainer.limit_train_batches == 0:
            raise ValueError("Trainer(limit_train_batches=0): a task takes at least one batch of each epoch")
        if isinstance(self.epochs, Sequence):
            further = data.num_tasks - len(self._learnt)
            if len(self.epochs) not in (data.num_tasks, further):
                tasks = f"{data.num_tasks} tasks" + f", {further} of them new" * bool(self._learnt)
                raise ValueError(
                    f"TaskSchedule(epochs={self.epochs}): {len(self.epochs)} entries for {tasks}; "
                    "give one number for all tasks, or one per task"
                )
            self._first_listed = data.num_tasks - len(self.epochs)
        total = sum(self._planned(data.num_tasks))
        limit = trainer.max_epochs
        if limit is not None and 0 <= limit < total and not parts.fast_dev_run:
            raise ValueError(
                f"Trainer(max_epochs={limit}): the schedule takes {total} epochs ({data.num_tasks} tasks); shorten "
                "TaskSchedule(epochs=...), or leave the end to the schedule with max_epochs=-1"
            )
        if trainer.max_steps != -1 and not parts.fast_dev_run:
            raise ValueError(
                f"Trainer(max_steps={trainer.max_steps}): the schedule decides when the sequence ends; leave "
                "max_steps out, and shorten TaskSchedule(epochs=...) or use limit_train_batches"
            )
        if (trainer.min_epochs or 0) > total or trainer.min_steps:
            raise ValueError(
                f"Trainer(min_epochs={trainer.min_epochs}, min_steps={trainer.min_steps}): the schedule takes {total} "
                "epochs and decides when the sequence ends; use TaskSchedule(epochs=...)"
            )
        if callbacks_of(trainer, Timer):
            raise ValueError(
                "Trainer(max_time=...) would end the sequence inside a task; send SIGTERM when time is up "
                "(SequenceCheckpoint saves and leaves), and go on with ckpt_path='last'"
            )
        if callbacks_of(trainer, EarlyStopping):
            raise ValueError(
                "EarlyStopping would end the whole sequence at the first task that no longer improves; "
                "TaskEarlyStopping(monitor, patience) ends the task"
            )
        parts.reload_dataloaders_every_n_epochs = 1  # a new task needs a new loader, and so does a shrunken one
        self._limit_val_batches, nothing = trainer.limit_val_batches, not data.val_fraction
        trainer.limit_val_batches = 0 if nothing else self._limit_val_batches
        arrange(trainer, pl_module)
        if data.learnt is not None and not data.is_resumed:
            if parts.fast_dev_run:
                raise ValueError(
                    "Trainer(fast_dev_run=...): it tries a sequence from its beginning, but this one goes on; use "
                    "limit_train_batches and TaskSchedule(epochs=1)"
                )
            go_on(trainer, pl_module, getattr(pl_module, RECORD))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:  # PyTorch restores another optimiser's state without complaint
            enlarge_state(optimizer)
            for group in optimizer.param_groups:
                if missing := optimizer.defaults.keys() - group.keys() - {"differentiable"}:  # PyTorch adds it later
                    raise ValueError(
                        f"TaskSchedule: the checkpoint is from another optimiser: {type(optimizer).__name__} has "
                        f"{', '.join(sorted(missing))}, which the checkpoint lacks"
                    )
        if self._found is not None:
            note_other_settings(trainer, self._found, self._identity(trainer, pl_module))
            self._found = None
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        if schedulers and pl_module.automatic_optimization and self.restart_schedulers is None:
            rank_zero_warn(
                f"TaskSchedule: the learning-rate scheduler of {type(pl_module).__name__} goes on through all tasks; "
                "TaskSchedule(restart_schedulers=True) restarts it with each task, False keeps it and silences this"
            )
        if not self._at_start:
            self._at_start = [(copy.deepcopy(s.state_dict()), _rates(s)) for s in schedulers]
        if task_data(trainer).finished:
            rank_zero_info("TaskSchedule: all tasks of this run are finished; there is nothing left to train.")
            trainer.should_stop = True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        while self.begun < task_data(trainer).task:
            self.begun += 1
            if self.restart_schedulers and self.begun > 0:
                for config, (state, rates) in zip(trainer.lr_scheduler_configs, self._at_start):
                    config.scheduler.load_state_dict(copy.deepcopy(state))
                    for group, rate in zip(config.scheduler.optimizer.param_groups, rates):
                        group["lr"] = rate
            announce("on_task_start", trainer, pl_module, self.begun)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        # Consolidation happens on the last batch, not at the epoch's end: Lightning validates in between.
        data = task_data(trainer)
        if not trainer.is_last_batch:
            return
        if data.epoch_in_task + 1 >= self.epochs_of(data.task):
            data.end_task()
        self._consolidate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._consolidate(trainer, pl_module)  # a callback may have ended the task after the epoch's last batch

    def _consolidate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = task_data(trainer)
        if data.starts[-1] > trainer.current_epoch and self.ended < self.begun:
            self.ended = self.begun
            if trainer.world_size > 1:  # DDP synchronises batch-norm statistics at the next forward, which is too late
                for buffer in pl_module.buffers():
                    torch.distributed.broadcast(buffer, 0)
            for hook in ("on_before_task_end", "on_task_end", "on_after_task_end"):
                announce(hook, trainer, pl_module, self.begun)
                Enforcement.of(pl_module).apply_to_averages()  # before they are measured or saved
            trainer.should_stop = trainer.should_stop or data.finished

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remember(trainer, pl_module, self.begun == self.ended and not parts_of(trainer).fast_dev_run)

    def _remember(self, trainer: pl.Trainer, pl_module: pl.LightningModule, ended: bool) -> None:
        """Let the module remember what it needs to go on after this fit; nothing if it was stopped inside a task."""
        if callable(remember := getattr(pl_module, "remember_sequence", None)):
            remember(remembered(trainer) if ended else None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == "fit" and self.begun != self.ended:
            self._remember(trainer, pl_module, ended=False)
        trainer.limit_val_batches = getattr(self, "_limit_val_batches", trainer.limit_val_batches)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            trainer.limit_val_batches = self._limit_val_batches

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun, "ended": self.ended, "schedulers": self._at_start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begun, self.ended = state["begun"], state["ended"]
        self._at_start = list(state["schedulers"])

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        at = {"begun": self.begun, "ended": self.ended}
        checkpoint["task_sequence"] = self._identity(trainer, pl_module) | at

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        found, here = sequence_of(checkpoint), self._identity(trainer, pl_module)
        if trainer.state.fn != "fit":
            return refuse_other_tasks(found, here)
        data = task_data(trainer)
        if trainer.ckpt_path:
            refuse_another_run(found, here)
        else:
            refuse_another_objective(found, here)
            found = found | {"must": here["must"] | {k: found["must"][k] for k in MAY_CHANGE}}
        planned = self._planned(data.num_tasks)
        refuse_epochs(found["epochs"], planned, data.starts, epochs_complete(checkpoint))
        self._found = found if trainer.ckpt_path else found | {"epochs": planned}
        loop = checkpoint["loops"]["fit_loop"]
        epoch, batch = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
        if batch["is_last_batch"] and epoch["processed"] < epoch["started"]:
            raise ValueError(
                "TaskSchedule: this checkpoint was taken between an epoch's last batch and its end, which Lightning "
                "would skip on resuming; take another (SequenceCheckpoint never saves there)"
            )

    def _identity(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return identity(trainer, pl_module, self._planned(task_data(trainer).num_tasks))

    def _planned(self, tasks: int) -> list[int]:
        return [self.epochs_of(task) for task in range(tasks)]


def _rates(scheduler: Any) -> list[Any]:
    return [group["lr"] for group in scheduler.optimizer.param_groups]
