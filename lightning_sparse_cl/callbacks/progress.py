"""A progress bar that says where in the task sequence a run is."""

from __future__ import annotations

from lightning.pytorch.callbacks import RichProgressBar

from lightning_sparse_cl.callbacks.schedule import TaskSchedule
from lightning_sparse_cl.callbacks.trainer_parts import first_callback, task_data


class TaskProgressBar(RichProgressBar):
    """Lightning's rich progress bar with "Task k/T, epoch e/E" in front; tasks and epochs counted from 1.

    Args:
        refresh_rate: batches between updates; each update reads the loss from the device.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)

    def _get_train_description(self, current_epoch: int) -> str:
        schedule = first_callback(self.trainer, TaskSchedule)
        if schedule is None:
            return super()._get_train_description(current_epoch)
        data = task_data(self.trainer)
        return f"Task {data.task + 1}/{data.num_tasks}, epoch {data.epoch_in_task + 1}/{schedule.epochs_of(data.task)}"
