"""TDM and DGM, and all of SparCL, keep what its paper says of them, throughout a run and in modules of any kind."""

from collections import defaultdict

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from toy_trainer import trainer

from lightning_sparse_cl import (
    SET,
    ContinualModule,
    DERpp,
    DynamicDataRemoval,
    DynamicGradientMasking,
    Masks,
    OneShotPruning,
    RigL,
    SmallCNN,
    SparCL,
    TaskAwareDynamicMasking,
)
from lightning_sparse_cl.backbones.batch_norm import batch_norm_still
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks
from lightning_sparse_cl.sparsity import top_k_mask


def sparcl(masking=None, removal=None, gradients=None, **kwargs):
    return SparCL(
        SmallCNN(4),
        DERpp(30, 8),
        masking or TaskAwareDynamicMasking(0.75, every=2),
        removal or DynamicDataRemoval(0.3, cutoff=2, every=2),
        gradients or DynamicGradientMasking(0.05, interval=3),
        **kwargs,
    )


class Counts(pl.Callback):
    """Every number of weights that a layer's mask had, by task."""

    def __init__(self, name):
        self.name, self.events, self.task = name, defaultdict(list), -1

    def on_fit_start(self, trainer, pl_module):
        masks = Masks.of(pl_module)
        put = masks.set_alive
        self.events[0].append(int(masks.alive[self.name].sum()))

        def recorded(name, mask):
            put(name, mask)
            if name == self.name:
                self.events[trainer.datamodule.task].append(int(mask.sum()))
                assert int(pl_module.get_parameter(name).count_nonzero()) <= int(mask.sum())

        masks.set_alive = recorded


@pytest.mark.parametrize(
    ("width", "counts"),
    [
        (64, (9216, 9216 - 368, 9216 + 368)),
        (512, (589824, 589824 - 23592, 589824 + 23592)),
    ],  # 64 * 64 * 9, 512 * 512 * 9
)
def test_every_event_leaves_exactly_so_many_weights(width, counts):
    k, shrunk, expanded = counts
    model, counter = PlainClassifier(width=width), Counts("net.3.weight")
    masking = TaskAwareDynamicMasking(0.75, every=2, p_intra=0.01, p_inter=0.01)
    trainer(masking, counter, epochs=5, limit_train_batches=1).fit(model, toy_tasks(num_tasks=2))
    assert counter.events[0] == [k, shrunk, k, shrunk, k]  # after epochs 2 and 4
    assert counter.events[1] == [expanded, shrunk, k, shrunk, k]


def test_a_task_that_ends_while_expanded_is_shrunk():
    model, counter = PlainClassifier(width=16), Counts("net.3.weight")
    trainer(TaskAwareDynamicMasking(0.75, every=3, p_inter=0.1), counter, epochs=2).fit(model, toy_tasks(num_tasks=2))
    assert counter.events[0] == [576] and counter.events[1] == [576 + 230, 576]


def test_all_layers_ranked_together_keep_the_total():
    model = PlainClassifier(width=16)
    masking = TaskAwareDynamicMasking(0.5, every=1, ranking="global", init="magnitude", dense=["net.8.weight"])
    trainer(masking, epochs=3).fit(model, toy_tasks(num_tasks=2))
    alive = {name: mask.sum().item() for name, mask in Masks.of(model).alive.items()}
    assert sum(alive.values()) == round(0.5 * (144 + 2304))
    assert alive["net.0.weight"] > 0.6 * 144  # earlier layers keep more (Appendix E)


class Invariants(pl.Callback):
    """Holds after every step of a run with all three parts."""

    def __init__(self, masking):
        self.masking, self.steps, self.compared = masking, 0, 0
        self.zeros, self.support, self.before = {}, {}, {}

    def on_fit_start(self, trainer, pl_module):
        masks, measure, put = Masks.of(pl_module), self.masking.importance, Masks.of(pl_module).set_alive
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
    masking = TaskAwareDynamicMasking(0.7, every=2, p_intra=0.1, p_inter=0.1, gradients=gradients)
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


