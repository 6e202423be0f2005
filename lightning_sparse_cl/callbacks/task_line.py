"""What a log says when a task has been learnt."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_sparse_cl.callbacks.evaluation import SCENARIOS, ContinualEvaluation
from lightning_sparse_cl.callbacks.tables import TITLES
from lightning_sparse_cl.callbacks.time_left import SequenceTime, duration
from lightning_sparse_cl.callbacks.trainer_parts import first_callback, task_data
from lightning_sparse_cl.metrics.accuracy_matrix import acc_seen


def learnt_line(trainer: pl.Trainer, task: int, time: SequenceTime) -> str:
    """At most 80 characters: the task, mean accuracies on the tasks seen so far, time taken and time left.

    Args:
        trainer: the trainer, in ``on_after_task_end``.
        task: the task that has ended, from 0.
        time: the sequence's time, up to date.
    """
    data = task_data(trainer)
    line = f"task {task + 1}/{data.num_tasks} learnt"
    evaluation = first_callback(trainer, ContinualEvaluation)
    if evaluation is not None:
        matrices = evaluation.matrices
        found = {s: float(acc_seen(matrices[s].R)[task]) for s in SCENARIOS if s in matrices}
        figures = [f"{TITLES[s]} {100 * acc:.1f} %" for s, acc in found.items() if acc == acc]
        line += f": {', '.join(figures)} so far" if figures else ""
    times = [] if time.elapsed is None else [duration(time.elapsed)]
    times += [] if time.left is None or data.finished else [f"{duration(time.left)} left"]
    return f"{line}; {', '.join(times)}" if times else line
