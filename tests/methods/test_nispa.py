"""NISPA: a fixed number of connections, none from plastic to stable units, phases taken back, nothing forgotten."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from logits_of_tasks import Logits
from stopped import assert_resumes
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.callbacks import stable_units
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks
from lightning_sparse_cl.sparsity.channels import Channels
from lightning_sparse_cl.sparsity.units import kernelwise

PHASE, EPOCHS = 2, 6
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}
BACKBONES = {
    "cnn": lambda: scl.SmallCNN(8),
    "residual": lambda: scl.ResNet18(4),
    "depthwise": lambda: scl.SmallImageMobileNetV2(0.25),
    "mlp": lambda: scl.SmallMLP((20, 20)),
}


def nispa(backbone="cnn", optimizer="adamw", sparsity=0.6, tolerance=0.0075, phases=9, **subnetworks):
    units = scl.StableUnits(sparsity, PHASE, phases, tolerance)
    return scl.NISPA(BACKBONES[backbone](), units, scl.TaskSubnetworks(**subnetworks), optimizer=OPTIMIZERS[optimizer])


def units_of(module):
    return next(p for p in module.policies if isinstance(p, scl.StableUnits))


def data(num_tasks=3, **options):
    return toy_tasks(num_tasks, val_fraction=0.2, **options)


class Watch(pl.Callback):
    """At every step: how many kernels each layer has, and that none leads from plastic to stable units."""

    def __init__(self):
        self.kernels, self.chosen = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        units, masks = units_of(pl_module), scl.Masks.of(pl_module)
        self.kernels.append({n: int(kernelwise(masks.alive[n]).sum()) for n in units._layers})
        self.chosen.append([int(s.sum()) for s in units._chosen])
        stable = units._chosen or units.stable
        plastic = [~s for s in stable]
        for name in (*units._layers, *((units._head,) if units._chosen else ())):
            weight = pl_module.get_parameter(name)
            assert not weight[units._between(name, weight, stable, plastic)].any(), name


@pytest.mark.parametrize("batch_norm", ["per_task", pytest.param("frozen", marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "backbone", ["cnn", "residual", *(pytest.param(b, marks=pytest.mark.slow) for b in ("depthwise", "mlp"))]
)
def test_nothing_is_forgotten(backbone, optimizer, batch_norm):
    torch.manual_seed(0)
    logits, evaluation = Logits(), scl.ContinualEvaluation()
    module = nispa(backbone, optimizer, batch_norm=batch_norm, full="share")
    trainer(logits, evaluation, epochs=EPOCHS).fit(module, data(4, size=16 if backbone == "depthwise" else 8))
    logits.assert_same()
    assert evaluation.matrices["task_il"].summary()["bwt"] == 0


@pytest.mark.parametrize("backbone", ["cnn", pytest.param("residual", marks=pytest.mark.slow)])
def test_the_number_of_connections_stays_and_none_leads_from_plastic_to_stable_units(backbone):
    torch.manual_seed(0)
    module, watch = nispa(backbone, tolerance=1.0), Watch()
    trainer(watch, epochs=EPOCHS).fit(module, data())
    sparse = units_of(module).names(module)
    for name, count in watch.kernels[0].items():
        kernels = kernelwise(module.get_parameter(name)).numel()
        assert count == (round(0.4 * kernels) if name in sparse else kernels), name
    for later in watch.kernels:  # where the pool of a layer runs out, it has fewer
        assert all(later[name] <= count for name, count in watch.kernels[0].items())
    assert len({kernels[sparse[0]] for kernels in watch.kernels[: 4 * EPOCHS]}) == 1


@pytest.mark.parametrize("per_unit", [1, 4])
def test_units_that_lead_nowhere_are_the_first_to_get_a_connection(per_unit):
    units, network = scl.StableUnits(0.5), torch.nn.Sequential(torch.nn.Conv2d(1, 6, 1), torch.nn.Flatten())
    network.append(torch.nn.Linear(6 * per_unit, 5))
    units.channels = channels = Channels.of(network)
    plastic = [torch.ones(n, dtype=torch.bool) for n in channels.sizes]
    plastic[channels.writes["2"]] = torch.tensor([True, False, True, True, True])
    kept = torch.zeros(5, 6 * per_unit, dtype=torch.bool)
    kept[2, 2 * per_unit :: per_unit] = True  # the last four channels lead somewhere
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        grown = units._grown("2.weight", network[2].weight, kept, 3, plastic, generator)
        assert int(grown.sum()) == 3 and not (grown & kept).any() and not grown[1].any()
        of_channel = grown.view(5, 6, per_unit).sum((0, 2))
        assert of_channel[0] >= 1 and of_channel[1] >= 1


def test_subnetworks_have_stable_units_only_and_use_those_of_earlier_tasks():
    torch.manual_seed(0)
    module = nispa(tolerance=1.0, phases=4)
    trainer(epochs=EPOCHS).fit(module, data())
    units, learnt = units_of(module), scl.Subnetworks.of(module)
    assert units.summary()["phases"] == [3, 3, 3]
    for name in units._layers:
        first, second, third = (learnt.mask(t, name) for t in range(3))
        allowed = units._between(name, module.get_parameter(name), units.stable, units.stable)
        assert not (third & ~allowed).any() and not (first & ~second).any() and not (second & ~third).any()
    assert all(0 < part <= 1 for part in units.summary()["stable"].values())
    assert min(units.summary()["stable"].values()) < 1


@pytest.mark.parametrize(
    ("accuracies", "phase"),
    [
        ([0.5, 0.9, 0.6, 0.99], 2),  # the third phase costs too much
        ([0.9, 0.5, 0.895, 0.895], 4),  # within the tolerance, and the second phase may do what it likes
        ([0.9, 0.9, 0.9, 0.2], 3),
    ],
)
def test_a_phase_that_costs_too_much_is_taken_back(accuracies, phase, monkeypatch):
    found, networks = iter(accuracies), []
    monkeypatch.setattr(stable_units, "held_out_accuracy", lambda *_: next(found))

    class Keep(scl.TaskCallback):
        """The weights that each phase has trained, before the callback acts."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.is_last_batch and trainer.datamodule.epoch_in_task % PHASE == PHASE - 1:
                networks.append({n: t.clone() for n, t in pl_module.network.state_dict().items()})

    torch.manual_seed(0)
    module = nispa(tolerance=0.01)
    trainer(Keep(), epochs=4 * PHASE).fit(module, data(1))
    assert units_of(module).summary()["phases"] == [phase]
    assert len(networks) == min(phase + 1, 4)
    for name, tensor in module.network.state_dict().items():
        mask = scl.Masks.of(module).alive.get(name)
        then = networks[phase - 1][name]
        assert torch.equal(tensor, then if mask is None else then * mask), name