def test_importance_is_that_of_equations_1_and_3():
    """Against autograd by hand, over the whole task and the whole memory."""
    seen = []

    class Check(TaskAwareDynamicMasking):
        def importance(self, trainer, pl_module):
            found, data = super().importance(trainer, pl_module), trainer.datamodule
            at, memory = data.task, pl_module.objective.memory
            norms = [m for m in pl_module.modules() if isinstance(m, nn.BatchNorm2d)]
            statistics = [m.running_mean.clone() for m in norms]
            grads = {n: pl_module.get_parameter(n).grad.clone() for n in found}
            alive = data.alive[at]
            x, y = data.train_sets[at][alive]
            logits = pl_module(data.prepare(x, augment=False))[:, 2 * at : 2 * at + 2]
            names = list(found)
            weights = [pl_module.get_parameter(n) for n in names]
            with Masks.of(pl_module).scoring():
                current = torch.autograd.grad(F.cross_entropy(logits, y - 2 * at), weights)
                n = len(memory)
                logits = pl_module(data.prepare(memory.images[:n], augment=False))
                old = torch.autograd.grad(F.cross_entropy(logits, memory.labels[:n]), weights)
            for m, mean in zip(norms, statistics):
                m.running_mean.copy_(mean)
            for name, w, a, b in zip(names, weights, current, old):
                expected = w.abs() + 2.0 * a.abs() + 3.0 * b.abs()
                assert torch.allclose(found[name], expected, rtol=1e-4, atol=1e-7)
                assert torch.equal(pl_module.get_parameter(name).grad, grads[name])
            seen.append(at)
            return found

    trainer(epochs=4).fit(sparcl(Check(0.5, every=2, alpha=2.0, beta=3.0)), toy_tasks())
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("memory", [True, False])
def test_gradient_masks_keep_the_largest_importance_of_equation_3(memory):
    checked = []

    class Check(DynamicGradientMasking):
        def importance(self, trainer, pl_module, batch):
            state = torch.get_rng_state()
            found, data = super().importance(trainer, pl_module, batch), trainer.datamodule
            names, at = list(found), data.task
            weights = [pl_module.get_parameter(n) for n in names]
            with Masks.of(pl_module).scoring(), batch_norm_still(pl_module):
                logits = pl_module(batch[0])[:, 2 * at : 2 * at + 2]
                loss = F.cross_entropy(logits, batch[1] - 2 * at)
                expected = [2.0 * g.abs() for g in torch.autograd.grad(loss, weights)]
                if memory and len(pl_module.objective.memory):
                    torch.set_rng_state(state)
                    x, y, *_ = pl_module.objective.memory.draw(16)
                    loss = F.cross_entropy(pl_module(data.prepare(x, augment=False)), y)
                    expected = [e + 3.0 * g.abs() for e, g in zip(expected, torch.autograd.grad(loss, weights))]
            for name, value in zip(names, expected):
                assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-7)
            self.found = found
            return found

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if batch_idx % self.interval == 0:
                for name, score in self.found.items():
                    alive = self.masks.alive[name]
                    kept = top_k_mask(score, int(alive.sum()) - int(0.2 * score.numel()), among=alive)
                    assert torch.equal(self.masks.updated[name], kept)
                checked.append(trainer.global_step)

    objective = DERpp(30, 8) if memory else None
    policies = [TaskAwareDynamicMasking(0.5, every=2), Check(0.2, interval=3, alpha=2.0, beta=3.0)]
    trainer(epochs=2).fit(ContinualModule(SmallCNN(4), objective, policies=policies), toy_tasks())
    assert len(checked) == 3 * 2 * 2


