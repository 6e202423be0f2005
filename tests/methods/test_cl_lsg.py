"""CL-LSG on toy tasks: it grows when it must, forgets nothing, and what is not grown is not there."""

import json
from functools import partial

import pytest
import torch
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.callbacks.target_accuracy import targets_of
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks

TASKS = 3


def lsg(target=1.1, backbone=None, reuse_epochs=3, policies=(), **gates):
    return scl.CLLSG(
        backbone or scl.SmallCNN(16),
        scl.SparseGrowth(target, reuse_epochs),
        scl.GrowthGates(**gates),
        optimizer=partial(torch.optim.SGD, lr=0.03, momentum=0.9, weight_decay=0.01),
        mask_optimizer=partial(torch.optim.Adam, lr=0.1, weight_decay=0.01),
        policies=policies,
    )


def fit(module, *callbacks, epochs=6, **data):
    torch.manual_seed(0)
    run = trainer(*callbacks, scl.ContinualEvaluation(), epochs=epochs)
    run.fit(module, toy_tasks(num_tasks=TASKS, **({"val_fraction": 0.2} | data)))
    return run


class Watch(scl.Sparsifier):
    """Logits of every task after every task; frozen weights after every step; channels before and after."""

    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        self.after, self.frozen, self.kernels = [], {}, []

    def on_task_start(self, trainer, pl_module, task):
        self.frozen = {n: (f.clone(), self.masks.held(n).clone()) for n, f in self.masks.frozen.items()}

    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, (frozen, value) in self.frozen.items():
            weight = pl_module.get_parameter(name)
            alive = frozen & self.masks.alive.get(name, True)
            assert torch.equal(weight[alive], value[alive])

    @torch.no_grad()
    def on_after_task_end(self, trainer, pl_module, task):
        data, learnt = trainer.datamodule, scl.Subnetworks.of(pl_module)
        x = [torch.cat([data.prepare(i, augment=False) for i, _ in loader]) for loader in data.test_dataloader()]
        self.after.append([learnt.network(t)(x[t]) for t in range(task + 1)])
        for t in range(task + 1):
            with learnt.use(t):
                pl_module.eval()
                whole = pl_module.network(x[t])[:, data.classes[t]]
                pl_module.train()
            torch.testing.assert_close(self.after[-1][t], whole, rtol=1e-4, atol=1e-4)
        self.kernels.append({n: k.clone() for n, k in pl_module.gates.allocated_kernels().items()})


@pytest.mark.parametrize("backbone", [scl.SmallCNN, scl.ResNet18, scl.LeNet5])
def test_nothing_is_forgotten_after_growth(backbone):
    watch = Watch()
    module = lsg(1.1, backbone(8), policies=[watch])
    run = fit(module, size=16)
    for i, later in enumerate(watch.after):
        for t, logits in enumerate(later):
            assert torch.equal(logits, watch.after[t][t]), f"task {t} after task {i}"
    evaluation = next(c for c in run.callbacks if isinstance(c, scl.ContinualEvaluation))
    assert evaluation.matrices["task_il"].summary()["bwt"] == 0
    growth = module.policies[1].summary()
    assert growth["grew"] == [True] * TASKS and growth["allocated"] == sorted(growth["allocated"])
    assert len(evaluation.held_out) == TASKS


def test_a_target_of_zero_never_grows():
    module = lsg(0.0)
    run = fit(module)
    seed = 8 / 64
    growth = module.policies[1].summary()
    assert growth["grew"] == [False] * TASKS and run.datamodule.starts == [0, 1, 2, 3]
    assert growth["allocated"] == [growth["allocated"][0]] * TASKS
    assert 0 < growth["allocated"][0] < seed
    assert growth["reached"] == next(c for c in run.callbacks if isinstance(c, scl.ContinualEvaluation)).held_out


def test_growth_ends_when_the_target_is_reached():
    module, stages = lsg(0.9, reuse_epochs=2), []

    class Record(scl.Sparsifier):
        def on_train_epoch_end(self, trainer, pl_module):
            stages.append((trainer.datamodule.task, bool(pl_module.gates.growing)))

    module.policies.append(Record())
    run = fit(module, epochs=20)
    growth, starts = module.policies[1].summary(), run.datamodule.starts
    assert any(growth["grew"]) and not all(growth["grew"])
    for task, grew in enumerate(growth["grew"]):
        length = starts[task + 1] - starts[task]
        assert length < 20 and growth["reached"][task] >= 0.9
        assert grew == (length > 2)
        assert [g for t, g in stages if t == task] == [epoch >= 1 for epoch in range(length)] or not grew


