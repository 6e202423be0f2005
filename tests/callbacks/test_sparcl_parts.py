"""SparCL keeps what its paper says of it throughout a run, in modules of any kind; so do its parts with others."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from toy_trainer import trainer

from lightning_sparse_cl import (
    SET,
    ContinualModule,
    DERpp,
    DynamicDataRemoval,
    DynamicGradientMasking,
    Masks,
    RigL,
    SmallCNN,
    SparCL,
    TaskAwareDynamicMasking,
)
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks


def sparcl(masking=None, removal=None, gradients=None, **kwargs):
    return SparCL(
        SmallCNN(4),
        DERpp(30, 8),
        masking or TaskAwareDynamicMasking(0.75, interval=2),
        removal or DynamicDataRemoval(0.3, cutoff=2, interval=2),
        gradients or DynamicGradientMasking(0.05, interval=3),
        **kwargs,
    )


class Invariants(pl.Callback):
    """Holds after every step of a run with all three parts."""

    def __init__(self, masking):
        self.masking, self.steps, self.compared = masking, 0, 0
        self.zeros, self.support, self.before = {}, {}, {}

    def on_train_start(self, trainer, pl_module):
        masks, measure, put = self.masking.masks, self.masking.importance, self.masking.masks.set_alive
        scores = {}

        def importance(*args):
            scores.update(measure(*args))
            return dict(scores)

        def set_alive(name, mask):
            old = masks.alive.get(name)
            put(name, mask)
            if name in scores:  # the shrinking that follows a ranking
                dropped, score = old & ~mask, scores.pop(name)
                assert not (mask & ~old).any()
                assert not dropped.any() or score[mask].min() >= score[dropped].max()
                self.compared += bool(dropped.any())
            else:
                self.zeros[name] = mask & ~old if old is not None else ~mask
                assert not pl_module.get_parameter(name)[self.zeros[name]].any()

        self.masking.importance, masks.set_alive = importance, set_alive

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before = {n: pl_module.get_parameter(n).detach().clone() for n in Masks.of(pl_module).alive}
        for name, grown in self.zeros.items():  # still exactly zero
            assert not self.before[name][grown].any()
        self.zeros = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        masks = Masks.of(pl_module)
        self.steps += 1
        for name, alive in masks.alive.items():
            weight, updated = pl_module.get_parameter(name), masks.updated[name]
            assert not weight[~alive].any()
            assert not (updated & ~alive).any()
            assert int(updated.sum()) == int(alive.sum()) - int(0.05 * alive.numel())
            assert torch.equal(weight[~updated], self.before[name][~updated])
            if batch_idx % 3:
                assert torch.equal(updated, self.support[name])
            self.support[name] = updated.clone()


@pytest.mark.parametrize("gradients", ["measured", "training"])
def test_invariants_of_a_whole_run_under_momentum_and_weight_decay(gradients):
    masking = TaskAwareDynamicMasking(0.7, interval=2, p_intra=0.1, p_inter=0.1, gradients=gradients)
    holds = Invariants(masking)
    model = sparcl(
        masking,
        gradients=DynamicGradientMasking(0.05, interval=3, gradients=gradients),
        optimizer=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    )
    trainer(holds, epochs=6).fit(model, toy_tasks())
    assert holds.steps == 3 * (5 + 5 + 4 + 4 + 3 + 3)  # 80, 68 and 56 samples, batches of 16
    assert holds.compared == 3 * 2 * 3  # layers, rankings a task, tasks
    assert not Masks.of(model).updated


@pytest.mark.parametrize(
    "policy", [TaskAwareDynamicMasking(0.5, interval=1, p_intra=0.2), RigL(0.5, interval=3), SET(0.5, interval=3)]
)
def test_frozen_weights_are_neither_dropped_nor_counted_as_updated(policy):
    class Hold(pl.Callback):
        def on_task_end(self, trainer, pl_module, task):
            if task == 0:
                for name, mask in Masks.of(pl_module).alive.items():
                    Masks.of(pl_module).set_frozen(name, mask & (torch.rand(mask.shape) < 0.5))

        def on_train_batch_end(self, trainer, pl_module, *_):
            masks = Masks.of(pl_module)
            for name, frozen in masks.frozen.items():
                values = self.__dict__.setdefault(name, pl_module.get_parameter(name)[frozen].clone())
                assert torch.equal(pl_module.get_parameter(name)[frozen], values)
                assert not (masks.updated[name] & frozen).any()
                k = round(0.5 * frozen.numel())
                assert int(masks.alive[name].sum()) in (k, k + int(0.01 * frozen.numel()))

    trainer(policy, DynamicGradientMasking(0.05, 3), Hold(), epochs=3).fit(PlainClassifier(), toy_tasks())


def test_a_part_whose_quantity_is_zero_does_nothing():
    states = []
    for make in (
        lambda: sparcl(TaskAwareDynamicMasking(0.0), DynamicDataRemoval(0.0), DynamicGradientMasking(0.0)),
        lambda: ContinualModule(SmallCNN(4), DERpp(30, 8)),
    ):
        pl.seed_everything(0, verbose=False)
        trainer(epochs=3).fit(model := make(), toy_tasks())
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*states)


def test_a_stock_module_with_automatic_optimisation_uses_the_same_callbacks():
    model, data = PlainClassifier(), toy_tasks()
    keys = list(model.state_dict())
    masking = TaskAwareDynamicMasking(0.8, interval=2)
    holds = Invariants(masking)
    parts = [masking, DynamicDataRemoval(0.3, 2, 2), DynamicGradientMasking(0.05, interval=3)]
    trainer(*parts, holds, epochs=6).fit(model, data)
    assert list(model.state_dict()) == keys
    assert [len(a) for a in data.alive] == [56] * 3
    assert holds.compared == 2 * 3 and int(model.net[3].weight.count_nonzero()) <= round(0.2 * 2304)


@pytest.mark.parametrize("gradients", ["measured", "training"])
def test_masks_work_without_a_task_sequence(gradients):
    class Loose(PlainClassifier):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.randn(24, 1, 8, 8), torch.arange(24) % 4), 4, shuffle=True)

    model = Loose()
    masking = TaskAwareDynamicMasking(0.75, interval=1, gradients=gradients)
    parts = [masking, DynamicGradientMasking(0.05, interval=2, gradients=gradients)]
    pl.Trainer(accelerator="cpu", max_epochs=3, callbacks=parts, logger=False, enable_checkpointing=False,
               enable_progress_bar=False, enable_model_summary=False).fit(model)  # fmt: skip
    assert int(Masks.of(model).alive["net.3.weight"].sum()) == 576
    assert int(model.net[3].weight.count_nonzero()) <= 576


def test_masks_of_another_network_are_refused_and_nothing_changes():
    a, b = PlainClassifier(), PlainClassifier(width=8)
    masks, other = Masks.of(a), Masks.of(b)
    other.set_alive("net.3.weight", torch.ones(8, 8, 3, 3, dtype=torch.bool))
    masks.set_alive("net.8.weight", torch.zeros(6, 64, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask of 'net\.3\.weight' has shape \(8, 8, 3, 3\), the weight"):
        masks.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"a mask of 'conv\.weight', which this network does not have"):
        masks.load_state_dict({"alive": {"conv.weight": torch.ones(2, dtype=torch.bool)}})
    assert list(masks) == ["net.8.weight"] and not a.net[8].weight.any()


def test_a_second_fit_with_other_layers_masks_those_too():
    model = PlainClassifier()
    for dense in (["net.8.*"], ["net.0.*"]):
        trainer(TaskAwareDynamicMasking(0.5, dense=dense), epochs=1).fit(model, toy_tasks())
    alive = Masks.of(model).alive
    assert {name: int(mask.sum()) for name, mask in alive.items()} == {
        name: mask.numel() // 2 for name, mask in alive.items()
    }
    assert list(alive) == ["net.0.weight", "net.3.weight", "net.8.weight"]


def fit(*parts, **kwargs):
    trainer(*parts, epochs=4).fit(ContinualModule(SmallCNN(4)), toy_tasks(**kwargs))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskAwareDynamicMasking(1.0), r"sparsity=1\.0"),
        (lambda: TaskAwareDynamicMasking(0.9, p_intra=0.1), r"p_intra=0\.1\).*\[0, 0\.1\)"),
        (lambda: TaskAwareDynamicMasking(0.005, p_inter=0.01), r"p_inter=0\.01\).*\[0, 0\.005\]"),
        (lambda: TaskAwareDynamicMasking(interval=0), "interval=0"),
        (lambda: TaskAwareDynamicMasking(alpha=-1), "alpha=-1"),
        (lambda: TaskAwareDynamicMasking(init="ones"), "init='ones'.*'random' or 'magnitude'"),
        (lambda: fit(TaskAwareDynamicMasking(dense=["stem*"])), r"dense='stem\*' matches none of the weights"),
        (lambda: DynamicGradientMasking(1.0), r"q=1\.0"),
        (lambda: DynamicGradientMasking(interval=0), "interval=0"),
        (lambda: DynamicGradientMasking(gradients="mine"), "gradients='mine'"),
        (lambda: fit(TaskAwareDynamicMasking(0.9), DynamicGradientMasking(0.2)), r"q=0\.2.*are unpruned"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
