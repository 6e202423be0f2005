"""When tasks begin and end, and what is trained on in each."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from toy_trainer import trainer

from lightning_sparse_cl import (
    ContinualEvaluation,
    ContinualModule,
    DERpp,
    EsaCL,
    FlopsCounter,
    Masks,
    SmallCNN,
    SmallMLP,
    TaskSchedule,
)
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks


class Diary(pl.Callback):
    """Writes down what happens; stands before and behind everything else."""

    def __init__(self):
        self.lines = []

    def on_task_start(self, trainer, pl_module, task):
        self.lines.append(("start", task, trainer.current_epoch))

    def on_train_batch_start(self, trainer, *_):
        self.lines.append(("batch", trainer.datamodule.task, trainer.current_epoch))

    def on_train_batch_end(self, trainer, *_):
        self.lines.append(("end of batch", trainer.datamodule.task, trainer.current_epoch))

    def on_task_end(self, trainer, pl_module, task):
        self.lines.append(("end", task, trainer.current_epoch))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("epochs", [2, [1, 2, 1]])
def test_exactly_a_tasks_batches_lie_between_its_start_and_end(epochs, first):
    diary = Diary()
    t = pl.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[diary, TaskSchedule(epochs)] if first else [TaskSchedule(epochs), diary],
    )  # fmt: skip
    t.fit(ContinualModule(SmallMLP([8])), toy_tasks())
    expected, epoch = [], 0
    for task, n in enumerate([2, 2, 2] if epochs == 2 else epochs):
        expected.append(("start", task, epoch))
        for e in range(epoch, epoch + n):
            expected += [("batch", task, e), ("end of batch", task, e)] * 5  # 80 samples in batches of 16
        epoch += n
        expected.append(("end", task, epoch - 1))
    assert diary.lines == expected


def test_a_callback_may_end_a_task_early():
    class Impatient(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.is_last_batch and trainer.datamodule.task == 1:
                trainer.datamodule.end_task()
                trainer.datamodule.end_task()

    t = trainer(Impatient(), epochs=3)
    t.fit(ContinualModule(SmallMLP([8])), toy_tasks())
    assert t.datamodule.starts == [0, 3, 4, 7] and t.current_epoch == 7


def test_only_the_current_task_is_trained_on_and_removed_samples_are_not():
    class Watch(pl.Callback):
        seen = {}

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            data = trainer.datamodule
            indices = data.indices(batch_idx)
            assert torch.equal(data.train_sets[data.task].labels[indices], batch[1])
            assert torch.equal(data.train_sets[data.task].inputs[indices], data.raw)
            self.seen.setdefault(trainer.current_epoch, []).extend(indices.tolist())
            if trainer.is_last_batch and trainer.current_epoch == 0:
                data.alive[0] = data.alive[0][:48]

    watch = Watch()
    trainer(watch).fit(ContinualModule(SmallMLP([8])), toy_tasks())
    assert sorted(watch.seen[0]) == list(range(80))
    assert sorted(watch.seen[1]) == list(range(48))
    assert watch.seen[0][:5] != sorted(watch.seen[0])[:5]


def test_schedule_needs_a_task_data_module():
    with pytest.raises(TypeError, match="not a TaskDataModule"):
        trainer().fit(PlainClassifier(), DataLoader(TensorDataset(torch.randn(4, 1, 8, 8), torch.arange(4))))


@pytest.mark.parametrize("same_trainer", [True, False])
def test_the_same_objects_serve_a_second_fit(same_trainer):
    data, evaluation, passes = toy_tasks(), ContinualEvaluation(), FlopsCounter()
    first = trainer(evaluation, passes)
    first.fit(ContinualModule(SmallMLP([8])), data)
    again = first if same_trainer else trainer(evaluation, passes)
    again.fit(model := EsaCL(SmallCNN(4), DERpp(30, 8)), data)
    assert passes.counts["samples"] == 480 and data.finished
    assert not evaluation.matrices["class_il"].R.isnan().any()
    assert len(Masks.of(model)) == 3 and again.current_epoch == (12 if same_trainer else 6)


def test_validation_samples_are_held_out_and_joint_training_sees_all_tasks():
    data = toy_tasks(val_fraction=0.25)
    t = trainer(epochs=1)
    t.fit(ContinualModule(SmallMLP([8])), data)
    assert [len(a) for a in data.alive] == [60] * 3
    assert "val/acc" in t.callback_metrics
    joint, evaluation = toy_tasks(joint=True), ContinualEvaluation()
    trainer(evaluation, epochs=1).fit(ContinualModule(SmallMLP([8])), joint)
    assert joint.num_tasks == 1 and len(joint.train_sets[0]) == 240
    assert evaluation.matrices["class_il"].R.shape == (1, 3)
