"""A task that was learnt computes the same bits for ever; its subnetwork has exactly the weights that it should."""

from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from logits_of_tasks import Logits
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.callbacks.drop_grow import cosine
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks
from lightning_sparse_cl.sparsity.distributions import counts

OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
}
HEAD = ["head.weight"]
EXCHANGE = dict(fraction=0.5, interval=3, until=1.0, final=0.005, dense=HEAD)
GROWTH = [scl.SET, scl.UnfiredGrowth, scl.RigL, scl.MomentumGrowth, scl.AdaptiveGrowth]


def dst(growth=scl.RigL, optimizer="adam", width=8, sparsity=0.6, distribution="erk", **subnetworks):
    rule = growth(sparsity, distribution=distribution, **EXCHANGE)
    backbone = scl.SmallCNN(width)
    return scl.ContinualDST(
        backbone, growth=rule, subnetworks=scl.TaskSubnetworks(**subnetworks), optimizer=OPTIMIZERS[optimizer]
    )


@pytest.mark.parametrize("batch_norm", ["per_task", "frozen"])
@pytest.mark.parametrize(("growth", "optimizer"), [*((g, "adam") for g in GROWTH), (scl.SET, "sgd"), (scl.RigL, "sgd")])
def test_nothing_is_forgotten(growth, optimizer, batch_norm):
    logits, evaluation = Logits(), scl.ContinualEvaluation()
    module = dst(growth, optimizer, batch_norm=batch_norm)
    trainer(logits, evaluation, epochs=3).fit(module, toy_tasks(num_tasks=4))
    logits.assert_same()
    R = evaluation.matrices["task_il"].R
    assert all(torch.equal(R[i, : t + 1], R[-1, : t + 1]) for t in range(4) for i in range(t, 4))
    assert evaluation.matrices["task_il"].summary()["bwt"] == 0


def test_shared_batch_norm_does_forget():
    logits = Logits()
    trainer(logits, epochs=3).fit(dst(batch_norm="shared"), toy_tasks(num_tasks=3))
    with pytest.raises(AssertionError):
        logits.assert_same()


def test_nothing_is_forgotten_where_tasks_share_their_classes():
    logits, evaluation = Logits(), scl.ContinualEvaluation()
    module = scl.ContinualDST(
        scl.SmallMLP([32, 32]), growth=scl.SET(0.6, **EXCHANGE), optimizer=partial(torch.optim.Adam, lr=0.01)
    )
    trainer(logits, evaluation, epochs=1).fit(module, scl.PermutedDigits(num_tasks=3, batch_size=32))
    logits.assert_same()
    assert evaluation.matrices["task_il"].summary()["bwt"] == 0
    assert evaluation.matrices["task_il"].summary()["acc"] > 0.5 > 0.2 > evaluation.matrices["task_il"].baseline.mean()


def test_a_module_is_not_trained_twice():
    module = dst()
    trainer(epochs=1).fit(module, toy_tasks())
    with pytest.raises(ValueError, match="this ContinualDST has already learnt 3 tasks"):
        trainer(epochs=1).fit(module, toy_tasks())


class Counts(pl.Callback):
    """After every step: each layer has its number, what is frozen has its value, what is off is zero."""

    def on_task_start(self, trainer, pl_module, task):
        masks = scl.Masks.of(pl_module)
        self.frozen = {n: (f.clone(), masks.held(n).clone()) for n, f in masks.frozen.items()}
        self.shared = self.dropped = 0
        self.last = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.datamodule.epoch_in_task == batch_idx == 0:
            assert not getattr(pl_module.policies[2], "_kept", None)  # nothing of the last task is remembered

    def on_train_batch_end(self, trainer, pl_module, *_):
        masks = scl.Masks.of(pl_module)
        shapes = {n: pl_module.get_parameter(n).shape for n in masks}
        assert {n: int(m.sum()) for n, m in masks.alive.items()} == counts("", "erk", shapes, 0.4)
        for name, alive in masks.alive.items():
            weight = pl_module.get_parameter(name)
            assert not weight[~alive].any()
            if name in self.frozen:
                frozen, value = self.frozen[name]
                assert torch.equal(weight[frozen & alive], value[frozen & alive])
                assert torch.equal(masks.held(name)[frozen], value[frozen])
                self.shared += int((frozen & alive).sum())
                self.dropped += int((frozen & self.last.get(name, alive) & ~alive).sum())
            self.last[name] = alive

    def on_task_end(self, trainer, pl_module, task):
        assert (self.shared > 0) == (task > 0) == (self.dropped > 0)  # frozen weights compete in the drop


