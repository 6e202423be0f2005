"""What is pruned, frozen and reopened, in this package's modules and in others."""

import json

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from toy_trainer import trainer

from lightning_sparse_cl import (
    ContinualEvaluation,
    ContinualModule,
    DERpp,
    EsaCL,
    FreezeMasks,
    Masks,
    OneShotPruning,
    Reopen,
    RunReport,
    SmallCNN,
    SmallMLP,
    TaskSchedule,
)
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks

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


def test_a_stock_module_with_automatic_optimisation_uses_the_same_callbacks(tmp_path):
    evaluation, frozen = ContinualEvaluation(), {}

    class Hold(pl.Callback):
        def on_after_task_end(self, trainer, pl_module, task):
            for name, value in frozen.items():
                assert torch.equal(pl_module.get_parameter(name)[value[0]], value[1])
            for name, mask in Masks.of(pl_module).frozen.items():
                frozen[name] = mask.clone(), pl_module.get_parameter(name)[mask].detach().clone()

    torch.manual_seed(0)
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
        default_root_dir=tmp_path / "run",
    )
    t.fit(model, toy_tasks())
    assert list(model.state_dict()) == keys
    assert evaluation.matrices["task_il"].summary()["acc"] > 0.6
    assert frozen and int(model.net[3].weight.count_nonzero()) < model.net[3].weight.numel()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["class_il"]["fwt"] is not None


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
