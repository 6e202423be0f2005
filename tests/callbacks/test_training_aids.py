"""What users of Lightning expect under manual optimisation: clipping, schedules, early stopping, finite losses."""

from datetime import timedelta
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR
from toy_trainer import trainer

from lightning_sparse_cl import (
    ContinualEvaluation,
    ContinualModule,
    DERpp,
    EsaCL,
    FiniteLoss,
    GradientClipping,
    OneShotPruning,
    RandomState,
    SequenceCheckpoint,
    SharpnessAware,
    SmallCNN,
    SmallMLP,
    SplitTensors,
    StochasticFrankWolfe,
    TaskEarlyStopping,
    TaskLRSchedule,
)
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks


@pytest.mark.parametrize("automatic", [False, True])
def test_clipping_bounds_the_gradient_of_every_step(automatic):
    class Watch(pl.Callback):
        norms = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.norms.append(float(torch.nn.utils.get_total_norm(p.grad for p in pl_module.parameters())))

    before, after = Watch(), Watch()
    before.norms, after.norms = [], []
    model = PlainClassifier(6) if automatic else ContinualModule(SmallMLP([8]), update=SharpnessAware())
    trainer(before, GradientClipping(0.1), after).fit(model, toy_tasks())
    assert max(before.norms) > 0.2 and max(after.norms) <= 0.1 * (1 + 1e-4)
    assert len(after.norms) == 30


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_learning_rates_start_again_with_every_task(interval):
    class Watch(pl.Callback):
        rates = []

        def on_train_batch_start(self, trainer, *_):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    watch = Watch()
    watch.rates = []
    model = ContinualModule(SmallMLP([8]), optimizer=partial(SGD, lr=0.8))
    trainer(watch, TaskLRSchedule(partial(StepLR, step_size=1, gamma=0.5), interval)).fit(model, toy_tasks())
    task = [0.8] * 5 + [0.4] * 5 if interval == "epoch" else [0.8 * 0.5**i for i in range(10)]
    assert watch.rates == pytest.approx(task * 3)


