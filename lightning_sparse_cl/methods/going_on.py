"""A module remembers its sequence, and goes on with further tasks and classes when it is fitted again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_sparse_cl.callbacks.identity import sequence_of
from lightning_sparse_cl.callbacks.trainer_parts import task_data
from lightning_sparse_cl.checkpoint_file import read_checkpoint
from lightning_sparse_cl.data.learnt import ASKED
from lightning_sparse_cl.methods.growth import grown, grown_masks
from lightning_sparse_cl.objectives.base import Objective
from lightning_sparse_cl.sparsity.masks import Masks


class Growing(Protocol):
    """A module that is built for a number of classes. :class:`~lightning_sparse_cl.ContinualModule` is one."""

    head: nn.Linear
    objective: Objective

    def build(self, **built_for: Any) -> None:
        """Size the network."""


class GoesOn(pl.LightningModule):
    """Base of modules that learn further tasks in a further fit."""

    sequence: dict[str, Any] | None = None
    """What the last fit has left of its sequence, beside the network, as a checkpoint holds it; the next fit goes on
    from there. If None, the next fit begins a sequence."""
    _known_classes: int | None = None
    """Called before the network gets outputs for further classes."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self._known_classes is not None:
            prepare = task_data(self.trainer).prepare
            cast(Growing, self).objective.add_classes(cast(Any, self), self._known_classes, prepare)
            self._known_classes = None

    def grow(self, checkpoint: dict[str, Any], classes: int) -> None:
        """Grow the network, and the checkpoint's, to ``classes`` classes if they have fewer."""
        learner, known = cast(Growing, self), checkpoint["built_for"]["num_classes"]
        if learner.head.out_features == known < classes:
            masks = Masks.of(self).state_dict()
            with torch.random.fork_rng([]):
                labels = task_data(self.trainer).labels
                learner.build(**(checkpoint["built_for"] | {"num_classes": classes, "labels": labels}))
            checkpoint["state_dict"] = grown(checkpoint["state_dict"], self)
            checkpoint["masks"] = grown_masks(checkpoint.get("masks", masks), self)
            self._known_classes = known

    def go_on_from(self, path: str | os.PathLike) -> None:
        """Take the network and the sequence of a checkpoint: the next fit learns the tasks that it has not learnt yet.

        Args:
            path: a checkpoint of a task sequence, taken at its end, between tasks, or within a task.

        Raises:
            ValueError: if the file is damaged, or is from another version, method or network.
        """
        checkpoint = read_checkpoint(Path(path))
        try:
            sequence = sequence_of(checkpoint)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        trained, own = sequence["tested"]["method"], type(cast(Growing, self).objective).__name__
        if (objective := sequence["settings"].get("objective", own)) != own:
            raise ValueError(f"{path}: this checkpoint is from {objective}, and its memory does not fit {own}")
        if trained != type(self).__qualname__:
            raise ValueError(
                f"{path}: this checkpoint is from a {trained}, and cannot go on as a {type(self).__qualname__}"
            )
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])
        self.sequence = (self.sequence or {}) | {ASKED: True}

    def remember_sequence(self, checkpoint: Mapping[str, Any] | None) -> None:
        """Keep what a checkpoint holds of the sequence, except what the module holds itself. If None, forget it."""
        own = ("state_dict", "masks", "subnetworks")
        known = checkpoint if checkpoint is not None and "task_sequence" in checkpoint else None
        self.sequence = None if known is None else {k: v for k, v in known.items() if k not in own}
