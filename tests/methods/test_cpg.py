"""CPG: stages and their ends, sparsities along a cubic, growth that starts over, picks, and nothing forgotten."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from logits_of_tasks import Logits
from stopped import assert_resumes
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.callbacks import compact_pick_grow
from lightning_sparse_cl.callbacks.gradual_pruning import cubic
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}
SHORT = {
    "learn": 2, "compact": 2, "ramp": 1, "retrain": 2, "patience": 1, "steps": (0.3, 0.6), "interval": 1, "fits": 0.5,
}  # fmt: skip
EPOCHS = 11  # two more than all stages can take


def cpg(target=0.5, optimizer="sgd", backbone=None, batch_norm="per_task", stages={}, **options):  # noqa: B006
    return scl.CPG(
        backbone or scl.SmallCNN(8),
        scl.CompactPickGrow(target, **(SHORT | stages)),
        scl.TaskSubnetworks(batch_norm, "share"),
        optimizer=OPTIMIZERS[optimizer],
        mask_optimizer=partial(torch.optim.Adam, lr=0.002),
        **options,
    )


def data(num_tasks=3, **options):
    return toy_tasks(num_tasks, **({"val_fraction": 0.2} | options))


def accuracies(monkeypatch, of_task, fits=1.0):
    """Have the callback find these accuracies in turn, and on the training samples always the same."""
    found = iter(of_task)
    monkeypatch.setattr(compact_pick_grow, "held_out_accuracy", lambda *_: next(found))
    monkeypatch.setattr(compact_pick_grow, "accuracy_on", lambda *_: fits)


class Watch(scl.TaskCallback):
    """Stage and epoch, and how many weights of each layer are alive, after every step."""

    after = (scl.CompactPickGrow,)

    def __init__(self):
        self.stages, self.alive = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.stages.append((pl_module.stages._at["stage"], pl_module.stages._at["epoch"]))
        self.alive.append({n: int(m.sum()) for n, m in scl.Masks.of(pl_module).alive.items()})


@pytest.mark.parametrize("batch_norm", ["per_task", pytest.param("frozen", marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("backbone", ["cnn", pytest.param("residual", marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", [0.9, pytest.param(1.1, marks=pytest.mark.slow)])
def test_nothing_is_forgotten(backbone, optimizer, batch_norm, target):
    torch.manual_seed(0)
    logits, evaluation = Logits(), scl.ContinualEvaluation()
    module = cpg(target, optimizer, scl.ResNet18(4) if backbone == "residual" else None, batch_norm)
    trainer(logits, evaluation, epochs=EPOCHS).fit(module, data(4))
    logits.assert_same()
    assert evaluation.matrices["task_il"].summary()["bwt"] == 0


def test_the_cubic_ramp():
    assert cubic(0.5, 0.0, 0.1) == pytest.approx(0.0875)
    assert [cubic(u, 0.1, 0.9) for u in (-1, 0, 1, 2)] == pytest.approx([0.1, 0.1, 0.9, 0.9])


def test_sparsity_rises_along_the_cubic_to_exactly_what_was_asked(monkeypatch):
    accuracies(monkeypatch, [1.0] * 3)
    module, watch = cpg(stages={"sizes": (1.0,)}), Watch()
    trainer(watch, epochs=EPOCHS).fit(module, data(1))
    size, name = module.get_parameter("backbone.3.weight").numel(), "backbone.3.weight"
    assert [s for s, _ in watch.stages] == ["learn"] * 8 + ["compact"] * 16
    expected = [0.0] * 8
    for before, after in ((0.0, 0.3), (0.3, 0.6)):  # four steps an epoch, of which the first epoch is the ramp
        expected += [cubic((i + 1) / 4, before, after) for i in range(4)] + [after] * 4
    assert [a[name] for a in watch.alive] == [size - round(s * size) for s in expected]
    assert module.stages.summary()["sparsity"] == [0.6]


@pytest.mark.parametrize(
    ("reached", "target", "kept", "steps"),
    [
        ([0.9, 0.8, 0.8], 0.85, 0.0, 24),  # the target is reached before pruning only
        ([0.9, 0.9, 0.8], 0.85, 0.3, 24),
        ([0.9, 0.8, 0.9], 0.85, 0.6, 24),  # the largest sparsity that reaches it, whatever came before
    ],
)
def test_the_largest_sparsity_that_reaches_the_target_is_kept(reached, target, kept, steps, monkeypatch):
    accuracies(monkeypatch, reached)
    module, watch = cpg(target, stages={"sizes": (1.0,)}), Watch()
    trainer(watch, epochs=EPOCHS).fit(module, data(1))
    assert module.stages.summary()["sparsity"] == [kept] and len(watch.stages) == steps
    used = scl.Subnetworks.of(module).mask(0, "backbone.3.weight")
    assert int(used.sum()) == used.numel() - round(kept * used.numel())


@pytest.mark.parametrize("spare", [0, 1])
def test_the_last_stage_may_end_with_the_task(spare, monkeypatch):
    accuracies(monkeypatch, [0.9] * 3)
    stages = {"sizes": (1.0,), "retrain": 0}
    module = cpg(0.85, stages=stages)
    trainer(epochs=6 + spare).fit(module, data(1))
    assert module.stages.summary()["sparsity"] == [0.6]


@pytest.mark.parametrize(("reached", "fits"), [(0.1, 0.0), (0.1, 1.0), (0.9, 0.0)])
def test_what_is_missed_in_the_largest_network_leaves_an_equal_share_to_each_later_task(reached, fits, monkeypatch):
    accuracies(monkeypatch, [reached] * 99, fits)
    module = cpg(0.5, stages={"sizes": (1.0,), "steps": (0.3, 0.5, 0.6, 0.7, 0.9)})
    trainer(epochs=EPOCHS + 6).fit(module, data())
    assert module.stages.summary()["sparsity"] == [0.7, 0.5, 0.0]
    kept = next(p for p in module.policies if isinstance(p, scl.TaskSubnetworks))
    assert kept.summary()["used"] == pytest.approx([0.3, 0.65, 1.0], abs=0.02)


def test_samples_that_are_not_fitted_make_it_grow(monkeypatch):
    accuracies(monkeypatch, [0.9] * 99, fits=0.4)
    module = cpg(0.5)
    trainer(epochs=EPOCHS).fit(module, data(1))
    assert module.stages.summary()["size"] == [1.0]


def test_learning_rates_fall_by_stages(monkeypatch):
    accuracies(monkeypatch, [1.0] * 99)
    seen = {}

    class Rates(scl.TaskCallback):
        after = (scl.CompactPickGrow,)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            at = trainer.datamodule.task, pl_module.stages._at["stage"], pl_module.stages._at["epoch"]
            states = [len(o.state) for o in trainer.optimizers] if batch_idx == 0 else None
            rates = [round(o.param_groups[0]["lr"] / o.defaults["lr"], 6) for o in trainer.optimizers]
            seen.setdefault(at, (rates, states))

    module = cpg(0.5, stages={"learn": 10, "sizes": (1.0,), "retrain": 2})
    trainer(Rates(), epochs=EPOCHS + 10).fit(module, data(2))
    learn = [seen[1, "learn", e][0] for e in range(10)]
    assert learn == [[1, 1]] * 5 + [[0.1, 0.2]] * 2 + [[0.1, 0]] + [[0.01, 0]] * 2
    assert seen[1, "compact", 0][0] == [0.1, 0] and seen[1, "retrain", 0][0] == [0.1, 0.2]
    assert all(seen[1, stage, 0][1] == [0, 0] for stage in ("learn", "compact", "retrain")), "momentum starts afresh"
    assert seen[1, "learn", 1][1][0] > 0


def test_retraining_that_gains_nothing_changes_nothing(monkeypatch):
    accuracies(monkeypatch, [0.9] * 99)
    networks = []

    class Look(scl.TaskCallback):
        after = (scl.CompactPickGrow,)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.datamodule.task == 1 and pl_module.stages._at["stage"] == "retrain" and not networks:
                networks.append(pl_module.stages._best["states"][0])

        def on_task_end(self, trainer, pl_module, task):
            if task == 1:
                networks.append({n: t.clone() for n, t in pl_module.network.state_dict().items()})

    trainer(Look(), epochs=EPOCHS).fit(cpg(0.5), data(2))
    assert all(torch.equal(networks[0][name], tensor) for name, tensor in networks[1].items())


def test_samples_that_are_not_fitted_any_more_end_the_pruning(monkeypatch):
    found, fits = iter([0.9, 0.9, 0.9]), iter([1.0, 1.0, 0.4])
    monkeypatch.setattr(compact_pick_grow, "held_out_accuracy", lambda *_: next(found))
    monkeypatch.setattr(compact_pick_grow, "accuracy_on", lambda *_: next(fits))
    module = cpg(0.85, stages={"sizes": (1.0,)})
    trainer(epochs=EPOCHS).fit(module, data(1))
    assert module.stages.summary()["sparsity"] == [0.3]


def test_a_target_that_is_reached_at_once_never_grows_and_one_that_is_never_reached_grows_once():
    for target, sizes in ((0.0, [2 / 3] * 3), (1.1, [1.0] * 3)):
        torch.manual_seed(0)
        module = cpg(target)
        trainer(epochs=EPOCHS).fit(module, data())
        summary = module.stages.summary()
        assert summary["size"] == pytest.approx(sizes)
        if target:  # in the largest network enough is left for the tasks that come: 0.7 of 3, 0.5 of 2, all of the last
            assert summary["sparsity"] == [0.6, 0.6, 0.0]
        else:
            assert summary["sparsity"] == [0.6] * 3
        closed = module.get_parameter("backbone.3.weight").detach()[round(8 * (2 / 3) ** 0.5) :]
        assert closed.any() == bool(target)


def test_growth_starts_the_task_over_and_keeps_what_was_learnt(monkeypatch):
    learnt, networks = [1.0, 1.0, 1.0, 0.2], []
    accuracies(monkeypatch, [*learnt, *[1.0] * 20])

    class Look(scl.TaskCallback):
        def on_task_end(self, trainer, pl_module, task):
            networks.append({n: t.clone() for n, t in pl_module.network.state_dict().items()})

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if (
                trainer.datamodule.task == 1
                and pl_module.stages._at == {"stage": "learn", "epoch": 0}
                and batch_idx == 0
            ):
                networks.append({n: t.clone() for n, t in pl_module.network.state_dict().items()})

    module, logits = cpg(0.5), Logits()
    trainer(logits, Look(), epochs=EPOCHS).fit(module, data(2))
    assert module.stages.summary()["size"] == pytest.approx([2 / 3, 1.0])
    logits.assert_same()
    _, begun, again, _ = networks
    name, width = "backbone.3.weight", round(8 * (2 / 3) ** 0.5)
    old = again[name][:width, :width]
    assert torch.equal(old, begun[name][:width, :width])
    assert again[name][width:].any() and not begun[name][width:].any() and again[name][:width, width:].any()
    assert torch.equal(begun["backbone.1.running_mean"], again["backbone.1.running_mean"])


def test_later_tasks_pick_among_old_weights_and_never_change_them():
    torch.manual_seed(0)
    module = cpg(0.5, optimizer="adamw", stages={"learn": 4})
    module.mask_optimizer = partial(torch.optim.SGD, lr=20.0)
    trainer(epochs=EPOCHS + 4).fit(module, data())
    learnt = scl.Subnetworks.of(module)
    part = []
    for name in learnt.tasks[0].masks:
        first, second = learnt.mask(0, name), learnt.mask(1, name)
        part.append(int((first & second).sum()) / int(first.sum()))
    assert 0 < min(part) < 1, "some old weights are left out"


def test_picks_start_anew_with_every_task_and_with_retraining():
    seen = {}

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            at = (trainer.datamodule.task, pl_module.stages._at["stage"], pl_module.stages._at["epoch"], batch_idx)
            if at[2:] == (0, 0) and at[1] in ("learn", "retrain"):
                seen[at] = all(bool((s == 0.01).all()) for s in pl_module.picks.scores)

    trainer(Look(), epochs=EPOCHS).fit(cpg(0.0), data())
    assert len(seen) == 5 and all(seen.values())


def test_whole_gradients_are_counted_only_while_picks_learn():
    asked = {}

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            asked.setdefault(
                (trainer.datamodule.task, pl_module.stages._at["stage"]), bool(pl_module.whole_gradients())
            )

    trainer(Look(), epochs=EPOCHS).fit(cpg(0.0), data(2))
    expected = {(0, "learn"): False, (0, "compact"): False, (1, "learn"): True, (1, "compact"): False}
    assert asked == expected | {(1, "retrain"): True}


@pytest.mark.parametrize("step", [50, *(pytest.param(s, marks=pytest.mark.slow) for s in (3, 9, 14, 22, 26, 41, 57))])
@pytest.mark.parametrize("target", [0.5, pytest.param(1.1, marks=pytest.mark.slow)])
def test_resumed_it_ends_with_the_same_bits(target, step, tmp_path):
    assert_resumes(lambda: cpg(target), step, EPOCHS, tmp_path, val_fraction=0.2)


@pytest.mark.parametrize(
    "changed",
    [
        {"learn": 1}, {"compact": 1}, {"ramp": 2}, {"retrain": 1}, {"patience": 2}, {"steps": [0.5]}, {"interval": 2},
        {"sizes": [0.5, 1.0]}, {"fits": 0.0}, {"target": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_every_parameter_does_something(changed, monkeypatch):
    reached = [0.3, *[0.9] * 6, 0.95, 0.96, 0.9, 0.97] + [0.9] * 9
    accuracies(monkeypatch, reached, fits=0.4)
    results = []
    for options in ({}, changed):
        accuracies(monkeypatch, reached, fits=0.8 if "fits" not in changed else 0.4)
        torch.manual_seed(0)
        base = SHORT | {"target": 0.5, "retrain": 4, "fits": 0.5, "interval": 3} | options
        module = scl.CPG(scl.SmallCNN(8), scl.CompactPickGrow(**base))
        trainer(epochs=EPOCHS + 2).fit(module, data(2))
        results.append(torch.cat([p.detach().flatten() for p in module.network.parameters()]))
    assert not torch.equal(*results)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *(
            (lambda t=t: scl.CompactPickGrow(t), r"CompactPickGrow\(target=.*\): an accuracy or a run's metrics.json")
            for t in (None, [], [None], {}, (0.5, 0.5), True, ["a.json", 0.5])
        ),
        (lambda: scl.CompactPickGrow(0.5, steps=None), r"steps=None\): a list of fractions"),
        (lambda: scl.CompactPickGrow(0.5, steps="abc"), r"steps='abc'\): a list of fractions"),
        (lambda: scl.CompactPickGrow(0.5, sizes=[None]), r"CompactPickGrow\(sizes=None\)"),
        (lambda: scl.CompactPickGrow(0.5, fits=2), r"fits=2\): an accuracy, in \[0, 1\]"),
        (lambda: scl.CompactPickGrow(0.5, fits=float("nan")), r"fits=nan\)"),
        (lambda: scl.CPG(scl.SmallCNN(4), "stages"), r"CPG\(stages='stages'\): a CompactPickGrow"),
        (
            lambda: trainer(scl.TaskEarlyStopping("val/acc"), epochs=EPOCHS).fit(cpg(), data()),
            "its stages end by themselves, and set the learning rates; leave TaskEarlyStopping out",
        ),
        (
            lambda: trainer(epochs=EPOCHS).fit(cpg(policies=[scl.GradualPruning(0.5)]), data()),
            "CompactPickGrow: GradualPruning makes masks of the same weights; use one of them",
        ),
        (
            lambda: trainer(epochs=EPOCHS).fit(cpg(reopen=scl.Reopen("zero", 0.3)), data()),
            r"leave Reopen\(part=0.3\) out",
        ),
        (lambda: scl.CompactPickGrow(-0.1), r"CompactPickGrow\(target=-0.1\): an accuracy"),
        (lambda: scl.CompactPickGrow(0.5, learn=0), r"CompactPickGrow\(learn=0\): a whole number, at least 1"),
        (lambda: scl.CompactPickGrow(0.5, compact=2, ramp=3), r"CompactPickGrow\(ramp=3\): at most compact=2"),
        (lambda: scl.CompactPickGrow(0.5, steps=[0.5, 0.3]), r"steps=\[0.5, 0.3\]\): each is larger"),
        (lambda: scl.CompactPickGrow(0.5, steps=[]), r"steps=\[\]\): a list"),
        (lambda: scl.CompactPickGrow(0.5, sizes=[0.5]), r"sizes=\[0.5\]\): .*of which the last is 1"),
        (lambda: trainer(epochs=8).fit(cpg(), data()), r"all stages take up to 10 epochs, and task 0 has 8"),
        (lambda: trainer(epochs=EPOCHS).fit(cpg(), toy_tasks()), "set the data module's val_fraction"),
        (lambda: trainer(epochs=EPOCHS).fit(cpg([0.5, 0.5]), data()), r"target=\[0.5, 0.5\]\): 2 held-out"),
        (
            lambda: trainer(epochs=EPOCHS).fit(cpg(objective=scl.LwF()), data()),
            "CPG: LwF computes with the network's weights",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_module_without_picks_is_refused():
    with pytest.raises(TypeError, match="PlainClassifier has no WeightScores as `picks`"):
        trainer(scl.CompactPickGrow(0.5, **SHORT), epochs=EPOCHS).fit(PlainClassifier(), data())
