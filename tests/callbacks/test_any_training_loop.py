"""Steps, losses and modules as people write them: by hand, in closures, compiled, with other names and arguments."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from foreign_module import PRUNED, Mlp, fit
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
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


# -- time ------------------------------------------------------------------------------------------------------


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
    """Two optimisers, of which one steps at every fourth batch, as a critic's generator does."""

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

    module = Normed()
    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    fit(module, swa, scl.OneShotPruning(0.9, dense=[]), epochs=3)
    x = torch.cat([x for x, _ in module.train_dataloader()])
    mean = module.net[:3](x).mean(0)
    assert torch.allclose(module.net[3].running_mean, mean, atol=5e-3)
    assert float((module.net[2].weight == 0).float().mean()) == pytest.approx(0.9, abs=1e-3)


# -- the loss --------------------------------------------------------------------------------------------------


class OtherNames(Mlp):
    def training_step(self, b, _):
        return F.cross_entropy(self(b[0]), b[1])


class NoIndex(Mlp):
    def training_step(self, b):
        return F.cross_entropy(self(b[0]), b[1])


POLICIES = [
    lambda: scl.SNIP(0.8),
    lambda: scl.TaskAwareDynamicMasking(0.8, 1),
    lambda: scl.DynamicGradientMasking(0.1, 3),
]


@pytest.mark.parametrize("module", [OtherNames, NoIndex])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_training_step_may_name_its_arguments_as_it_likes(policy, module):
    fit(module(), policy(), epochs=2)


def test_a_compiled_module_is_ranked_by_its_own_gradients(monkeypatch):
    found = []
    rank = scl.SNIP.scores
    monkeypatch.setattr(scl.SNIP, "scores", lambda *args: found.append(rank(*args)) or found[-1])
    for compiled in (False, True):
        torch.manual_seed(0)
        module = Mlp()
        fit(torch.compile(module, backend="eager") if compiled else module, scl.SNIP(0.8), epochs=1)
    plain, ranked = found
    assert all(torch.allclose(score, ranked[name], rtol=1e-4) and score.any() for name, score in plain.items())


def test_a_loss_that_reaches_no_weight_is_refused():
    class Held(Mlp):
        def __init__(self):
            super().__init__()
            self.compute = lambda x: self.net(x)  # a copy computes with the weights of the original

        def forward(self, x):
            return self.compute(x)

    with pytest.raises(ValueError, match=r"Held: its loss has no gradient of net\.2\.weight.*Give a function"):
        fit(Held(), scl.SNIP(0.8))


def test_asking_for_the_loss_moves_no_scheduler_and_no_generator():
    class Moves(Mlp):
        def training_step(self, batch, batch_idx):
            self.lr_schedulers().step()
            return super().training_step(batch, batch_idx) * float(np.random.rand())

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": schedule, "interval": "epoch", "frequency": 1000}]

    ends = []
    for parts in ([], [scl.SNIP(0.0)]):
        pl.seed_everything(0, verbose=False)
        t = fit(module := Moves(), *parts, epochs=1)
        ends.append((t.optimizers[0].param_groups[0]["lr"], module.state_dict(), np.random.rand()))
    (rate, plain, draw), (ranked_rate, ranked, ranked_draw) = ends
    assert rate == ranked_rate and draw == ranked_draw
    assert all(torch.equal(ranked[name], tensor) for name, tensor in plain.items())


# -- what is said ----------------------------------------------------------------------------------------------


def test_weights_that_are_not_trained_are_left_alone_and_that_is_said_once():
    module = Mlp()
    module.net[2].weight.requires_grad_(False)
    with pytest.warns(UserWarning) as said:
        fit(module, scl.OneShotPruning(0.8), scl.DynamicGradientMasking(0.1), epochs=1)
    told = [str(w.message) for w in said if "require no gradient" in str(w.message)]
    assert len(told) == 1 and "1 weights require no gradient (net.2.weight)" in told[0]
    assert module.net[2].weight.all() and list(scl.Masks.of(module)) == ["net.4.weight"]
    other = Mlp()
    other.net[2].weight.requires_grad_(False)
    assert scl.sparse_weights(other, sparse=[nn.Linear]) == scl.sparse_weights(other, sparse=["Linear"])
    assert "net.2.weight" not in scl.sparse_weights(other, sparse=[nn.Linear])


def test_masks_of_another_sparsity_are_kept_and_that_is_said():
    module = Mlp()
    fit(module, scl.SET(0.8), epochs=1)
    with pytest.warns(UserWarning, match=r"RigL\(sparsity=0.9\): the weights have masks already, of sparsity 0.8"):
        fit(module, scl.RigL(0.9), epochs=1)


