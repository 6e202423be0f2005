"""The task sequence: when tasks begin and end, what is measured, what is pruned and frozen."""

import copy
import json

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy_trainer import trainer

from lightning_sparse_cl import (
    ContinualEvaluation,
    ContinualModule,
    DERpp,
    EsaCL,
    FreezeMasks,
    LossSelection,
    Masks,
    OneShotPruning,
    PassCounter,
    Plain,
    RandomState,
    Reopen,
    RunReport,
    SharpnessAware,
    SmallCNN,
    SmallMLP,
    SplitTensors,
    TaskSchedule,
)
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks


class Diary(pl.Callback):
    """Writes down what happens; stands before and behind everything else."""

    def __init__(self):
        self.lines = []

    def on_task_start(self, trainer, pl_module, task):
        self.lines.append(("start", task, trainer.current_epoch))

    def on_train_batch_start(self, trainer, *_):
        self.lines.append(("batch", trainer.datamodule.task, trainer.current_epoch))

    def on_train_batch_end(self, trainer, *_):
        self.lines.append(("end of batch", trainer.datamodule.task, trainer.current_epoch))

    def on_task_end(self, trainer, pl_module, task):
        self.lines.append(("end", task, trainer.current_epoch))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("epochs", [2, [1, 2, 1]])
def test_exactly_a_tasks_batches_lie_between_its_start_and_end(epochs, first):
    diary = Diary()
    t = pl.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[diary, TaskSchedule(epochs)] if first else [TaskSchedule(epochs), diary],
    )  # fmt: skip
    t.fit(ContinualModule(SmallMLP([8])), toy_tasks())
    expected, epoch = [], 0
    for task, n in enumerate([2, 2, 2] if epochs == 2 else epochs):
        expected.append(("start", task, epoch))
        for e in range(epoch, epoch + n):
            expected += [("batch", task, e), ("end of batch", task, e)] * 5  # 80 samples in batches of 16
        epoch += n
        expected.append(("end", task, epoch - 1))
    assert diary.lines == expected


