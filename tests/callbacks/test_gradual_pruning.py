"""Sparsity that rises along a cubic inside each task: counts, ends, zeros that stay, resuming, other modules."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from logits_of_tasks import Logits
from stopped import assert_resumes
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.callbacks.gradual_pruning import cubic
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks

NAME = "backbone.3.weight"


class Counts(scl.TaskCallback):
    """Alive weights of a layer while each batch is trained, by task."""

    after = (scl.ScorePruning,)

    def __init__(self, name=NAME):
        self.name, self.counts = name, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        alive, task = scl.Masks.of(pl_module).alive, getattr(trainer.datamodule, "task", 0)
        weight = pl_module.get_parameter(self.name)
        self.counts.setdefault(task, []).append(int(alive[self.name].sum()) if self.name in alive else weight.numel())
        assert self.name not in alive or not weight[~alive[self.name]].any()


def module(policies):
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    return scl.ContinualModule(scl.SmallCNN(8), optimizer=sgd, policies=policies)


def loader(n=64, batch_size=16):
    samples = torch.utils.data.TensorDataset(torch.rand(n, 1, 8, 8), torch.arange(n) % 6)
    return torch.utils.data.DataLoader(samples, batch_size)


def test_the_sparsity_rises_along_the_cubic_in_each_task_to_what_was_asked():
    counts, pruning = Counts(), scl.GradualPruning(0.8, 0.25, 0.75, times=5, dense=["head.weight"])
    trainer(counts, epochs=4).fit(module([pruning, scl.Reopen("zero")]), toy_tasks(2))  # 20 steps a task
    size = 8 * 8 * 9
    parts = [min(max(int((step / 20 - 0.25) / 0.5 * 5 + 1e-9), 0), 5) / 5 for step in range(20)]
    expected = [size - round(cubic(part, 0, 0.8) * size) for part in parts]
    assert expected[0] == size and expected[-1] == round(0.2 * size) and len(set(expected)) == 6
    assert counts.counts[0] == expected and counts.counts[1] == expected


@pytest.mark.parametrize("of", ["free", "share"])
def test_with_subnetworks_the_weights_are_divided_and_nothing_is_forgotten(of):
    pruning = scl.GradualPruning(0.5 if of == "free" else 0.0, times=4, of=of, dense=["head.weight"])
    model, logits = scl.PackNet(scl.SmallCNN(8), pruning), Logits()
    trainer(logits, epochs=3).fit(model, toy_tasks(3))
    logits.assert_same()
    learnt, size = scl.Subnetworks.of(model), 8 * 8 * 9
    used = [int(learnt.used(NAME, t).sum()) for t in (1, 2, 3)]
    assert used == ([size // 2, size * 3 // 4, size * 7 // 8] if of == "free" else [size // 3, size * 2 // 3, size])


def test_the_last_task_keeps_all_if_told_to():
    counts = Counts()
    pruning = scl.GradualPruning(0.5, times=4, dense=["head.weight"], last=False)
    trainer(counts, epochs=2).fit(module([pruning, scl.Reopen("zero")]), toy_tasks(2))
    assert counts.counts[0][-1] == 288 and set(counts.counts[1]) == {576}


def test_a_task_that_ends_early_is_pruned_at_its_end():
    class End(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.datamodule.epoch_in_task == 1:
                trainer.datamodule.end_task()

    model = module([scl.GradualPruning(0.8, 0.0, 1.0, times=5)])
    trainer(End(), epochs=8).fit(model, toy_tasks(1))
    assert int(scl.Masks.of(model).alive[NAME].sum()) == round(0.2 * 8 * 8 * 9)


def test_in_another_module_without_tasks():
    model, counts = PlainClassifier(6, 8), Counts("net.3.weight")
    pruning, quiet = scl.GradualPruning(0.9, until=0.5, times=4), {"logger": False, "enable_checkpointing": False}
    pl.Trainer(accelerator="cpu", max_epochs=4, callbacks=[pruning, counts], **quiet).fit(model, loader())
    assert counts.counts[0][0] == 8 * 8 * 9 and set(counts.counts[0][8:]) == {round(0.1 * 8 * 8 * 9)}
    assert len(set(counts.counts[0])) == 5


@pytest.mark.parametrize("step", [7, *(pytest.param(s, marks=pytest.mark.slow) for s in (2, 12, 18, 27))])
def test_resumed_it_ends_with_the_same_bits(step, tmp_path):
    make = lambda: scl.PackNet(scl.SmallCNN(8), scl.GradualPruning(0.5, times=6, dense=["head.weight"]))  # noqa: E731
    assert_resumes(make, step, 3, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.5, "until": 0.5}, r"start=0.5, until=0.5\): parts of a task"),
        ({"until": 1.5}, r"until=1.5\)"),
        ({"times": 0}, r"times=0\): a whole number, at least 1"),
        ({"of": "all"}, r"GradualPruning\(of='all'\): of is 'free' or 'share'"),
        ({"sparsity": 1.0}, r"GradualPruning\(sparsity=1.0\)"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        scl.GradualPruning(**({"sparsity": 0.5} | options))


def test_the_end_must_be_known():
    quiet = {"logger": False, "enable_checkpointing": False}
    run = pl.Trainer(accelerator="cpu", max_epochs=-1, callbacks=[scl.GradualPruning(0.9)], **quiet)
    with pytest.raises(ValueError, match="the end of the training is not known"):
        run.fit(PlainClassifier(6, 8), loader(8, 4))