@pytest.mark.parametrize("growth", GROWTH)
def test_counts_values_and_zeros_after_every_step(growth):
    trainer(Counts(), epochs=3).fit(dst(growth), toy_tasks(num_tasks=3))


class Alive(pl.Callback):
    """Masks of one layer after every step, by task."""

    def __init__(self, name="backbone.3.weight"):
        self.name, self.tasks, self.kept = name, [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.datamodule.epoch_in_task == batch_idx == 0:
            self.tasks.append([scl.Masks.of(pl_module).alive[self.name]])

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.tasks[-1].append(scl.Masks.of(pl_module).alive[self.name])


def test_unfired_growth_takes_what_was_never_alive_in_the_task_as_long_as_there_is_some():
    alive = Alive()
    trainer(alive, epochs=3).fit(dst(scl.UnfiredGrowth, sparsity=0.8, distribution="uniform"), toy_tasks(num_tasks=2))
    for masks in alive.tasks:
        fired, exhausted = masks[0].clone(), 0
        for before, after in pairwise(masks):
            grown = after & ~before
            if grown.any():
                exhausted += int((~fired).sum() < grown.sum())
                assert exhausted or not (grown & fired).any()
                fired |= after
        assert not exhausted or fired.all()
    assert not torch.equal(alive.tasks[0][0], alive.tasks[1][0])


def test_adaptive_growth_changes_from_random_to_gradient():
    class Asked(pl.Callback):
        def __init__(self):
            self.by_task = {}

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.by_task.setdefault(trainer.datamodule.task, set()).add(bool(scl.Enforcement.of(pl_module).whole))

    asked, rule = Asked(), scl.AdaptiveGrowth(0.6, **EXCHANGE)
    module = scl.ContinualDST(scl.SmallCNN(8), growth=rule, optimizer=OPTIMIZERS["adam"])
    run = trainer(asked, epochs=2)
    run.callbacks = [asked] + [c for c in run.callbacks if c is not asked]
    run.fit(module, toy_tasks(num_tasks=6))
    assert [True in asked.by_task[t] for t in range(6)] == [False, False, False, True, True, True]


def test_the_fraction_follows_the_papers_cosine():
    assert [cosine(t, 0.5, 0.005) for t in (0, 0.5, 1)] == pytest.approx([0.5, 0.2525, 0.005], abs=1e-12)


def test_it_works_in_a_module_that_knows_nothing_of_it():
    torch.manual_seed(0)
    logits, evaluation, model = Logits(), scl.ContinualEvaluation(), PlainClassifier(6, 8)
    model.configure_optimizers = lambda: torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.01)
    keys = list(model.state_dict())
    policies = [scl.TaskSubnetworks(), scl.Reopen(), scl.SET(0.5, interval=3, dense=["net.8.weight"])]
    trainer(*policies, logits, evaluation, epochs=3).fit(model, toy_tasks(num_tasks=3))
    logits.assert_same()
    assert evaluation.matrices["task_il"].summary()["bwt"] == 0 and list(model.state_dict()) == keys
    assert evaluation.matrices["task_il"].summary()["acc"] > 0.8


