"""PackNet: owners by count, masks that nest, retraining under the mask, and nothing forgotten."""

from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from logits_of_tasks import Logits
from stopped import assert_resumes
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks

EPOCHS, RETRAIN, STEPS = 5, 2, 5
HEAD = ["head.weight"]
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}


def packnet(sparsity=0.5, optimizer="sgd", last=False, of="free", init="zero", **subnetworks):
    pruning = scl.OneShotPruning(sparsity, of, retrain=RETRAIN, last=last, dense=HEAD)
    return scl.PackNet(
        scl.SmallCNN(8), pruning, scl.TaskSubnetworks(**subnetworks), scl.Reopen(init), optimizer=OPTIMIZERS[optimizer]
    )


def owned(module):
    """How many weights each task has that no earlier one had, by weight."""
    learnt = scl.Subnetworks.of(module)
    used = {n: [0, *(int(learnt.used(n, t + 1).sum()) for t in range(len(learnt)))] for n in learnt.tasks[0].masks}
    return {name: [b - a for a, b in pairwise(counts)] for name, counts in used.items()}


class Watch(pl.Callback):
    """The mask and the weights at every step, as (task, epoch, step)."""

    def __init__(self):
        self.alive = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        masks, at = scl.Masks.of(pl_module), (trainer.datamodule.task, trainer.datamodule.epoch_in_task, batch_idx)
        self.alive[at] = {name: mask.clone() for name, mask in masks.alive.items()}
        assert all(not pl_module.get_parameter(n)[~mask].any() for n, mask in masks.alive.items())


@pytest.mark.parametrize("batch_norm", ["per_task", pytest.param("frozen", marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("init", ["zero", pytest.param("random", marks=pytest.mark.slow)])
def test_nothing_is_forgotten(batch_norm, optimizer, init):
    logits, evaluation = Logits(), scl.ContinualEvaluation()
    module = packnet(optimizer=optimizer, batch_norm=batch_norm, init=init)
    trainer(logits, evaluation, epochs=EPOCHS).fit(module, toy_tasks(num_tasks=4))
    logits.assert_same()
    assert evaluation.matrices["task_il"].summary()["bwt"] == 0


def test_each_task_keeps_half_of_what_is_free_and_the_last_one_all():
    module = packnet()
    trainer(epochs=EPOCHS).fit(module, toy_tasks(num_tasks=5))
    for name, counts in owned(module).items():
        free, expected = module.get_parameter(name).numel(), []
        for _ in range(4):
            expected.append(round(0.5 * free))  # half to even
            free -= expected[-1]
        assert counts == [*expected, free], name


def test_equal_shares():
    module = packnet(0.0, last=True, of="share")
    trainer(epochs=EPOCHS).fit(module, toy_tasks(num_tasks=4))
    for name, counts in owned(module).items():
        share = module.get_parameter(name).numel() / 4
        assert all(abs(count - share) <= 1 for count in counts), name


def test_the_mask_holds_while_the_task_is_retrained_and_earlier_ones_are_in_it():
    watch, module = Watch(), packnet()
    trainer(watch, epochs=EPOCHS).fit(module, toy_tasks(num_tasks=3))
    learnt = scl.Subnetworks.of(module)
    for task in range(2):
        masks = {name: learnt.mask(task, name) for name in learnt.tasks[task].masks}
        for epoch in range(EPOCHS):
            for step in range(STEPS):
                alive = watch.alive[task, epoch, step]
                pruned = epoch >= EPOCHS - RETRAIN
                assert all(torch.equal(alive[n], mask) if pruned else n not in alive for n, mask in masks.items())
        assert all(not (mask & ~learnt.mask(task + 1, n)).any() for n, mask in masks.items())
    assert not watch.alive[2, EPOCHS - 1, 0]  # the last one is not pruned


AT_PRUNING = (EPOCHS - RETRAIN) * STEPS


@pytest.mark.parametrize(
    "step",
    [
        AT_PRUNING,
        AT_PRUNING + 2,
        *(pytest.param(s, marks=pytest.mark.slow) for s in (3, AT_PRUNING - 1, 2 * EPOCHS * STEPS - 3)),
    ],
)
def test_resumed_it_ends_with_the_same_bits(tmp_path, step):
    assert_resumes(packnet, step, EPOCHS, tmp_path)


def test_pruning_inside_works_in_a_module_that_knows_nothing_of_it():
    watch = Watch()
    policies = [scl.OneShotPruning(0.5, retrain=1), scl.TaskSubnetworks(), scl.Reopen("zero")]
    trainer(watch, *policies, epochs=3).fit(PlainClassifier(), toy_tasks(num_tasks=2))
    assert watch.alive[0, 2, 0] and not watch.alive[0, 1, 0]


def plain(*policies, epochs=3, tasks=True):
    run = trainer(*policies, epochs=epochs) if tasks else pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=list(policies), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    run.fit(PlainClassifier(), toy_tasks(num_tasks=2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scl.OneShotPruning(0.5, retrain=0), r"retrain=0\): how many of a task's last epochs"),
        (lambda: scl.OneShotPruning(0.5, retrain=1.5), "retrain=1.5"),
        (lambda: scl.OneShotPruning(0.5, epoch=1, retrain=1), r"epoch=1, retrain=1\): both say when"),
        (
            lambda: plain(scl.OneShotPruning(0.5, retrain=3)),
            r"retrain=3\): task 1 has 3 epochs, .* use 1 to 2, or null",
        ),
        (lambda: plain(scl.OneShotPruning(0.5, last=False), tasks=False), r"last=False\): only a sequence has a last"),
        (lambda: plain(scl.OneShotPruning(0.5, retrain=1), epochs=-1, tasks=False), "number of epochs is not known"),
        (
            lambda: trainer(epochs=EPOCHS).fit(packnet(0.0), toy_tasks(num_tasks=3)),
            "task 1 of 3 has no free weight in its mask; the free weights ended with task 0",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
