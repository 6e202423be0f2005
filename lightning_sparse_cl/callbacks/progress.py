"""A progress bar that shows where in the task sequence a run is, and when the sequence will end."""

from __future__ import annotations

import time
import warnings
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import CustomTimeColumn
from rich.progress import Progress, Task
from rich.text import Text

from lightning_sparse_cl.callbacks.schedule import TaskSchedule
from lightning_sparse_cl.callbacks.time_left import SequenceTime
from lightning_sparse_cl.callbacks.trainer_parts import first_callback, task_data


class TaskProgressBar(RichProgressBar):
    """Lightning's rich progress bar with "Task k/T, epoch e/E" in front; tasks and epochs counted from 1.

    Its times refer to the whole sequence: since this process began to train, and until the last task ends. Without a
    :class:`TaskSchedule` the bar is Lightning's own. In notebooks it also shows without ipywidgets.

    Args:
        refresh_rate: updates per second; each reads the loss from the device. 0 shows no bar.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.sequence_time = SequenceTime()
        self._next_update = 0.0

    def _init_progress(self, trainer: pl.Trainer) -> None:
        earlier = self.progress
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", 'install "ipywidgets"')
            super()._init_progress(trainer)
        progress = self.progress
        if progress is None or progress is earlier or find_spec("ipywidgets") is not None:
            return
        if progress.console.is_jupyter:
            progress.live.refresh = NotebookDisplay(progress).refresh  # type: ignore[method-assign]  # of this very bar
            progress.refresh()  # its place in the cell's output, before anything else is printed

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        columns = super().configure_columns(trainer)
        if first_callback(trainer, TaskSchedule) is None:
            return columns
        ours = SequenceTimeColumn(self)
        return [ours if isinstance(column, CustomTimeColumn) else column for column in columns]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.sequence_time, self._next_update = SequenceTime(), 0.0
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_batch_start(trainer, pl_module, *args)
        self.sequence_time.begin(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        now = time.monotonic()
        if self.is_disabled or (now < self._next_update and not trainer.is_last_batch):
            return
        self._next_update = now + 1 / self.refresh_rate
        if first_callback(trainer, TaskSchedule) is not None:
            self.sequence_time.update(trainer)
        super().on_train_batch_end(trainer, pl_module, *args)

    def _get_train_description(self, current_epoch: int) -> str:
        schedule = first_callback(self.trainer, TaskSchedule)
        if schedule is None:
            return super()._get_train_description(current_epoch)
        data = task_data(self.trainer)
        return f"Task {data.task + 1}/{data.num_tasks}, epoch {data.epoch_in_task + 1}/{schedule.epochs_of(data.task)}"


class NotebookDisplay:
    """A bar in a notebook, as an output that changes: rich itself needs a widget of ipywidgets, and else shows nothing.

    Args:
        progress: what is shown.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._handle: Any = None

    def refresh(self) -> None:
        """Show it, or what has become of it; another thread calls this, too."""
        from IPython.display import display

        if self._handle is None:
            self._handle = display(self._progress, display_id=True)
        else:
            self._handle.update(self._progress)


class SequenceTimeColumn(CustomTimeColumn):
    """Shows the sequence's time on the training bar, and Lightning's own on the others. Another thread draws it."""

    def __init__(self, bar: TaskProgressBar) -> None:
        super().__init__(style=bar.theme.time)
        self._bar = bar

    def render(self, task: Task) -> Text:
        if task.id != self._bar.train_progress_bar_id:
            return super().render(task)
        elapsed, left = (
            "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))
            for seconds in (self._bar.sequence_time.elapsed, self._bar.sequence_time.left)
        )
        return Text(f"{elapsed} • {left}", style=self.style)
