"""What makes two runs the same: what must agree when a run goes on, and what may be changed on purpose."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_sparse_cl.callbacks.checkpoint import SequenceCheckpoint
from lightning_sparse_cl.callbacks.task_callback import TaskCallback
from lightning_sparse_cl.callbacks.trainer_parts import callbacks_of, parts_of, task_data
from lightning_sparse_cl.data.datamodule import TaskDataModule

FORMAT = 5
"""Version of the state in checkpoints; grows when its layout changes."""
DATA = "fingerprint of each task's data"
MAY_CHANGE = ("val_fraction", "batch_size over all processes", "seed", "limit_train_batches", "overfit_batches")
"""What must agree in a resumed run, but may change when a sequence goes on with further tasks."""
Differences = dict[str, tuple[Any, Any]]
"""The checkpoint's value and this run's, by name."""


def identity(trainer: pl.Trainer, pl_module: pl.LightningModule, epochs: Sequence[int]) -> dict[str, Any]:
    """What defines a run, in primitives: ``must`` has to agree if it goes on, ``tested`` if it is only tested.

    Any of the ``settings`` may be changed on purpose. ``epochs`` are the epochs planned for each task.
    """
    data = task_data(trainer)
    tested = {
        "method": type(pl_module).__qualname__,
        "data": type(data).__qualname__,
        "classes of each task": [
            [getattr(data, "class_names", range(9**9))[c] for c in classes] for classes in data.classes
        ],
    }
    must = {
        "samples of each task": data.samples_per_task,
        DATA: data.fingerprints,
        "val_fraction": data.val_fraction,
        "batch_size over all processes": data.batch_size * trainer.world_size,
        "seed": int(seed) if (seed := os.environ.get("PL_GLOBAL_SEED")) else None,
        "limit_train_batches": trainer.limit_train_batches,
        "overfit_batches": parts_of(trainer).overfit_batches,
    }
    return {
        "format": FORMAT,
        "tested": tested,
        "must": must,
        "settings": settings(trainer, pl_module),
        "epochs": list(epochs),
    }


def epochs_complete(checkpoint: Mapping[str, Any]) -> int:
    """Number of epochs complete in a checkpoint, over all tasks."""
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]


def sequence_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The :func:`identity` in a checkpoint.

    Raises:
        ValueError: if it is not from a task sequence, or from another version.
    """
    found = checkpoint.get("task_sequence")
    if found is None:
        raise ValueError("TaskSchedule: this checkpoint is not of a task sequence; start anew without ckpt_path")
    if (form := found.get("format")) != FORMAT:
        raise ValueError(
            f"TaskSchedule: another version wrote this checkpoint (format = {form}, not {FORMAT}); go on with that "
            "version, or take its weights by load_from_checkpoint"
        )
    return found


