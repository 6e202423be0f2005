"""What a sequence has learnt before a fit, so that data learnt already can be told from data still to be learnt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning.pytorch as pl

from lightning_sparse_cl.checkpoint_file import read_checkpoint
from lightning_sparse_cl.data.labels import is_number
from lightning_sparse_cl.nests import described as kinds

RECORD = "sequence"
"""Attribute of a module: its sequence when its last fit ended, as a checkpoint holds it, without the weights."""
ASKED = "asked_to_go_on"
"""Entry of that record: the user has asked to go on, so that a fit without further tasks has nothing to train."""


@dataclass(frozen=True)
class LearntTasks:
    """The tasks that a sequence has learnt to their end, and what further tasks have to agree with."""

    class_names: list[str]
    """By label."""
    classes: list[list[int]]
    """Labels of each task."""
    fingerprints: list[str]
    samples: list[int]
    """Number of training samples of each task."""
    epochs: list[int]
    """Number of epochs planned for each task."""
    running: str | None
    """Fingerprint of the task within which the sequence was stopped. None if it stopped between tasks."""
    planned: int
    """Number of tasks of the whole sequence, as it was planned when it began."""
    layout: dict[str, str]
    """Types and shapes of a stored sample; see :func:`~lightning_sparse_cl.nests.described`."""
    normalisation: dict[str, list[float]] | None
    """``mean`` and ``std`` of the transform. None if the samples had a transform of another kind."""
    target: str
    """What labels are."""
    joint: bool = False
    is_sequence: bool = True
    """Whether there is a sequence to go on from. False if a module only knows classes."""

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any], ended: int, begun: int) -> LearntTasks:
        """From a checkpoint that has :func:`data_state`.

        Args:
            checkpoint: its contents.
            ended: how many tasks are learnt to their end.
            begun: how many tasks have begun.
        """
        state = data_state(checkpoint) or {}
        return cls(
            class_names=list(state["class_names"]),
            classes=[list(c) for c in state["classes"][:ended]],
            fingerprints=list(state["fingerprints"][:ended]),
            samples=list(state["samples"][:ended]),
            epochs=list(checkpoint["task_sequence"]["epochs"][:ended]),
            running=state["fingerprints"][ended] if begun > ended else None,
            planned=state["planned"],
            layout=dict(state["layout"]),
            normalisation=state["normalisation"],
            target=state.get("target", "classes"),
            joint=state["joint"],
        )

    @classmethod
    def names_alone(cls, class_names: Sequence[str], layout: dict[str, str], target: str) -> LearntTasks:
        """For a module whose sequence is not known, as after a fit that was stopped in a task: labels stay the same."""
        return cls(list(class_names), [], [], [], [], None, 0, layout, None, target, is_sequence=False)

    @property
    def names(self) -> list[list[str]]:
        """Names of each task's classes."""
        return [[self.class_names[c] for c in task] for task in self.classes]

    def labels_of(self, names: Sequence[str], owner: str) -> tuple[list[str], list[int]]:
        """Names of all classes, the known ones first, and among them the label of each of ``names``.

        Raises:
            ValueError: naming ``owner``, if classes have numbers here and names there, or the reverse: then nobody can
                know which of them are the same.
        """
        numbered, here = (all(is_number(name) for name in part) for part in (self.class_names, names))
        if numbered != here:
            known, found = (", ".join(map(repr, part[:3])) for part in (self.class_names, names))
            raise ValueError(
                f"{owner}: its classes are {found}, those learnt before {known}; classes are recognised by name, so "
                "give all of them names, or all of them numbers"
            )
        every = list(dict.fromkeys([*self.class_names, *names]))
        return every, [every.index(name) for name in names]

    def match(self, fingerprints: Sequence[str]) -> tuple[list[int | None], list[int]]:
        """The place of each learnt task among those given, or None, and which of these are still to be learnt."""
        places: list[int | None] = []
        left = list(range(len(fingerprints)))
        for wanted in self.fingerprints:
            place = next((i for i in left if fingerprints[i] == wanted), None)
            places.append(place)
            left = [i for i in left if i != place]
        first = [i for i in left if fingerprints[i] == self.running][:1]
        return places, [*first, *(i for i in left if i not in first)]


def data_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The state of the data module in a checkpoint. None if it is not from a task sequence of this version."""
    sequence = checkpoint.get("task_sequence") or {}
    state = checkpoint.get(str((sequence.get("tested") or {}).get("data")))
    return state if state is not None and "ended" in sequence and "layout" in state else None


class Before(NamedTuple):
    """What preceded a fit or a test."""

    learnt: LearntTasks | None = None
    """What the module has learnt. None if that is nothing, or not known."""
    goes_on: bool = False
    """Whether the sequence goes on for certain, even if none of the data are new."""
    only: set[str] | None = None
    """Fingerprints of the tasks to which an open sequence keeps. None if it takes all tasks."""
    is_resumed: bool = False
    """Whether there is a checkpoint that will be restored."""


def before_this(trainer: pl.Trainer, fitting: bool, is_open: bool, joint: bool) -> Before:
    """What the module to be fitted or tested has learnt, in this sequence or in one that this one continues.

    In a fit from ``ckpt_path`` it is what that run had learnt before it began, as such a fit is the same run.

    Args:
        trainer: the trainer, in ``setup``.
        fitting: whether the trainer fits; otherwise it tests.
        is_open: whether the data are :class:`OpenTasks`.
        joint: whether the data train all tasks at once.
    """
    if (path := _checkpoint_path(trainer)) is not None:
        checkpoint = _peek(trainer, path)
        state = data_state(checkpoint)
        if state is None or state["joint"] or joint:
            return Before(is_resumed=True)
        only = set(state["fingerprints"]) if fitting and is_open else None
        tasks = state["learnt_before"] if fitting else len(state["classes"])
        return Before(LearntTasks.of(checkpoint, tasks, tasks) if tasks else None, True, only, is_resumed=True)
    record = getattr(trainer.lightning_module, RECORD, None) or {}
    state = data_state(record)
    if state is None:
        described = getattr(trainer.lightning_module, "data_description", None) if fitting else None
        if described is None:
            return Before()
        return Before(LearntTasks.names_alone(described.class_names, kinds(described.layout), described.target))
    if not fitting and (state["joint"] or joint):
        return Before()
    sequence = record["task_sequence"]
    learnt = LearntTasks.of(record, sequence["ended"] + 1, sequence["begun"] + 1)
    return Before(learnt, bool(record.get(ASKED)) or is_open)


def _checkpoint_path(trainer: pl.Trainer) -> str | None:
    """The checkpoint that a fit or a test begins with.

    Lightning does not give it before restoring it, which is after the data are read and the network is built: until
    then it is an argument of a running call. (``trainer.ckpt_path`` is still the previous fit's.)
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            path = frame.f_locals.get("ckpt_path")
            return None if path is None else str(path)
        frame = frame.f_back
    if trainer.state.status == "running":
        raise RuntimeError(
            "lightning_sparse_cl: this version of Lightning does not begin a fit or test in Trainer._run"
        )
    return None


def _peek(trainer: pl.Trainer, path: str) -> dict[str, Any]:
    """The contents of a checkpoint, or nothing if it cannot be read: restoring it will say why."""
    try:
        return trainer.strategy.load_checkpoint(path) if "://" in path else read_checkpoint(path, mmap=True)
    except ValueError:
        return {}
