"""What a run is said to have cost is what the papers' formulas and a sum by hand give for its plan."""

import json

import lightning.pytorch as pl
import pytest
import torch
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
    assert sam.summary()["training"] == sam.summary()["dense"] == 2 * 6 * total * 240


def test_footprint_and_size_of_a_run(tmp_path):
    data, footprint, size = toy_tasks(), scl.MemoryFootprint(), scl.ModelCapacity()
    model = scl.SparCL(
        scl.SmallCNN(16), scl.DERpp(30, 8), scl.TaskAwareDynamicMasking(0.75, 1, p_inter=0.0),
        scl.DynamicDataRemoval(0.0), scl.DynamicGradientMasking(0.125, 4),
    )  # fmt: skip
    t = trainer(scl.FlopsCounter(), footprint, size, scl.RunReport(), epochs=2, default_root_dir=tmp_path)
    t.fit(model, data)
    cost, found = DenseCost.of(model, data.input_shape), footprint.summary()
    assert found["formula"] == pytest.approx(sparcl_memory(cost, 16, 0.75, 0.875), rel=1e-6)
    assert found["dense"] == sparcl_memory(cost, 16)
    assert found["peak"] > found["formula"]
    path = tmp_path / "model.safetensors"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["size"]["bytes"] == path.stat().st_size < metrics["size"]["dense_bytes"] / 2
    assert metrics["size"]["capacity"] == pytest.approx(0.25)
    assert metrics["flops"]["papers"] < metrics["flops"]["training"] < metrics["flops"]["dense"]
    state = scl.load_sparse(path)
    assert not any(name.startswith("objective") for name in state)
    fresh = scl.ContinualModule(scl.SmallCNN(16))
    fresh.build(data.input_shape, data.num_classes)
    fresh.load_state_dict(state)
    x = data.prepare(data.test_sets[0].images, augment=False)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_a_module_that_cannot_be_counted_is_trained_all_the_same(tmp_path):
    class Inner(PlainClassifier):
        forward = None

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    class Unused(PlainClassifier):
        def __init__(self):
            super().__init__()
            self.aux = torch.nn.Linear(16, 16)

    flops, report = scl.FlopsCounter(), scl.RunReport()
    with pytest.warns(UserWarning, match="Inner: its FLOPs and footprint are not counted"):
        trainer(flops, scl.MemoryFootprint(), report, default_root_dir=tmp_path).fit(Inner(), toy_tasks())
    assert flops.summary() == {"samples": 480, "forward": 0, "backward": 0}
    trainer(flops, scl.RigL(0.5, interval=3), report, default_root_dir=tmp_path).fit(Unused(), toy_tasks())
    assert flops.summary()["training"] < flops.summary()["dense"]