def test_grown_weights_are_random_and_start_without_momentum():
    grown = {}

    class Check(TaskAwareDynamicMasking):
        def _expand(self, trainer, pl_module, more):
            before = dict(self.masks.alive)
            super()._expand(trainer, pl_module, more)
            for name, mask in before.items():
                new = self.masks.alive[name] & ~mask
                momentum = trainer.optimizers[0].state[pl_module.get_parameter(name)]["momentum_buffer"]
                assert new.any() and not momentum[new].any() and momentum[mask].any()
                unused = (~mask).flatten().nonzero().squeeze(1)
                place = torch.searchsorted(unused, new.flatten().nonzero().squeeze(1)).float() / len(unused)
                grown.setdefault((pl_module, name), []).append(place)

    for seed in (0, 1):
        pl.seed_everything(seed, verbose=False)
        model = PlainClassifier(width=16)
        trainer(Check(0.5, every=1, p_intra=0.2), epochs=2).fit(model, toy_tasks(num_tasks=1))
    places = torch.cat([p for found in grown.values() for p in found])
    assert abs(float(places.mean()) - 0.5) < 0.05 and float(places.std()) > 0.25  # all over the unused ones
    assert len({tuple(p.tolist()) for found in grown.values() for p in found}) == len(grown)


@pytest.mark.parametrize(
    "policy", [TaskAwareDynamicMasking(0.5, every=1, p_intra=0.2), RigL(0.5, interval=3), SET(0.5, interval=3)]
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


def test_gradient_masks_wait_for_a_step_that_rigl_has_taken_away():
    model = PlainClassifier()
    parts = [RigL(0.5, interval=3), DynamicGradientMasking(0.05, interval=3, gradients="training")]
    trainer(*parts, epochs=3).fit(model, toy_tasks())
    assert int(model.net[3].weight.count_nonzero()) <= 1152


def test_a_stock_module_with_automatic_optimisation_uses_the_same_callbacks():
    model, data = PlainClassifier(), toy_tasks()
    keys = list(model.state_dict())
    masking = TaskAwareDynamicMasking(0.8, every=2)
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
    masking = TaskAwareDynamicMasking(0.75, every=1, gradients=gradients)
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


def refit_with_other_layers():
    model = PlainClassifier()
    for dense in (["net.8.*"], ["net.0.*"]):
        trainer(TaskAwareDynamicMasking(0.5, dense=dense), epochs=1).fit(model, toy_tasks())


def fit(*parts, **kwargs):
    trainer(*parts, epochs=4).fit(ContinualModule(SmallCNN(4)), toy_tasks(**kwargs))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskAwareDynamicMasking(1.0), r"sparsity=1\.0"),
        (lambda: TaskAwareDynamicMasking(0.9, p_intra=0.1), r"p_intra=0\.1\).*\[0, 0\.1\)"),
        (lambda: TaskAwareDynamicMasking(0.005, p_inter=0.01), r"p_inter=0\.01\).*\[0, 0\.005\]"),
        (lambda: TaskAwareDynamicMasking(every=0), "every=0"),
        (lambda: TaskAwareDynamicMasking(alpha=-1), "alpha=-1"),
        (lambda: TaskAwareDynamicMasking(init="ones"), "init='ones'.*'random' or 'magnitude'"),
        (lambda: fit(TaskAwareDynamicMasking(dense=["stem*"])), r"dense='stem\*' matches none of the weights"),
        (refit_with_other_layers, r"dense=\['net\.0\.\*'\].*are of net\.0\.weight, net\.3\.weight; net\.8\.weight"),
        (lambda: DynamicGradientMasking(1.0), r"q=1\.0"),
        (lambda: DynamicGradientMasking(interval=0), "interval=0"),
        (lambda: DynamicGradientMasking(gradients="mine"), "gradients='mine'"),
        (lambda: fit(TaskAwareDynamicMasking(0.9), DynamicGradientMasking(0.2)), r"q=0\.2.*are unpruned"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_pruning_goes_well_with_gradient_masks():
    """Weights that the gradient mask holds may be pruned, and stay so."""
    model = ContinualModule(SmallCNN(4), policies=[DynamicGradientMasking(0.05, 4), OneShotPruning(0.9)])
    trainer(epochs=2).fit(model, toy_tasks())
    assert int(model.backbone[3].weight.count_nonzero()) <= round(0.1 * 144)