def test_the_share_of_activity_falls_along_a_cosine():
    units = scl.StableUnits(0.9)
    shares = []
    for units._phase in (10, 15, 20, 26):
        shares.append(units._share())
    assert shares == pytest.approx([0.75, 0.5, 0.25, 0.0432], abs=1e-4)


def test_a_task_ends_when_little_activity_is_left(monkeypatch):
    monkeypatch.setattr(stable_units, "held_out_accuracy", lambda *_: 1.0)
    module = nispa(phases=3)  # shares 0.75, 0.25, 0
    trainer(epochs=20).fit(module, data(2))
    assert units_of(module).summary()["phases"] == [2, 2]


def test_biases_of_plastic_units_and_the_optimiser_start_anew():
    seen, states = {}, []

    class Look(scl.TaskCallback):
        after = (scl.StableUnits,)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            at = trainer.datamodule.task, trainer.datamodule.epoch_in_task
            if at == (1, 0) and batch_idx == 0:
                seen["bias"] = pl_module.backbone[1].bias.detach().clone()
            if batch_idx == 0 and at[1] % PHASE == 0:
                states.append(len(trainer.optimizers[0].state))

    torch.manual_seed(0)
    module = nispa("mlp", phases=4, full="share")
    trainer(Look(), epochs=EPOCHS).fit(module, data(2))
    units, first = units_of(module), scl.Subnetworks.of(module)
    stable = first.mask(0, "backbone.1.weight").any(1)
    assert not stable.all() and not seen["bias"][~stable].any() and seen["bias"][stable].any()
    assert set(states) == {0} and units.summary()["stable"]


def test_what_grows_is_drawn_as_the_layers_weights_are():
    drawn = []

    class Look(scl.TaskCallback):
        after = (scl.StableUnits,)

        def on_train_epoch_end(self, trainer, pl_module):
            alive, weight = scl.Masks.of(pl_module).alive["backbone.7.weight"], pl_module.backbone[7].weight.detach()
            drawn.append((alive.clone(), weight.clone()))

    torch.manual_seed(0)
    net = scl.SmallCNN(16)
    module = scl.NISPA(net, scl.StableUnits(0.5, PHASE, 4, 1.0))
    trainer(Look(), epochs=2 * PHASE).fit(module, data(1))
    (_, _), (alive, weight) = drawn[0], drawn[1]
    old, grown = alive & drawn[0][0], alive & ~drawn[0][0]
    assert int(grown.sum()) > 100 and (weight[grown] != 0).all()
    assert float(weight[grown].std()) == pytest.approx(float(weight[old].std()), rel=0.2)
    assert abs(float(weight[grown].mean()) - float(weight[old].mean())) < 0.2 * float(weight[old].std())