def test_a_checkpoint_from_before_the_pruning_is_said_in_the_fit(tmp_path):
    with pytest.warns(UserWarning, match="the last checkpoint was written before the weights were pruned"):
        fit(Mlp(), scl.OneShotPruning(0.8), ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=7))


def test_two_policies_of_a_kind_act_on_weights_of_their_own(tmp_path):
    module, last = Mlp(), ModelCheckpoint(tmp_path, save_last=True)
    parts = [scl.OneShotPruning(0.8, sparse=["net.2.*"]), scl.OneShotPruning(0.5, sparse=["net.4.*"])]
    fit(module, *parts, last)
    assert [int((module.get_parameter(n) == 0).sum()) for n in PRUNED] == [4096 - 819, 2048]
    with pytest.raises(ValueError, match="makes masks of the same weights; divide them by"):
        fit(Mlp(), scl.RigL(0.8), scl.SNFS(0.8))


def test_an_average_obeys_the_masks_before_training_begins(tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            average = next(c for c in trainer.callbacks if isinstance(c, EMAWeightAveraging))._average_model.module
            seen.append(int((average.net[2].weight == 0).sum()))

    fit(Mlp(), Look(), EMAWeightAveraging(), scl.RigL(0.8), epochs=1)
    assert seen == [4096 - 819]


class Foreign(pl.Callback):
    """Attributes and methods that only look like ours."""

    after = 3
    needs_tasks = True

    def on_multitask_loss(self):
        pass


def test_other_peoples_attributes_are_not_taken_for_declarations():
    fit(Mlp(), Foreign(), scl.SET(0.8), epochs=1)


class OldArguments(pl.Callback):
    def on_task_start(self, trainer, task):
        pass


LAZY = nn.Sequential(nn.Linear(20, 64), nn.LazyLinear(64), nn.Linear(64, 4))


def lazy():
    module = Mlp()
    module.net = LAZY
    return module


class Rounds(scl.ScorePruning):
    def scores(self, trainer, pl_module, batch):
        return {}


BAD = {
    "rounds": (lambda: Rounds(0.5, rounds=1.5), r"Rounds\(rounds=1\.5\): rounds is a whole number"),
    "sparsity": (lambda: scl.SET("0.8"), r"SET\(sparsity='0\.8'\): sparsity is a number"),
    "interval": (lambda: scl.SET(0.8, interval=2.5), r"SET\(interval=2\.5\): interval is a whole number"),
    "until": (lambda: scl.RigL(0.8, until=None), r"RigL\(until=None\): until is a number"),
    "q": (lambda: scl.DynamicGradientMasking(None), r"DynamicGradientMasking\(q=None\)"),
    "a list": (lambda: scl.SET(0.8, distribution=["x"]), r"SET\(distribution=\['x'\]\)"),
    "a text": (lambda: scl.SET(0.8, distribution={"*": "0.5"}), r"SET\(distribution\['\*'\]='0\.5'\): .* is a number"),
    "one pattern": (lambda: fit(Mlp(), scl.SET(0.8, dense="net.2.weight")), r"dense='net\.2\.weight': a list of"),
    "one type": (lambda: fit(Mlp(), scl.SET(0.8, sparse=nn.Linear)), r"sparse=<class .*Linear'>: a list of patterns"),
    "a number": (lambda: fit(Mlp(), scl.SET(0.8, sparse=[5])), r"sparse=\[5\]: 5 is neither a pattern nor a type"),
    "loss": (lambda: fit(Mlp(), scl.SNIP(0.8, loss="ce")), r"SNIP\(loss='ce'\): a function of \(module, batch\)"),
    "no tensor": (lambda: fit(Mlp(), scl.SNIP(0.8, loss=lambda m, b: 1.0)), "returned a float"),
    "a vector": (lambda: fit(Mlp(), scl.SNIP(0.8, loss=lambda m, b: m(b[0]))), r"a tensor of shape \(8, 4\) with"),
    "restart": (lambda: scl.TaskSchedule(1, restart_schedulers="yes"), r"restart_schedulers='yes'\): True, False"),
    "nothing left": (lambda: fit(Mlp(), scl.OneShotPruning(0.9999)), "leaves no weight in net.2.weight, which"),
    "lazy": (lambda: fit(lazy(), scl.SET(0.8)), r"SET: net\.1\.weight has no size yet"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_one_line(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_hook_with_other_arguments_is_refused_by_name():

    with pytest.raises(
        TypeError, match=r"OldArguments\.on_task_start: a hook of tasks takes \(trainer, pl_module, task\)"
    ):
        trainer(OldArguments()).fit(PlainClassifier(), toy_tasks())