def test_sizes_are_those_of_a_brute_force_count():
    watch = Watch()
    module = lsg(1.1, policies=[watch])
    fit(module)
    used, learnt = module.policies[2].summary(), scl.Subnetworks.of(module)
    names = [n for n, p in module.network.named_parameters() if p.ndim > 1 and n != "head.weight"]
    total = sum(module.get_parameter(n).numel() for n in names)
    union = {n: torch.zeros_like(learnt.mask(0, n)) for n in names}
    for task in range(TASKS):
        count = 0
        for name in names:
            union[name] |= learnt.mask(task, name)
            count += int(union[name].sum())
            kernels = watch.kernels[task][name]
            weight = learnt.mask(task, name)
            assert not weight[~kernels].any()  # nothing is used that is not allocated
            assert torch.equal(weight.flatten(2).all(2), weight.flatten(2).any(2))  # whole kernels
        assert used["used"][task] == count / total
        allocated = sum(int(watch.kernels[task][n].sum()) * 9 for n in names)
        assert module.policies[1].allocated[task] == allocated / total >= used["used"][task]
    assert used["used"][-1] < 1


def test_what_is_not_grown_is_not_there_at_test_time():
    module = lsg(1.1)
    fit(module)
    for task in range(TASKS):
        small = scl.Subnetworks.of(module).network(task)
        layers = {n: m for n, m in small.named_modules() if isinstance(m, torch.nn.Conv2d)}
        for name, layer in layers.items():
            mask = scl.Subnetworks.of(module).mask(task, f"{name}.weight")
            assert layer.weight.shape[0] <= mask.shape[0] and layer.in_channels <= int(
                mask.flatten(2).any(2).any(0).sum()
            )
        parameters = sum(p.numel() for p in small.parameters())
        assert parameters < 0.8 * sum(p.numel() for p in module.network.parameters())
    x = torch.rand(3, 1, 8, 8)
    module.eval()
    for task in range(TASKS):
        labels = module.predict(x, task)
        assert set(labels.tolist()) <= {2 * task, 2 * task + 1}
        assert torch.equal(labels, module(x)[:, 2 * task : 2 * task + 2].argmax(1) + 2 * task)


def test_released_kernels_are_owned_once_a_task_has_used_them():
    module = lsg(1.1)
    fit(module)
    learnt = scl.Subnetworks.of(module)
    name = module.gates.names[1]
    first = learnt.used(name, 1)
    released = (~first).flatten(2).all(2)
    second = learnt.mask(1, name)
    assert (second.flatten(2).any(2) & released).any()
    masks = scl.Masks.of(module)
    assert torch.equal(masks.frozen[name], learnt.used(name))


def test_targets_from_runs(tmp_path):
    runs = [tmp_path / "a.json", tmp_path / "b.json"]
    runs[0].write_text(json.dumps({"held_out": [0.5, 0.9]}))
    runs[1].write_text(json.dumps({"held_out": [0.7, 0.8]}))
    assert targets_of("SparseGrowth", [str(r) for r in runs], 2) == [0.7, 0.9]
    assert targets_of("SparseGrowth", str(runs[0]), 2) == [0.5, 0.9]
    assert targets_of("SparseGrowth", 0.4, 2) == [0.4, 0.4]
    with pytest.raises(ValueError, match="2 held-out accuracies for 3 tasks"):
        targets_of("SparseGrowth", str(runs[0]), 3)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        targets_of("SparseGrowth", "nowhere.json", 3)


def test_scratch_and_fine_tune_keep_a_network_a_task():
    finals = {}
    for name, more in (("fine-tune", []), ("scratch", [scl.FromScratch()])):
        torch.manual_seed(0)
        watch = scl.TaskSubnetworks(share=False)
        module = scl.IsolatingModule(scl.SmallCNN(4), scl.CrossEntropy(True), policies=[watch, *more])
        run = fit(module, epochs=3)
        assert watch.summary() == {"used": [1, 2, 3]}
        evaluation = next(c for c in run.callbacks if isinstance(c, scl.ContinualEvaluation))
        assert evaluation.matrices["task_il"].summary()["bwt"] == 0
        finals[name] = [scl.Subnetworks.of(module).tasks[t].own["backbone.3.weight"] for t in range(2)]
    assert torch.equal(finals["scratch"][0], finals["fine-tune"][0])
    assert not torch.equal(finals["scratch"][1], finals["fine-tune"][1])
    moved = [(after - before).abs().mean() for before, after in finals.values()]
    assert moved[1] > 3 * moved[0]  # from scratch it ends somewhere else


