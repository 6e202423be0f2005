"""Callbacks by kind, and a data module that has to be one of tasks."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.demos.boring_classes import BoringDataModule
from torch.utils.data import DataLoader, TensorDataset

import lightning_sparse_cl as scl
from lightning_sparse_cl.callbacks.trainer_parts import TrainerParts, callbacks_of, first_callback, parts_of, task_data
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks


class Early(Callback):
    """A kind with a kind of its own."""


class Earlier(Early):
    """Is an Early, too."""


def trainer(*callbacks):
    return pl.Trainer(
        callbacks=list(callbacks), logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, accelerator="cpu", fast_dev_run=3,
    )  # fmt: skip


def test_callbacks_of_a_kind_come_in_their_order_and_subclasses_count():
    first, second = Earlier(), Early()
    made = trainer(first, Callback(), second)
    assert callbacks_of(made, Early) == [first, second] and callbacks_of(made, Earlier) == [first]
    assert first_callback(made, Early) is first and first_callback(made, Timer) is None


def test_the_data_module_of_tasks_is_returned_and_any_other_is_named():
    made, data = trainer(), toy_tasks()
    parts_of(made).datamodule = data
    assert task_data(made) is data
    for other, name in ((None, "NoneType"), (BoringDataModule(), "BoringDataModule")):
        parts_of(made).datamodule = other
        with pytest.raises(TypeError, match=f"^Early: the trainer's datamodule is a {name}, not a TaskDataModule$"):
            task_data(made, Early())


@pytest.mark.parametrize("name", TrainerParts.__annotations__)
def test_lightning_sets_what_is_declared(name):
    assert hasattr(trainer(), name)


@pytest.mark.parametrize("callback", [scl.AGEM(30, 8), scl.GPM()])
def test_callbacks_that_keep_what_tasks_learnt_refuse_data_without_tasks(callback):
    loader, name = DataLoader(TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8))), type(callback).__name__
    with pytest.raises(TypeError, match=f"^{name}: the trainer's datamodule is a NoneType, not a TaskDataModule$"):
        trainer(callback).fit(PlainClassifier(), loader)
