"""What a Trainer holds that its class does not declare, and its callbacks and data of a given kind."""

from __future__ import annotations

from typing import Protocol, TypeVar, cast

import lightning.pytorch as pl

from lightning_sparse_cl.data.datamodule import TaskDataModule

Kind = TypeVar("Kind")


class TrainerParts(Protocol):
    """Attributes that Lightning's connectors set on the Trainer, with their types. For type checkers."""

    callbacks: list[pl.Callback]
    """In the order in which their hooks are called."""
    datamodule: pl.LightningDataModule | None
    """None if a fit was given loaders."""
    fast_dev_run: bool | int
    """Whether the fit is only tried, or for how many batches."""
    log_every_n_steps: int
    """0 if nothing is logged."""
    overfit_batches: int | float
    """The number of batches, or the part of them, that is trained on and tested; 0.0 for all."""
    reload_dataloaders_every_n_epochs: int
    """0 if loaders are made once."""


def parts_of(trainer: pl.Trainer) -> TrainerParts:
    """The Trainer itself, as a type that declares these attributes."""
    return cast(TrainerParts, trainer)


def task_data(trainer: pl.Trainer, asker: object = None) -> TaskDataModule:
    """The Trainer's data module.

    Args:
        trainer: the trainer.
        asker: the callback that needs tasks; the error names its class.

    Raises:
        TypeError: if it is not a :class:`TaskDataModule`.
    """
    data = parts_of(trainer).datamodule
    if not isinstance(data, TaskDataModule):
        who = "" if asker is None else f"{type(asker).__name__}: "
        raise TypeError(f"{who}the trainer's datamodule is a {type(data).__name__}, not a TaskDataModule")
    return data


def callbacks_of(trainer: pl.Trainer, kind: type[Kind]) -> list[Kind]:
    """The Trainer's callbacks of this kind, in their order."""
    return [callback for callback in parts_of(trainer).callbacks if isinstance(callback, kind)]


def first_callback(trainer: pl.Trainer, kind: type[Kind]) -> Kind | None:
    """The first callback of this kind, or None if the Trainer has none."""
    return next((callback for callback in parts_of(trainer).callbacks if isinstance(callback, kind)), None)


def batches_trained(trainer: pl.Trainer) -> int:
    """Batches since the fit began: the step under which Lightning logs."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
