"""DDR removes the easiest samples, exactly so many, when it should."""

from collections import defaultdict
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from toy_trainer import trainer

from lightning_sparse_cl import (
    DERpp,
    DynamicDataRemoval,
    DynamicGradientMasking,
    SmallCNN,
    SparCL,
    TaskAwareDynamicMasking,
)
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks


def sparcl(removal):
    masking, gradients = TaskAwareDynamicMasking(0.75, interval=2), DynamicGradientMasking(0.05, interval=3)
    return SparCL(SmallCNN(4), DERpp(30, 8), masking, removal, gradients)


def test_samples_left_are_those_of_the_paper():
    removal = DynamicDataRemoval()
    assert [removal.remaining(10_000, stage) for stage in range(6)] == [10000, 9250, 8500, 7750, 7000, 7000]
    at_once = DynamicDataRemoval(one_shot=True)
    assert [at_once.remaining(10_000, stage) for stage in range(6)] == [10000] * 4 + [7000, 7000]


class Watch(pl.Callback):
    """What each sample did in the stage, and which were removed, by hand."""

    def __init__(self, removal):
        self.removal, self.interval, self.stage, self.left = removal, removal.interval, defaultdict(list), []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for i, row, y in zip(trainer.datamodule.indices(batch_idx).tolist(), outputs["logits"], batch[1]):
            self.stage[i].append((row, y))

    def on_train_epoch_end(self, trainer, pl_module):  # before the removal, which is one of the policies
        data = trainer.datamodule
        self.alive = data.alive[data.task].clone()
        if (data.epoch_in_task + 1) % self.interval == 0 and data.epoch_in_task < self.removal.cutoff * self.interval:
            by_hand = {i: BY_HAND[self.removal.by](shown) / len(shown) for i, shown in self.stage.items()}
            found = self.removal.difficulty()[list(by_hand)]
            assert found.tolist() == pytest.approx(list(by_hand.values()), rel=1e-4)

    def on_train_epoch_start(self, trainer, pl_module):
        data = trainer.datamodule
        if data.epoch_in_task and data.epoch_in_task % self.interval == 0 and self.stage:
            kept = set(data.alive[data.task].tolist())
            self.left.append((set(self.alive.tolist()) - kept, kept, dict(self.stage)))
        if data.epoch_in_task % self.interval == 0:
            self.stage = defaultdict(list)


def unlearnt(shown):
    right = [bool(row.argmax() == y) for row, y in shown]
    return sum(a and not b for a, b in pairwise(right)) if any(right) else float("inf")


BY_HAND = {
    "misclassification": lambda shown: sum(float(row.argmax() != y) for row, y in shown),
    "forgetting": unlearnt,
    "loss": lambda shown: sum(float(F.cross_entropy(row, y)) for row, y in shown),
    "gradient": lambda shown: sum(float((row.softmax(0) - F.one_hot(y, len(row))).norm()) for row, y in shown),
}


@pytest.mark.parametrize("by", BY_HAND)
def test_the_easiest_samples_leave(by):
    removal = DynamicDataRemoval(0.4, cutoff=2, interval=3, by=by)
    watch = Watch(removal)
    data = toy_tasks(num_tasks=2, batch_size=20)  # 80 samples: all are seen in every epoch at first
    trainer(watch, epochs=8).fit(sparcl(removal), data)
    assert [(len(gone), len(kept)) for gone, kept, _ in watch.left] == [(16, 64), (16, 48)] * 2
    for gone, kept, stage in watch.left:
        rate = {i: BY_HAND[by](shown) / len(shown) for i, shown in stage.items()}
        assert max(rate.get(i, 0.0) for i in gone) <= min(rate.get(i, 1e9) for i in kept) + 1e-6


def test_removal_is_the_same_again_and_other_with_another_seed():
    alive = []
    for seed in (0, 0, 1):
        pl.seed_everything(seed, verbose=False)
        data = toy_tasks(num_tasks=1)
        trainer(epochs=5).fit(sparcl(DynamicDataRemoval(0.3, cutoff=2, interval=2)), data)
        alive.append(data.alive[0])
    assert torch.equal(alive[0], alive[1]) and not torch.equal(alive[0], alive[2])


def test_at_random_no_label_counts():
    data = toy_tasks(num_tasks=1)
    trainer(DynamicDataRemoval(0.5, 1, 1, by="random"), epochs=2).fit(NoClasses(), data)
    kept = data.alive[0]
    assert len(kept) == 40 and not torch.equal(kept, torch.arange(40)) and not torch.equal(kept, torch.arange(40, 80))
    by_class = data.train_sets[0].labels[kept].bincount()
    assert by_class.min() > 8  # 20 each, give or take


def test_removal_needs_a_task_sequence_in_the_data():
    with pytest.raises(TypeError, match="not a TaskDataModule"):
        pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[DynamicDataRemoval()], logger=False,
                   enable_checkpointing=False).fit(
            PlainClassifier(), DataLoader(TensorDataset(torch.randn(4, 1, 8, 8), torch.arange(4))))  # fmt: skip


class OwnLoss(PlainClassifier):
    """Whose loss is no cross-entropy; it knows best which samples are hard."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self(x) - F.one_hot(y, 6)).square().mean(1)
        return {"loss": loss.mean(), "per_sample": y % 2 + 0 * loss.detach()}


class NoClasses(PlainClassifier):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0], batch[1].float()

    def training_step(self, batch, batch_idx):
        return (self(batch[0])[:, 0] - batch[1]).square().mean()


def test_the_loss_by_which_samples_are_removed_is_the_modules_own():
    data = toy_tasks(num_tasks=1)
    trainer(DynamicDataRemoval(0.5, 1, 1, by="loss"), epochs=2).fit(OwnLoss(), data)
    assert set(data.train_sets[0].labels[data.alive[0]].tolist()) == {1}
    for by in ("loss", "misclassification"):
        with pytest.raises(ValueError, match=rf"by='{by}'\): labels of shape \(16,\) and \S+ are not classes"):
            trainer(DynamicDataRemoval(0.5, 1, 1, by=by), epochs=2).fit(NoClasses(), toy_tasks())


def test_data_removal_shortens_epochs_without_a_schedule_too():
    class Steps(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            steps.append(trainer.global_step)

    steps = []
    pl.Trainer(accelerator="cpu", max_epochs=4, callbacks=[DynamicDataRemoval(0.5, 2, 1), Steps()], logger=False,
               enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False).fit(
        PlainClassifier(), toy_tasks())  # fmt: skip
    assert steps == [5, 8, 10, 12]


def fit(removal):
    trainer(removal, epochs=4).fit(PlainClassifier(), toy_tasks())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynamicDataRemoval(1.0), r"fraction=1\.0"),
        (lambda: DynamicDataRemoval(cutoff=0), "cutoff=0"),
        (lambda: DynamicDataRemoval(by="luck"), "by='luck'.*misclassification, forgetting, gradient, loss, random"),
        (lambda: fit(DynamicDataRemoval(0.3, 3, 2)), "cutoff=3, interval=2.*task 0 takes 4 epochs, which is 2 stages"),
        (lambda: fit(DynamicDataRemoval(0.9, 2, 2)), r"fraction=0\.9\): 8 of the 80 samples of task 0 would be left"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
