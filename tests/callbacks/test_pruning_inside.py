"""Pruning inside a task, and tasks that get a part of the pruned weights back."""

import copy
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks

EPOCHS, EPOCH, STEPS = 4, 2, 5
PART = 0.25


class Look(pl.Callback):
    """What is alive at each step, as (task, epoch, step): names to masks, and to the weights."""

    def __init__(self) -> None:
        self.alive: dict[tuple[int, int, int], dict[str, torch.Tensor]] = {}
        self.weights: dict[tuple[int, int, int], dict[str, torch.Tensor]] = {}
        self.state_of_pruned: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        data, masks = trainer.datamodule, scl.Masks.of(pl_module)
        at = data.task, data.epoch_in_task, batch_idx
        self.alive[at] = {name: mask.clone() for name, mask in masks.alive.items()}
        self.weights[at] = {name: pl_module.get_parameter(name).detach().clone() for name in masks}
        for optimizer in trainer.optimizers:
            for name, mask in masks.alive.items():
                state = optimizer.state.get(pl_module.get_parameter(name), {})
                kept = [v for v in state.values() if torch.is_tensor(v) and v.shape == mask.shape]
                assert kept
                self.state_of_pruned += [float(v[~mask].abs().sum()) for v in kept]


def kinds():
    """Of modules: this package's, and others under each kind of optimisation."""
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1)
    adam = partial(torch.optim.AdamW, lr=0.01)
    return {
        "EsaCL": lambda p: scl.EsaCL(scl.SmallCNN(8), scl.DERpp(30, 8), 0.8, prune_epoch=EPOCH, reopen=p[1]),
        "EsaCL, share": lambda p: scl.EsaCL(
            scl.SmallCNN(8), scl.DERpp(30, 8), 0.6, "share", prune_epoch=EPOCH, reopen=p[1]
        ),
        "SGD": lambda p: scl.ContinualModule(scl.SmallCNN(8), scl.ER(30, 8), optimizer=sgd, policies=list(p)),
        "AdamW": lambda p: scl.ContinualModule(scl.SmallCNN(8), optimizer=adam, policies=list(p)),
    }


@pytest.mark.parametrize("init", ["zero", "random"])
@pytest.mark.parametrize("part", [1.0, PART])
@pytest.mark.parametrize("kind", kinds())
def test_the_mask_holds_from_the_epoch_to_the_end_of_the_task(kind, part, init):
    look = Look()
    module = kinds()[kind]((scl.OneShotPruning(0.8, epoch=EPOCH), scl.Reopen(init, part)))
    trainer(look, epochs=EPOCHS).fit(module, toy_tasks(batch_size=16))
    assert set(look.state_of_pruned) == {0.0}  # momentum of pruned weights: K would be spent on them
    for task in range(3):
        first = look.alive[task, EPOCH, 0]
        assert len(first) == 3
        for epoch in (EPOCH, EPOCH + 1):
            for step in range(STEPS):
                now = look.alive[task, epoch, step]
                assert all(torch.equal(now[name], first[name]) for name in first)
                assert all(not look.weights[task, epoch, step][name][~now[name]].any() for name in now)
        before = look.alive[task, 0, 0]
        if task == 0 or part == 1:
            assert not before
            continue
        last = look.alive[task - 1, EPOCH, 0]
        for name, mask in last.items():
            pruned = int((~mask).sum())
            assert int((before[name] & ~mask).sum()) == int(part * pruned) and not (mask & ~before[name]).any()
            assert torch.equal(look.alive[task, EPOCH - 1, STEPS - 1][name], before[name])
            if "share" not in kind:
                assert int(first[name].sum()) == round(0.2 * mask.numel())
            assert not torch.equal(first[name], mask)  # what was reopened has competed


def test_frozen_weights_stay_through_a_pruning_inside_a_task():
    class Hold(pl.Callback):
        held: dict = {}

        def on_train_batch_end(self, trainer, pl_module, *_):
            for name, (mask, values) in self.held.items():
                assert torch.equal(pl_module.get_parameter(name)[mask], values)

        def on_after_task_end(self, trainer, pl_module, task):
            for name, mask in scl.Masks.of(pl_module).frozen.items():
                self.held[name] = mask.clone(), pl_module.get_parameter(name)[mask].detach().clone()

    hold, kept = Hold(), []
    module = scl.EsaCL(scl.SmallCNN(8), scl.DERpp(30, 8), 0.8, "free", prune_epoch=1, reopen=scl.Reopen("zero", PART))
    trainer(hold, epochs=2).fit(module, toy_tasks(batch_size=16))
    for name, mask in scl.Masks.of(module).frozen.items():
        kept.append(float(mask.float().mean()))
        assert module.get_parameter(name)[mask].any()
    assert all(each == pytest.approx(0.488, abs=0.01) for each in kept) and len(hold.held) == 3