def test_tasks_that_keep_their_own_weights_by_pruning():
    """PackNet with masks a task: prune the free weights, freeze, remember."""
    logits, model = Logits(), PlainClassifier(6, 8)
    policies = [scl.OneShotPruning(0.5, dense=["net.8.weight"]), scl.TaskSubnetworks(), scl.Reopen()]
    trainer(*policies, logits, epochs=3).fit(model, toy_tasks(num_tasks=3))
    logits.assert_same()
    used = policies[1].summary()["used"]
    assert used == pytest.approx([0.5, 0.75, 0.875], abs=0.01)


def test_summary_against_counting_by_hand():
    run, module = trainer(epochs=2), dst(scl.SET)
    run.fit(module, toy_tasks(num_tasks=3))
    shared, learnt = module.policies[0].summary(), scl.Subnetworks.of(module)
    names = [n for n in scl.Masks.of(module)]
    total = sum(module.get_parameter(n).numel() for n in names)
    union = {n: torch.zeros_like(learnt.mask(0, n)) for n in names}
    for t in range(3):
        masks = {n: learnt.mask(t, n) for n in names}
        size = sum(int(m.sum()) for m in masks.values())
        assert shared["free_in_mask"][t] == sum(int((masks[n] & ~union[n]).sum()) for n in names) / size
        union = {n: union[n] | masks[n] for n in names}
        assert shared["used"][t] == sum(int(u.sum()) for u in union.values()) / total
        assert all(torch.equal(learnt.used(n, t + 1), union[n]) for n in names)
        both = [sum(int((masks[n] & learnt.mask(j, n)).sum()) for n in names) for j in range(3)]
        assert shared["overlap"][t] == [b / size for b in both]
        own, whole = (sum(p.numel() for p in m.parameters()) for m in (learnt.network(t), module.network))
        assert shared["compact"][t] == own / whole
        for name in names:
            assert shared["density"][name][t] == pytest.approx(masks[name].float().mean().item())
    assert size == round(0.4 * total)


def test_a_loaded_module_answers_without_a_trainer(tmp_path):
    module = dst(scl.SET)
    run = trainer(epochs=2)
    run.fit(module, toy_tasks(num_tasks=3))
    run.save_checkpoint(tmp_path / "run.ckpt")
    x = torch.rand(5, 1, 8, 8)
    loaded = scl.ContinualDST.load_from_checkpoint(
        tmp_path / "run.ckpt", backbone=scl.SmallCNN(8), growth=scl.SET(0.6, dense=HEAD), weights_only=True
    ).eval()
    assert torch.equal(loaded(x), module.eval()(x))
    for task, classes in enumerate(((0, 1), (2, 3), (4, 5))):
        labels = loaded.predict(x, task)
        assert torch.equal(labels, module.predict(x, task)) and set(labels.tolist()) <= set(classes)
    with pytest.raises(ValueError, match="task 3 was never trained; this module has learnt tasks 0 to 2"):
        loaded.predict(x, 3)


def test_more_tasks_than_capacity_is_said_and_sharing_goes_on_only_when_told():
    with pytest.raises(
        ValueError, match=r"task 1 of 3 has no free weight in its mask; the free weights ended with task 0"
    ):
        trainer(epochs=1).fit(dst(sparsity=0.0), toy_tasks())
    logits, module = Logits(), dst(sparsity=0.0, full="share")
    trainer(logits, epochs=3).fit(module, toy_tasks())
    logits.assert_same()
    assert module.policies[0].summary()["free_in_mask"] == [1, 0, 0]


