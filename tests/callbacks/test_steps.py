"""Optimiser steps as people write them, by hand, in closures, several in a batch: policies count and see each."""

import lightning.pytorch as pl
import pytest
import torch
from foreign_module import PRUNED, Mlp, fit
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks

RULES = dict(sparsity=0.8, interval=4, until=1.0)


def watched(policy, *args, **kwargs):
    """The policy, and the numbers of the optimiser steps at which each weight was exchanged."""
    seen = {name: [] for name in PRUNED}

    class Watched(policy):
        def exchange(self, trainer, pl_module, names):
            for name in names:
                optimizer = next(o for o in trainer.optimizers if name in self.stepped_by(pl_module, o))
                seen[name].append(self._steps.taken(optimizer))
            super().exchange(trainer, pl_module, names)

    return Watched(*args, **kwargs), seen


class ByHand(Mlp):
    """Accumulates batches by hand."""

    automatic_optimization = False
    every = 3

    def training_step(self, batch, batch_idx):
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]) / self.every)
        if (batch_idx + 1) % self.every == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()


class Wasserstein(Mlp):
    """Two optimisers; one steps at every fourth batch, as a critic's generator does."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer, every in zip(self.optimizers(), (1, 4)):
            if (batch_idx + 1) % every == 0:
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(half.parameters(), 1e-3) for half in (self.net[:3], self.net[3:])]


class Closures(Mlp):
    """An optimiser that asks for the loss several times in a step."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), 0.01, max_iter=3, history_size=2)


