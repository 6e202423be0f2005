"""Sparse kernels under Lightning: the same runs, computed in another way."""

import copy
import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import SGD, Adam
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.acceleration import network, runner
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks
from lightning_sparse_cl.kernels import KernelsUnavailable, functions
from lightning_sparse_cl.sparsity import Masks


class Watcher(pl.Callback):
    """How many elements the optimiser has at each step, and in how many of them kernels computed a gradient."""

    def __init__(self, monkeypatch):
        self.sizes, self.calls = [], 0
        backward = functions.Convolution.backward

        def counted(*args):
            self.calls += 1
            return backward(*args)

        monkeypatch.setattr(functions.Convolution, "backward", staticmethod(counted))

    def on_train_batch_end(self, trainer, *_):
        self.sizes.append(sum(p.numel() for o in trainer.optimizers for g in o.param_groups for p in g["params"]))


def small(**kwargs):
    return scl.SmallCNN(8, **kwargs)


METHODS = {
    "SparCL": lambda: scl.SparCL(
        small(), scl.DERpp(20, 8), scl.TaskAwareDynamicMasking(0.8, interval=1), scl.DynamicDataRemoval(0.2, 1, 1),
        scl.DynamicGradientMasking(0.05, 4), optimizer=partial(SGD, lr=0.05, momentum=0.9),
    ),
    "SparCL, gradients of the training step": lambda: scl.SparCL(
        small(), scl.DERpp(20, 8), scl.TaskAwareDynamicMasking(0.8, interval=1, gradients="training"),
        scl.DynamicDataRemoval(0.2, 1, 1), scl.DynamicGradientMasking(0.05, 4, gradients="training"),
    ),
    "RigL": lambda: scl.ContinualModule(small(), scl.ER(20, 8), policies=[scl.RigL(0.8, interval=3)]),
    "SET, Adam": lambda: scl.ContinualModule(
        small(), scl.ER(20, 8), optimizer=partial(Adam, lr=1e-3), policies=[scl.SET(0.8, interval=3)]
    ),
    "SNIP, SAM": lambda: scl.ContinualModule(
        small(), update=scl.SharpnessAware(0.05), policies=[scl.SNIP(0.8), scl.GradientClipping(1.0)]
    ),
    "EWC": lambda: scl.ContinualModule(small(), scl.EWC(), policies=[scl.SET(0.8, interval=3)]),
    "EsaCL": lambda: scl.EsaCL(small(), scl.ER(20, 8), freeze="share"),
    "Continual DST": lambda: scl.ContinualDST(small(), growth=scl.SET(0.8, interval=3)),
    "La-MAML": lambda: scl.ContinualModule(
        small(), scl.ER(20, 8), update=scl.LaMAML(), optimizer=partial(SGD, lr=1.0), policies=[scl.SET(0.8)]
    ),
    "a foreign module": lambda: PlainClassifier(),
}  # fmt: skip
WHOLE = {"EsaCL", "La-MAML"}
"""Of these nothing is pruned while they train, or every step reads all weights."""


@pytest.mark.parametrize("name", METHODS)
def test_runs_are_the_same_but_for_rounding(name, monkeypatch):
    runs = []
    for accelerated in (False, True):
        pl.seed_everything(0, verbose=False)
        module, watcher = METHODS[name](), Watcher(monkeypatch)
        more = [scl.SET(0.8, interval=4)] if isinstance(module, PlainClassifier) else []
        fast = scl.SparseAcceleration(measure=False)
        fitted = trainer(*more, watcher, *([fast] if accelerated else []))
        fitted.fit(module, toy_tasks(2, size=8))
        masks = Masks.of(module)
        assert all((module.get_parameter(n)[~m] == 0).all() for n, m in masks.alive.items())
        assert fast.acceleration is None and all(type(m._parameters) is dict for m in module.modules())
        runs.append((module, {n: int(m.sum()) for n, m in masks.alive.items()}, watcher))
    (plain, counts, _), (module, own, watcher) = runs
    assert own == counts
    assert watcher.calls > 0 or name in WHOLE
    whole = sum(p.numel() for p in plain.parameters())
    assert (min(watcher.sizes) < whole) == (name not in WHOLE), (min(watcher.sizes), whole)
    for (n, a), b in zip(module.named_parameters(), plain.parameters()):
        assert a.shape == b.shape and torch.isfinite(a).all(), n
    assert module.state_dict().keys() == plain.state_dict().keys()


