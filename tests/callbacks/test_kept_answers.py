"""Answers of frozen subnetworks are kept; the figures are those of asking all of them every time, bit for bit."""

from collections import Counter
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from forked import forked
from lightning.pytorch.callbacks import EMAWeightAveraging
from toy_trainer import shortened, trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.__main__ import main
from lightning_sparse_cl.callbacks import kept_answers
from lightning_sparse_cl.callbacks.averaging import averaged
from lightning_sparse_cl.data.loader import collate
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks

CONFIGS = Path(__file__).parents[2] / "configs" / "split_digits"
NAMES = ["class_il", "class_il_before", "task_il", "task_il_before"]


def direct(run, module, suffix=""):
    """Accuracies by asking all subnetworks, extracted anew, about all test sets."""
    learnt, data, rows = scl.Subnetworks(module), run.datamodule, {"class_il": [], "task_il": []}
    learnt.tasks = list(scl.Subnetworks.of(module).tasks)
    training = module.training
    module.eval()
    with averaged(run, module), torch.no_grad(), run.precision_plugin.forward_context():
        for task, loader in enumerate(data.test_dataloader()):
            live = torch.zeros(data.num_classes, dtype=torch.bool)
            live[data.classes[task]] = True
            hits, total = torch.zeros(2, dtype=torch.long), 0
            for x, y in loader:
                x = data.prepare(x, augment=False)
                answers = learnt.answers(x)
                whole, own = (
                    (learnt.combined(x, answers, *of) if answers else module(x))[:, : data.num_classes]
                    for of in ((), (task,))
                )
                own = own.masked_fill(~live, -torch.inf)
                hits += torch.stack([(logits.argmax(1) == y).sum() for logits in (whole, own)])
                total += len(y)
            for name, count in zip(rows, hits):
                rows[name].append(count)
            rows.setdefault("total", []).append(torch.tensor(total))
    module.train(training)
    found = {name: torch.stack(values) for name, values in rows.items()}
    if run.world_size > 1:
        for counts in found.values():
            torch.distributed.all_reduce(counts)
    return {name + suffix: found[name].float() / found["total"].float() for name in ("class_il", "task_il")}


class Direct(pl.Callback):
    """Compares the matrices with direct measurements of the same moments."""

    compared = 0

    def __init__(self):
        self.rows = {name: [] for name in NAMES}

    def on_before_task_end(self, trainer, pl_module, task):
        for name, row in direct(trainer, pl_module, "_before").items():
            self.rows[name].append(row)

    def on_after_task_end(self, trainer, pl_module, task):
        for name, row in direct(trainer, pl_module).items():
            self.rows[name].append(row)

    def on_train_end(self, trainer, pl_module):
        evaluation = next(c for c in trainer.callbacks if isinstance(c, scl.ContinualEvaluation))
        for name, matrix in evaluation.matrices.items():
            assert torch.equal(matrix.R[-len(self.rows[name]) :], torch.stack(self.rows[name])), name
            Direct.compared += 1


@pytest.fixture
def asked(monkeypatch):
    """How often each subnetwork is asked by evaluations."""
    found, answers = Counter(), scl.Subnetworks.answers

    def counting(self, x, task=None):
        if self is scl.Subnetworks.of(self.module):
            found.update(range(len(self)) if task is None else [task])
        return answers(self, x, task)

    monkeypatch.setattr(scl.Subnetworks, "answers", counting)
    return found


MORE = {
    "": [],
    "domains": ["--data=PermutedDigits", "--data.init_args.num_tasks=4"],
    "joint": ["--data.init_args.joint=true"],
    "bf16": ["--trainer.precision=bf16-mixed"],
    "bf16-true": ["--trainer.precision=bf16-true"],
}


@pytest.mark.parametrize(
    ("config", "more"),
    [
        *((config, more) for config in ("continual_dst", "cl_lsg", "scratch") for more in ("", "domains")),
        *(("continual_dst", more) for more in ("joint", "bf16", "bf16-true")), ("finetune_copies", "bf16"),
    ],
)  # fmt: skip
def test_figures_are_those_of_asking_all(config, more, tmp_path):
    Direct.compared = 0
    data = ["--data.init_args.batch_size=48", *MORE[more]]
    if more == "domains" and config != "continual_dst":
        data.append("--data.init_args.val_fraction=0.2")
    main(
        [
            "fit", "-c", str(CONFIGS / f"{config}.yaml"), *data, "--model.init_args.backbone.width=4",
            "--schedule.epochs=2", "--evaluation.before_pruning=true", "--trainer.accelerator=cpu",
            "--trainer.limit_train_batches=2", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}",
            "--trainer.enable_progress_bar=false", f"--trainer.callbacks+={Direct.__module__}.Direct",
            *shortened(config),
        ]
    )  # fmt: skip
    assert Direct.compared == 4


def dst(**kwargs):
    growth = scl.SET(0.6, interval=3, dense=["head.weight"])
    optimizer = partial(torch.optim.Adam, lr=0.01)
    return scl.ContinualDST(scl.SmallCNN(4), growth=growth, optimizer=optimizer, **kwargs)


