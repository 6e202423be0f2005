"""SET, RigL, SNFS and SNIP: the right weights go and come, exactly so many, when they should."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F
from toy_trainer import trainer

from lightning_sparse_cl import SET, SNFS, SNIP, ContinualModule, DERpp, Masks, RigL, SmallCNN
from lightning_sparse_cl.callbacks.growth_rules import share_out
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks
from lightning_sparse_cl.sparsity import Enforcement, top_k_mask


class Exchanges(pl.Callback):
    """Weights and masks before and after every step, and the gradient that no mask acted on."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        masks = Masks.of(pl_module)
        names = list(masks)
        with Enforcement.of(pl_module).scoring():
            loss = F.cross_entropy(pl_module(batch[0]), batch[1])
            grads = torch.autograd.grad(loss, [pl_module.get_parameter(n) for n in names])
        weights = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
        self.now = dict(masks.alive), weights, dict(zip(names, grads))

    def on_train_batch_end(self, trainer, pl_module, *_):
        weights = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
        state = trainer.optimizers[0].state
        momentum = {
            n: state[p]["momentum_buffer"].clone()
            for n, p in pl_module.named_parameters()
            if "momentum_buffer" in state[p]
        }
        self.seen.append((*self.now, dict(Masks.of(pl_module).alive), weights, momentum))
        for name, alive in Masks.of(pl_module).alive.items():
            assert not weights[name][~alive].any()