def refuse_another_run(found: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse to go on with anything else than the run was begun with.

    Raises:
        ValueError: naming everything that differs.
    """
    if differing := differences(found["tested"], here["tested"]) | differences(found["must"], here["must"]):
        raise ValueError(f"TaskSchedule: the checkpoint is from another run: {told(differing)}")


def refuse_another_objective(found: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse to go on with another objective than the sequence was begun with: its memory is made for that one.

    Raises:
        ValueError: naming both.
    """
    before, now = (which["settings"].get("objective") for which in (found, here))
    if before != now:
        raise ValueError(f"TaskSchedule: the sequence was learnt with {before}, and cannot go on with {now}")


def refuse_epochs(planned: Sequence[int], now: Sequence[int], starts: Sequence[int], complete: int) -> None:
    """Refuse other numbers of epochs, except for what is still to be trained.

    Args:
        planned: epochs of each task when the checkpoint was written.
        now: epochs of each task in this run.
        starts: the checkpoint's first epochs of the tasks begun, and of the next if one has just ended.
        complete: number of epochs complete in the checkpoint, over all tasks.

    Raises:
        ValueError: if a task that is over would have had another number, or the running one has already had as many.
    """
    for task, (before, wanted, start) in enumerate(zip(planned, now, starts)):
        if before == wanted:
            continue
        if task + 1 < len(starts):
            raise ValueError(
                f"TaskSchedule: task {task} of the checkpoint is over, and was to have {before} epochs, not "
                f"{wanted}; start anew, or give a list of epochs that has {before} for it"
            )
        if wanted <= complete - start:
            raise ValueError(
                f"TaskSchedule: task {task} of the checkpoint has had {complete - start} epochs, but {wanted} are "
                "planned"
            )


def refuse_other_tasks(found: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse to test on other classes than were trained; warn of other images of the same classes.

    Raises:
        ValueError: naming everything that differs.
    """
    if differing := differences(found["tested"], here["tested"]):
        raise ValueError(f"TaskSchedule: the checkpoint is from another run: {told(differing)}")
    there = [pair for pair in zip(found["must"][DATA], here["must"][DATA]) if pair[1]]  # others are not tested
    if any(before != now for before, now in there):
        rank_zero_warn("TaskSchedule: the data are not those of the checkpoint's training, or have changed since")


def note_other_settings(trainer: pl.Trainer, found: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Report settings changed on purpose, which hold from now on, even where the checkpoint has restored its own.

    Raises:
        ValueError: if the user has not chosen the checkpoint: Lightning takes an ``hpc_ckpt`` by itself, and the newest
            file in the folder for ``ckpt_path="last"``.
    """
    planned = differences({"epochs": found["epochs"]}, {"epochs": here["epochs"]})
    changed = differences(found["must"], here["must"])
    differing = differences(found["settings"], here["settings"]) | planned | changed
    if not differing:
        return
    if Path(str(trainer.ckpt_path)).name.startswith("hpc_ckpt"):
        raise ValueError(
            f"{trainer.ckpt_path}, which Lightning takes by itself in a SLURM job, is from another run: "
            f"{told(differing)}; move it away"
        )
    offered = any(saving.was_offered(trainer.ckpt_path) for saving in callbacks_of(trainer, SequenceCheckpoint))
    if offered and differing.keys() != planned.keys():
        raise ValueError(
            f"ckpt_path='last' has found {trainer.ckpt_path}, which is from another run: {told(differing)}; give its "
            "path to go on from it, or this run a folder of its own"
        )
    for i, optimizer in enumerate(trainer.optimizers):
        for key, value in optimizer.defaults.items():
            before, now = differing.get(f"{optimizer_name(i)}.{key}", (None, None))
            for group in optimizer.param_groups if now is not None else ():
                place = f"initial_{key}" if f"initial_{key}" in group else key  # under a schedule: for the next task
                if group[place] == before:
                    group[place] = value
    rank_zero_warn(f"TaskSchedule: this run goes on with other settings: {told(differing)}")


def differences(found: Mapping[str, Any], here: Mapping[str, Any]) -> Differences:
    """The entries that differ between the same parts of two identities."""
    return {k: (found.get(k), here.get(k)) for k in (*here, *found.keys() - here) if found.get(k) != here.get(k)}


def told(differing: Differences) -> str:
    """Differences in words."""
    return ", ".join(
        f"{name} = {_short(here)} ({_short(found)} in the checkpoint)" for name, (found, here) in differing.items()
    )


def settings(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """Hyper-parameters by dotted name: constructor arguments of the module, of its parts and of the callbacks that act
    on tasks; what the optimisers begin with; and the Trainer's settings that affect training.
    """
    found = settings_of(pl_module)
    for callback in callbacks_of(trainer, TaskCallback):
        describe(callback, type(callback).__name__, found)
    for i, optimizer in enumerate(trainer.optimizers):
        found[optimizer_name(i)] = type(optimizer).__name__
        for key, value in optimizer.defaults.items():
            if key != "differentiable":  # PyTorch adds it later
                describe(value, f"{optimizer_name(i)}.{key}", found)
    for key in ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"):
        describe(getattr(trainer, key), f"trainer.{key}", found)
    return found


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Hyper-parameters of a module and of its parts, as :func:`settings` names them."""
    found: dict[str, Any] = {}
    describe(module, "", found)
    for name, value in getattr(module, "hparams", {}).items():
        describe(value, f"hparams.{name}", found)
    return found


def digest(parts: Iterable[Any]) -> str:
    """Eight hexadecimal digits that tell lists of values apart."""
    return sha256("\0".join(map(repr, parts)).encode()).hexdigest()[:8]


def settings_of_data(data: TaskDataModule) -> dict[str, Any]:
    """What data were made with, as far as it is kept and is a number, a text or a list of up to 100 of them."""
    source = getattr(data, "source", None)
    found: dict[str, Any] = {"data.num_tasks": data.num_tasks}
    given = _arguments(data) | ({} if source is None else _arguments(source)) | {"transform": data.given_transform}
    for name, value in given.items():
        plain = (bool, int, float, str)
        if value is None or isinstance(value, plain) or (callable(value) and name in ("transform", "augment")):
            describe(value, f"data.{name}", found)
        elif isinstance(value, list | tuple) and len(value) <= 100 and all(isinstance(item, plain) for item in value):
            found[f"data.{name}"] = list(value)
    return found


def optimizer_name(i: int) -> str:
    """The name of an optimiser's settings."""
    return f"optimizer_{i}" if i else "optimizer"


def describe(value: Any, name: str, found: dict[str, Any], inside: tuple[int, ...] = ()) -> None:
    """Add ``value``, and the constructor arguments of its parts as far as these keep them under their names.

    Args:
        value: what to describe.
        name: its dotted name.
        found: the entries are added to it.
        inside: identities of the objects that contain it.
    """
    if id(value) in inside or len(inside) > 5:
        return
    inner = (*inside, id(value))
    if value is None or isinstance(value, bool | int | float | str):
        found[name] = value
    elif isinstance(value, Sequence):
        for i, item in enumerate(value):
            describe(item, f"{name}.{i}", found, inner)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            describe(item, f"{name}.{key}", found, inner)
    elif inspect.isfunction(value) or inspect.ismethod(value):
        found[name] = f"{value.__qualname__} {digest([value.__code__.co_code, *value.__code__.co_consts])}"
    elif inspect.isbuiltin(value):
        found[name] = value.__qualname__
    elif isinstance(value, partial):
        value = without_parser(value)
        found[name] = getattr(value.func, "__name__", type(value.func).__name__)
        describe(value.keywords, name, found, inner)
    else:
        found[name or "method"] = type(value).__name__
        for parameter, kept in _arguments(value).items():
            describe(kept, f"{name}.{parameter}".lstrip("."), found, inner)


def _arguments(part: Any) -> dict[str, Any]:
    """What the constructors of a part and of its base classes were given, as far as it is kept.

    It is kept under the argument's name or, where that means something else (``forward``), with ``_`` before it.
    """
    if type(part).__module__.startswith("torch."):
        return {}
    inits = [init for cls in type(part).__mro__ if inspect.isfunction(init := vars(cls).get("__init__"))]
    kept, found = {**getattr(part, "__dict__", {}), **getattr(part, "_modules", {})}, {}
    for name in (name for init in inits for name in inspect.signature(init).parameters):
        if isinstance(aside := kept.get(f"_{name}"), bool | int | float | str):
            found[name] = aside
        elif name in kept:
            found[name] = kept[name]
    return found


def without_parser(value: partial) -> partial:
    """The class with its arguments, without the parser that jsonargparse's ``Callable[[...], Class]`` holds."""
    if not str(getattr(value.func, "__module__", "")).startswith("jsonargparse"):
        return value
    place = next((i for i, part in enumerate(value.args) if inspect.isclass(part)), None)
    if place is None:
        return value
    return partial(value.args[place], *value.args[place + 1 :], **value.keywords)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
