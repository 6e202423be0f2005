"""The loss by which weights are ranked is the module's own, and asking for it leaves no trace in the run."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from foreign_module import PRUNED, Mlp, TwoOptimizers, fit
from lightning.pytorch.callbacks import BaseFinetuning, LambdaCallback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_sparse_cl as scl


class Regression(Mlp):
    """Float targets (B, 4); batches are dicts."""

    def training_step(self, batch, batch_idx):
        return {"loss": F.mse_loss(self(batch["x"]), batch["y"])}

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(96, 20, generator=generator)
        return DataLoader([{"x": v, "y": v[:4].tanh()} for v in x], 8)


def sensitivity(module, loss):
    weights = [module.get_parameter(name) for name in PRUNED]
    return {n: (w * g).abs().detach() for n, w, g in zip(PRUNED, weights, torch.autograd.grad(loss, weights))}


def test_snip_ranks_by_the_loss_of_the_training_step():
    module = Regression()
    batch = next(iter(module.train_dataloader()))
    scores = sensitivity(module, F.mse_loss(module(batch["x"]), batch["y"]))
    fit(module, scl.SNIP(0.8), epochs=1, limit_train_batches=1, enable_checkpointing=False)
    alive = scl.Masks.of(module).alive
    for name, score in scores.items():
        assert score[alive[name]].min() >= score[~alive[name]].max()


@pytest.mark.parametrize("policy", [scl.TaskAwareDynamicMasking, scl.DynamicGradientMasking])
def test_policies_of_sparcl_take_it_too(policy):
    seen = []

    class Recorded(Regression):
        def training_step(self, batch, batch_idx):
            found = super().training_step(batch, batch_idx)
            seen.append((self is module, float(found["loss"])))
            return found

    module = Recorded()
    given = dict(sparsity=0.8, interval=1) if policy is scl.TaskAwareDynamicMasking else dict(q=0.1, interval=4)
    fit(module, policy(**given), epochs=2, enable_checkpointing=False)
    asked = [loss for own, loss in seen if not own]
    assert len(asked) == (12 if policy is scl.TaskAwareDynamicMasking else 6)
    assert sum(own for own, _ in seen) == 24


class Noisy(Mlp):
    """Everything that a step may move: dropout, batch-norm, a metric, a teacher, a counter, the log."""

    def __init__(self):
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(64))
        self.net.insert(3, nn.Dropout(0.3))
        self.accuracy = torchmetrics.MeanMetric()
        self.teacher = nn.Linear(20, 4).requires_grad_(False)
        self.calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        logits = self(batch[0])
        self.accuracy.update(logits.argmax(1) == batch[1])
        with torch.no_grad():
            self.teacher.weight.lerp_(torch.randn_like(self.teacher.weight), 0.1)
        loss = F.cross_entropy(logits + self.teacher(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.logger.log_metrics({"own": float(loss)}, self.calls)
        return loss


@pytest.mark.parametrize("policy", [lambda: scl.SNIP(0.0), lambda: scl.SNIP(0.0, "global")], ids=["layer", "global"])
def test_a_ranking_that_prunes_nothing_changes_no_bit(policy, tmp_path):
    ends, logs = [], []
    for parts in ([], [policy()]):
        pl.seed_everything(3, verbose=False)
        logger = CSVLogger(tmp_path, name=str(len(parts)))
        module = Noisy()
        fit(module, *parts, epochs=2, logger=logger, log_every_n_steps=1, enable_checkpointing=False)
        ends.append((module.state_dict(), module.calls, module.accuracy.compute(), torch.get_rng_state()))
        logs.append((tmp_path / str(len(parts)) / "version_0" / "metrics.csv").read_text())
    (plain, *rest), (ranked, *others) = ends
    assert all(torch.equal(ranked[name], tensor) for name, tensor in plain.items())
    assert rest[:1] == others[:1] and all(torch.equal(a, b) for a, b in zip(rest[1:], others[1:]))
    assert logs[0] == logs[1]


def test_a_module_that_optimises_by_itself_is_refused_with_the_option_that_serves_it():
    def loss(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1])

    for policy in (scl.SNIP(0.8), scl.TaskAwareDynamicMasking(0.8), scl.DynamicGradientMasking(0.1)):
        name = type(policy).__name__
        with pytest.raises(ValueError, match=rf"{name}: TwoOptimizers optimises by itself.*give {name}\(loss=\.\.\.\)"):
            fit(TwoOptimizers(), policy)
    fit(TwoOptimizers(), scl.SNIP(0.8, loss=loss))
    for gradients in (scl.TaskAwareDynamicMasking, scl.DynamicGradientMasking):
        fit(TwoOptimizers(), gradients(gradients="training"))  # no loss is asked for


def test_what_cannot_be_copied_or_gives_no_loss_is_said_in_one_line():
    class Locked(Mlp):
        def __init__(self):
            super().__init__()
            self.generator = (x for x in ())

    class Silent(Mlp):
        def training_step(self, batch, batch_idx):
            return None

    for module, message in ((Locked(), "Locked cannot be copied"), (Silent(), "returned NoneType and no loss")):
        with pytest.raises(ValueError, match=message) as error:
            fit(module, scl.SNIP(0.5))
        assert "`loss`" in str(error.value) and "\n" not in str(error.value)


class Collects(BoringModel):
    """Keeps the losses of its steps with their graphs, as is common where an epoch's end looks at them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        self.outputs = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        self.outputs.append(loss)
        return loss