@pytest.mark.parametrize("policy", [scl.SET, scl.RigL, scl.SNFS, scl.UnfiredGrowth])
@pytest.mark.parametrize("module", [ByHand, Wasserstein, Closures])
def test_each_optimiser_exchanges_after_so_many_of_its_own_steps(policy, module):
    rule, seen = watched(policy, **RULES)
    t = fit(module(), rule, epochs=4)
    batches = 4 * Mlp.batches
    steps = {ByHand: (16, 16), Wasserstein: (batches, batches // 4), Closures: (batches, batches)}[module]
    assert seen == {name: list(range(4, n, 4)) for name, n in zip(PRUNED, steps)}, t.global_step


def test_gradient_masks_are_chosen_anew_after_so_many_steps():
    chosen = []

    class Recorded(scl.DynamicGradientMasking):
        def prune(self, trainer, pl_module, batch=None):
            chosen.append(trainer.fit_loop.epoch_loop.batch_idx)
            super().prune(trainer, pl_module, batch)

    fit(ByHand(), Recorded(0.1, interval=2, gradients="training"), epochs=1)
    assert chosen == [0, 6]
    chosen.clear()
    fit(Mlp(), Recorded(0.1, interval=2), epochs=1, accumulate_grad_batches=3)
    assert chosen == [0, 6]


def test_an_overflow_under_a_gradient_scaler_is_no_gradient():
    class Small(Mlp):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    rule = scl.SNFS(**RULES)
    module = Small()
    fit(module, rule, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert all(m.isfinite().all() for m in rule._kept.values())
    assert all(torch.isfinite(p).all() for p in module.parameters())


class Subclass(torch.optim.Adam):
    """A step that calls its base class's step, and moves the weights once more."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                group["calls"] = group.get("calls", 0) + 1
                for p in group["params"]:
                    p.mul_(0.99)
        return loss


class Subclassed(Mlp):
    def configure_optimizers(self):
        torch.optim.SGD(self.parameters(), 0.1)  # which lets torch's hooks into the base class's step
        return Subclass(self.parameters(), 1e-3)


def test_a_step_inside_of_a_step_is_one_and_taken_away_as_a_whole():
    rule, seen = watched(scl.RigL, **RULES)
    calls, before = [], {}

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})
            self.exchanges = len(seen[PRUNED[0]])

        def on_train_batch_end(self, trainer, pl_module, *_):
            dense = [n for n, _ in pl_module.named_parameters() if n not in PRUNED]
            still = all(torch.equal(pl_module.get_parameter(n), before[n]) for n in dense)
            assert still == (len(seen[PRUNED[0]]) > self.exchanges)
            calls.append(trainer.optimizers[0].param_groups[0].get("calls", 0))

    fit(Subclassed(), rule, Look(), epochs=2)
    assert seen[PRUNED[0]] == [4, 8, 12, 16, 20]
    assert calls[-1] == 24 - 5  # what the optimiser counts was put back, too


class ManySteps(Mlp):
    """Several steps in a batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(3):
            self.optimizers().zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            self.optimizers().step()


class Adversarial(Mlp):
    """The first loss sends gradients through the second half, which are thrown away before its own."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        one, other = self.optimizers()
        self.manual_backward(100 * self(batch[0]).square().mean())
        one.step()
        one.zero_grad()
        other.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        other.step()
        one.zero_grad()
        other.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.Adam(half.parameters(), 1e-3) for half in (self.net[:3], self.net[3:])]


@pytest.mark.parametrize("module", [ManySteps, Adversarial])
def test_gradients_that_decide_are_those_of_the_step(module):
    class Compared(scl.RigL):
        exchanges = 0

        def grow_scores(self, trainer, pl_module):
            found = super().grow_scores(trainer, pl_module)
            for name, score in found.items():
                alive, grad = self.masks.alive[name], pl_module.get_parameter(name).grad
                assert torch.allclose(score[alive], grad[alive].abs(), rtol=1e-4)
                Compared.exchanges += 1
            return found

    rule, seen = watched(Compared, **RULES | {"interval": 5})
    fit(module(), rule, epochs=2)
    steps = 72 if module is ManySteps else 24
    assert seen == {name: list(range(5, steps, 5)) for name in PRUNED} and Compared.exchanges == 2 * len(
        seen[PRUNED[0]]
    )


def test_whole_gradients_are_taken_in_the_steps_of_exchanges_alone():
    asked = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            asked.append(bool(scl.Enforcement.of(pl_module).whole))

    trainer(scl.RigL(0.5, interval=5, until=1.0), Look(), epochs=1).fit(PlainClassifier(), toy_tasks())
    assert len(asked) == 15 and not any(asked)  # each task has five steps, and would exchange at its sixth
    asked.clear()
    trainer(scl.RigL(0.5, interval=2, until=1.0), Look(), epochs=1).fit(PlainClassifier(), toy_tasks())
    assert asked == [False, False, True, False, True] * 3


def test_gradients_that_are_set_by_hand_are_not_seen_and_that_is_said():
    class Functional(Mlp):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            weights = {n: p.detach() for n, p in self.net.named_parameters()}
            loss = lambda w: F.cross_entropy(torch.func.functional_call(self.net, w, batch[0]), batch[1])  # noqa: E731
            for name, grad in torch.func.grad(loss)(weights).items():
                self.net.get_parameter(name).grad = grad
            self.optimizers().step()

    with pytest.warns(UserWarning, match=r"RigL: no gradient of net\.2\.weight.* so nothing is exchanged"):
        fit(Functional(), scl.RigL(**RULES), epochs=1)


def test_gradient_masks_end_with_the_fit_that_set_them(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 5:
                raise RuntimeError("broken off")

    module, last = Mlp(), ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=3)
    with pytest.raises(RuntimeError, match="broken off"):
        fit(module, scl.SNIP(0.5), scl.DynamicGradientMasking(0.4, 2), last, Stop())
    assert scl.Masks.of(module).updated
    loaded = Mlp.load_from_checkpoint(tmp_path / "last.ckpt")
    scl.Masks.of(loaded).load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["masks"])
    for again in (module, loaded):
        before = again.net[2].weight.detach().clone()
        fit(again, scl.Sparsifier(), epochs=1)
        alive = scl.Masks.of(again).alive["net.2.weight"]
        assert not scl.Masks.of(again).updated
        assert float((again.net[2].weight != before)[alive].float().mean()) > 0.99


def test_a_callback_that_was_resumed_counts_anew_in_another_fit(tmp_path):
    rule, seen = watched(scl.SET, **RULES)
    fit(Mlp(), rule, ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=6), epochs=1, limit_train_batches=6)
    fit(Mlp(), rule, epochs=1, ckpt_path=tmp_path / "last.ckpt")
    for steps in seen.values():
        steps.clear()
    fit(Mlp(), rule, epochs=1)
    assert seen == {name: [4, 8] for name in PRUNED}


def test_a_loss_that_is_not_a_number_prunes_nothing():
    class Broken(Mlp):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    module = Broken()
    with pytest.raises(ValueError, match=r"SNIP: scores of net\.2\.weight are not numbers"):
        fit(module, scl.SNIP(0.5))
    assert not len(scl.Masks.of(module))


def test_batch_norm_is_measured_for_the_pruned_network():
    class Normed(Mlp):
        def __init__(self):
            super().__init__()
            self.net.insert(3, nn.BatchNorm1d(64))

    torch.manual_seed(0)
    module = Normed()
    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    fit(module, swa, scl.OneShotPruning(0.9, dense=[]), epochs=3)
    x = torch.cat([x for x, _ in module.train_dataloader()])
    mean = module.net[:3](x).mean(0)
    assert torch.allclose(module.net[3].running_mean, mean, atol=2e-2)  # SWA's own inexactness is 1e-2
    assert float((module.net[2].weight == 0).float().mean()) == pytest.approx(0.9, abs=1e-3)
