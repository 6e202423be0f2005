"""Labels of any numeric type are taken, other values refused; classes are counted and keep their names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset
from toy_trainer import trainer

from lightning_sparse_cl import ContinualModule, SmallMLP
from lightning_sparse_cl import data as scl
from tests import fake_data
from tests.data.test_what_data_are import IMAGES, LABELS, Loaded, Pairs, ready, refused


def test_listed_labels_are_compared_with_items() -> None:
    wrong = Pairs(IMAGES, LABELS.tolist(), (LABELS + 10).tolist())
    right = Pairs(IMAGES, LABELS.tolist(), LABELS.tolist())
    for data in (wrong, Subset(wrong, range(40)), ConcatDataset([right, wrong])):
        refused(lambda d=data: scl.TaskDatasets([d], [d], in_memory=False), r"item \d+ has the label [01], .* 1[01]$")
        with pytest.warns(UserWarning, match="in memory the items count"):
            assert ready(scl.TaskDatasets([data], [data])).classes == [[0, 1]]
    refused(lambda: Loaded([wrong], [wrong]), "training of task 0: item 0 has the label 0, .* 10")
    short = Pairs(IMAGES, LABELS.tolist(), [0, 1])
    refused(lambda: scl.TaskDatasets([short], [short], in_memory=False), ".targets lists 2 labels for 80 items")


WHOLE = {
    "float": lambda y: float(y), "bool": bool, "numpy": np.int16, "numpy float": np.float32,
    "0-d": torch.tensor, "one element": lambda y: torch.tensor([y]), "array": lambda y: np.array([y], dtype=np.uint8),
    "0-d float": lambda y: torch.tensor(float(y)),
}  # fmt: skip


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers_of_any_type_are_labels(kind: str, in_memory: bool) -> None:
    data = Pairs(IMAGES, [WHOLE[kind](int(y)) for y in LABELS])
    split = ready(scl.TaskDatasets([data], [data], in_memory=in_memory))
    ((x, y), *_) = split.test_dataloader()[0]
    assert torch.equal(x, IMAGES) and torch.equal(y, LABELS) and y.dtype == torch.int64


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    "label, what",
    [
        (0.7, "float 0.7"),
        (torch.tensor(0.7), "Tensor"),
        (np.float64(0.7), "float64 0.7"),
        (math.nan, "float nan"),
        (torch.tensor([0.0, 1.0]), r"torch.float32 \(2,\)"),
        (np.array([0, 1]), r"int64 \(2,\)"),
        ([0, 1], "a list of 2"),
        ("7", "str 7"),
        (None, "NoneType"),
    ],
    ids=["float", "0-d", "numpy", "NaN", "one-hot", "array", "list", "text", "None"],
)
def test_other_labels_are_refused_by_item(label: Any, what: str, in_memory: bool) -> None:
    data = Pairs(IMAGES, [0, 1, label, *[1] * 77])
    refused(
        lambda: scl.TaskDatasets([data], [data], in_memory=in_memory),
        rf"train\[0\]\): labels are whole numbers.*item 2 is {what}",
    )


@pytest.mark.parametrize("make", [scl.SampleTensors, lambda x, y: scl.SplitTensors((x, y), (x, y), 2)])
def test_labels_in_tensors(make: Any) -> None:
    refused(lambda: make(IMAGES, LABELS + 0.7), "labels are whole numbers; label 0 is 0.7")
    refused(lambda: make(IMAGES, torch.eye(2)[LABELS]), r"labels \(N,\).*got .*\(80, 2\)")
    for labels in (LABELS.float(), LABELS.bool(), LABELS.to(torch.uint8)):
        made = make(IMAGES, labels)
        data = ready(made).train_sets[1] if isinstance(made, scl.SplitTensors) else made
        assert data.labels.dtype == torch.int64 and data.labels.unique().tolist() in ([0, 1], [1])


def test_labels_of_a_source_are_indices() -> None:
    class Own(scl.Source):
        num_classes, labels = 2, LABELS.to(torch.uint8)  # uint8 would choose like a mask

        def read(self, train: bool) -> tuple[Tensor, Tensor]:
            return IMAGES, self.labels

    assert torch.equal(ready(scl.ClassSplit(Own(), 2)).train_sets[1].inputs, IMAGES[LABELS == 1])
    Own.labels = LABELS + 1
    for split in (scl.ClassSplit(Own(), 2), scl.Permuted(Own(), 2)):
        refused(lambda s=split: s, "a source of 2 classes labels them 0-1, got 2")


IDS = torch.tensor([3, 7, 42, 99])


@pytest.mark.parametrize("ids", [IDS, IDS * 10**9, torch.tensor([1, 2, 3, 200]).to(torch.uint8)], ids=str)
def test_ids_of_tensors_are_counted(ids: Tensor) -> None:
    labels = ids[torch.arange(80) % 4]
    plain = ready(scl.SplitTensors(*[(IMAGES, torch.arange(80) % 4)] * 2, num_tasks=2, class_order=1))
    split = ready(scl.SplitTensors(*[(IMAGES, labels)] * 2, num_tasks=2, class_order=1))
    assert (split.num_classes, split.classes) == (4, [[0, 1], [2, 3]]) == (plain.num_classes, plain.classes)
    assert split.class_names == [str(int(ids[c])) for c in split.class_order]
    assert plain.class_names == [str(c) for c in plain.class_order]
    for ours, theirs in zip(split.train_sets + split.test_sets, plain.train_sets + plain.test_sets, strict=True):
        assert torch.equal(ours.inputs, theirs.inputs) and torch.equal(ours.labels, theirs.labels)
    joint = ready(scl.SplitTensors(*[(IMAGES, labels)] * 2, num_tasks=2, joint=True))
    assert (joint.num_classes, joint.class_names) == (4, [str(i) for i in ids.tolist()])
    assert ready(scl.Permuted(scl.TensorSource(*[(IMAGES, labels)] * 2), 2)).class_names == joint.class_names


def test_tasks_are_equal_whatever_the_ids() -> None:
    data = IMAGES[:72].repeat(2, 1, 1, 1), torch.arange(144) % 9 + 1
    assert ready(scl.SplitTensors(data, data, num_tasks=3)).classes == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("joint", [True, False])
def test_ids_of_data_sets_are_counted_over_all_tasks(joint: bool, in_memory: bool) -> None:
    parts = [IDS[torch.arange(80) % 2], IDS[2 + torch.arange(80) % 2]]
    tasks = [Pairs(IMAGES, y.tolist(), y.tolist()) for y in reversed(parts)]
    split = ready(scl.TaskDatasets(tasks, tasks, in_memory=in_memory, joint=joint))
    assert (split.num_classes, split.classes) == (4, [[2, 3], [0, 1]])
    assert split.class_names == ["3", "7", "42", "99"]
    ((_, y), *_) = split.test_dataloader()[0]
    assert torch.equal(y, 2 + LABELS) and split.train_sets[0][5][1] == 3
    if joint:
        assert split.train_sets[0][80 + 5][1] == 1
    tensors = [scl.SampleTensors(IMAGES, y) for y in reversed(parts)]
    again = ready(Loaded(tensors, tensors, joint=joint))
    assert (again.classes, again.class_names) == (split.classes, split.class_names)
    assert tensors[0].labels.tolist() == parts[1].tolist()  # what was given stays as it is


def test_the_same_ids_in_all_tasks() -> None:
    tasks = [Pairs(IMAGES, (5 + LABELS).tolist())] * 3
    split = ready(scl.TaskDatasets(tasks, tasks))
    assert (split.classes, split.class_names) == ([[0, 1]] * 3, ["5", "6"])


def test_ids_that_are_refused() -> None:
    for ids, message in ((LABELS - 1, "labels are integers from 0 on, got -1"), (LABELS + 0.5, "label 0 is 0.5")):
        refused(lambda y=ids: scl.SplitTensors((IMAGES, y), (IMAGES, y), 2), message)
    tasks = [Pairs(IMAGES, (LABELS - 1).tolist())]
    refused(lambda: scl.TaskDatasets(tasks, tasks), "task 0 has the label -1; labels count from 0")
    refused(lambda: scl.SplitTensors((IMAGES, LABELS), (IMAGES, LABELS + 1), 2), "no training sample has the label 2")


def test_names_of_the_classes(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("folder", "tiny", "mini", "c10", "c100", "fashion"):
        (tmp_path / name).mkdir()
    fake_data.write_image_folder(tmp_path / "folder", classes=2)
    fake_data.write_tiny_imagenet(tmp_path / "tiny", classes=20)
    fake_data.write_mini_imagenet(tmp_path / "mini")
    fake_data.write_cifar10(tmp_path / "c10", monkeypatch)
    fake_data.write_cifar100(tmp_path / "c100", monkeypatch)
    fake_data.write_mnist(tmp_path / "fashion", name="FashionMNIST")
    wnids = (tmp_path / "tiny/tiny-imagenet-200/wnids.txt").read_text().split()
    root = {name: str(tmp_path / name) for name in ("tiny", "mini", "c10", "c100", "fashion")}
    names = {
        scl.SplitImageFolder(str(tmp_path / "folder"), 2, class_order=[1, 0]): ["class_1", "class_0"],
        scl.SplitTinyImageNet(root=root["tiny"]): wnids,
        scl.SplitMiniImageNet(root=root["mini"]): [f"n{99 - c:04d}" for c in range(100)],
        scl.SplitCIFAR10(root=root["c10"], class_order=list(range(9, -1, -1))): [str(c) for c in range(9, -1, -1)],
        scl.SplitFashionMNIST(root=root["fashion"]): ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal",
            "Shirt", "Sneaker", "Bag", "Ankle boot"],
        scl.SplitDigits(): [str(c) for c in range(10)],
        scl.RotatedDigits(2): [str(c) for c in range(10)],
    }  # fmt: skip
    for split, expected in names.items():
        split.batch_size = 1
        assert ready(split).class_names == expected and split.num_classes == len(expected)
    split = ready(scl.SplitCIFAR100(root=root["c100"], superclasses=True))
    assert split.class_names == [str(c) for c in split.class_order]


@pytest.mark.parametrize("workers", [0, 1])
def test_items_with_ids_train_as_tensors_do(workers: int) -> None:
    parts = [(IMAGES[:40], IDS[LABELS[:40]]), (IMAGES[40:], IDS[2 + LABELS[40:]])]
    items = [Pairs(x, y.tolist()) for x, y in parts]
    tensors = [scl.SampleTensors(x, y) for x, y in parts]
    ends = []
    for data in (
        scl.TaskDatasets(items, items, in_memory=False, num_workers=workers, batch_size=8),
        scl.TaskDatasets(tensors, tensors, batch_size=8),
    ):
        pl.seed_everything(0, verbose=False)
        module = ContinualModule(SmallMLP([8]))
        trainer(epochs=1).fit(module, data)
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*ends) and module.head is not None and module.head.out_features == 4
