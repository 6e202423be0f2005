"""Data that are not what they seem are refused in one line, which names the place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_sparse_cl import data as scl

SEED = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (80, 3, 6, 6), dtype=torch.uint8, generator=SEED)
LABELS = torch.arange(80) % 2
FLOATS = IMAGES / 255


class Pairs(Dataset):
    """Items (image, label), and a list of labels that may say something else."""

    def __init__(self, images: Any, labels: Any, targets: Any = None) -> None:
        self.images, self.labels = images, labels
        if targets is not None:
            self.targets = targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.images[index], self.labels[index]


class Loaded(scl.TaskDataModule):
    """A subclass as a user writes it."""

    def __init__(self, train: list[Dataset], test: list[Dataset], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parts = train, test

    def load(self) -> Any:
        return self.parts


def ready(data: scl.TaskDataModule) -> Any:
    data.prepare_data()
    data.setup()
    return data


def refused(make: Callable[[], scl.TaskDataModule], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ready(make())
    assert "\n" not in str(error.value)


def sequences(train: Tensor, test: Tensor, later: Tensor) -> list[Callable[[], scl.TaskDataModule]]:
    """Two tasks of these training and test images, whose second task has other training images, in every form."""
    trains, tests = ([(x, LABELS) for x in part] for part in ((train, later), (test, test)))
    pairs = [[Pairs(*p) for p in part] for part in (trains, tests)]
    tensors = [[scl.SampleTensors(*p) for p in part] for part in (trains, tests)]
    return [
        lambda: scl.TaskDatasets(*pairs),
        lambda: scl.TaskDatasets(*pairs, in_memory=False),
        lambda: scl.TaskDatasets(*tensors),
        lambda: Loaded(*tensors),
        lambda: Loaded(*pairs),
    ]


@pytest.mark.parametrize("form", range(5), ids=["gathered", "by item", "in memory", "load", "load, by item"])
@pytest.mark.parametrize(
    "train, test, later, message",
    [
        (
            IMAGES,
            FLOATS,
            IMAGES,
            r"test samples of task 0 are float32 .*, those of task 0 uint8 .*; all must be equal",
        ),
        (FLOATS, FLOATS, FLOATS.double(), r"training samples of task 1 are float64 .*, those of task 0 float32 "),
        (
            FLOATS,
            FLOATS * 255,
            FLOATS,
            r"training images of task 0 go up to (1|0.9\d*), .*test images of task 0 to 25\d",
        ),
        (
            FLOATS,
            FLOATS,
            FLOATS * 255,
            r"training images of task 0 go up to (1|0.9\d*), .*training images of task 1 to 25\d",
        ),
        (IMAGES, IMAGES // 128, IMAGES, r"training images of task 0 go up to 25\d, .*test images of task 0 to 1;"),
        (IMAGES, IMAGES[:, :, :, :4], IMAGES, r"test samples of task 0 are uint8 \(3, 6, 4\)"),
    ],
    ids=["dtype", "dtype of a task", "range", "range of a task", "uint8 in 0-1", "shape"],
)
def test_one_type_and_range_for_all(form: int, train: Tensor, test: Tensor, later: Tensor, message: str) -> None:
    refused(sequences(train, test, later)[form], message)


def test_one_type_and_range_in_tensors() -> None:
    for test, message in (
        (FLOATS, r"test samples are float32 .*, train samples uint8 "),
        (IMAGES // 128, "25.*to 1; bring"),
    ):
        refused(lambda x=test: scl.SplitTensors((IMAGES, LABELS), (x, LABELS), 2), message)
    later = torch.where((LABELS == 1).view(-1, 1, 1, 1), 255 * FLOATS, FLOATS)
    refused(
        lambda: scl.SplitTensors((later, LABELS), (later, LABELS), 2), "task 0 go up .* training images of task 1 to"
    )


@pytest.mark.parametrize("form", range(5))
@pytest.mark.parametrize(
    "train, test, later",
    [
        (IMAGES, IMAGES // 4, IMAGES // 8),  # dark
        (2 * FLOATS - 1, FLOATS * 4, FLOATS * 9),
        (IMAGES, IMAGES * 0, IMAGES * 0),
        (torch.cat([FLOATS[1:], 1000 * FLOATS[:1]]), FLOATS, FLOATS),  # an outlier
        (FLOATS, FLOATS * (FLOATS > 0.99), FLOATS),  # sparse
    ],
    ids=["dark", "scaled a little", "black", "outlier", "sparse"],
)
def test_honest_ranges_pass(form: int, train: Tensor, test: Tensor, later: Tensor) -> None:
    assert ready(sequences(train, test, later)[form]()).num_tasks == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", range(5))
def test_values_that_are_not_finite_are_found(form: int, value: float) -> None:
    broken = FLOATS.clone()
    broken[70, 1, 2, 3] = value  # 70 is one of the items that are looked at
    forms = sequences(FLOATS, broken, FLOATS), sequences(FLOATS, FLOATS, broken)
    for make, part, task in zip((f[form] for f in forms), ("test", "training"), (0, 1), strict=True):
        called = (
            r"\(train\[1|\(test\[0" if form < 2 else f"{part} of task {task}" if form == 4 else f"task {task}, {part}"
        )
        refused(make, f"{called}.* 70 has values that are NaN or infinite")


def test_values_of_tensors_are_found_by_task_and_sample() -> None:
    broken = FLOATS.clone()
    broken[41, 0, 0, 0] = math.nan
    refused(
        lambda: scl.SplitTensors((FLOATS, LABELS), (broken, LABELS), 2), "task 1, test sample 20 has values that are"
    )
    refused(lambda: scl.SplitTensors((broken, LABELS), (FLOATS, LABELS), 2), "task 1, training sample 20 has values")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, y: (x[:, :4], y), r"item 33 are float32 \(3, 4, 6\), those of item 0 float32 \(3, 6, 6\)"),
        (lambda x, y: (x.double(), y), "item 33 are float64"),
        (lambda x, y: (x / 0, y), "item 33 has values that are NaN or infinite"),
        (lambda x, y: (x, 0), r"item 33 has the label 0, but the data set's list of labels \(.targets\) has 1"),
        (lambda x, y: (x, y, 0), r"items are pairs \(sample, label\); item 33 is a tuple of 3"),
        (lambda x, y: (x, 0.5), "whole numbers, one for each sample; that of item 33 is float 0.5"),
    ],
    ids=["size", "dtype", "NaN", "label", "triple", "fraction"],
)
def test_items_read_later_are_checked_too(change: Any, message: str) -> None:
    class Broken(Pairs):
        def __getitem__(self, index: int) -> Any:
            item = super().__getitem__(index)
            return change(*item) if index == 33 else item  # not among those looked at in setup

    data = Broken(list(FLOATS), LABELS.tolist(), LABELS.tolist())
    plain = scl.ImageTransform([0.0] * 3, [1.0] * 3)  # given, or setup would read more items
    split = ready(scl.TaskDatasets([data], [data], in_memory=False, transform=plain))
    with pytest.raises(ValueError, match=message):
        list(DataLoader(split.test_sets[0], 16))
    if "3, 4, 6" in message:  # one of them in a worker process
        with pytest.raises(ValueError, match=message):
            list(DataLoader(split.test_sets[0], 80, num_workers=1, multiprocessing_context="fork"))
    if "label 0" not in message:
        refused(lambda: scl.TaskDatasets([data], [data]), message)


def as_dicts(image: Any) -> list[dict[str, Any]]:
    return [{"image": image, "label": 0}] * 40


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([(IMAGES[0], 0)])


LAST = IMAGES.permute(0, 2, 3, 1)
TOKENS = torch.randint(0, 99, (80, 12))
NOT_IMAGES: list[tuple[Any, str]] = [
    ((TOKENS.view(80, 1, 3, 4), LABELS), "images are uint8 or float, got int64"),
    ((LAST, LABELS), r"seem to be \(H, W, C\), use .permute\(0, 3, 1, 2\)"),
    ((LAST.numpy(), LABELS.numpy()), r"use .permute\(0, 3, 1, 2\)"),
    ((LAST[..., :1] / 255, LABELS), r"use .permute\(0, 3, 1, 2\)"),
    ((IMAGES, LABELS, LABELS), r"give a pair \(samples, labels\), got a tuple of 3"),
    ({"images": IMAGES, "labels": LABELS}, "give a pair .*, got a dict"),
    (TensorDataset(IMAGES, LABELS), "give a pair .*, got a TensorDataset"),
    ((IMAGES, ["a", 1] * 40), "labels: a tensor, an array of numbers or a number is expected, got a list"),
    ((IMAGES.to(torch.complex64), LABELS), "uint8 or float, got complex64"),
]


@pytest.mark.parametrize("given, message", NOT_IMAGES, ids=[message for _, message in NOT_IMAGES])
def test_what_are_no_images(given: Any, message: str) -> None:
    refused(lambda: scl.SplitTensors(given, given, 2), message)


NO_PAIRS: list[tuple[Any, str]] = [
    (Pairs(TOKENS.view(80, 1, 3, 4), LABELS), "images are uint8 or float, got int64"),
    (Pairs(LAST, LABELS), r"seem to be \(H, W, C\), use .permute\(2, 0, 1\)|use .permute\(0, 3, 1, 2\)"),
    (Pairs(LAST.numpy(), LABELS), r".permute\("),
    (as_dicts(IMAGES[0]), "item 0 is a dict with the keys image, label"),
    (TensorDataset(IMAGES, LABELS, LABELS), "item 0 is a tuple of 3"),
    (TensorDataset(IMAGES), "item 0 is a tuple of 1"),
    (IMAGES, r"item 0 is torch.uint8 \(3, 6, 6\)"),
    (Pairs(np.array([object()] * 40), LABELS), "item 0 is or has object"),
    (Stream(), "a data set has a length, and items by index; Stream has not"),
]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("data, message", NO_PAIRS, ids=[message for _, message in NO_PAIRS])
def test_items_that_are_no_pairs_of_sample_and_label(data: Any, message: str, in_memory: bool) -> None:
    refused(lambda: scl.TaskDatasets([data], [data], in_memory=in_memory), message)


def test_task_datasets_are_lists() -> None:
    data = TensorDataset(IMAGES, LABELS)
    refused(lambda: scl.TaskDatasets(data, data), "data sets, one per task, got TensorDataset and TensorDataset")
    tokens = [scl.SampleTensors(TOKENS.view(80, 1, 3, 4), LABELS)]
    refused(lambda: scl.TaskDatasets(tokens, tokens), "images are uint8 or float, got int64")


def test_arrays_and_odd_tensors_are_taken() -> None:
    plain = ready(scl.SplitTensors((IMAGES, LABELS), (IMAGES, LABELS), 2))
    flipped = np.flip(IMAGES.flip(3).numpy(), 3)  # negative strides
    grad = ready(scl.SplitTensors(*[(FLOATS.clone().requires_grad_(), LABELS)] * 2, num_tasks=2))
    array = ready(scl.SplitTensors(*[(flipped, LABELS.numpy())] * 2, num_tasks=2))
    assert torch.equal(scl.SampleTensors(IMAGES.numpy(), LABELS.numpy()).inputs, IMAGES)
    items = ready(scl.TaskDatasets(*[[Pairs(flipped, LABELS.numpy())]] * 2, in_memory=False))
    wide = ready(scl.SplitTensors(*[(IMAGES[:1].expand(80, -1, -1, -1), LABELS)] * 2, num_tasks=2))
    for t in range(2):
        assert torch.equal(array.train_sets[t].inputs, plain.train_sets[t].inputs)
        assert not grad.train_sets[t].inputs.requires_grad
        assert torch.equal(wide.train_sets[t].inputs[7], IMAGES[0])
    assert torch.equal(items.train_sets[0][5][0], IMAGES[5])


def test_what_is_said_but_not_refused() -> None:
    train = (IMAGES, torch.arange(80) % 4)
    with pytest.warns(UserWarning, match="SplitTensors: task 1 has no test samples of 1 of its classes: '3'"):
        ready(scl.SplitTensors(train, (IMAGES[:60], torch.arange(60) % 3), 2))
    drawn = Pairs(list(IMAGES), LABELS.tolist())
    drawn.__class__ = type("Drawn", (Pairs,), {"__getitem__": lambda d, i: (torch.rand(3, 6, 6), i % 2)})
    with pytest.warns(UserWarning, match=r"train\[0\]\): item 0 differs each time it is read"):
        ready(scl.TaskDatasets([drawn], [drawn]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready(scl.SplitTensors(train, train, 2))


def test_a_validation_part_of_nothing_is_refused() -> None:
    refused(
        lambda: scl.SplitTensors((IMAGES, LABELS), (IMAGES, LABELS), 2, val_fraction=0.01),
        r"SplitTensors\(val_fraction=0.01\): none of the 40 training samples of task 0 is set aside",
    )