@pytest.mark.parametrize("options", [{"check_val_every_n_epoch": 2}, {"val_check_interval": 0.5}, {}], ids=str)
@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_what_sequence_checkpoint_writes_can_be_resumed(tmp_path, options, held_out):
    def fit(folder, **resume):
        pl.seed_everything(0, verbose=False)
        checkpoint = SequenceCheckpoint(folder, save_top_k=-1, filename="{step}")
        t = trainer(RandomState(), checkpoint, epochs=3, enable_checkpointing=True, **options)
        t.fit(ContinualModule(SmallCNN(4), DERpp(30, 8)), toy_tasks(num_tasks=2, val_fraction=held_out), **resume)
        return t.lightning_module

    whole = fit(tmp_path / "a")
    written = sorted((tmp_path / "a").glob("step=*.ckpt"))
    assert len(written) >= 6
    for path in written[:-1:2]:
        for a, b in zip(whole.parameters(), fit(tmp_path / "b", ckpt_path=path).parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("step", [7, 10, 13])
def test_schedules_and_early_stopping_go_on_where_they_were(tmp_path, step):
    def fit(folder, **resume):
        pl.seed_everything(0, verbose=False)
        model = EsaCL(
            SmallCNN(4), DERpp(30, 8), policies=[TaskLRSchedule(partial(CosineAnnealingLR, T_max=15), "step")]
        )
        checkpoint = SequenceCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer(
            RandomState(), ContinualEvaluation(), TaskEarlyStopping("val/acc", 1, "max"), checkpoint, epochs=4,
            enable_checkpointing=True,
        ).fit(model, toy_tasks(val_fraction=0.2), **resume)  # fmt: skip
        return model.trainer

    whole = fit(tmp_path / "a")
    resumed = fit(tmp_path / "b", ckpt_path=tmp_path / "a" / f"step={step}.ckpt")
    assert whole.datamodule.starts == resumed.datamodule.starts
    for a, b in zip(whole.lightning_module.parameters(), resumed.lightning_module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_early_stopping_ends_the_task_and_not_the_sequence():
    class Scripted(pl.Callback):
        """A metric that stops improving after the second epoch of a task."""

        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("score", float(min(trainer.datamodule.epoch_in_task, 1)))

    evaluation = ContinualEvaluation()
    t = trainer(Scripted(), TaskEarlyStopping("score", 2, "max"), OneShotPruning(0.5), evaluation, epochs=[9, 9, 3])
    model = ContinualModule(SmallCNN(4))
    t.fit(model, toy_tasks(val_fraction=0.2))
    assert t.datamodule.starts == [0, 4, 8, 11]  # best in its second epoch, two more without gain; the last is short
    assert not evaluation.matrices["class_il"].R.isnan().any()
    weight = model.backbone[3].weight
    assert int((weight == 0).sum()) == weight.numel() // 2  # the last task was consolidated, too


def test_what_lightning_would_do_wrongly_is_refused_with_a_remedy():
    model = ContinualModule(SmallMLP([8]))
    for callbacks, options, message in (
        ([], {"gradient_clip_val": 1.0}, r"GradientClipping\(1.0\)"),
        ([], {"accumulate_grad_batches": 4}, "batch_size 4 times"),
        ([EarlyStopping("val/loss")], {}, "TaskEarlyStopping"),
        ([], {"max_steps": 10}, "max_steps"),
        ([], {"min_epochs": 30}, "min_epochs"),
        ([], {"max_time": "00:01:00:00"}, "SIGTERM"),
        ([TaskEarlyStopping("val/acc")], {"check_val_every_n_epoch": 2}, "every epoch's metric"),
        ([TaskLRSchedule(ReduceLROnPlateau)], {}, "needs no metric"),
        ([TaskEarlyStopping("nonsense")], {}, "nonsense.*train/loss"),
        ([], {"precision": "16-true"}, "bf16-mixed"),
        ([TaskEarlyStopping("val/acc")], {}, "val_fraction"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(*callbacks, **options).fit(model, toy_tasks())
    with pytest.raises(ValueError, match=r"module.backbone.compile\(\)"):
        trainer().fit(torch.compile(model), toy_tasks())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_backbone_learns_the_same(backend):
    def fit(compiled):
        pl.seed_everything(0, verbose=False)
        model = EsaCL(SmallCNN(4), DERpp(30, 8), policies=[GradientClipping(1.0)])
        if compiled:
            model.backbone.compile(backend=backend)
        trainer(RandomState(), ContinualEvaluation()).fit(model, toy_tasks(num_tasks=2))
        return model.state_dict()

    plain, compiled = fit(False), fit(True)
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", [ContinualModule, EsaCL])
def test_no_step_waits_for_the_gpu(method):
    class Strict(pl.Callback):
        """Every wait inside a step is an error, from the second step on."""

        def on_train_batch_start(self, trainer, *_):
            torch.cuda.set_sync_debug_mode("error" if trainer.global_step else "default")

        def on_train_batch_end(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    images = torch.randint(256, (320, 3, 8, 8), dtype=torch.uint8), torch.arange(320) % 4
    data = SplitTensors(images, images, num_tasks=2, batch_size=16, crop=1, flip=True)
    fit = trainer(FiniteLoss(), Strict(), accelerator="gpu", devices=1, log_every_n_steps=0)
    fit.fit(method(SmallCNN(4), DERpp(30, 8)), data)


def test_a_loss_that_is_not_a_number_names_its_place_and_spares_the_checkpoint(tmp_path):
    class Poison(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 12:
                pl_module.head.weight.data.fill_(float("nan"))

    checkpoint = SequenceCheckpoint(tmp_path, every_n_train_steps=2, save_last=True)
    model = ContinualModule(SmallMLP([8]))
    with pytest.raises(ValueError, match="task 1, epoch 2, step 12"):
        trainer(FiniteLoss(), Poison(), checkpoint, enable_checkpointing=True).fit(model, toy_tasks())
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 10
    assert all(v.isfinite().all() for v in kept["state_dict"].values() if torch.is_tensor(v))


def test_a_loss_that_is_not_a_number_names_its_step_without_checkpoints():
    class Poison(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 12:
                batch[0].fill_(float("nan"))

    model = ContinualModule(SmallMLP([8]))
    with pytest.raises(ValueError, match="task 1, epoch 2, step 13"):
        trainer(FiniteLoss(), Poison()).fit(model, toy_tasks())


def test_a_loss_that_is_not_a_number_is_seen_among_accumulated_batches():
    class Once(PlainClassifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + float("inf") if batch_idx == 0 and self.current_epoch == 1 else loss

    with pytest.raises(ValueError, match="task 0, epoch 1"):
        trainer(FiniteLoss(), accumulate_grad_batches=4).fit(Once(6), toy_tasks())


def test_a_checkpoint_that_monitors_the_loss_has_its_own_steps(tmp_path):
    class Losses(pl.Callback):
        seen = {}

        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            self.seen[trainer.global_step] = float(outputs["loss"])

    losses = Losses()
    saved = ModelCheckpoint(tmp_path, "{step}", "train/loss", every_n_train_steps=7, save_top_k=-1)
    trainer(losses, saved, enable_checkpointing=True).fit(ContinualModule(SmallMLP([8])), toy_tasks())
    scores = {int(Path(p).stem.removeprefix("step=")): float(v) for p, v in saved.best_k_models.items()}
    assert scores == pytest.approx({step: losses.seen[step] for step in (7, 14, 21, 28)})


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"precision": "bf16-true"},
        {"fast_dev_run": True},
        {"overfit_batches": 2},
        {"limit_train_batches": 2},
        {"limit_train_batches": 0.5},
        {"logger": True, "log_every_n_steps": 1},
        {"accumulate_grad_batches": 1, "deterministic": True},
    ],
    ids=str,
)
def test_trainer_options_work(options):
    evaluation = ContinualEvaluation()
    t = trainer(evaluation, **options)
    t.fit(EsaCL(SmallCNN(4), DERpp(30, 8)), toy_tasks())
    if "fast_dev_run" not in options:
        assert evaluation.matrices["class_il"].R.isfinite().all()


def test_checkpoints_by_a_metric_and_by_steps(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="val/acc", mode="max", save_top_k=2)
    steps = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=4, save_top_k=-1)
    t = trainer(best, steps, enable_checkpointing=True)
    t.fit(EsaCL(SmallCNN(4), DERpp(30, 8)), toy_tasks(val_fraction=0.2))
    assert len(list((tmp_path / "best").iterdir())) == 2
    assert len(list((tmp_path / "steps").iterdir())) == 24 // 4


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_a_stock_checkpoint_between_last_batch_and_epoch_end_is_refused_others_are_exact(tmp_path, held_out):
    def fit(**resume):
        pl.seed_everything(0, verbose=False)
        stock = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        t = trainer(RandomState(), ContinualEvaluation(), stock, enable_checkpointing=True)
        t.fit(EsaCL(SmallCNN(4), DERpp(30, 8)), toy_tasks(val_fraction=held_out), **resume)
        return t

    whole = fit()
    last_of_a_task = whole.global_step // 3
    with pytest.raises(ValueError, match="between an epoch's last batch and its end"):
        fit(ckpt_path=tmp_path / f"step={last_of_a_task}.ckpt")
    for step in (last_of_a_task - 1, last_of_a_task + 1):
        resumed = fit(ckpt_path=tmp_path / f"step={step}.ckpt")
        for a, b in zip(whole.lightning_module.parameters(), resumed.lightning_module.parameters(), strict=True):
            assert torch.equal(a, b)


def test_checkpoints_by_time_under_manual_optimisation(tmp_path):
    checkpoint = SequenceCheckpoint(tmp_path, train_time_interval=timedelta(0), save_top_k=-1, filename="{step}")
    trainer(checkpoint, enable_checkpointing=True).fit(ContinualModule(SmallMLP([8])), toy_tasks())
    assert len(list(tmp_path.glob("step=*.ckpt"))) == 30


def test_a_schedule_of_lr_holds_for_the_sgd_steps_of_frank_wolfe():
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = StochasticFrankWolfe([weight], lr=0.1, sgd_lr=0.4, sgd_momentum=0.0)
    scheduler = StepLR(optimizer, 1, 0.5)
    for expected in (-0.4, -0.6):
        weight.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
        assert weight.tolist() == pytest.approx([expected] * 3)


@pytest.mark.parametrize("options", [{"T_max": 0}, {"T_max": "ten"}, {}])
def test_a_scheduler_that_cannot_be_is_named(options):
    scheduler = partial(CosineAnnealingLR, **options)
    module = ContinualModule(SmallCNN(4), policies=[TaskLRSchedule(scheduler)])
    with pytest.raises(ValueError, match=r"TaskLRSchedule\(scheduler=CosineAnnealingLR\): "):
        trainer().fit(module, toy_tasks(2))
