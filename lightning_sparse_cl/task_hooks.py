"""The hooks of tasks: what callbacks, modules and objectives may do when a task begins and ends."""

from __future__ import annotations

import inspect
import re
from typing import Any

HOOKS = ("on_task_start", "on_before_task_end", "on_task_end", "on_after_task_end")
"""In the order in which they are called."""


class TaskHooks:
    """Base of everything that acts when tasks begin and end: callbacks, the module, and its objective.

    :class:`~lightning_sparse_cl.TaskSchedule` calls each hook of all callbacks, in their order, and then the module's,
    which passes it on to its objective. Between start and end lie exactly the task's batches.

    Arguments are the same for all of them:

    * ``trainer``: the Trainer; its ``datamodule`` is the :class:`~lightning_sparse_cl.TaskDataModule`.
    * ``pl_module``: the module that is trained.
    * ``task``: the number of the task, from 0.
    """

    def on_task_start(self, trainer: Any, pl_module: Any, task: int) -> None:
        """The first batch of the task comes next."""

    def on_before_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
        """All batches of the task are learnt; nothing has been consolidated."""

    def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
        """Consolidate now: prune, then freeze, then store exemplars or Fisher information."""

    def on_after_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
        """The weights are final for this task: measure them."""


def check_task_hooks(owner: object) -> None:
    """Refuse a method that looks like a hook of tasks and is none, or takes other arguments.

    Raises:
        TypeError: with the name of the method, and those of the hooks or of their arguments.
    """
    for name in dir(type(owner)):
        if not re.fullmatch(r"on_((before|after)_)?task_\w+", name):
            continue
        where = f"{type(owner).__name__}.{name}"
        if name not in HOOKS:
            raise TypeError(f"{where} is no hook of tasks; they are {', '.join(HOOKS)}")
        try:
            inspect.signature(getattr(owner, name)).bind(None, None, 0)
        except TypeError:
            raise TypeError(f"{where}: a hook of tasks takes (trainer, pl_module, task)") from None
