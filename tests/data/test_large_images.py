"""Image files of any size, cut by their shorter side, grey or RGB, in memory or read by workers."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from forked import forked
from killed import Strike, final_state
from PIL import Image
from test_resume import assert_identical
from torch.optim import SGD
from toy_trainer import trainer

import lightning_sparse_cl as scl


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four classes of grey images of many sizes; each class is bright in another quarter of the middle."""
    random = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 8)):
        for c in range(4):
            (place := tmp_path / "images" / part / f"class_{c}").mkdir(parents=True)
            for i in range(count):
                height, width = random.integers(16, 40, 2)
                side = min(height, width)
                pixels = random.integers(0, 60, (height, width))
                top, left = (height - side) // 2 + side // 2 * (c // 2), (width - side) // 2 + side // 2 * (c % 2)
                pixels[top : top + side // 2, left : left + side // 2] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return tmp_path / "images"


def split(folder: Path, **kwargs: Any) -> scl.SplitImageFolder:
    options: dict[str, Any] = {"size": 12, "fit": "crop", "channels": None, "batch_size": 8}
    return scl.SplitImageFolder(str(folder), 2, **(options | kwargs))


def train(
    folder: Path, saved: Path | None = None, at: int | None = None, path: str | None = None, **kwargs: Any
) -> Any:
    pl.seed_everything(0, verbose=False)
    module, data = (
        scl.ContinualModule(scl.SmallCNN(4), scl.ER(20, 8), optimizer=partial(SGD, lr=0.05)),
        split(folder, **kwargs),
    )
    saving = [] if saved is None else [scl.SequenceCheckpoint(str(saved), every_n_train_steps=3, save_last=True)]
    evaluation = scl.ContinualEvaluation()
    callbacks = (evaluation, scl.RandomState(), *saving, Strike(at))
    trainer(*callbacks, epochs=4, enable_checkpointing=saved is not None).fit(module, data, ckpt_path=path)
    return module, evaluation, data


def test_files_read_by_workers_are_learnt_as_those_in_memory(folder: Path) -> None:
    held, evaluation, data = train(folder)
    assert data.input_shape == (1, 12, 12) and evaluation.matrices["task_il"].R.diag().min() > 0.9
    for workers in (0, 2):
        files, _, data = train(folder, in_memory=False, num_workers=workers)
        assert all(torch.equal(t, files.state_dict()[n]) for n, t in held.state_dict().items() if torch.is_tensor(t))
    assert not isinstance(data.train_sets[0], scl.SampleTensors)


def test_the_shorter_side_is_scaled_and_the_middle_is_cut_out(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for c in range(2):
            (tmp_path / part / str(c)).mkdir(parents=True)
            pixels = np.zeros((20, 60, 3), np.uint8)
            pixels[:, 20:40], pixels[:, 40:, c] = 200, 90  # the middle is white
            Image.fromarray(pixels).save(tmp_path / part / str(c) / "a.png")
    cut, squashed = (scl.ImageFolderSource(str(tmp_path), 10, fit=fit).read(True)[0] for fit in ("crop", "squash"))
    assert cut.shape == squashed.shape == (2, 3, 10, 10)
    assert cut[:, :, :, 1:9].min() == 200 and squashed[:, :, :, 0].max() == 0
    grey = scl.ImageFolderSource(str(tmp_path), 10, fit="crop", channels=1).read(True)[0]
    assert grey.shape == (2, 1, 10, 10)


def test_predictions_cut_images_as_training_did(folder: Path) -> None:
    module, _, data = train(folder, in_memory=False)
    paths = sorted((folder / "test").rglob("*.png"))
    stored = torch.stack([data.source.items(False)[i] for i in range(len(paths))])
    assert torch.equal(module.prepare_images(paths), data.prepare(stored, augment=False))
    right = [p.name == path.parent.name for p, path in zip(module.predict_images(paths), paths)]
    assert sum(right) > len(right) / 2


def test_killed_and_resumed(folder: Path, tmp_path: Path) -> None:
    run = partial(train, folder, in_memory=False, num_workers=1)
    run(tmp_path / "whole")
    assert forked(run, tmp_path / "killed", 31) == -signal.SIGKILL
    assert forked(run, tmp_path / "killed", None, str(tmp_path / "killed" / "last.ckpt")) == 0
    assert_identical(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))


def test_a_changed_file_is_another_task(folder: Path) -> None:
    def fingerprints() -> list[str]:
        data = split(folder, in_memory=False)
        data.setup()
        return data.fingerprints

    before = fingerprints()
    assert fingerprints() == before
    os.utime(folder / "train" / "class_0" / "0.png", (1, 1))
    now = fingerprints()
    assert now[0] != before[0] and now[1] == before[1]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"fit": "stretch"}, r"ImageFolderSource\(fit='stretch'\): fit is 'squash' or 'crop'"),
        ({"size": None}, r"ImageFolderSource\(fit='crop'\): images are cut to a size: give size"),
        ({"size": 0}, r"ImageFolderSource\(size=0\): a number of pixels, at least 1"),
        ({"size": 8.5}, r"ImageFolderSource\(size=8.5\): a number of pixels, at least 1"),
        ({"channels": 2}, r"ImageFolderSource\(channels=2\): 3 \(RGB\), 1 \(grey\)"),
    ],
)
def test_refusals(folder: Path, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(folder, **kwargs)


def test_a_broken_file_is_named_when_it_is_read(folder: Path) -> None:
    (folder / "train" / "class_1" / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*class_1/3.png"):
        train(folder, in_memory=False)
