"""A-GEM and GPM as callbacks: around any objective, update rule and policy they make sense with."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks
from lightning_sparse_cl.optim.projection import agem_


class Steps(pl.Callback):
    """Gradients of every step, before and after the callbacks in between."""

    def __init__(self):
        self.grads = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = pl_module.named_parameters()
        self.grads.append({n: p.grad.detach().clone() for n, p in named if p.grad is not None})


def fitted(module, *callbacks, epochs=2):
    data = toy_tasks()
    trainer(*callbacks, epochs=epochs).fit(module, data)
    return module, data


OBJECTIVES = [scl.CrossEntropy(), scl.DERpp(30, 8), scl.EWC(10.0), scl.CO2L(30, 8, dim=8), scl.LwF()]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize(
    "update", [scl.SingleBackward(), scl.SharpnessAware(), scl.LaMAML(parts=2)], ids=lambda u: str(u)[:9]
)
def test_agem_acts_on_the_last_gradient_of_any_objective_and_update(objective, update, monkeypatch):
    references = []

    def recorded(grads, reference):
        references.append(reference)
        agem_(grads, reference)

    monkeypatch.setattr("lightning_sparse_cl.callbacks.agem.agem_", recorded)
    torch.manual_seed(0)
    before, after, agem = Steps(), Steps(), scl.AGEM(30, 8)
    policies = [before, agem, after]
    module = scl.ContinualModule(scl.SmallCNN(4), copy.deepcopy(objective), copy.deepcopy(update), policies=policies)
    fitted(module)
    assert len(before.grads) == len(after.grads) > len(references) > 0
    first = len(after.grads) - len(references)  # steps of the first task: no memory yet
    assert first == len(after.grads) // 3
    changed = 0
    for old, new, reference in zip(before.grads[first:], after.grads[first:], references):
        along = sum(float((a * r).sum()) for a, r in zip(old.values(), reference))
        now = sum(float((a * r).sum()) for a, r in zip(new.values(), reference))
        same = all(torch.equal(old[n], new[n]) for n in old)
        assert same == (along >= 0) or abs(along) < 1e-6
        assert now >= -1e-4 * max(1.0, abs(along))
        changed += not same
    assert changed


def test_agem_uses_its_whole_memory_and_every_task_has_a_share():
    agem = scl.AGEM(memory=31, replay_batch_size=8)
    fitted(PlainClassifier(6), agem)  # a module that knows nothing of this package
    assert len(agem.memory) == 31
    assert agem.memory.contents().tasks.bincount().tolist() == [11, 10, 10]


def test_a_memory_larger_than_a_task_still_draws_at_random():
    agem = scl.AGEM(memory=90, replay_batch_size=8)
    fitted(PlainClassifier(6), agem)
    held = agem.memory.contents()
    for task in range(3):
        counts = held.labels[held.tasks == task].bincount(minlength=6)
        assert counts.sum() == 30 and (counts > 5).sum() == 2


def test_what_the_papers_would_charge_grows_with_the_reference_pass():
    def papers(*policies):
        flops = scl.FlopsCounter()
        torch.manual_seed(0)
        fitted(scl.ContinualModule(scl.SmallCNN(4), scl.ER(30, 16), policies=list(policies)), flops)
        return flops.summary()["papers"]

    assert papers(scl.AGEM(30, 16)) > 1.3 * papers()


def test_whole_gradients_are_those_of_the_step_alone():
    module = scl.ContinualModule(scl.SmallCNN(4), policies=[scl.RigL(0.5)])
    _, data = fitted(module, scl.AGEM(30, 8))
    masks, own, x = scl.Masks.of(module), scl.Enforcement.of(module), torch.randn(4, *data.input_shape)
    own.ask_whole(list(masks.alive))
    with own.unrecorded():
        module(x).sum().backward()
    assert not own.take_whole()
    own.ask_whole(list(masks.alive))
    module(x).sum().backward()
    assert set(own.take_whole()) == set(masks.alive)


def gpm_module(*policies, **kwargs):
    torch.manual_seed(0)
    gpm = scl.GPM(threshold=0.9, increment=0.01, samples=20)
    objective = kwargs.pop("objective", None) or scl.CrossEntropy(single_head=True)
    return gpm, scl.ContinualModule(scl.SmallCNN(6), objective, policies=[*policies, gpm], **kwargs)


@pytest.mark.parametrize("update", [scl.SingleBackward(), scl.SharpnessAware()], ids=lambda u: type(u).__name__)
@pytest.mark.parametrize("pruned", [False, True])
def test_every_step_is_orthogonal_to_the_bases_of_its_task(update, pruned):
    policies = [scl.OneShotPruning(0.5), scl.Reopen("zero")] if pruned else []
    gpm, module = gpm_module(*policies, update=update)

    class Check(pl.Callback):
        steps = free = 0

        def on_train_batch_start(self, trainer, pl_module, *_):
            self.before = {n: p.detach().clone() for n, p in pl_module.network.named_parameters()}

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.datamodule.task == 0 or trainer.is_last_batch:  # pruning and Reopen act there
                return
            self.steps += 1
            for name, p in pl_module.network.named_parameters():
                moved = p.detach() - self.before[name]
                if name in gpm.layers:
                    along = moved.flatten(1) @ gpm.bases[name]
                    assert float(along.norm()) <= 1e-5 * max(1.0, float(self.before[name].norm())), name
                    width, rank = gpm.bases[name].shape
                    assert moved.any() or rank == width
                    self.free += rank < width
                elif not name.startswith("head."):
                    assert not moved.any(), name

    check = Check()
    module.policies.append(check)
    fitted(module)
    assert check.steps > 10 and check.free > 10
    for basis in gpm.bases.values():
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("reopened", [False, True])
def test_what_the_first_task_learnt_stays_where_the_threshold_is_one(reopened):
    gpm = scl.GPM(threshold=1.0, samples=1000)
    torch.manual_seed(0)
    policies = [scl.OneShotPruning(0.5, of="free"), scl.Reopen("zero"), gpm][0 if reopened else 2 :]
    module = scl.ContinualModule(scl.SmallCNN(4), scl.CrossEntropy(single_head=True), policies=policies)
    kept = {}

    class Watch(pl.Callback):
        def on_before_task_end(self, trainer, pl_module, task):
            if task:
                self.look(trainer, pl_module, task)

        def on_after_task_end(self, trainer, pl_module, task):
            if task == 0:
                self.look(trainer, pl_module, task)

        def look(self, trainer, pl_module, task):
            data = trainer.datamodule
            pl_module.eval()
            with torch.no_grad():
                kept[task] = pl_module(data.prepare(data.train_sets[0].inputs, augment=False))[:, data.classes[0]]

    module.policies.append(Watch())
    fitted(module)
    torch.testing.assert_close(kept[1], kept[0], atol=1e-3, rtol=1e-3)  # before the second task's own pruning


@pytest.mark.parametrize(
    ("others", "name"),
    [
        ([scl.TaskAwareDynamicMasking(0.5, 1)], "TaskAwareDynamicMasking"),
        ([scl.SET(0.5)], "SET"),
        ([scl.DynamicGradientMasking(0.1)], "DynamicGradientMasking"),
        ([scl.OneShotPruning(0.5), scl.FreezeMasks(), scl.Reopen("zero")], "FreezeMasks"),
        ([scl.OneShotPruning(0.5)], "OneShotPruning without Reopen"),
        ([scl.OneShotPruning(0.5, epoch=1), scl.Reopen("zero")], r"OneShotPruning\(epoch=1\)"),
        ([scl.OneShotPruning(0.5), scl.Reopen("zero", 0.1)], r"Reopen\(part=0.1\)"),
    ],
)
def test_gpm_refuses_masks_that_act_while_a_task_trains(others, name):
    with pytest.raises(ValueError, match=f"GPM: {name} masks weights or gradients while tasks train"):
        fitted(gpm_module(*copy.deepcopy(others))[1])


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([scl.OneShotPruning(0.5), scl.Reopen()], 'use Reopen\\(init="zero"\\)'),
        ([scl.AGEM(30, 8)], "GPM: A-GEM's projection adds a direction"),
    ],
)
def test_gpm_refuses_what_moves_weights_in_other_directions(others, message):
    with pytest.raises(ValueError, match=message):
        fitted(gpm_module(*copy.deepcopy(others))[1])


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        (lambda p: torch.optim.Adam(p), "Adam"),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1), r"SGD\(weight_decay=0.1\)"),
    ],
)
def test_gpm_refuses_optimisers_that_leave_the_null_space(optimizer, name):
    with pytest.raises(ValueError, match=f"GPM: {name}.*use SGD without weight decay"):
        fitted(gpm_module(optimizer=optimizer)[1])
    with pytest.raises(ValueError, match="GPM: StochasticFrankWolfe"):
        fitted(gpm_module(optimizer=lambda p: scl.StochasticFrankWolfe(p, k=0.1))[1])


class Grouped(PlainClassifier):
    def __init__(self):
        super().__init__(6)
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.LazyLinear(6))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: scl.AGEM(memory=0), ValueError, "size=0"),
        (lambda: scl.AGEM(replay_batch_size=0), ValueError, r"AGEM\(replay_batch_size=0\)"),
        (lambda: scl.GPM(threshold=0.0), ValueError, r"GPM\(threshold=0.0\).*in \(0, 1\]"),
        (lambda: scl.GPM(threshold=1.1), ValueError, r"GPM\(threshold=1.1\)"),
        (lambda: scl.GPM(increment=-0.1), ValueError, r"GPM\(increment=-0.1\)"),
        (lambda: scl.GPM(samples=0), ValueError, r"GPM\(samples=0\)"),
        (lambda: fitted(PlainClassifier(6), scl.AGEM(memory=2)), ValueError, r"AGEM\(memory=2\).*there are 3;"),
        (lambda: fitted(Grouped(), scl.GPM()), ValueError, "GPM: net.1.weight of Grouped belongs to Conv2d"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
