"""Every split on a small data set in its real format, and what it says when something is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.datasets import MNIST

from lightning_sparse_cl import data as scl
from tests import fake_data

WRITERS: dict[str, Callable[[Path, Any], fake_data.Written]] = {
    "SplitMNIST": lambda root, _: fake_data.write_mnist(root),
    "SplitFashionMNIST": lambda root, _: fake_data.write_mnist(root, name="FashionMNIST"),
    "SplitCIFAR10": fake_data.write_cifar10,
    "SplitCIFAR100": fake_data.write_cifar100,
    "SplitTinyImageNet": lambda root, _: fake_data.write_tiny_imagenet(root),
    "SplitMiniImageNet": lambda root, _: fake_data.write_mini_imagenet(root),
    "SplitImageFolder": lambda root, _: fake_data.write_image_folder(root),
}


def ready(data: scl.TaskDataModule) -> Any:
    data.prepare_data()
    data.setup()
    return data


def samples(images: Tensor, labels: Tensor) -> Counter:
    return Counter((x.numpy().tobytes(), int(y)) for x, y in zip(images, labels, strict=True))


@pytest.mark.parametrize("name", WRITERS)
def test_every_sample_is_in_the_task_of_its_class(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    written = WRITERS[name](tmp_path, monkeypatch)
    sizes = {"num_tasks": 2} if name == "SplitImageFolder" else {}
    split = ready(getattr(scl, name)(root=str(tmp_path), class_order=1, **sizes))
    classes = split.num_classes // split.num_tasks
    assert sorted(split.class_order) == list(range(split.num_classes)) != split.class_order
    for part, sets in {"train": split.train_sets, "test": split.test_sets}.items():
        total: Counter = Counter()
        for t, task in enumerate(sets):
            assert task.labels.unique().tolist() == list(range(t * classes, (t + 1) * classes))
            total += samples(task.inputs, torch.tensor(split.class_order)[task.labels])
        same = total == samples(*written[part])  # apart, or a failure compares them at length
        assert same
    assert split.input_shape == written["train"][0].shape[1:]


def test_digits_are_those_of_scikit_learn_and_split_by_class() -> None:
    real = load_digits()
    images = torch.from_numpy(real.images * 255 / 16).round().to(torch.uint8).unsqueeze(1)
    train, test = scl.DigitsSource().read(train=True), scl.DigitsSource().read(train=False)
    same = samples(*train) + samples(*test) == samples(images, torch.from_numpy(real.target))
    assert same
    for c in range(10):
        assert int((test[1] == c).sum()) == int((real.target == c).sum()) // 5
    pixels = train[0].double() / 255
    assert (round(pixels.mean().item(), 4), round(pixels.std().item(), 4)) == (
        *scl.DigitsSource.mean,
        *scl.DigitsSource.std,
    )


def test_class_order() -> None:
    assert scl.SplitDigits().class_order == list(range(10))
    assert scl.SplitDigits(class_order=3).class_order == scl.SplitDigits(class_order=3).class_order
    assert scl.SplitDigits(class_order=3).class_order != scl.SplitDigits(class_order=4).class_order
    backwards = ready(scl.SplitDigits(class_order=list(range(9, -1, -1))))
    images, labels = scl.DigitsSource().read(train=True)
    assert torch.equal(backwards.train_sets[1].inputs, images[(labels == 7) | (labels == 6)])
    assert backwards.train_sets[1].labels.unique().tolist() == [2, 3]


def test_superclasses_are_tasks(tmp_path: Path, monkeypatch: Any) -> None:
    written = fake_data.write_cifar100(tmp_path, monkeypatch)
    split = ready(scl.SplitCIFAR100(root=str(tmp_path), superclasses=True))
    assert split.num_tasks == 20
    for t, task in enumerate(split.test_sets):
        assert task.labels.unique().tolist() == list(range(5 * t, 5 * t + 5))
        assert {fake_data.superclass_of(split.class_order[c]) for c in task.labels} == {t}
    coarse = scl.CIFAR100Source(str(tmp_path), coarse=True)
    assert coarse.num_classes == 20
    assert coarse.read(train=True)[1].tolist() == [fake_data.superclass_of(int(c)) for c in written["train"][1]]


def test_tiny_imagenet_downloads_once_and_works_in_part(tmp_path: Path, monkeypatch: Any) -> None:
    fetched = []

    def download(url: str, root: str, md5: str) -> None:
        fetched.append(url)
        fake_data.write_tiny_imagenet(Path(root), classes=10)

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", download)
    source = scl.TinyImageNetSource(str(tmp_path), download=True)
    assert source.num_classes == 200
    for _ in range(2):
        source.fetch()
        source.read(train=True)
    assert fetched == [source.url] and source.num_classes == 10
    wnids = (source.folder / "wnids.txt").read_text().split()
    (source.folder / "wnids.txt").write_text("\n".join(wnids[:4]))
    for path in (source.folder / "train" / wnids[1]).rglob("*.JPEG"):
        path.unlink()
    assert source.read(train=True)[1].unique().tolist() == [0, 2, 3]
    assert source.read(train=False)[1].unique().tolist() == [0, 1, 2, 3]


def test_permuted_tasks_show_the_same_pixels_elsewhere() -> None:
    first, second = ready(scl.PermutedDigits(num_tasks=3, seed=5)), ready(scl.PermutedDigits(num_tasks=4, seed=5))
    for train, sets in {True: first.train_sets, False: first.test_sets}.items():
        images, labels = scl.DigitsSource().read(train)
        assert torch.equal(sets[0].inputs, images)
        for t, task in enumerate(sets):
            order = first.permutation(t, 64)  # one for both parts
            assert torch.equal(task.inputs.flatten(2), images.flatten(2)[:, :, order])
            assert order.sort().values.tolist() == list(range(64)) and torch.equal(task.labels, labels)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first.train_sets, second.train_sets, strict=False))
    orders = [first.permutation(t, 64) for t in (1, 2)] + [scl.PermutedDigits(seed=6).permutation(1, 64)]
    assert len({tuple(order.tolist()) for order in orders}) == 3


def test_rotated_tasks_turn_evenly() -> None:
    images, labels = scl.DigitsSource().read(train=True)
    tasks = ready(scl.RotatedDigits(num_tasks=5, max_angle=180)).train_sets
    for t, quarters in {0: 0, 2: 1, 4: 2}.items():
        assert torch.equal(tasks[t].inputs, images.rot90(quarters, (2, 3)))
        assert torch.equal(tasks[t].labels, labels)
    between = tasks[1].inputs
    assert between.dtype == torch.uint8 and not torch.equal(between, images)
    assert scl.RotatedDigits(num_tasks=1).angles == [0]


def test_own_tensors_are_standardised_by_the_first_task() -> None:
    images = torch.randint(0, 256, (200, 2, 6, 6), dtype=torch.uint8)
    images[100:] //= 4  # the second task is darker
    labels = torch.arange(4).repeat_interleave(50)
    split = ready(scl.SplitTensors((images, labels), (images, labels), num_tasks=2, crop=1, flip=True))
    out = split.prepare(split.train_sets[0].inputs, augment=False)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(2), atol=1e-3, rtol=0)
    assert (split.transform.crop, split.transform.flip) == (1, True)
    assert split.prepare(split.train_sets[1].inputs, augment=False).mean() < -0.5


class Items(Dataset):
    """Forty items (image, label)."""

    def __init__(self, image: Any, label: int, n: int = 40) -> None:
        self.image, self.label, self.n = image, label, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.image, self.label


GREY = torch.randint(0, 256, (1, 6, 7), dtype=torch.uint8)
COLOUR = torch.randint(0, 256, (3, 6, 7), dtype=torch.uint8)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    "image, stored",
    [
        (Image.fromarray(GREY[0].numpy()), GREY),
        (Image.fromarray(COLOUR.permute(1, 2, 0).numpy()), COLOUR),
        (COLOUR, COLOUR),
        (COLOUR / 255, COLOUR / 255),
    ],
    ids=["grey PIL", "colour PIL", "uint8", "float"],
)
def test_task_datasets_take_images_and_tensors(image: Any, stored: Tensor, in_memory: bool) -> None:
    tasks = [Items(image, label) for label in (0, 1)]
    split = ready(scl.TaskDatasets(tasks, tasks, in_memory=in_memory))
    assert (split.num_classes, split.classes, split.input_shape) == (2, [[0], [1]], tuple(stored.shape))
    for label, loader in enumerate(split.test_dataloader()):
        ((x, y),) = loader
        assert torch.equal(x, stored.expand(40, -1, -1, -1)) and x.dtype == stored.dtype
        assert y.tolist() == [label] * 40
    assert isinstance(split.train_sets[0], scl.SampleTensors) == in_memory


def test_streamed_labels_are_not_decoded_where_they_are_listed(tmp_path: Path) -> None:
    written = fake_data.write_mnist(tmp_path)
    train = MNIST(str(tmp_path))
    tasks = [Subset(train, (train.targets == c).nonzero().flatten().tolist()) for c in (3, 5)]
    train.transform = lambda image: pytest.fail("an image was decoded")
    split = scl.TaskDatasets(tasks, tasks, in_memory=False)
    assert [data.targets.unique().tolist() for data in split.load()[0]] == [[3], [5]]
    train.transform = None
    train.target_transform = lambda label: label - 3  # now the list is not what the items say
    assert [data.targets.unique().tolist() for data in split.load()[0]] == [[0], [2]]
    assert torch.equal(split.load()[1][1][0][0], written["train"][0][written["train"][1] == 5][0])


def test_joint_training_is_the_union() -> None:
    apart, joint = ready(scl.SplitDigits()), ready(scl.SplitDigits(joint=True))
    assert (joint.num_tasks, len(joint.test_sets), joint.num_classes) == (1, 5, 10)
    assert len(joint.train_sets[0]) == sum(len(task) for task in apart.train_sets) == 1442


@pytest.mark.parametrize(
    "name", [n for n in scl.__all__ if n.startswith(("Split", "Permuted", "Rotated")) and n != "SplitTensors"]
)
def test_configurations_name_every_argument(name: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(scl, name), "data", fail_untyped=True)
    known = vars(parser.get_defaults().data)
    assert {"num_tasks", "batch_size", "val_fraction", "augment", "joint", "num_workers", "transform"} <= set(known)
    packaged = name in ("Permuted", "Rotated") or name.endswith(("Digits", "Vowels"))
    assert ("root" in known or "path" in known) == (not packaged)


def broken_folder(root: Path, change: Callable[[Path], Any], **kwargs: Any) -> scl.SplitImageFolder:
    fake_data.write_image_folder(root, classes=2)
    change(root)
    return scl.SplitImageFolder(str(root), num_tasks=2, **kwargs)


X, Y = torch.zeros(40, 1, 4, 4, dtype=torch.uint8), torch.zeros(40, dtype=torch.long)


class OneClass(scl.Source):
    """Two classes, and no image of the first."""

    num_classes = 2

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        return X, Y + 1


ERRORS: list[tuple[Callable[[Path], scl.TaskDataModule], str]] = [
    (lambda _: scl.SplitDigits(num_tasks=3), r"SplitDigits\(num_tasks=3\): 10 classes divide into 1, 2, 5 or 10 tasks"),
    (lambda _: scl.PermutedDigits(num_tasks=0), r"PermutedDigits\(num_tasks=0\): .* at least one task"),
    (lambda _: scl.SplitDigits(class_order=[0] * 10), r"class_order=\[0, .*each of the 10 classes 0-9 once"),
    (lambda _: scl.SplitCIFAR100(10, superclasses=True), r"num_tasks=10.*superclasses make 20 tasks"),
    (lambda p: scl.SplitMNIST(root=str(p)), r"MNISTSource\(root=.*missing or damaged.*download: true"),
    (lambda p: scl.SplitCIFAR10(root=str(p)), r"CIFAR10Source\(root=.*missing or damaged.*download: true"),
    (
        lambda p: scl.SplitTinyImageNet(root=str(p)),
        r"TinyImageNetSource\(root=.*wnids.txt.*missing; set download: true, or",
    ),
    (lambda p: scl.SplitMiniImageNet(root=str(p)), r"MiniImageNetSource\(root=.*train.csv.*place the images in"),
    (lambda p: scl.SplitImageFolder(str(p), 2), r"ImageFolderSource\(root=.*no folder '.*train/<class>'"),
    (
        lambda p: broken_folder(p, lambda p: (p / "test").rename(p / "x")),
        r"no folder '.*test/<class>' or '.*val/<class",
    ),
    (lambda p: broken_folder(p, lambda p: (p / "train/class_1/0000.png").write_text("?")), r"cannot read.*0000\.png"),
    (
        lambda p: broken_folder(p, lambda p: (p / "test/class_9").mkdir()),
        r"images of the class 'class_9', but none for training",
    ),
    (
        lambda p: broken_folder(p, lambda p: (p / "train/class_9").mkdir()),  # three classes now
        r"num_tasks=2\): 3 classes divide into 1 or 3",
    ),
    (
        lambda p: broken_folder(p, lambda p: (p / "train/class_1").rename(p / "x") and (p / "train/class_1").mkdir()),
        r"class_1' has no images",
    ),
    (
        lambda p: broken_folder(p, lambda p: Image.new("L", (5, 6)).save(p / "test/class_0/odd.png")),
        r"odd\.png' has 6x5 pixels instead of 10x12",
    ),
    (lambda _: scl.SplitTensors((X, Y[1:]), (X, Y), 1), r"train=.*\(40, 1, 4, 4\) and \(39,\)"),
    (lambda _: scl.SplitTensors((X, Y), (X.int(), Y), 1), r"test=.*uint8 or float, got int32"),
    (lambda _: scl.SplitTensors((X, Y - 1), (X, Y), 1), "integers from 0 on"),
    (lambda _: scl.SplitTensors((X.float(), Y), (X.float(), Y), 1, flip=True), "only uint8 images are augmented"),
    (
        lambda _: scl.SplitTensors((X, Y), (X[..., :2], Y), 1),
        r"test samples are .*2\), train samples .*4\)",
    ),
    (lambda _: scl.ClassSplit(OneClass(), 2), "task 0 has no training samples"),
    (lambda _: scl.SplitTensors((X, Y), (X, Y), 2), r"num_tasks=2\): 1 classes divide into 1 tasks"),
    (lambda _: scl.TaskDatasets([TensorDataset(X, Y)], []), "got 1 training, 0 test sets"),
    (lambda _: scl.TaskDatasets([Items(X[0], 0)], [Items(X[0], 7)]), "task 0 is tested on the label 7, which no train"),
    (
        lambda _: scl.TaskDatasets([Items(X[0], 0), Items(X[0, :, :2], 1)], [Items(X[0], 0), Items(X[0], 1)]),
        r"training samples of task 1 are uint8 \(1, 2, 4\), those of task 0 uint8 \(1, 4, 4\)",
    ),
    (lambda _: scl.TaskDatasets([Items(X[0], 0, n=0)], [Items(X[0], 0)]), r"train\[0\]\): the data set is empty"),
    (lambda _: scl.TaskDatasets([Items("x.png", 0)], [Items(X[0], 0)]), r"train\[0\]\): .*item 0 is or has str"),
    (lambda _: scl.TaskDatasets([Items(X[0].int(), 0)], [Items(X[0], 0)]), "images are uint8 or float, got int32"),
]


@pytest.mark.parametrize("make, message", ERRORS, ids=[message for _, message in ERRORS])
def test_errors_say_what_and_where(make: Callable[[Path], scl.TaskDataModule], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ready(make(tmp_path))


class Loaded(scl.TaskDataModule):
    """A subclass as a user writes it."""

    def __init__(self, parts: dict[str, list[Dataset]]) -> None:
        super().__init__()
        self.parts = parts

    def load(self) -> tuple[list[Dataset], list[Dataset]]:
        return self.parts["training"], self.parts["test"]


@pytest.mark.parametrize("part", ["training", "test"])
def test_an_empty_task_is_named(part: str) -> None:
    parts: dict[str, list[Dataset]] = {name: [Items(X[0], 0), Items(X[0], 1)] for name in ("training", "test")}
    assert ready(Loaded(parts)).classes == [[0], [1]]
    parts[part][1] = Items(X[0], 1, n=0)
    with pytest.raises(ValueError, match=f"^Loaded: task 1 has no {part} samples$"):
        ready(Loaded(parts))


def test_folders_are_resized_on_request(tmp_path: Path) -> None:
    fake_data.write_image_folder(tmp_path)
    Image.new("L", (5, 6)).save(tmp_path / "test" / "class_0" / "odd.png")
    split = ready(scl.SplitImageFolder(str(tmp_path), num_tasks=2, size=8))
    assert split.input_shape == (3, 8, 8) and len(split.test_sets[0]) == 9
