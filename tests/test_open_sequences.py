"""Sequences whose number of tasks is not known: from an iterator, and from a folder that another process fills."""

import json
import multiprocessing
import re
import shutil
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from forked import forked
from PIL import Image
from test_resume import assert_identical, strike
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.__main__ import main

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (120, 120, 120)}


def digits(*classes):
    data = scl.SplitDigits(tasks=[list(classes)])
    data.setup()
    label = torch.tensor(classes)
    train, test = ((d.inputs, label[d.labels]) for d in (data.train_sets[0], data.test_sets[0]))
    return torch.utils.data.TensorDataset(*train), torch.utils.data.TensorDataset(*test)


def learner():
    return scl.ContinualDST(scl.SmallCNN(4), growth=scl.SET(0.5, interval=4))


def test_tasks_come_from_an_iterator_until_it_ends_and_go_on_later():
    torch.manual_seed(0)
    module, asked = learner(), []

    def stream(*tasks):
        for task in tasks:
            asked.append(len(scl.Subnetworks.of(module)))
            yield digits(*task)

    scl.learn(trainer(scl.RandomState()), module, scl.TaskStream(stream((3, 4), (0, 7)), batch_size=32))
    assert asked == [0, 1], "a task is asked for when the one before it is learnt"
    last = scl.TaskStream(stream((9, 1), (3, 5)), batch_size=32)
    scl.learn(trainer(scl.RandomState()), module, last)
    assert last.names_of_tasks() == [["3", "4"], ["0", "7"], ["1", "9"], ["3", "5"]], "3 is the class that it was"
    assert [task.classes for task in scl.Subnetworks.of(module).tasks] == [[0, 1], [2, 3], [4, 5], [0, 6]]


def write_task(folder, *classes, test=True):
    random = torch.Generator().manual_seed(len(str(folder)))
    for name in classes:
        for part, count in (("train", 24), *([("test", 6)] if test else [])):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                noise = torch.randint(-25, 25, (8, 8, 3), generator=random)
                pixels = (torch.tensor(COLOURS[name]) + noise).clamp(0, 255).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / part / name / f"{i}.png")


def fill(root, started):
    """What another process does: a second task, file by file, when the first one is being learnt."""
    while not started.exists():
        time.sleep(0.05)
    write_task(root / "task_002", "blue")
    time.sleep(0.3)
    write_task(root / "task_002", "grey")
    (root / "task_002" / "complete").touch()


class Started(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        Path("started").touch()


def options(folder, root, *more):
    return [
        "fit", "-c", "split_digits/continual_dst", "--data=GrowingImageFolder", f"--data.root={root}",
        "--data.batch_size=16", "--data.settled=null", "--model.init_args.backbone.init_args.width=4",
        "--schedule.epochs=2", f"--trainer.default_root_dir={folder}", "--trainer.logger=false",
        f"--checkpoint.dirpath={folder}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", *more,
    ]  # fmt: skip


def test_a_folder_that_another_process_fills_while_it_is_learnt(tmp_path):
    root, whole = tmp_path / "tasks", tmp_path / "whole"
    write_task(root / "task_001", "red", "green")
    (root / "task_001" / "complete").touch()
    writer = multiprocessing.get_context("fork").Process(target=fill, args=(root, tmp_path / "started"))
    writer.start()
    cli = main(options(tmp_path / "open", root, "--trainer.callbacks+=test_open_sequences.Started", "--data.wait=6"))
    writer.join()
    assert cli.datamodule.names_of_tasks() == [["green", "red"], ["blue", "grey"]]
    main(options(whole, root))  # when both are there from the beginning
    states = [torch.load(newest(folder))["state_dict"] for folder in (tmp_path / "open", whole)]
    assert_identical(*states)


def newest(folder):
    return max(folder.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def test_a_folder_goes_on_later_without_the_images_that_were_learnt(tmp_path):
    root, first = tmp_path / "tasks", tmp_path / "first"
    write_task(root / "task_001", "red", "green")
    write_task(root / "task_002", "blue")  # not complete
    (root / "task_001" / "complete").touch()
    cli = main(options(first, root))
    assert cli.datamodule.names_of_tasks() == [["green", "red"]]
    shutil.rmtree(root / "task_001" / "train")
    shutil.rmtree(root / "task_001")
    (root / "task_002" / "complete").touch()
    cli = main(options(tmp_path / "later", root, f"--continue_from={first / 'last.ckpt'}"))
    assert cli.datamodule.names_of_tasks() == [["green", "red"], ["blue"]]
    R = json.loads((tmp_path / "later" / "metrics.json").read_text())["task_il"]["matrix"]
    assert R[1] == [None, 1.0]
    again = main(options(tmp_path / "nothing", root, f"--continue_from={newest(tmp_path / 'later')}"))
    assert again.trainer.global_step == cli.trainer.global_step, "nothing new, nothing is trained"


def test_a_killed_run_goes_on_with_the_tasks_that_it_had(tmp_path):
    root = tmp_path / "tasks"
    write_task(root / "task_001", "red", "green")
    (root / "task_001" / "complete").touch()
    strikes = strike("on_train_batch_end", 4)
    every = "--checkpoint.every_n_train_steps=1"
    assert forked(main, options(tmp_path / "killed", root, every, *strikes)) != 0
    write_task(root / "task_002", "blue", "grey")
    (root / "task_002" / "complete").touch()
    main(options(tmp_path / "killed", root, every, "--ckpt_path=last"))
    main(options(tmp_path / "whole", root))
    assert_identical(*(torch.load(newest(tmp_path / name))["state_dict"] for name in ("killed", "whole")))


def test_a_folder_without_a_marker_is_complete_when_nothing_changes_any_more(tmp_path):
    write_task(tmp_path / "task_001", "red")
    data = scl.GrowingImageFolder(str(tmp_path), settled=0.5)
    assert data.complete() == []
    time.sleep(0.6)
    assert data.complete() == [tmp_path / "task_001"]
    write_task(tmp_path / "task_002", "blue")
    write_task(tmp_path / "task_003", "grey")
    (tmp_path / "task_003" / "complete").touch()
    assert data.complete() == [tmp_path / "task_001"], "a task that is not complete holds back those after it"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: scl.GrowingImageFolder(root, wait=-1), "GrowingImageFolder(wait=-1): seconds, at least 0"),
        (lambda root: scl.GrowingImageFolder(f"{root}/nowhere"), "there is no such folder"),
        (lambda root: scl.GrowingImageFolder(root), "there is no complete folder task_..."),
        (lambda root: scl.TaskStream(iter([])), "the iterator gives no task"),
        (lambda root: scl.TaskStream(iter([7])), "a task is a pair of a training and a test set, got a int"),
    ],
)
def test_what_is_no_sequence_is_refused_in_one_line(tmp_path, make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        make(str(tmp_path)).setup("fit")
