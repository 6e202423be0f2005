"""What a run is said to have cost is what the papers' formulas and a sum by hand give for its plan."""

import json
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks
from lightning_sparse_cl.metrics import DenseCost, mean_kept, sparcl_flops, sparcl_memory
from lightning_sparse_cl.sparsity import sparse_weights


def images(classes: int, per_class: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(classes).repeat(per_class)
    return torch.randint(256, (len(labels), 3, size, size), dtype=torch.uint8), labels


@pytest.mark.parametrize("kind", ["digits", "images"])
def test_a_run_of_sparcl_costs_what_the_closed_formula_says(kind):
    """Within 0.1 %: TDM, DDR and DGM on, with the expansion of later tasks, for every epoch's own samples and masks."""
    pl.seed_everything(0, verbose=False)
    s, p, q, every, epochs, batch = 0.75, 0.125, 0.125, 2, 9, 16
    if kind == "digits":
        data, backbone = scl.SplitDigits(batch_size=batch), scl.SmallCNN(8)
    else:
        backbone = scl.ResNet18(8)
        data = scl.SplitTensors(images(4, 50, 8), images(4, 4, 8), 2, batch_size=batch)
    masking = scl.TaskAwareDynamicMasking(s, every, p_inter=p)
    removal, gradients = scl.DynamicDataRemoval(0.3, 4, every), scl.DynamicGradientMasking(q, 7)
    model = scl.SparCL(backbone, scl.DERpp(64, batch), masking, removal, gradients)
    flops = scl.FlopsCounter()
    trainer(flops, epochs=epochs).fit(model, data)

    cost, pruned = DenseCost.of(model, data.input_shape), sparse_weights(model)
    d = 1 - cost.share(pruned)
    papers = physical = dense = samples = 0.0
    for task in range(data.num_tasks):
        whole = len(data.train_sets[task])
        for epoch in range(epochs):
            n = removal.remaining(whole, epoch // every) // batch * batch
            samples += n
            replayed = 2 * n - (2 * batch if task == epoch == 0 else 0)  # the first batch finds the memory empty
            zeros = s - p if task > 0 and epoch < every else s
            alone = sparcl_flops(cost.total_macs(), n, 0, zeros, zeros + q, d)
            papers += alone * (1 + replayed / n / 3)
            weights = d + (1 - d) * (1 - zeros)
            physical += 2 * cost.total_macs() * (n + replayed) * (2 * weights + d + (1 - d) * (1 - zeros - q))
            dense += 6 * cost.total_macs() * (n + replayed) * (whole // batch * batch) / n
    found = flops.summary()
    assert found["samples"] == samples
    assert found["papers"] == pytest.approx(papers, rel=1e-3)
    assert found["training"] == pytest.approx(physical, rel=1e-3)
    assert found["dense"] == pytest.approx(dense, rel=1e-6)
    assert sum(found["per_layer"].values()) == pytest.approx(found["training"])
    assert found["scoring"] > 0


def test_a_run_costs_what_the_one_line_formula_of_the_tables_says():
    """Samples that fill batches in every stage, and no expansion: one call of sparcl_flops, as in Table 3."""
    data = scl.SplitTensors(images(4, 200, 8), images(4, 4, 8), 2, batch_size=10)
    removal = scl.DynamicDataRemoval(0.3, 4, 1)
    model = scl.SparCL(
        scl.SmallCNN(8), scl.DERpp(64, 10), scl.TaskAwareDynamicMasking(0.75, 1, p_inter=0.0, gradients="training"),
        removal, scl.DynamicGradientMasking(0.125, 8, gradients="training"),
    )  # fmt: skip
    flops = scl.FlopsCounter()
    trainer(flops, epochs=10).fit(model, data)
    cost = DenseCost.of(model, data.input_shape)
    kept = mean_kept(0.3, [1, 2, 3, 4], 10)
    assert [len(a) for a in data.alive] == [280, 280] and flops.counts["samples"] == round(800 * 10 * kept)
    d = 1 - cost.share(sparse_weights(model))
    refreshed = 2 * sum(-(-n // 8) for n in (40, 37, 34, 31, *[28] * 6)) / (800 * kept)
    formula = sparcl_flops(cost.total_macs(), 8000, 2, 0.75, 0.875, d, kept)
    whole = sparcl_flops(cost.total_macs(), 8000, 2, 0.75, 0.75, d, kept)  # steps that choose the mask need all
    assert flops.summary()["papers"] == pytest.approx((1 - refreshed) * formula + refreshed * whole, rel=1e-3)
    assert flops.summary()["scoring"] == 0


def test_finding_masks_is_counted_apart():
    data = toy_tasks(num_tasks=1)
    flops, model = scl.FlopsCounter(), PlainClassifier(classes=2)
    trainer(flops, scl.TaskAwareDynamicMasking(0.75, interval=1), epochs=3).fit(model, data)
    cost = DenseCost.of(model, data.input_shape)
    sparse = cost.total_macs() - 0.75 * cost.macs["net.3.weight"]
    assert flops.summary()["training"] == pytest.approx(6 * sparse * 3 * 80)
    assert flops.summary()["scoring"] == pytest.approx(6 * sparse * 2 * 80)  # D_t after epochs 1 and 2
    assert flops.counts == {"samples": 240, "forward": 400, "backward": 400}


def test_whole_gradients_and_both_passes_of_sam_are_counted():
    data = toy_tasks(num_tasks=1)
    rigl, model = scl.FlopsCounter(), PlainClassifier(classes=2)
    trainer(rigl, scl.RigL(0.75, interval=5, until=1.0), epochs=3).fit(model, data)  # 15 steps, whole at two
    macs, total = (cost := DenseCost.of(model, data.input_shape)).macs["net.3.weight"], cost.total_macs()
    assert rigl.summary()["training"] == pytest.approx(16 * (15 * 6 * (total - 0.75 * macs) + 2 * 2 * 0.75 * macs))
    sam, model = scl.FlopsCounter(), scl.ContinualModule(scl.SmallCNN(4), update=scl.SharpnessAware())
    trainer(sam, epochs=3).fit(model, toy_tasks(num_tasks=1))
    total = DenseCost.of(model, data.input_shape).total_macs()
    assert sam.summary()["training"] == 2 * sam.summary()["dense"] == 2 * 6 * total * 240


def test_fast_weights_are_counted_as_the_weights_that_they_stand_for():
    flops = scl.FlopsCounter()
    module = scl.ContinualModule(scl.SmallMLP([8]), scl.ER(30, 8), scl.LaMAML(parts=2))
    trainer(flops, epochs=1).fit(module, toy_tasks())
    assert flops.summary()["weightless"] == 0 and all(flops.summary()["per_layer"].values())


def test_footprint_and_size_of_a_run(tmp_path):
    data, footprint, size = toy_tasks(), scl.MemoryFootprint(), scl.ModelCapacity()
    model = scl.SparCL(
        scl.SmallCNN(16), scl.DERpp(30, 8), scl.TaskAwareDynamicMasking(0.75, 1, p_inter=0.0),
        scl.DynamicDataRemoval(0.0), scl.DynamicGradientMasking(0.125, 4),
    )  # fmt: skip
    t = trainer(scl.FlopsCounter(), footprint, size, scl.RunReport(), epochs=2, default_root_dir=tmp_path / "run")
    t.fit(model, data)
    cost, found = DenseCost.of(model, data.input_shape), footprint.summary()
    assert found["formula"] == pytest.approx(sparcl_memory(cost, 16, 0.75, 0.875), rel=1e-6)
    assert found["dense"] == sparcl_memory(cost, 16)
    assert found["peak"] > found["formula"]
    path = tmp_path / "run" / "model.safetensors"
    metrics = json.loads((path.parent / "metrics.json").read_text())
    assert metrics["size"]["bytes"] == path.stat().st_size < metrics["size"]["dense_bytes"] / 2
    assert metrics["size"]["capacity"] == pytest.approx(0.25)
    assert metrics["flops"]["papers"] < metrics["flops"]["training"] < metrics["flops"]["dense"]
    state = scl.load_sparse(path)
    assert not any(name.startswith("objective") for name in state)
    fresh = scl.ContinualModule(scl.SmallCNN(16))
    fresh.build(data.input_shape, data.num_classes)
    fresh.load_state_dict(state)
    x = data.prepare(data.test_sets[0].inputs, augment=False)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


class Foreign(pl.LightningModule):
    """Knows nothing of this package: ``step`` is what its training step does, and it has no forward of its own."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        return self.step(batch)


class Sentences(Foreign):
    """Dict batches, attention, an embedding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

    def forward(self, batch):
        return self.encoder(self.words(batch["tokens"]))

    def step(self, batch):
        return self(batch).square().mean()


class Twins(Foreign):
    """BYOL: two views, a momentum copy without gradient, heads called one by one; in eval mode the copy adds noise."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = (nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Dropout(0.5)) for _ in range(2))
        self.predict = nn.Linear(6, 6)
        self.teacher.requires_grad_(False)

    def step(self, batch):
        with torch.no_grad():
            target = self.teacher.eval()(batch[1])
        return (self.predict(self.student(batch[0])) - target).square().mean()


def loader(samples):
    return torch.utils.data.DataLoader(samples, batch_size=4)


def fit(module, samples, *callbacks, epochs=2, **kwargs):
    options = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                   enable_model_summary=False, max_epochs=epochs)  # fmt: skip
    pl.Trainer(callbacks=list(callbacks), **(options | kwargs)).fit(module, loader(samples))


def test_batches_that_are_dicts_and_attention_at_its_masks():
    """in_proj_weight at half density costs half of its share; QK^T and AV stay whole."""
    samples = [{"tokens": torch.randint(9, (5,)), "length": torch.tensor(5.0)} for _ in range(8)]
    flops, footprint, module = scl.FlopsCounter(), scl.MemoryFootprint(), Sentences()
    name, weight = "encoder.layers.0.self_attn.in_proj_weight", module.encoder.layers[0].self_attn.in_proj_weight
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[::2] = True
    scl.Masks.of(module).set_alive(name, mask)
    fit(module, samples, flops, footprint)
    found, tokens = flops.summary(), 2 * 8 * 5
    macs = {n: p.numel() for n, p in module.named_parameters() if p.ndim > 1 and "words" not in n}
    assert found["weightless"] == 6 * 2 * tokens * 5 * 8
    assert found["per_layer"] == {n: 6 * tokens * size / (1 + (n == name)) for n, size in macs.items()}
    assert found["dense"] == 6 * tokens * sum(macs.values()) + found["weightless"]
    assert found["training"] == sum(found["per_layer"].values()) + found["weightless"]
    assert (found["samples"], found["forward"], found["backward"]) == (16, 16, 16) and not found["not_counted"]
    assert footprint.cost.activations == 5 * (3 * 8 + 8 + 16 + 8)


def test_a_training_step_of_several_forwards():
    """The student's and the head's passes cost their gradients; the frozen copy's are forward passes alone."""
    samples = [(torch.randn(8), torch.randn(8)) for _ in range(8)]
    flops = scl.FlopsCounter()
    fit(Twins(), samples, flops, epochs=3)
    found = flops.summary()
    assert found["per_layer"] == {
        "student.0.weight": 24 * 6 * 48, "teacher.0.weight": 24 * 2 * 48, "predict.weight": 24 * 6 * 36
    }  # fmt: skip
    assert (found["samples"], found["forward"], found["not_counted"]) == (24, 24, {})


def test_what_is_not_counted_is_said_and_trained_all_the_same():
    class Inner(PlainClassifier):
        forward = None

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    class Functional(Foreign):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 6))

        def step(self, batch):
            return nn.functional.cross_entropy(batch[0].flatten(1) @ self.weight, batch[1])

    class Unused(PlainClassifier):
        def __init__(self):
            super().__init__()
            self.aux = torch.nn.Linear(16, 16)

    flops, report, data = scl.FlopsCounter(), scl.RunReport(), toy_tasks()
    trainer(flops, scl.MemoryFootprint(), report).fit(model := Inner(), data)
    cost = DenseCost.of(model.net, data.input_shape)
    assert flops.summary()["training"] == flops.summary()["dense"] == 6 * cost.total_macs() * 480
    assert flops.counts == {"samples": 480, "forward": 480, "backward": 480}
    with pytest.warns(UserWarning, match=r"FlopsCounter: Functional.training_step is not counted: it calls no module"):
        trainer(flops, scl.MemoryFootprint(), report).fit(Functional(), data)
    assert flops.counts == {"samples": 480, "forward": 0, "backward": 0}
    assert [*flops.summary()["not_counted"]] == ["Functional.training_step"]
    trainer(flops, scl.RigL(0.5, interval=3), report).fit(Unused(), toy_tasks())
    assert flops.summary()["training"] < flops.summary()["dense"]


class Noisy(nn.Module):
    """Draws noise in eval mode too, from all sources, and counts its calls in all ways."""

    def __init__(self):
        super().__init__()
        self.calls, self.log, self.own = 0, [], torch.Generator().manual_seed(0)
        self.register_buffer("seen", torch.zeros(()))
        self.metric = torchmetrics.MeanMetric()

    def forward(self, x):
        self.calls += 1
        self.log.append(self.calls)
        self.seen += 1
        self.metric.update(x.detach().mean())
        noise = torch.randn_like(x) + torch.randn(x.shape, generator=self.own) + random.random() + np.random.rand()
        return x + 0.01 * self.calls * self.seen * self.metric.compute() * noise


class Everything(PlainClassifier):
    def __init__(self, compiled):
        super().__init__(width=4)
        self.net.insert(3, nn.Sequential(Noisy(), nn.Dropout(0.1)))
        self.attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        if compiled:
            self.net[0].compile(backend="eager")

    def forward(self, x):
        x = self.net[:6](x)
        return self.net[6:](x) + self.lstm(self.attention(x.flatten(2).transpose(1, 2)))[0].mean()


@pytest.mark.parametrize("compiled", [False, True])
def test_counting_changes_no_bit_of_a_training_with_noise(compiled):
    ends = []
    for measures in ([], [scl.FlopsCounter(), scl.MemoryFootprint()]):
        pl.seed_everything(0, verbose=False)
        module = Everything(compiled)
        trainer(*measures).fit(module, toy_tasks())
        noisy = module.net[3][0]
        assert noisy.log == [*range(1, noisy.calls + 1)]
        random_states = torch.get_rng_state(), noisy.own.get_state(), noisy.metric.mean_value, noisy.seen
        ends.append([*module.state_dict().values(), *random_states, random.random(), np.random.rand(), noisy.calls])
    assert measures[0].summary()["training"] > 0 and not measures[0].summary()["not_counted"]
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*ends, strict=True))


class WithMetric(PlainClassifier):
    """A metric inside of it is hashed by its state."""

    def __init__(self):
        super().__init__()
        self.metric = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.metric(loss.detach())
        return loss


def test_a_metric_in_the_module_does_not_disturb_the_count():
    flops = [scl.FlopsCounter(), scl.FlopsCounter()]
    for count, model in zip(flops, (PlainClassifier(), WithMetric())):
        trainer(count, epochs=1).fit(model, toy_tasks(num_tasks=1))
    plain, metric = (count.summary() for count in flops)
    assert plain["training"] == metric["training"] > 0 and not metric["not_counted"]


def test_a_network_that_is_traced_inside_a_fit_is_not_counted():
    class Trace(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            torch.fx.symbolic_trace(pl_module.network)

    counted = []
    for more in ([], [Trace()]):
        torch.manual_seed(0)
        counter = scl.FlopsCounter()
        trainer(counter, *more).fit(scl.PackNet(scl.SmallCNN(4), scl.OneShotPruning(0.5)), toy_tasks(2))
        counted.append(counter.summary())
    assert counted[0] == counted[1]
