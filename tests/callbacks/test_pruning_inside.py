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
    with pytest.raises(ValueError, match=r"OneShotPruning\(epoch=4\): the fit has 4 epochs.*use 1 to 3, or null"):
        fit(scl.OneShotPruning(0.75, epoch=4), 4)


class Plain(pl.LightningModule):
    """Somebody else's module; the last layer but one is frozen at first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(64, 16),
            *(torch.nn.Linear(16, 16) for _ in range(2)),
            torch.nn.Linear(16, 4),
        )

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)

    def train_dataloader(self):
        xy = torch.utils.data.TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8) % 4)
        return torch.utils.data.DataLoader(xy, 4)


class Late(pl.callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[3])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.net[3], optimizer)


@pytest.mark.parametrize("epoch", [None, 1])
def test_a_layer_that_is_unfrozen_after_the_epoch_is_pruned_at_the_end(epoch):
    model = Plain()
    pl.Trainer(accelerator="cpu", max_epochs=4, callbacks=[scl.OneShotPruning(0.75, epoch=epoch), Late()], logger=False,
               enable_checkpointing=False, enable_progress_bar=False).fit(model)  # fmt: skip
    assert [int((model.net[i].weight == 0).sum()) for i in (1, 2, 3, 4)] == [0, 192, 192, 0]


@pytest.mark.parametrize(("epoch", "every", "said"), [(2, 4, False), (None, 4, True), (None, 6, False), (5, 2, False)])
def test_a_checkpoint_from_before_the_pruning_is_told(tmp_path, recwarn, epoch, every, said):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_epochs=every)
    pl.Trainer(accelerator="cpu", max_epochs=6, callbacks=[scl.OneShotPruning(0.5, epoch=epoch), saver], logger=False,
               enable_progress_bar=False).fit(Plain())  # fmt: skip
    assert any("the last checkpoint was written before" in str(w.message) for w in recwarn) == said


def test_a_run_that_is_resumed_past_the_epoch_is_pruned_all_the_same(tmp_path):
    """Asked for only then: a resumed run may have other settings, by an explicit path."""

    def fit(pruning, epochs, path=None):
        module = scl.ContinualModule(scl.SmallCNN(4), policies=[pruning, scl.Reopen("zero")])
        stop = Stop(epochs)
        trainer(stop, epochs=5, enable_checkpointing=False).fit(module, toy_tasks(num_tasks=1), ckpt_path=path)
        return module

    class Stop(pl.Callback):
        def __init__(self, after):
            self.after = after

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch + 1 == self.after:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    fit(scl.OneShotPruning(0.5), 3)
    module = fit(scl.OneShotPruning(0.5, epoch=2), 9, tmp_path / "x.ckpt")
    assert all(float(m.float().mean()) == pytest.approx(0.5) for m in scl.Masks.of(module).alive.values())
    assert len(scl.Masks.of(module).alive) == 3


def test_a_trial_run_of_one_batch_is_not_refused():
    module = Plain()
    pl.Trainer(fast_dev_run=True, accelerator="cpu", callbacks=[scl.OneShotPruning(0.5, epoch=2)]).fit(module)


@pytest.mark.parametrize("init", ["zero", "random"])
def test_a_reopened_part_is_drawn_at_random_for_each_task_and_the_rest_is_left_alone(init):
    class Look(pl.Callback):
        parts: list = []

        def on_after_task_end(self, trainer, pl_module, task):
            self.kept = {n: (m.clone(), pl_module.get_parameter(n).detach().clone())
                         for n, m in scl.Masks.of(pl_module).alive.items()}  # fmt: skip

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.datamodule.task and trainer.datamodule.epoch_in_task == batch_idx == 0:
                name, (before, values) = next(iter(self.kept.items()))
                alive, weight = scl.Masks.of(pl_module).alive[name], pl_module.get_parameter(name)
                opened = alive & ~before
                assert torch.equal(weight[before], values[before])
                assert bool(weight[opened].any()) == (init == "random") and not weight[~alive].any()
                places = (~before).flatten().nonzero().squeeze(1)
                self.parts.append(opened.flatten()[places])

    look = Look()
    module = scl.ContinualModule(scl.SmallCNN(8), policies=[scl.OneShotPruning(0.5), scl.Reopen(init, 0.2)])
    trainer(look, epochs=1).fit(module, toy_tasks())
    a, b = look.parts
    n = int(a.sum())
    assert not a[:n].all() and not b[:n].all() and not torch.equal(a, b)


@pytest.mark.parametrize("epochs", [2, [5, 2, 5]])
def test_an_epoch_beyond_the_task_is_refused_before_anything_is_trained(epochs):
    module = scl.EsaCL(scl.SmallCNN(4), scl.DERpp(30, 8), prune_epoch=2)
    task = 1 if epochs == 2 else 2
    with pytest.raises(
        ValueError, match=rf"OneShotPruning\(epoch=2\): task {task} has 2 epochs.*use 1, or null"
    ) as error:
        trainer(epochs=epochs).fit(module, toy_tasks())
    assert "\n" not in str(error.value) and not scl.Masks.of(module).alive


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scl.OneShotPruning(0.5, epoch=0), r"OneShotPruning\(epoch=0\).*at least 1"),
        (lambda: scl.OneShotPruning(0.5, epoch=1.5), r"epoch=1.5\): epoch is a whole number"),
        (lambda: scl.EsaCL(scl.SmallMLP(), prune_epoch=0), r"EsaCL\(prune_epoch=0\).*at least 1"),
        (lambda: scl.EsaCL(scl.SmallMLP(), reopen="zero"), r"EsaCL\(reopen='zero'\): reopen is a Reopen"),
        (lambda: scl.SharpnessAware(replays="no"), r"SharpnessAware\(replays='no'\)"),
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
