"""`sparsecl predict --data FOLDER`: a table of the classes of images, by a checkpoint alone."""

import csv
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.__main__ import run
from lightning_sparse_cl.cli.predict import is_meant
from lightning_sparse_cl.demos import toy_tasks


@pytest.fixture
def photos(tmp_path):
    random, folder = np.random.RandomState(0), tmp_path / "photos"
    (folder / "deep" / "er").mkdir(parents=True)
    for i in range(7):
        shape = (*random.randint(5, 20, 2), 3)[: 2 + i % 2]
        Image.fromarray(random.randint(0, 256, shape).astype(np.uint8)).save(folder / "deep" / f"{i}.png")
    Image.fromarray(random.randint(0, 256, (9, 9)).astype(np.uint16)).save(folder / "deep" / "er" / "sixteen.tif")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    (t := trainer(epochs=1)).fit(scl.EsaCL(scl.SmallMLP([8, 8]), scl.ER(20, 8)), toy_tasks())
    t.save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.fixture
def sparsecl(monkeypatch):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["sparsecl", *map(str, args)])
        run()

    return call


def test_every_image_has_a_line(photos, checkpoint, sparsecl, tmp_path, capsys):
    sparsecl("predict", "--data", photos, "--ckpt_path", checkpoint, "--batch_size=3", "--device=cpu")
    with open("predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [f"deep/{i}.png" for i in range(7)] + ["deep/er/sixteen.tif"]
    assert list(rows[0]) == ["file", "class", "probability", "task"] and [row["file"] for row in rows] == names
    module = scl.EsaCL.load_from_checkpoint(checkpoint)
    found = module.predict_images([photos / name for name in names])
    assert [(row["class"], int(row["task"])) for row in rows] == [(p.name, p.task) for p in found]
    assert [float(row["probability"]) for row in rows] == pytest.approx([p.probability for p in found], abs=1e-5)
    assert "predictions.csv: 8 images" in capsys.readouterr().out


def test_files_that_cannot_be_read_are_named_and_left_out(photos, checkpoint, sparsecl, tmp_path):
    (photos / "broken.png").write_bytes(b"nothing")
    (photos / "photo.heic").write_bytes(b"nothing")
    with pytest.warns(UserWarning) as said:
        sparsecl("predict", "--data", photos, "--ckpt_path", checkpoint, "--output", tmp_path / "out.csv")
    told = [str(w.message) for w in said]
    assert any("broken.png" in line for line in told) and any("1 .heic" in line for line in told)
    written = (tmp_path / "out.csv").read_text()
    assert len(written.splitlines()) == 9 and "broken" not in written


def test_classes_of_several_tasks_leave_the_task_empty(photos, sparsecl, tmp_path):
    (t := trainer(epochs=1)).fit(scl.ContinualModule(scl.SmallMLP([8])), scl.PermutedDigits(2, batch_size=64))
    t.save_checkpoint(tmp_path / "domains.ckpt")
    sparsecl("predict", f"--data={photos}", f"--ckpt_path={tmp_path / 'domains.ckpt'}")
    assert all(line.endswith(",") for line in (tmp_path / "predictions.csv").read_text().splitlines()[1:])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data=no/such"], "--data=no/such: this folder is not there"),
        (["--data=empty"], "--data=empty: this folder has no images"),
        (["--data=broken"], "--data=broken: none of the 1 images of this folder can be read"),
        (["--ckpt_path=none.ckpt"], "checkpoint none.ckpt: this file is not there"),
        (["--ckpt_path=older.ckpt"], "checkpoint older.ckpt: it does not say what its network and data were"),
        (["--ckpt_path=own.ckpt"], "checkpoint own.ckpt: its data had a transform of their own"),
        (["--ckpt_path=floats.ckpt"], "checkpoint floats.ckpt: its training samples were float32 (1, 8, 8)"),
        (["--batch_size=0"], "--batch_size=0: a batch has at least one image"),
        (["--output=no/such.csv"], "--output=no/such.csv: there is no folder 'no'"),
        (["--device=nonsense"], "--device=nonsense: "),
        (["--colour=red"], "predict: unrecognized arguments: --colour=red"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(
    more, message, photos, checkpoint, sparsecl, tmp_path, monkeypatch
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"nothing")
    (tmp_path / "predictions.csv").write_text("what was there")

    class Own(scl.ImageTransform):
        pass

    (t := trainer(epochs=1)).fit(scl.ContinualModule(scl.SmallMLP([8])), toy_tasks(transform=Own([0.5], [0.5])))
    t.save_checkpoint(tmp_path / "own.ckpt")
    floats = (torch.rand(40, 1, 8, 8), torch.arange(40) % 4)
    data = scl.SplitTensors(floats, floats, num_tasks=2, batch_size=10)
    (t := trainer(epochs=1)).fit(scl.ContinualModule(scl.SmallMLP([8])), data)
    t.save_checkpoint(tmp_path / "floats.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr(scl.ContinualModule, "on_save_checkpoint", lambda *_: None)
        t.save_checkpoint(tmp_path / "older.ckpt")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        sparsecl("predict", f"--data={photos}", f"--ckpt_path={checkpoint}", *more)
    assert exit.value.code.startswith(f"sparsecl: error: {message}") and "\n" not in exit.value.code
    assert (tmp_path / "predictions.csv").read_text() == "what was there" and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["predict", "--data", "photos", "--ckpt_path", "x"], True),
        (["predict", "--ckpt_path", "x", "--data=photos/"], True),
        (["predict", "--data=photos/missing"], True),
        (["predict", "-c", "split_digits/esacl", "--ckpt_path", "last"], False),
        (["predict", "-c", "x", "--data", "SplitDigits"], False),
        (["predict", "-c", "x", "--data", "photos"], False),  # a data module of this name
        (["predict", "-c", "x", "--data.class_path=SplitDigits"], False),
        (["predict", "-c", "x", "--data", "photos/data.yaml"], False),
        (["predict", "-c", "x", '--data={"class_path": "a/b"}'], False),
        (["predict", "--data"], False),
        (["test", "--data", "photos"], False),
    ],
)
def test_lightnings_own_predict_is_told_apart(args, meant, photos):
    (photos / "data.yaml").write_text("class_path: SplitDigits\n")
    assert is_meant(args) == meant