def fit(module, *callbacks, data=None, evaluation=None, **kwargs):
    evaluation = evaluation or scl.ContinualEvaluation(before_pruning=True)
    trainer(evaluation, *callbacks, Direct(), epochs=1, limit_train_batches=4, **kwargs).fit(
        module, data or toy_tasks(num_tasks=4)
    )
    return evaluation


@pytest.mark.parametrize("class_il", [True, False])
def test_each_subnetwork_is_asked_once(class_il, asked):
    fit(dst(), evaluation=scl.ContinualEvaluation(True, class_il))
    assert asked == dict.fromkeys(range(4), 4 if class_il else 1)  # a batch of each test set, or of its own


@pytest.mark.parametrize("batch_norm", ["frozen", "shared"])
def test_batch_norm_that_moves_makes_all_answer_again(batch_norm, asked):
    fit(dst(subnetworks=scl.TaskSubnetworks(batch_norm)))
    assert (asked[0] == 4) == (batch_norm == "frozen")


def test_an_average_of_the_weights_and_a_foreign_module_with_a_larger_head():
    policies = [scl.TaskSubnetworks(), scl.Reopen(), scl.SET(0.5, interval=3, dense=["net.8.weight"])]
    model = PlainClassifier(11, 8)
    model.configure_optimizers = lambda: torch.optim.Adam(model.parameters(), lr=0.01)
    fit(model, *policies, EMAWeightAveraging(decay=0.9))


def test_a_second_fit_and_other_data_see_nothing_of_the_first():
    evaluation = scl.ContinualEvaluation(before_pruning=True)
    for data in (
        toy_tasks(num_tasks=4),
        toy_tasks(num_tasks=4, per_class=30),
        scl.SplitDigits(num_tasks=2, batch_size=64),
    ):
        fit(dst(), evaluation=evaluation, data=data)


class Meddle(pl.Callback):
    """Changes the first task's subnetwork when the second has been learnt."""

    def __init__(self, how):
        self.how = how

    def on_task_start(self, trainer, pl_module, task):
        learnt, masks, name = scl.Subnetworks.of(pl_module), scl.Masks.of(pl_module), "backbone.3.weight"
        if task != 2:
            return
        if self.how == "replaced":
            own = {n: torch.randn_like(t) if "head" in n else t for n, t in learnt.tasks[0].own.items()}
            learnt.tasks[0] = learnt.tasks[0]._replace(own=own)
        elif self.how == "loaded":
            state = learnt.state_dict()
            state["tasks"] = state["tasks"][::-1]
            learnt.load_state_dict(state)
        else:
            frozen = masks.frozen_part(name)
            masks.set_frozen(name, None)
            with torch.no_grad():
                pl_module.get_parameter(name).copy_(torch.randn_like(frozen, dtype=torch.float))
            masks.set_frozen(name, frozen)


@pytest.mark.parametrize("how", ["replaced", "loaded", "trained on"])
def test_a_subnetwork_that_is_no_longer_the_same_is_asked_again(how, asked):
    fit(dst(), Meddle(how))
    assert asked[0] > 4


class Shuffled(scl.SplitDigits):
    by_batches = False

    def test_dataloader(self):
        def order(data):
            batches = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(data), 50, False)
            return {"batch_sampler": list(batches)} if self.by_batches else {"shuffle": True, "batch_size": 50}

        return [torch.utils.data.DataLoader(d, collate_fn=collate, **order(d)) for d in self.test_sets]


@pytest.mark.parametrize("by_batches", [False, True])
def test_test_samples_in_another_order_each_time(by_batches):
    data = Shuffled(num_tasks=2, batch_size=64)
    data.by_batches = by_batches
    fit(dst(), data=data)


@pytest.mark.parametrize("class_il", [True, False])
def test_a_resumed_run_asks_once_for_what_is_missing(class_il, tmp_path, asked):
    def policies():
        saving = scl.SequenceCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        return scl.ContinualEvaluation(True, class_il), saving, scl.RandomState()

    whole, *more = policies()
    trainer(whole, *more, enable_checkpointing=True).fit(dst(), toy_tasks(num_tasks=4))
    asked.clear()
    again, *more = policies()
    run = trainer(again, *more, Direct(), enable_checkpointing=True)
    run.fit(dst(), toy_tasks(num_tasks=4), ckpt_path=tmp_path / "step=23.ckpt")  # in the third of ten steps each
    assert all(torch.equal(again.matrices[name].R, whole.matrices[name].R) for name in whole.matrices)
    assert asked == dict.fromkeys(range(4), 4 if class_il else 1)


def two_processes():
    fit(dst(), data=toy_tasks(num_tasks=3, batch_size=8), devices=2, strategy="ddp")


def test_on_two_processes():
    assert forked(two_processes, processes=2) == 0


def test_of_equal_logits_the_lowest_class_wins():
    torch.manual_seed(0)
    parts = torch.randint(-2, 2, (5, 4000, 6)).float()
    parts[torch.rand(parts.shape) < 0.4] = -torch.inf
    parts[torch.rand(parts.shape) < 0.01] = torch.nan
    kept = None
    for part in parts:
        kept = kept_answers._larger(kept, part)
    assert torch.equal(kept[1], parts.amax(0).argmax(1))