def short(*callbacks, max_epochs):
    return pl.Trainer(
        accelerator="cpu", max_epochs=max_epochs, limit_train_batches=3, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks],
    )  # fmt: skip


def test_a_module_that_holds_tensors_with_graphs_is_ranked_by_its_own_loss():
    module = Collects()
    short(scl.DynamicGradientMasking(0.5, interval=1), max_epochs=1).fit(module)
    assert len(module.outputs) == 3  # those of the passes that rank are a copy's
    assert all(loss.grad_fn is not None for loss in module.outputs)
    assert not scl.Masks.of(module).updated  # all are updated again


class Later(BaseFinetuning):
    """Trains the last layer for an epoch, and then all."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.layer[:2])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.layer[:2], optimizer)


def test_nothing_is_ranked_before_there_is_something_to_mask():
    module, held = Collects(), []
    policy = scl.DynamicGradientMasking(0.5, interval=1)
    look = LambdaCallback(on_train_epoch_end=lambda trainer, module: held.append(list(scl.Masks.of(module).updated)))
    short(Later(), policy, look, max_epochs=2).fit(module)
    assert held == [[], ["layer.1.weight"]]


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

    with pytest.raises(ValueError, match=r"Held: its loss has no gradient for net\.2\.weight.*Give a function"):
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


# -- a policy, a method and an objective of one's own --------------------------------------------------------


def test_scores_that_lack_a_weight_are_refused_by_name():
    class Half(scl.ScorePruning):
        def scores(self, trainer, pl_module, batch):
            return {"net.2.weight": pl_module.net[2].weight.detach()}

    with pytest.raises(ValueError, match=r"Half\.scores\(\) has no score for net\.4\.weight"):
        fit(Mlp(), Half(0.5))


@pytest.mark.parametrize("ranking", ["layer", "global"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_rounds_end_at_the_sparsity_and_each_is_scored_anew(ranking, rounds):
    densities = []

    class Magnitude(scl.ScorePruning):
        def scores(self, trainer, pl_module, batch):
            densities.append(self.masks.density())
            return {name: pl_module.get_parameter(name).detach().abs() for name in self.names(pl_module)}

    module = Mlp()
    fit(module, Magnitude(0.9, ranking, rounds=rounds), epochs=1)
    expected = [1.0] + [0.1 ** (i / rounds) for i in range(1, rounds)]
    assert densities == pytest.approx(expected, abs=1e-3)
    assert sum(int(m.sum()) for m in scl.Masks.of(module).alive.values()) == pytest.approx(0.1 * 8192, abs=1)


def test_sparsities_by_pattern():
    module = Mlp()
    fit(module, scl.OneShotPruning(0.5, distribution={"net.4.*": 0.9}), epochs=1)
    assert [int((module.get_parameter(n) == 0).sum()) for n in PRUNED] == [2048, 4096 - round(0.1 * 4096)]
    with pytest.raises(ValueError, match=r"SET\(distribution='head\*'\): matches none of net\.2\.weight"):
        fit(Mlp(), scl.SET(0.5, distribution={"head*": 0.9}))
    with pytest.raises(ValueError, match=r"SNIP\(distribution\['a'\]=1\.5\)"):
        scl.SNIP(0.5, distribution={"a": 1.5})