@pytest.mark.parametrize("gates", [{"selective": False, "attentive": False, "retrain": False}, {"retrain": False}])
def test_the_ablations_learn_the_first_task_with_the_seed(gates):
    module = lsg(0.9, reuse_epochs=10, **gates)
    fit(module, epochs=11)
    assert module.policies[1].grew[0] is False and module.policies[1].reached[0] >= 0.9


class ByHand(scl.Sparsifier):
    """Held-out accuracy and batch-norm statistics of the network without noise, measured another way."""

    found = None

    @torch.no_grad()
    def on_after_task_end(self, trainer, pl_module, task):
        data, network = trainer.datamodule, pl_module.network.eval()
        at = data._held_out[task]
        x = data.prepare(data.train_sets[task].inputs[at], augment=False)
        labels, live = data.train_sets[task].labels[at], data.live()
        right = network(x).masked_fill(~live, -torch.inf).argmax(1) == labels
        assert right.float().mean().item() == pytest.approx(pl_module.policies[1].reached[task])
        assert len(at) == 16 and not set(at.tolist()) & set(data.alive[task].tolist())
        network.train()
        images = data.prepare(data.train_sets[task].inputs[data.alive[task]], augment=False)
        before = network.backbone[0](images)
        torch.testing.assert_close(network.backbone[1].running_mean, before.mean((0, 2, 3)))
        torch.testing.assert_close(network.backbone[1].running_var, before.var((0, 2, 3)))
        pl_module.train()


def test_growth_is_judged_on_held_out_samples_by_the_network_without_noise():
    fit(lsg(1.1, policies=[ByHand()]))


def test_the_seed_is_drawn_for_its_size():
    module, norms = lsg(0.0, scl.SmallMLP([64, 64])), []

    class Norm(scl.Sparsifier):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            weight = pl_module.get_parameter("backbone.3.weight")
            norms.append(float(weight[:8, :8].std() / (1 / (3 * 8)) ** 0.5))

    module.policies.append(Norm())
    fit(module)
    assert norms[0] == pytest.approx(1, abs=0.3)  # uniform in +-1/sqrt(inputs), with 8 inputs


def test_epochs_of_every_task_leave_some_to_grow():
    with pytest.raises(ValueError, match=r"reuse_epochs=3\): a task has 2 epochs, none is left"):
        fit(lsg(reuse_epochs=3), epochs=[5, 2, 2])


def test_bad_input_is_named():
    for subnetworks in (scl.TaskSubnetworks(), scl.TaskSubnetworks("frozen", "share")):
        with pytest.raises(ValueError, match=r"CLLSG\(subnetworks=TaskSubnetworks"):
            scl.CLLSG(scl.SmallCNN(4), scl.SparseGrowth(0.5), subnetworks=subnetworks)
    for target, message in (
        ([0.1, "a.json"], "an accuracy or a run's metrics"),
        ([], "or a list of either"),
        ([__file__], "no metrics"),
    ):
        with pytest.raises(ValueError, match=message):
            targets_of("SparseGrowth", target, 2)
    with pytest.raises(ValueError, match="set the data module's val_fraction"):
        fit(lsg(), val_fraction=0.0)
    with pytest.raises(ValueError, match=r"reuse_epochs=6\): a task has 6 epochs"):
        fit(lsg(reuse_epochs=6))
    with pytest.raises(ValueError, match="reuse_epochs=0"):
        scl.SparseGrowth(0.5, 0)
    with pytest.raises(ValueError, match=r"target=-1\): an accuracy"):
        scl.SparseGrowth(-1)
    with pytest.raises(TypeError, match="PlainClassifier has no GrowthGates"):
        trainer(scl.SparseGrowth(0.5, 1), epochs=3).fit(PlainClassifier(), toy_tasks(val_fraction=0.2))