def test_frozen_batch_norm_normalises_by_the_first_tasks_statistics():
    class Check(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            norms = [m for m in pl_module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
            assert {m.training for m in norms} == {trainer.datamodule.task == 0}

    trainer(Check(), epochs=1).fit(dst(batch_norm="frozen"), toy_tasks())


@pytest.mark.parametrize(
    "backbone", [lambda: scl.VGG16(2, []), lambda: scl.SmallImageMobileNetV2(0.25), lambda: scl.ResNet18(4)]
)
def test_nothing_is_forgotten_by_the_papers_backbones(backbone):
    logits, rule = Logits(), scl.RigL(0.5, distribution="erk", **EXCHANGE)
    module = scl.ContinualDST(backbone(), growth=rule, optimizer=OPTIMIZERS["adam"])
    trainer(logits, epochs=1).fit(module, toy_tasks(size=16))
    logits.assert_same()


def test_validation_is_of_the_running_task():
    seen, module = [], dst(scl.SET)
    module.log = lambda name, value, **_: seen.append((name, float(value)))
    trainer(epochs=4).fit(module, toy_tasks(val_fraction=0.2))
    accuracies = [value for name, value in seen if name == "val/acc"]
    assert len(accuracies) >= 12 and max(accuracies[-4:]) > 0.5


class OtherNames(PlainClassifier):
    """Its own meanings of names that methods here have; a buffer that is not saved."""

    def __init__(self):
        super().__init__(6, 8)
        self.network, self.running = self.net, 0.0
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        return {"logits": self(batch[0])}


def test_a_foreign_module_may_have_any_names_and_be_tested_from_its_checkpoint(tmp_path):
    def policies():
        return [scl.TaskSubnetworks(), scl.Reopen(), scl.SET(0.5, interval=3, dense=["net.8.weight"])]

    evaluation, module = scl.ContinualEvaluation(), OtherNames()
    run = trainer(*policies(), evaluation, epochs=4)
    run.fit(module, toy_tasks())
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = scl.ContinualEvaluation()

    trainer(*policies(), again).test(OtherNames(), toy_tasks(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert torch.equal(again.tested["task_il"].R[0], evaluation.matrices["task_il"].R[-1])


def test_an_order_that_cannot_work_is_said():
    for model, policies, message in (
        (
            PlainClassifier(),
            [scl.OneShotPruning(0.5, dense=[]), scl.TaskSubnetworks()],
            "either no Reopen, listed after",
        ),
        (PlainClassifier(3), [scl.TaskSubnetworks()], "not a linear head of 6 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(*policies, epochs=2).fit(model, toy_tasks())
    with pytest.raises(ValueError, match="add TaskSubnetworks"):
        trainer(epochs=1).fit(scl.IsolatingModule(scl.SmallCNN(4)), toy_tasks())


def test_bad_input_is_named():
    for make, message in (
        (lambda: scl.TaskSubnetworks("own"), "batch_norm is 'per_task', 'frozen', 'shared'"),
        (lambda: scl.TaskSubnetworks(full="go on"), "full is 'error' or 'share'"),
        (lambda: scl.SET(0.5, fraction=0.1, final=0.2), r"SET\(final=0.2\): .* in \[0, fraction=0.1\]"),
        (lambda: scl.ResNet18(8, "5x5"), "stem is '3x3' or '7x7'"),
        (lambda: scl.VGG16(0), "at least one channel"),
        (lambda: scl.LeNet5(0), "at least one channel"),
        (lambda: scl.SmallImageMobileNetV2(0), "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match=r"uniform leaves no weight in backbone\.0"):
        trainer(epochs=1).fit(dst(sparsity=0.999, distribution="uniform"), toy_tasks())
    module = PlainClassifier()
    with pytest.raises(ValueError, match=r"mask of 'net.0.weight' has shape \(2, 2\), the weight \(16, 1, 3, 3\)"):
        scl.Subnetworks.of(module).add([0], {"net.0.weight": torch.ones(2, 2, dtype=torch.bool)}, [])
    state = {"tasks": [{"classes": [0], "masks": {"net.0.weight": torch.zeros(3, dtype=torch.uint8)}, "own": {}}]}
    with pytest.raises(ValueError, match=r"mask of 'net.0.weight', which does not fit"):
        scl.Subnetworks.of(module).load_state_dict(state)