def test_frozen_weights_keep_their_bits():
    kept = {}

    class Keep(pl.Callback):
        def on_after_task_end(self, trainer, pl_module, task):
            if task == 0:
                kept.update({n: pl_module.get_parameter(n)[f].clone() for n, f in Masks.of(pl_module).frozen.items()})
                kept["where"] = {n: f.clone() for n, f in Masks.of(pl_module).frozen.items()}

    pl.seed_everything(0, verbose=False)
    module = scl.ContinualModule(
        small(), policies=[scl.SET(0.5), scl.OneShotPruning(0.8), scl.FreezeMasks(), scl.SparseAcceleration(False)],
        optimizer=partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    )  # fmt: skip
    trainer(Keep()).fit(module, toy_tasks(3))
    where = kept.pop("where")
    assert where and all(torch.equal(module.get_parameter(n)[where[n]], value) for n, value in kept.items())


def test_evaluation_of_a_pruned_network_uses_the_kernels(monkeypatch):
    pl.seed_everything(0, verbose=False)
    module, data = scl.ContinualModule(small(), policies=[scl.OneShotPruning(0.8)]), toy_tasks(2)
    fitted = trainer()
    fitted.fit(module, data)

    def labels(fitted, module):
        return torch.cat([batch for task in fitted.predict(module, datamodule=data) for batch in task])

    plain = labels(trainer(), copy.deepcopy(module))
    calls, real = [], runner.Runner._program
    monkeypatch.setattr(runner.Runner, "_program", lambda self: calls.append(1) or real(self))
    fast = labels(trainer(scl.SparseAcceleration(measure=False)), module)
    assert calls and (fast == plain).float().mean() > 0.98
    assert all(type(m._parameters) is dict for m in module.modules())


def test_what_is_measured_before_training_uses_the_kernels_and_so_do_layers_that_are_made_later(monkeypatch):
    calls, real = [], runner.Runner._program
    monkeypatch.setattr(runner.Runner, "_program", lambda self: calls.append(self) or real(self))

    class Measures(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            with torch.no_grad():
                pl_module(torch.rand(4, *trainer.datamodule.input_shape))
            self.seen = len(calls)

    class Remakes(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            for parent in list(pl_module.modules()):
                for name, layer in list(parent.named_children()):
                    if isinstance(layer, torch.nn.Conv2d):
                        setattr(parent, name, copy.deepcopy(layer))
            trainer.strategy.setup_optimizers(trainer)

    measures, watcher = Measures(), Watcher(monkeypatch)
    module = scl.ContinualModule(small(), policies=[scl.SET(0.8), scl.SparseAcceleration(False), Remakes()])
    trainer(measures, watcher, epochs=1).fit(module, toy_tasks(2))
    assert measures.seen and watcher.calls
    assert max(watcher.sizes) < sum(p.numel() for p in module.parameters())
    assert all(type(m._parameters) is dict for m in module.modules())


@pytest.mark.parametrize("why", ["no compiler", "bf16-mixed"])
def test_where_there_are_no_kernels_the_run_goes_on_dense(why, monkeypatch):
    def none():
        raise KernelsUnavailable("sparse kernels: no C++ compiler was found")

    if why == "no compiler":
        monkeypatch.setattr(network, "library", none)
    module = scl.ContinualModule(small(), policies=[scl.SET(0.8)])
    told = "no C\\+\\+ compiler" if why == "no compiler" else "in 32-true precision"
    with pytest.warns(UserWarning, match=told) as warned:
        precision = "32-true" if why == "no compiler" else why
        trainer(scl.SparseAcceleration(), precision=precision, epochs=1).fit(module, toy_tasks(2))
    assert len([w for w in warned if "goes on dense" in str(w.message)]) == 1
    assert Masks.of(module).density() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("how", ["wrapped", "its network", "its step"])
def test_a_compiled_module_is_trained_dense_and_the_same(how):
    def compile_(module):
        if how == "its network":
            module.net = torch.compile(module.net, backend="eager")
        if how == "its step":
            module.training_step = torch.compile(module.training_step, backend="eager")
        return torch.compile(module, backend="eager") if how == "wrapped" else module

    runs = []
    for fast in ([], [scl.SparseAcceleration(measure=False)]):
        torch._dynamo.reset()
        pl.seed_everything(0, verbose=False)
        module = PlainClassifier()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer(scl.SET(0.8, interval=4), *fast, epochs=1).fit(compile_(module), toy_tasks(2, size=8))
        dense = [str(w.message) for w in told if "goes on dense" in str(w.message)]
        assert len(dense) == len(fast) and all("is compiled" in message for message in dense)
        runs.append(module)
    assert Masks.of(module).density() == pytest.approx(0.2, abs=0.01)
    assert all(map(torch.equal, *(m.state_dict().values() for m in runs)))
