"""The report is readable in 80 columns for any number of tasks, and its pictures stay small."""

import csv
import io
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from rich.console import Console
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.callbacks.blocks import blocks, labels, means
from lightning_sparse_cl.callbacks.picture import draw_matrices, draw_subnetworks
from lightning_sparse_cl.callbacks.tables import print_report, print_tested
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks

SIZES = [1, 2, 10, 11, 20, 21, 100, 1000]


def metrics_of(tasks, stages=None):
    """A run with the widest figures there are, and some that are not defined."""
    matrix = [[1.0] * tasks for _ in range(stages or tasks)]
    matrix[0][-1], matrix[-1][0] = None, math.nan
    result = {
        "matrix": matrix, "baseline": [None] * tasks, "acc": 1.0, "bwt": -1.0, "fwt": math.nan, "forgetting": None
    }  # fmt: skip
    count = 12_345_678_901
    return {
        **dict.fromkeys(("class_il", "task_il", "class_il_before", "task_il_before"), result),
        "sparsity": 0.99, "seconds": 1e6, "size": {"bytes": 1e10, "dense_bytes": 1e10},
        "flops": {"dense": 1e20, "training": 1e20, "papers": 1e20, "scoring": 1e20, "samples": count,
                  "forward": 2 * count, "backward": 2 * count},
        "memory": {"formula": 1e11, "dense": 1e11, "peak": 1e11, "source": "CUDA allocator"},
        "subnetworks": {"used": [1.0] * tasks}, "growth": {"grew": [1] * tasks, "allocated": [1.0] * tasks},
    }  # fmt: skip


def printed(show, figures):
    console = Console(width=80, file=io.StringIO())
    show(figures, console)
    text = console.file.getvalue()
    assert max(len(line) for line in (text.splitlines() or [text])) <= 80 and "…" not in text
    assert console.width == 80
    return text


@pytest.mark.parametrize("tasks", SIZES)
def test_the_tables_fit_80_columns(tasks):
    text = printed(print_report, metrics_of(tasks))
    assert ("whole matrix is in metrics.json" in text) == (tasks > 10)
    table = text.partition("accuracy on each task")[2].partition("Task-IL")[0]
    header, rows = table.splitlines()[1].split(), [line.split() for line in table.splitlines()[3:]]
    shown = labels(tasks, 10 if tasks <= 100 else 8)
    assert header == ["after", *shown] and rows[0] == ["none", *["-"] * len(shown)]
    assert [row[0] for row in rows[1 : len(shown) + 1]] == [label.split("-")[-1] for label in shown]
    assert {figure for row in rows[1 : len(shown) + 1] for figure in row[1:]} <= {"100.00", "-"}
    printed(print_report, metrics_of(tasks, stages=1))  # of joint training

    figures = {f"{s}/task_{t}": 1.0 for s in ("class_il", "task_il") for t in range(tasks)}
    text = printed(print_tested, figures | {"class_il/acc": 1.0, "task_il/acc": 0.5, "other": 2.0})
    assert text.count("100.00") == 2 * min(tasks, len(blocks(tasks, 20))) + 1 and "50.00" in text
    assert all(label in text.split() for label in labels(tasks, 20))
    assert printed(print_tested, {"test/loss": 1.0}) == ""


def test_blocks_are_means_of_what_is_defined():
    assert labels(11, 10) == ["1-2", "3-4", "5-6", "7-8", "9-10", "11"] and labels(10, 10)[-1] == "10"
    assert labels(100, 10)[-1] == "91-100"
    for count in range(60):
        found = blocks(count, 10)
        assert [i for block in found for i in block] == list(range(count)) and len(found) <= 10
    row = [0.1 * i for i in range(9)] + [None, math.nan, 0.5]
    assert means(row, 6) == [pytest.approx(v) for v in (0.05, 0.25, 0.45, 0.65, 0.8, 0.5)]
    assert means([None, math.nan], 1) == [None]