def test_a_task_that_ends_before_the_epoch_is_pruned_at_its_end():
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.datamodule.task == 1:
                trainer.datamodule.end_task()

    class Density(pl.Callback):
        found: list = []

        def on_after_task_end(self, trainer, pl_module, task):
            self.found.append(len(scl.Masks.of(pl_module).alive))

    density = Density()
    module = scl.ContinualModule(scl.SmallCNN(4), policies=[scl.OneShotPruning(0.5, epoch=2), scl.Reopen("zero")])
    trainer(Stop(), density, epochs=4).fit(module, toy_tasks())
    assert density.found == [3, 3, 3]
    assert all(float(m.float().mean()) == pytest.approx(0.5) for m in scl.Masks.of(module).alive.values())


def test_without_a_schedule_the_epoch_is_that_of_the_fit():
    class Loose(PlainClassifier):
        def train_dataloader(self):
            xy = torch.utils.data.TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8) % 4)
            return torch.utils.data.DataLoader(xy, 4)

    class Zeros(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.seen.append(int((pl_module.net[3].weight == 0).sum()))

    zeros, model = Zeros(), Loose()

    def fit(pruning, epochs):
        pl.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[pruning, zeros], logger=False,
                   enable_checkpointing=False, enable_progress_bar=False).fit(model)  # fmt: skip

    fit(scl.OneShotPruning(0.75, epoch=2), 4)
    n = model.net[3].weight.numel()
    assert zeros.seen == [0, 0, round(0.75 * n), round(0.75 * n)]
    with pytest.raises(ValueError, match=r"OneShotPruning\(epoch=4\): the fit has 4 epochs.*use 1 to 3"):
        fit(scl.OneShotPruning(0.75, epoch=4), 4)


@pytest.mark.parametrize("epochs", [2, [5, 2, 5]])
def test_an_epoch_beyond_the_task_is_refused_before_anything_is_trained(epochs):
    module = scl.EsaCL(scl.SmallCNN(4), scl.DERpp(30, 8), prune_epoch=2)
    task = 1 if epochs == 2 else 2
    with pytest.raises(ValueError, match=rf"OneShotPruning\(epoch=2\): task {task} has 2 epochs.*use 1") as error:
        trainer(epochs=epochs).fit(module, toy_tasks())
    assert "\n" not in str(error.value) and not scl.Masks.of(module).alive


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scl.OneShotPruning(0.5, epoch=0), r"OneShotPruning\(epoch=0\).*at least 1"),
        (lambda: scl.OneShotPruning(0.5, epoch=1.5), r"epoch=1.5\): epoch is a whole number"),
        (lambda: scl.EsaCL(scl.SmallMLP(), prune_epoch=-1), r"epoch=-1"),
        (lambda: scl.Reopen(part=0), r"Reopen\(part=0\): the fraction .* in \(0, 1\]"),
        (lambda: scl.Reopen(part=1.5), r"Reopen\(part=1.5\)"),
        (lambda: scl.Reopen(part=float("nan")), r"Reopen\(part=nan\)"),
        (lambda: scl.Reopen(part="half"), r"part='half'\): part is a number"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_second_fit_a_copy_and_another_seed():
    """Reopened parts are drawn by the run's seed; the same run twice is the same."""

    def masks(seed):
        pl.seed_everything(seed, verbose=False)
        module = scl.EsaCL(scl.SmallCNN(4), scl.DERpp(30, 8), prune_epoch=1, reopen=scl.Reopen("zero", PART))
        trainer(scl.RandomState(), epochs=2).fit(copy.deepcopy(module), toy_tasks())
        trainer(scl.RandomState(), epochs=2).fit(module, toy_tasks())
        return scl.Masks.of(module).alive

    a, b, other = masks(1), masks(1), masks(2)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], other[name]) for name in a)