def test_a_callback_may_end_a_task_early():
    class Impatient(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.is_last_batch and trainer.datamodule.task == 1:
                trainer.datamodule.end_task()
                trainer.datamodule.end_task()

    t = trainer(Impatient(), epochs=3)
    t.fit(ContinualModule(SmallMLP([8])), toy_tasks())
    assert t.datamodule.starts == [0, 3, 4, 7] and t.current_epoch == 7


def test_only_the_current_task_is_trained_on_and_removed_samples_are_not():
    class Watch(pl.Callback):
        seen = {}

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            data = trainer.datamodule
            indices = data.indices(batch_idx)
            assert torch.equal(data.train_sets[data.task].labels[indices], batch[1])
            assert torch.equal(data.train_sets[data.task].images[indices], data.raw)
            self.seen.setdefault(trainer.current_epoch, []).extend(indices.tolist())
            if trainer.is_last_batch and trainer.current_epoch == 0:
                data.alive[0] = data.alive[0][:48]

    watch = Watch()
    trainer(watch).fit(ContinualModule(SmallMLP([8])), toy_tasks())
    assert sorted(watch.seen[0]) == list(range(80))
    assert sorted(watch.seen[1]) == list(range(48))
    assert watch.seen[0][:5] != sorted(watch.seen[0])[:5]


def test_figures_agree_with_a_measurement_by_hand(tmp_path):
    evaluation = ContinualEvaluation(before_pruning=True)
    data, model = toy_tasks(), EsaCL(SmallCNN(4), DERpp(30, 8), sparsity=0.9)
    t = trainer(evaluation, PassCounter(), RunReport(), default_root_dir=tmp_path)
    t.fit(model, data)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    model.eval()
    for scenario, offset in (("class_il", 0), ("task_il", 1)):
        row = []
        for task, test in enumerate(data.test_sets):
            logits = model(data.prepare(test.images, augment=False))
            if offset:
                logits = logits[:, 2 * task : 2 * task + 2]
            row.append(float((logits.argmax(1) + 2 * task * offset == test.labels).float().mean()))
        assert metrics[scenario]["matrix"][-1] == pytest.approx(row, abs=1e-6)
        assert metrics[scenario]["acc"] == pytest.approx(sum(row) / 3)
        assert None not in metrics[scenario]["baseline"]
        assert metrics[f"{scenario}_before"]["acc"] is not None
    # 3 tasks, 2 epochs, 5 batches of 16, two passes of 16 + 2 * 8; the very first batch replays nothing
    assert metrics["passes"] == {"samples": 480, "forward": 30 * 64 - 32, "backward": 30 * 64 - 32}
    assert metrics["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert (tmp_path / "accuracy_matrix.png").stat().st_size > 0
    tested = t.test(model, data, verbose=False)[0]
    assert tested["class_il/acc"] == pytest.approx(metrics["class_il"]["acc"])
    assert tested["task_il/task_1"] == pytest.approx(metrics["task_il"]["matrix"][-1][1], abs=1e-6)


@pytest.mark.parametrize("measure", [[ContinualEvaluation()], [ContinualEvaluation(before_pruning=True)]])
def test_measuring_changes_nothing(measure):
    weights = []
    for callbacks in ([], measure):
        torch.manual_seed(0)
        model = ContinualModule(nn.Sequential(SmallMLP([8]), nn.Dropout(0.5)), DERpp(30, 8))
        trainer(*callbacks).fit(model, toy_tasks())
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*weights)


READINGS = {"none": [0.2, 0.2, 0.2], "share": [0.2 / 3, 0.4 / 3, 0.2], "free": [0.2, 0.36, 0.488]}


@pytest.mark.parametrize("freeze", READINGS)
def test_freeze_readings_keep_exactly_what_they_say(freeze):
    class Count(pl.Callback):
        kept, frozen_values = [], {}

        def on_after_task_end(self, trainer, pl_module, task):
            self.kept.append([int(pl_module.get_parameter(n).count_nonzero()) for n in Masks.of(pl_module)])
            for name, (mask, values) in self.frozen_values.items():
                assert torch.equal(pl_module.get_parameter(name)[mask], values)  # bit for bit
            for name, mask in Masks.of(pl_module).frozen.items():
                self.frozen_values[name] = mask.clone(), pl_module.get_parameter(name)[mask].detach().clone()

        def on_train_batch_end(self, trainer, pl_module, *_):
            masks = Masks.of(pl_module)
            assert not masks.alive  # all capacity is open while a task is trained
            group = trainer.optimizers[0].param_groups[0]
            if pl_module.trainer.datamodule.task == 1 and masks.frozen:
                i = next(
                    i for i, p in enumerate(group["params"]) if p is pl_module.get_parameter(next(iter(masks.frozen)))
                )
                assert group["free"][i] == int((~next(iter(masks.frozen.values()))).sum())

    model = EsaCL(SmallCNN(8), DERpp(30, 8), freeze=freeze)
    count = Count()
    count.kept, count.frozen_values = [], {}
    trainer(count).fit(model, toy_tasks())
    sizes = [model.get_parameter(n).numel() for n in Masks.of(model)]
    assert len(sizes) == 3
    expected = []
    for task in range(3):
        before = expected[-1] if expected and freeze != "none" else [0, 0, 0]
        fraction = {"none": 0.2, "share": 0.2 / 3, "free": 0.2}[freeze]
        base = [n - b if freeze == "free" else n for n, b in zip(sizes, before)]
        expected.append([b + round(fraction * n) for b, n in zip(before, base)])
    assert count.kept == expected
    assert [sum(k) / sum(sizes) for k in count.kept] == pytest.approx(READINGS[freeze], abs=2e-3)
    assert bool(Masks.of(model).frozen) == (freeze != "none")


@pytest.mark.parametrize("init", ["zero", "random"])
def test_reopened_weights_start_as_asked_and_keep_the_survivors(init):
    class AtStart(pl.Callback):
        def on_after_task_end(self, trainer, pl_module, task):
            self.kept = {
                n: (m.clone(), pl_module.get_parameter(n).detach().clone())
                for n, m in Masks.of(pl_module).alive.items()
            }

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 0:
                for name, (mask, values) in self.kept.items():
                    weight = pl_module.get_parameter(name)
                    assert torch.equal(weight[mask], values[mask])
                    assert bool(weight[~mask].count_nonzero()) == (init == "random")
                self.checked = True

    check = AtStart()
    model = ContinualModule(SmallCNN(4), policies=[OneShotPruning(0.7), Reopen(init)])
    trainer(check, epochs=1).fit(model, toy_tasks())
    assert check.checked


def test_batch_norm_statistics_move_once_a_step_under_sam():
    norm = nn.BatchNorm2d(4)
    model = ContinualModule(nn.Sequential(nn.LazyConv2d(4, 3), norm, nn.Flatten()), update=SharpnessAware(0.5))
    trainer(epochs=1).fit(model, toy_tasks())
    assert norm.num_batches_tracked == 15


def test_sam_of_radius_zero_is_plain_training():
    states = []
    for update in (Plain(), SharpnessAware(0.0), SharpnessAware(0.5)):
        pl.seed_everything(1, verbose=False)
        model = ContinualModule(SmallMLP([8]), update=update)
        trainer(RandomState(), epochs=1).fit(model, toy_tasks())
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(states[0], states[1])
    assert not torch.allclose(states[0], states[2], atol=1e-3)


def test_float_images_survive_a_checkpoint_in_memory(tmp_path):
    images, labels = torch.randn(80, 1, 8, 8), torch.arange(80) % 4
    data = SplitTensors((images, labels), (images, labels), num_tasks=2, batch_size=10)
    t = trainer(epochs=1)
    t.fit(model := ContinualModule(SmallMLP([8]), DERpp(20, 8)), data)
    t.save_checkpoint(tmp_path / "x.ckpt")
    loaded = ContinualModule.load_from_checkpoint(
        tmp_path / "x.ckpt", backbone=SmallMLP([8]), objective=DERpp(20, 8), weights_only=True
    )
    assert model.objective.memory.images.dtype == torch.float32
    assert torch.equal(loaded.objective.memory.images, model.objective.memory.images)


def test_a_stock_module_with_automatic_optimisation_uses_the_same_callbacks(tmp_path):
    evaluation, frozen = ContinualEvaluation(), {}

    class Hold(pl.Callback):
        def on_after_task_end(self, trainer, pl_module, task):
            for name, value in frozen.items():
                assert torch.equal(pl_module.get_parameter(name)[value[0]], value[1])
            for name, mask in Masks.of(pl_module).frozen.items():
                frozen[name] = mask.clone(), pl_module.get_parameter(name)[mask].detach().clone()

    model = PlainClassifier()
    keys = list(model.state_dict())
    t = trainer(
        evaluation,
        OneShotPruning(0.5),
        FreezeMasks(),
        Reopen(),
        Hold(),
        RunReport(),
        epochs=6,
        default_root_dir=tmp_path,
    )
    t.fit(model, toy_tasks())
    assert list(model.state_dict()) == keys
    assert evaluation.matrices["task_il"].summary()["acc"] > 0.6
    assert frozen and int(model.net[3].weight.count_nonzero()) < model.net[3].weight.numel()
    assert json.loads((tmp_path / "metrics.json").read_text())["class_il"]["fwt"] is not None


def test_pruning_without_a_schedule_happens_once_when_the_fit_ends():
    class Loose(PlainClassifier):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8) % 4), 4)

    model = Loose()
    pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[OneShotPruning(0.75)], logger=False,
               enable_checkpointing=False, enable_progress_bar=False).fit(model)  # fmt: skip
    assert int(model.net[3].weight.count_nonzero()) == round(0.25 * model.net[3].weight.numel())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskSchedule(0), "epochs=0"),
        (lambda: TaskSchedule([]), "epochs="),
        (lambda: OneShotPruning(1.0), r"sparsity is the zero fraction, in \[0, 1\)"),
        (lambda: OneShotPruning(0.5, of="all"), "of="),
        (lambda: Reopen("ones"), "init="),
        (lambda: EsaCL(SmallMLP(), freeze="B"), "freeze='B'"),
        (lambda: EsaCL(SmallMLP(), sparsity=-0.1), "sparsity=-0.1"),
        (lambda: trainer(epochs=[1, 2]).fit(ContinualModule(SmallMLP([8])), toy_tasks()), "2 entries for 3 tasks"),
        (lambda: trainer(max_steps=20).fit(ContinualModule(SmallMLP([8])), toy_tasks()), "leave max_steps out"),
        (lambda: trainer(max_epochs=3).fit(ContinualModule(SmallMLP([8])), toy_tasks()), "takes 6 epochs"),
        (lambda: trainer().fit(ContinualModule(SmallMLP([8])), toy_tasks(batch_size=81)), "use a smaller batch"),
        (lambda: toy_tasks(val_fraction=1.0), "val_fraction=1.0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_schedule_needs_a_task_data_module():
    with pytest.raises(TypeError, match="not a TaskDataModule"):
        trainer().fit(PlainClassifier(), DataLoader(TensorDataset(torch.randn(4, 1, 8, 8), torch.arange(4))))


@pytest.mark.parametrize("same_trainer", [True, False])
def test_the_same_objects_serve_a_second_fit(same_trainer):
    data, evaluation, passes = toy_tasks(), ContinualEvaluation(), PassCounter()
    first = trainer(evaluation, passes)
    first.fit(ContinualModule(SmallMLP([8])), data)
    again = first if same_trainer else trainer(evaluation, passes)
    again.fit(model := EsaCL(SmallCNN(4), DERpp(30, 8)), data)
    assert passes.counts["samples"] == 480 and data.finished
    assert not evaluation.matrices["class_il"].R.isnan().any()
    assert len(Masks.of(model)) == 3 and again.current_epoch == (12 if same_trainer else 6)


def test_validation_samples_are_held_out_and_joint_training_sees_all_tasks():
    data = toy_tasks(val_fraction=0.25)
    t = trainer(epochs=1)
    t.fit(ContinualModule(SmallMLP([8])), data)
    assert [len(a) for a in data.alive] == [60] * 3
    assert "val/acc" in t.callback_metrics
    joint, evaluation = toy_tasks(joint=True), ContinualEvaluation()
    trainer(evaluation, epochs=1).fit(ContinualModule(SmallMLP([8])), joint)
    assert joint.num_tasks == 1 and len(joint.train_sets[0]) == 240
    assert evaluation.matrices["class_il"].R.shape == (1, 3)


def test_selection_saves_passes_after_its_warm_up():
    passes = PassCounter()
    selection = LossSelection(sse=0.5, ere=0.25, warmup=1)
    model = ContinualModule(SmallMLP([8]), update=SharpnessAware(), selection=selection)
    trainer(passes).fit(model, toy_tasks(num_tasks=1, per_class=40))
    warm, selected = 5, 5  # steps of the first and of the second epoch
    assert passes.counts == {
        "samples": 160,
        "forward": warm * 2 * 16 + selected * (16 + 8 + 4),  # ranking, ascent, descent
        "backward": warm * 2 * 16 + selected * (8 + 4),
    }


@pytest.mark.parametrize("selection", [None, LossSelection(0.5, 0.5, 0)])
@pytest.mark.parametrize("update", [Plain(), SharpnessAware(0.1)])
def test_memory_keeps_stored_images_and_the_logits_from_before_the_update(update, selection):
    pl.seed_everything(0, verbose=False)
    data = toy_tasks(num_tasks=1, per_class=8)  # one batch
    model = ContinualModule(SmallMLP([8]), DERpp(16, 8), update=update, selection=selection)
    data.setup()
    model.build(data.input_shape, data.num_classes)
    before = copy.deepcopy(model)
    trainer(epochs=1).fit(model, data)
    memory = model.objective.memory
    assert len(memory) == 16 and memory.images.dtype == torch.uint8
    torch.testing.assert_close(memory.logits, before(data.prepare(memory.images, augment=False)))
    assert not torch.allclose(memory.logits, model(data.prepare(memory.images, augment=False)))
    assert sorted(memory.images.flatten(1).sum(1).tolist()) == sorted(
        data.train_sets[0].images.flatten(1).sum(1).tolist()
    )


def test_momentum_does_not_outlive_a_task_but_radii_do():
    class Watch(pl.Callback):
        seen, norms = {}, set()

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.seen[trainer.global_step] = len(optimizer.state)
            self.norms.add(tuple(optimizer.param_groups[0]["norms"]))

    watch = Watch()
    trainer(watch, epochs=1).fit(EsaCL(SmallCNN(4), DERpp(30, 8)), toy_tasks())
    assert [step for step, size in watch.seen.items() if size == 0] == [0, 5, 10]  # five steps a task
    assert len(watch.norms) == 1