def moved(before, after):
    return [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("policy", [RigL, SET])
def test_each_layer_keeps_its_number_and_the_smallest_go(policy):
    steps, model = Exchanges(), PlainClassifier()
    trainer(policy(0.8, fraction=0.4, interval=3, until=1.0), steps, epochs=4).fit(model, toy_tasks(num_tasks=2))
    changed = [i for i, (before, _, _, after, *_) in enumerate(steps.seen) if moved(before, after)]
    assert changed == [i for i in range(40) if i % 20 and i % 20 % 3 == 0]  # two tasks of 20 steps
    for i in changed:
        before, weights, grads, after, stepped, momentum = steps.seen[i]
        f = 0.2 * (1 + math.cos(math.pi * (i % 20) / 20))
        for name in moved(before, after):
            dropped, alive = int(f * int(before[name].sum())), weights[name][before[name]].abs()
            assert int(after[name].sum()) == int(before[name].sum()) == round(0.2 * before[name].numel())
            gone, new = before[name] & ~after[name], after[name] & ~before[name]
            assert 0 < int(gone.sum()) == int(new.sum()) <= dropped
            assert weights[name][gone].abs().max() <= alive.sort().values[dropped - 1]
            if policy is RigL:
                kept = top_k_mask(weights[name].abs(), int(before[name].sum()) - dropped, among=before[name])
                grown = top_k_mask(grads[name].abs(), dropped, among=~kept)  # some that were dropped may come back
                assert torch.equal(after[name], kept | grown)
                assert not momentum[name][new].any() and momentum[name][kept].any()
                assert not stepped[name][new].any()
                stayed = before[name] & after[name]
                assert torch.equal(stepped[name][stayed], weights[name][stayed])
        if policy is RigL:  # the exchange takes the place of the step: momentum moves nothing either
            assert torch.equal(stepped["net.8.weight"], weights["net.8.weight"])
        else:
            assert not torch.equal(stepped["net.8.weight"], weights["net.8.weight"])


def test_the_exchanged_fraction_falls_to_zero_and_starts_anew_with_a_task():
    class Record(RigL):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            fractions.append(self.exchanged(trainer))

    fractions = []
    trainer(Record(0.5, until=0.5), epochs=4).fit(PlainClassifier(), toy_tasks(num_tasks=2))
    assert fractions == pytest.approx(
        [0.15 * (1 + math.cos(math.pi * t / 10)) if t < 10 else 0.0 for t in range(20)] * 2
    )
    assert fractions[0] == 0.3


class Shares(SNFS):
    """Checks every exchange against the momentum."""

    exchanges = 0

    def exchange(self, trainer, pl_module, names):
        before, part = dict(self.masks.alive), self.exchanged(trainer)
        momentum = {n: m.abs() for n, m in self._kept.items()}
        mean = {n: float(m[before[n]].mean()) for n, m in momentum.items()}
        lost = {n: int(part * int(m.sum())) for n, m in before.items()}
        sizes = {n: pl_module.get_parameter(n).detach().abs() for n in before}
        super().exchange(trainer, pl_module, names)
        grown = share_out(sum(lost.values()), mean, {n: m.numel() for n, m in before.items()})
        for name, mask in before.items():
            kept = top_k_mask(sizes[name], int(mask.sum()) - lost[name], among=mask)
            assert torch.equal(self.masks.alive[name], kept | top_k_mask(momentum[name], grown[name], among=~kept))
        self.exchanges += 1


def test_snfs_keeps_the_total_and_follows_the_momentum():
    steps, model, policy = Exchanges(), ContinualModule(SmallCNN(4), DERpp(30, 8)), Shares(0.7, interval=4)
    trainer(policy, steps, epochs=3).fit(model, toy_tasks(num_tasks=2))
    totals = [sum(int(m.sum()) for m in after.values()) for _, _, _, after, *_ in steps.seen]
    assert set(totals) == {sum(round(0.3 * m.numel()) for m in Masks.of(model).alive.values())}
    assert len({int(after["backbone.3.weight"].sum()) for _, _, _, after, *_ in steps.seen}) > 1
    assert policy.exchanges == 6
    assert policy._kept.keys() == Masks.of(model).alive.keys()
    assert all(m[~Masks.of(model).alive[n]].any() for n, m in policy._kept.items())


@pytest.mark.parametrize(
    ("total", "weight", "room", "given"),
    [
        (10, {"a": 1.0, "b": 4.0}, {"a": 99, "b": 99}, {"a": 2, "b": 8}),
        (10, {"a": 1.0, "b": 4.0}, {"a": 99, "b": 3}, {"a": 7, "b": 3}),
        (10, {"a": 1.0, "b": 4.0}, {"a": 1, "b": 3}, {"a": 1, "b": 3}),
        (1, {"a": 1.0, "b": 4.0}, {"a": 5, "b": 5}, {"a": 0, "b": 1}),
        (4, {"a": 0.0, "b": 0.0}, {"a": 5, "b": 5}, {"a": 2, "b": 2}),
    ],
)
def test_sharing_out(total, weight, room, given):
    assert share_out(total, weight, room) == given


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_snip_keeps_what_the_first_batch_is_sensitive_to(ranking):
    masks_of, scores = [], {}

    class Check(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):  # listed first: nothing is pruned yet
            if not scores:
                for name in ("net.0.weight", "net.3.weight"):
                    weight = pl_module.get_parameter(name)
                    (grad,) = torch.autograd.grad(F.cross_entropy(pl_module(batch[0]), batch[1]), weight)
                    scores[name] = (weight * grad).detach().abs()

        def on_train_batch_end(self, trainer, pl_module, *_):
            masks_of.append({n: m.clone() for n, m in Masks.of(pl_module).alive.items()})

    trainer(Check(), SNIP(0.75, ranking, dense=["net.8.*"])).fit(model := PlainClassifier(), toy_tasks())
    assert all(torch.equal(masks[n], masks_of[0][n]) for masks in masks_of for n in masks)
    mask = masks_of[0]
    assert not model.net[3].weight[~mask["net.3.weight"]].any()
    if ranking == "layer":
        assert [int(m.sum()) for m in mask.values()] == [36, 576]
        assert scores["net.3.weight"][mask["net.3.weight"]].min() >= scores["net.3.weight"][~mask["net.3.weight"]].max()
    else:
        kept, gone = (torch.cat([scores[n][m if keep else ~m] for n, m in mask.items()]) for keep in (True, False))
        assert len(kept) == round(0.25 * (144 + 2304)) and kept.min() >= gone.max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RigL(1.0), r"RigL\(sparsity=1\.0\)"),
        (lambda: SET(0.5, fraction=1.5), r"SET\(fraction=1\.5\)"),
        (lambda: SNFS(0.5, interval=0), r"SNFS\(interval=0\)"),
        (lambda: RigL(0.5, until=0.0), r"RigL\(until=0\.0\)"),
        (lambda: SNIP(-0.1), r"SNIP\(sparsity=-0\.1\)"),
        (lambda: SNIP(0.5, "all"), r"ranking='all'"),
        (lambda: trainer(SNIP(0.5, dense=["x"])).fit(PlainClassifier(), toy_tasks()), "dense='x' matches none"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
