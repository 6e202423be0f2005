"""Fingerprints are of all stored samples and labels of a task, and of nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from lightning_sparse_cl import data as scl
from tests import fake_data

IMAGES = torch.randint(0, 256, (80, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(80) % 4
DIGITS = ["6556a4495ee4632b", "6e7b449e9661b834", "4e4931b125e54aa4", "6403d8a861e065d3", "118cc11b6db833f2"]


def of(data: scl.TaskDataModule) -> list[str]:
    data.setup()
    return data.fingerprints


def split(images: Any = IMAGES, labels: Any = LABELS, test: Any = None, **kwargs: Any) -> list[str]:
    return of(scl.SplitTensors((images, labels), test or (images, labels), num_tasks=2, **kwargs))


def changed(values: torch.Tensor, *places: int) -> torch.Tensor:
    """A copy with other values at these places."""
    values = values.clone()
    for place in places:
        values[place] = values[place].flatten()[0] ^ 1 if values.ndim > 1 else (values[place] + 2) % 4
    return values


SAME: dict[str, Callable[[], list[str]]] = {
    "again": split,
    "floats of labels": lambda: split(labels=LABELS.float()),
    "ids": lambda: split(labels=LABELS * 7),
    "own transform": lambda: split(transform=scl.ImageTransform([0.2], [0.7])),
    "batch and augmentation": lambda: split(batch_size=7, augment=False),
    "validation part": lambda: split(val_fraction=0.5, batch_size=4),
    "strides": lambda: split(IMAGES.transpose(0, 3).contiguous().transpose(0, 3)),
}
OTHER: dict[str, tuple[Callable[[], list[str]], list[int]]] = {
    "last image": (lambda: split(changed(IMAGES, 79), test=(IMAGES, LABELS)), [1]),
    "test image": (lambda: split(test=(changed(IMAGES, 0), LABELS)), [0]),
    "two labels": (lambda: split(labels=torch.cat([LABELS[:2].flip(0), LABELS[2:]]), test=(IMAGES, LABELS)), [0]),
    "order": (lambda: split(IMAGES.flip(0), LABELS.flip(0)), [0, 1]),
    "class order": (lambda: split(class_order=[1, 0, 2, 3]), [0]),
    "order of tasks": (lambda: split(class_order=[2, 3, 0, 1]), [0, 1]),
    "type": (lambda: split(IMAGES.float()), [0, 1]),
    "shape": (lambda: split(IMAGES.reshape(80, 1, 4, 9)), [0, 1]),
    "one sample less": (lambda: split(IMAGES[:79], LABELS[:79], test=(IMAGES, LABELS)), [1]),
}


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_matter(name: str) -> None:
    assert SAME[name]() == split()


@pytest.mark.parametrize("name", OTHER)
def test_what_matters_shows_in_its_task(name: str) -> None:
    make, tasks = OTHER[name]
    before, after = split(), make()
    assert [t for t in range(2) if before[t] != after[t]] == tasks
    assert all(len(f) == 16 and int(f, 16) >= 0 for f in before + after)


def test_joint_training_has_one_of_everything() -> None:
    joint = split(joint=True)
    assert len(joint) == 1 and joint != split()[:1]
    for make, _ in (OTHER[name] for name in ("last image", "test image", "two labels")):
        assert make() != split()
    assert split(changed(IMAGES, 79), test=(IMAGES, LABELS), joint=True) != joint
    assert split(test=(changed(IMAGES, 0), LABELS), joint=True) != joint


def test_it_is_the_same_on_every_machine() -> None:
    assert of(scl.SplitDigits()) == DIGITS


def test_tensors_in_data_sets_and_in_memory_agree() -> None:
    tensors = [scl.SampleTensors(IMAGES, LABELS)]
    pairs = [TensorDataset(IMAGES, LABELS)]
    gathered = of(scl.TaskDatasets(pairs, pairs))
    assert gathered == of(scl.TaskDatasets(tensors, tensors))
    half = scl.SampleTensors(IMAGES.to(torch.bfloat16), LABELS)  # numpy does not know this type
    assert of(scl.TaskDatasets([half], [half])) != gathered


def by_item(data: Dataset) -> list[str]:
    plain = scl.ImageTransform([0.0] * 3, [1.0] * 3)
    return of(scl.TaskDatasets([data], [data], in_memory=False, transform=plain, batch_size=1))


@pytest.mark.parametrize(
    "wrap", [lambda d: d, lambda d: Subset(d, range(0, len(d), 2)), lambda d: ConcatDataset([d, d])]
)
def test_arrays_behind_items_count(wrap: Callable[[Dataset], Dataset]) -> None:
    def made(images: torch.Tensor, labels: torch.Tensor = LABELS) -> list[str]:
        return by_item(wrap(TensorDataset(images, labels)))

    assert made(IMAGES) == made(IMAGES.clone())
    assert made(IMAGES) != made(changed(IMAGES, 78))
    assert made(IMAGES) != made(IMAGES, changed(LABELS, 0, 2))


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(len(d))), lambda d: ConcatDataset([d, d])])
def test_files_behind_items_count_without_being_decoded(
    wrap: Callable[[Dataset], Dataset], tmp_path: Path, monkeypatch: Any
) -> None:
    fake_data.write_image_folder(tmp_path / "one", classes=2, per_class=20)
    shutil.copytree(tmp_path / "one", tmp_path / "two")  # with the times of modification

    def found(root: str) -> list[str]:
        return by_item(wrap(ImageFolder(str(tmp_path / root / "train"))))

    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: opened.append(args) or real(*args, **kwargs))
    before = found("one")
    assert len(opened) <= 40  # those that are looked at, not all
    assert before == found("one") == found("two")
    file = tmp_path / "two" / "train" / "class_1" / "0000.png"
    stamp = file.stat()
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert found("two") != before
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert found("two") == before
    file.write_bytes(file.read_bytes() + b"more")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert found("two") != before
    file.rename(file.with_name("0000x.png"))
    assert found("two") != before


def test_another_subset_of_the_same_files_differs(tmp_path: Path) -> None:
    fake_data.write_image_folder(tmp_path, classes=2, per_class=20)
    files = ImageFolder(str(tmp_path / "train"))
    assert by_item(Subset(files, range(0, 40, 2))) != by_item(Subset(files, range(1, 40, 2)))


def test_a_fingerprint_is_taken_once_and_before_the_data_move(monkeypatch: Any) -> None:
    taken = []
    real = scl.task_sets.fingerprints
    monkeypatch.setattr(scl.task_sets, "fingerprints", lambda *args: taken.append(args) or real(*args))
    data = scl.SplitDigits()
    for stage in ("fit", "fit", "test"):
        data.setup(stage)
    for part in data.train_sets:
        part.to(torch.device("meta"))
    assert len(taken) == 1 and data.fingerprints == of(scl.SplitDigits())