@pytest.mark.parametrize("tasks", [1, 5, 20, 100])
def test_pictures_stay_small(tmp_path, tasks):
    matrix = metrics_of(tasks)["class_il"]["matrix"]
    draw_matrices({"Class-IL": matrix, "Task-IL": matrix}, tmp_path / "R.png")
    row = [1.0] * tasks
    shared = {
        "density": {f"backbone.layer{i}.weight": row for i in range(tasks)}, "used": row, "free_in_mask": row,
        "compact": row, "overlap": matrix,
    }  # fmt: skip
    draw_subnetworks(shared, {"allocated": row}, tmp_path / "shared.png")
    for name, panels in (("R", 2), ("shared", 4)):
        with Image.open(tmp_path / f"{name}.png") as image:
            cells = min(tasks, 20)
            assert image.height == 60 + 44 * max(cells, 3 if name == "shared" else 0)
            assert image.width < panels * (44 * cells + 250)


def test_what_is_tested_is_printed(capsys):
    t = trainer(scl.ContinualEvaluation(), scl.RunReport(), epochs=1)
    t.fit(scl.ContinualModule(scl.SmallMLP([8])), data := toy_tasks(num_tasks=2))
    capsys.readouterr()
    found = t.test(t.lightning_module, data, verbose=False)[0]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, key in (("1", "task_0"), ("2", "task_1"), ("ACC", "acc")):
        assert [name, *(f"{100 * found[f'{s}/{key}']:.2f}" for s in ("class_il", "task_il"))] in lines


def test_a_run_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=b"]
    report = scl.RunReport(folder=str(tmp_path / "run"), name="mine")
    module = scl.EsaCL(scl.SmallCNN(4), scl.DERpp(30, 8, forward="joint"), sparsity=0.7)

    def told(module):
        trainer(scl.ContinualEvaluation(), report, epochs=2).fit(module, toy_tasks(batch_size=20, class_order=3))
        return json.loads((tmp_path / "run" / "metrics.json").read_text())

    found = told(module)
    assert (found["name"], found["method"], found["data"]) == ("mine", "EsaCL-DERpp", "SplitTensors")
    assert found["commit"] is None and found["versions"]["lightning_sparse_cl"] == scl.__version__
    expected = {
        "sparsity": 0.7, "objective.memory.size": 30, "objective.forward": "joint", "backbone.width": 4, "epochs": 2,
        "data.batch_size": 20, "data.num_tasks": 3, "optimizer": "StochasticFrankWolfe",
    }  # fmt: skip
    assert expected.items() <= found["settings"].items()
    assert len(found["task_seconds"]) == 3 and sum(found["task_seconds"]) <= found["seconds"] + 0.01
    for scenario in ("class_il", "task_il"):
        R = torch.tensor(found[scenario]["matrix"], dtype=torch.float64)
        seen = [R[i, : i + 1].mean().item() for i in range(3)]
        assert found[scenario]["acc_seen"] == pytest.approx(seen, abs=1e-6)
        assert found[scenario]["incremental_acc"] == pytest.approx(sum(seen) / 3, abs=1e-6)
        assert found[scenario]["acc"] == pytest.approx(seen[-1], abs=1e-6)

    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    found = told(scl.ContinualModule(scl.SmallMLP([4]), scl.ER(30, 8), policies=[scl.SET(0.5, dense=[])]))
    assert (
        found["method"] == "ER-SET"
        and len(found["commit"]) == 40 + len("+changes")
        and found["commit"].endswith("+changes")
    )
    assert told(PlainClassifier())["method"] == "PlainClassifier"


def test_a_finished_run_that_is_resumed_still_says_what_it_is(tmp_path):
    for ckpt_path in (None, tmp_path / "last.ckpt"):
        parts = scl.RandomState(), scl.ContinualEvaluation(), scl.RunReport(folder=str(tmp_path), show=False)
        saving = scl.SequenceCheckpoint(tmp_path, save_last=True)
        t = trainer(*parts, saving, epochs=1, enable_checkpointing=True)
        t.fit(scl.ContinualModule(scl.SmallMLP([4])), toy_tasks(), ckpt_path=ckpt_path)
        found = json.loads((tmp_path / "metrics.json").read_text())
        assert found["method"] == "CrossEntropy" and found["settings"]["epochs"] == 1 and found["digests"]