def test_what_is_not_frozen_starts_anew():
    seen = []

    class Start(scl.TaskCallback):
        def on_task_end(self, trainer, pl_module, task):
            seen.append({n: pl_module.get_parameter(n).detach().clone() for n in units_of(pl_module)._layers})

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.datamodule.task == 1 and trainer.datamodule.epoch_in_task == batch_idx == 0:
                seen.append({n: pl_module.get_parameter(n).detach().clone() for n in units_of(pl_module)._layers})

    module = nispa()
    trainer(Start(), epochs=EPOCHS).fit(module, data(2))
    learnt = scl.Subnetworks.of(module)
    for name, before in seen[0].items():
        used, after = learnt.mask(0, name), seen[1][name]
        assert torch.equal(before[used], after[used])
        others = ~used & (after != 0)
        assert others.any() and not (before[others] == after[others]).any()


@pytest.mark.parametrize("step", [18, *(pytest.param(s, marks=pytest.mark.slow) for s in (3, 8, 17, 25, 31, 40))])
@pytest.mark.parametrize("falls", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_resumed_it_ends_with_the_same_bits(falls, step, tmp_path, monkeypatch):
    if falls:  # so that the third phase is taken back
        monkeypatch.setattr(stable_units, "held_out_accuracy", lambda t, *_: 1 - 0.1 * t.datamodule.epoch_in_task)
    assert_resumes(lambda: nispa(tolerance=0.0), step, EPOCHS + 1, tmp_path, val_fraction=0.2)


@pytest.mark.parametrize(
    "changed",
    [
        {"sparsity": 0.3}, {"phase": 3}, {"phases": 5}, {"tolerance": 0.001}, {"dense": ["backbone.3.weight"]},
        {"sparse": ["backbone.3.weight"]},
    ],
    ids=str,
)  # fmt: skip
def test_every_parameter_does_something(changed, monkeypatch):
    monkeypatch.setattr(stable_units, "held_out_accuracy", lambda t, *_: 1 - 0.005 * t.datamodule.epoch_in_task)
    results = []
    for options in ({}, changed):
        torch.manual_seed(0)
        units = scl.StableUnits(**({"sparsity": 0.6, "phase": 2, "phases": 9, "tolerance": 0.5} | options))
        module = scl.NISPA(scl.SmallCNN(8), units)
        trainer(epochs=EPOCHS + 1).fit(module, data(1))
        results.append(torch.cat([p.detach().flatten() for p in module.network.parameters()]))
    assert not torch.equal(*results)


def test_in_another_module():
    torch.manual_seed(0)
    logits, module = Logits(), PlainClassifier(6, 8)
    parts = [scl.StableUnits(0.5, PHASE, 9, dense=[]), scl.TaskSubnetworks(full="share"), logits]
    trainer(*parts, epochs=EPOCHS).fit(module, data())
    logits.assert_same()


class Crossed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.LazyLinear(8)

    def forward(self, x):
        return self.layer(x.flatten(1).flip(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scl.StableUnits(1.0), r"StableUnits\(sparsity=1.0\)"),
        (lambda: scl.StableUnits(0.5, phase=0), r"StableUnits\(phase=0\): a whole number, at least 1"),
        (lambda: scl.StableUnits(0.5, phases=2.5), r"StableUnits\(phases=2.5\)"),
        (lambda: scl.StableUnits(0.5, tolerance=-0.1), r"StableUnits\(tolerance=-0.1\)"),
        (lambda: scl.NISPA(scl.SmallCNN(4), units=-1), r"NISPA\(units=-1\): a StableUnits, or None"),
        (
            lambda: trainer(epochs=EPOCHS).fit(nispa(share=False), data()),
            r"TaskSubnetworks\(share=False\) keeps whole networks",
        ),
        (
            lambda: trainer(scl.SET(0.5), epochs=EPOCHS).fit(nispa(), data()),
            "StableUnits: SET makes masks of the same weights; use one of them",
        ),
        (lambda: trainer(epochs=3).fit(nispa(), data()), r"phase=2\): task 0 has 3 epochs, but at least two"),
        (lambda: trainer(epochs=EPOCHS).fit(nispa(), toy_tasks()), "set the data module's val_fraction"),
        (
            lambda: trainer(scl.StableUnits(0.5, PHASE), epochs=EPOCHS).fit(PlainClassifier(), data()),
            "TaskSubnetworks stores what tasks use; add it",
        ),
        (
            lambda: trainer(epochs=EPOCHS).fit(scl.NISPA(Crossed(), scl.StableUnits(0.5, PHASE, sparse=["*"])), data()),
            "channels cannot be followed",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
