"""What a sequence has learnt before a fit, so that its data are told apart: learnt already, or still to be learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_sparse_cl.data.labels import is_number

RECORD = "sequence"
"""Attribute of a module: what its sequence was when its last fit ended, as in a checkpoint, without the weights."""
ASKED = "asked_to_go_on"
"""Entry of that record: the user has asked for it, so that a fit without further tasks has nothing to train."""


@dataclass(frozen=True)
class LearntTasks:
    """The tasks that a sequence has learnt to their end, and what further ones have to agree with."""

    class_names: list[str]
    """By label."""
    classes: list[list[int]]
    """Labels of each task."""
    fingerprints: list[str]
    samples: list[int]
    """For training, of each task."""
    epochs: list[int]
    """Planned for each task."""
    running: str | None
    """Fingerprint of the task within which the sequence was stopped. If it stopped between tasks, None."""
    planned: int
    """Tasks of the whole sequence, as it was planned when it began."""
    image: tuple[tuple[int, ...], str]
    """Shape (C, H, W) and type of a stored image."""
    normalisation: dict[str, list[float]] | None
    """``mean`` and ``std`` of :class:`ImageTransform`. If the images were normalised in another way, None."""
    joint: bool = False

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any], ended: int, begun: int) -> LearntTasks:
        """Out of a checkpoint that has :func:`data_state`.

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
            image=(tuple(state["input_shape"]), state["stored_dtype"]),
            normalisation=state["normalisation"],
            joint=state["joint"],
        )

    @property
    def names(self) -> list[list[str]]:
        """Names of each task's classes."""
        return [[self.class_names[c] for c in task] for task in self.classes]

    def labels_of(self, names: Sequence[str], owner: str) -> tuple[list[str], list[int]]:
        """Names of all classes, the known ones first, and among them the label of each of ``names``.

        Raises:
            ValueError: in the name of ``owner``, if classes have numbers here and names there, or the reverse: nobody
                knows then which of them are the same.
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
        """Where each learnt task is among the tasks given, if it is, and which of those are still to be learnt."""
        places: list[int | None] = []
        left = list(range(len(fingerprints)))
        for wanted in self.fingerprints:
            place = next((i for i in left if fingerprints[i] == wanted), None)
            places.append(place)
            left = [i for i in left if i != place]
        first = [i for i in left if fingerprints[i] == self.running][:1]
        return places, [*first, *(i for i in left if i not in first)]


def data_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The state of the data module in a checkpoint. If it is not of a task sequence of this version, None."""
    sequence = checkpoint.get("task_sequence") or {}
    state = checkpoint.get((sequence.get("tested") or {}).get("data"))
    return state if state is not None and "ended" in sequence and "class_names" in state else None