def test_joint_training_has_seen_all_tasks(tmp_path):
    report = scl.RunReport(folder=str(tmp_path))
    trainer(scl.ContinualEvaluation(), report, epochs=1).fit(PlainClassifier(), toy_tasks(joint=True))
    found = json.loads((tmp_path / "metrics.json").read_text())["class_il"]
    assert found["acc_seen"] == [pytest.approx(found["acc"], abs=1e-6)]


@pytest.mark.parametrize("tasks", [3, 60])
def test_every_logger_gets_a_curve_for_each_task(tmp_path, tasks):
    loggers = [CSVLogger(tmp_path, "a"), CSVLogger(tmp_path, "b")]
    images = torch.randint(256, (tasks * 8, 1, 6, 6), dtype=torch.uint8)
    labels = torch.arange(tasks * 8) % tasks
    data = scl.SplitTensors((images, labels), (images, labels), num_tasks=tasks, batch_size=4)
    t = trainer(scl.ContinualEvaluation(), epochs=1, logger=loggers)
    t.fit(scl.ContinualModule(scl.SmallMLP([4])), data)
    R = next(c for c in t.callbacks if isinstance(c, scl.ContinualEvaluation)).matrices["class_il"].R
    for logger in loggers:
        with open(Path(logger.log_dir, "metrics.csv"), newline="") as file:
            rows = list(csv.DictReader(file))
        for task in range(tasks):
            curve = [float(row[f"class_il/task_{task}"]) for row in rows if row[f"class_il/task_{task}"]]
            assert curve == pytest.approx(R[:, task].tolist(), abs=1e-6)
        seen = [float(row["class_il/acc_seen"]) for row in rows if row["class_il/acc_seen"]]
        assert seen == pytest.approx([R[i, : i + 1].mean().item() for i in range(tasks)], abs=1e-6)


def test_without_a_folder_nothing_is_left_and_everything_is_told(tmp_path, capsys):
    size = scl.ModelCapacity()
    trainer(size, scl.RunReport(), epochs=1).fit(PlainClassifier(), toy_tasks())
    assert not list(tmp_path.iterdir())
    assert size.summary()["bytes"] > 0 and "no files written" in capsys.readouterr().out
    folder = tmp_path / "told"
    told = scl.ModelCapacity(folder=str(folder)), scl.RunReport(folder=str(folder))
    trainer(*told, epochs=1).fit(PlainClassifier(), toy_tasks())
    assert [p.name for p in tmp_path.iterdir()] == ["told"]
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "metrics.json"}
    found = json.loads((folder / "metrics.json").read_text())
    assert found["finished"] and found["size"] == told[0].summary()
    assert torch.is_tensor(scl.load_sparse(folder / "model.safetensors")["net.0.weight"])


def test_what_a_module_holds_is_told_by_its_repr():
    module, report = scl.WSN(scl.SmallCNN(4), keep=0.3), scl.RunReport(show=False)
    trainer(report, epochs=1).fit(module, toy_tasks(num_tasks=2))
    learnt = scl.Subnetworks.of(module)
    used = [sum(int(learnt.mask(task, name).sum()) for name in learnt.tasks[task].masks) for task in (0, 1)]
    assert repr(learnt).splitlines()[1:] == [f"  task {i}: {n:,} masked weights in use" for i, n in enumerate(used)]
    assert 0 < used[0] < sum(p.numel() for p in module.parameters())
    module = scl.EsaCL(scl.SmallCNN(4), sparsity=0.75, freeze="share")
    trainer(epochs=1).fit(module, toy_tasks(num_tasks=1))
    lines = repr(scl.Masks.of(module)).splitlines()
    assert lines[0] == "Masks of 3 weights of EsaCL" and lines[1].startswith("  backbone.3.weight: 25.0% alive")


def test_a_report_may_be_silent(tmp_path, capsys):
    for show in (False, True):
        report = scl.RunReport(folder=str(tmp_path), show=show)
        trainer(report, epochs=1).fit(PlainClassifier(), toy_tasks())
        assert bool(capsys.readouterr().out) == show
    assert (tmp_path / "metrics.json").exists()
