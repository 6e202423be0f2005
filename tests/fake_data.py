"""Small data sets of random pixels, written in the on-disk formats of the real ones.

Every function returns what it wrote, by part: ``{"train": (images (N, C, H, W) uint8, labels (N,)), "test": ...}``.
"""

from __future__ import annotations

import csv
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

Written = dict[str, tuple[Tensor, Tensor]]


def _random(classes: int, per_class: int, shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(classes), per_class))
    return rng.integers(0, 256, (len(labels), *shape), dtype=np.uint8), labels


def _tensors(images: np.ndarray | list[np.ndarray], labels: np.ndarray | list[int]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.stack(list(images))), torch.tensor(labels, dtype=torch.long)


def write_mnist(root: Path, per_class: int = 40, name: str = "MNIST") -> Written:
    """``root/MNIST/raw/*-ubyte``; the name may be FashionMNIST."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    written = {}
    for seed, (part, prefix) in enumerate({"train": "train", "test": "t10k"}.items()):
        images, labels = _random(10, per_class if part == "train" else 4, (1, 28, 28), seed)
        header = np.array([0x803, len(labels), 28, 28], ">i4").tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = np.array([0x801, len(labels)], ">i4").tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.astype(np.uint8).tobytes())
        written[part] = _tensors(images, labels)
    return written


def _pickle(path: Path, content: dict[str, Any]) -> list[str]:
    """Write it; the name and the checksum as torchvision lists them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return [path.name, hashlib.md5(path.read_bytes()).hexdigest()]


def write_cifar10(root: Path, monkeypatch: Any, per_class: int = 40) -> Written:
    """``root/cifar-10-batches-py``; ``monkeypatch`` (pytest's) makes torchvision accept the checksums."""
    folder = root / "cifar-10-batches-py"
    images, labels = _random(10, per_class, (3, 32, 32), seed=0)
    batches = [
        _pickle(folder / f"data_batch_{i + 1}", {"data": x.reshape(len(x), -1), "labels": y.tolist()})
        for i, (x, y) in enumerate(zip(np.array_split(images, 5), np.array_split(labels, 5), strict=True))
    ]
    test_images, test_labels = _random(10, 4, (3, 32, 32), seed=1)
    test = {"data": test_images.reshape(len(test_images), -1), "labels": test_labels.tolist()}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", batches)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [_pickle(folder / "test_batch", test)])
    name, md5 = _pickle(folder / "batches.meta", {"label_names": [str(c) for c in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return {"train": _tensors(images, labels), "test": _tensors(test_images, test_labels)}


def superclass_of(fine: int) -> int:
    """The superclass that :func:`write_cifar100` gives a class: 5 classes each, not in a row."""
    return 7 * fine % 20


def write_cifar100(root: Path, monkeypatch: Any, per_class: int = 8) -> Written:
    """``root/cifar-100-python`` with fine and coarse labels; ``monkeypatch`` as for :func:`write_cifar10`."""
    folder = root / "cifar-100-python"
    written = {}
    for seed, part in enumerate(("train", "test")):
        images, labels = _random(100, per_class if part == "train" else 2, (3, 32, 32), seed)
        content = {
            "data": images.reshape(len(images), -1),
            "fine_labels": labels.tolist(),
            "coarse_labels": [superclass_of(int(c)) for c in labels],
        }
        monkeypatch.setattr(datasets.CIFAR100, f"{part}_list", [_pickle(folder / part, content)])
        written[part] = _tensors(images, labels)
    name, md5 = _pickle(folder / "meta", {"fine_label_names": [str(c) for c in range(100)]})
    monkeypatch.setattr(datasets.CIFAR100, "meta", {"filename": name, "key": "fine_label_names", "md5": md5})
    return written


def _save(path: Path, rng: np.random.Generator, size: tuple[int, int], grey: bool = False) -> np.ndarray:
    """Save a random image; the pixels (3, H, W) that are read back, since JPEG is lossy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if grey else (*size, 3)
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return np.array(Image.open(path).convert("RGB")).transpose(2, 0, 1)


def write_tiny_imagenet(root: Path, per_class: int = 2, classes: int = 200) -> Written:
    """``root/tiny-imagenet-200`` as unpacked from the archive; every seventh image is grey."""
    folder, rng = root / "tiny-imagenet-200", np.random.default_rng(0)
    wnids = [f"n{c:08d}" for c in rng.permutation(classes)]  # the real list is not sorted either
    train: tuple[list[np.ndarray], list[int]] = ([], [])
    for label, wnid in enumerate(wnids):
        for i in range(per_class):
            path = folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            train[0].append(_save(path, rng, (64, 64), grey=len(train[1]) % 7 == 0))
            train[1].append(label)
    test_labels = rng.permutation(classes)
    test_images = [_save(folder / "val" / "images" / f"val_{i}.JPEG", rng, (64, 64)) for i in range(classes)]
    lines = [f"val_{i}.JPEG\t{wnids[c]}\t0\t32\t44\t62\n" for i, c in enumerate(test_labels)]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("".join(f"{w}\n" for w in wnids))
    (folder / "words.txt").write_text("".join(f"{w}\tthing {w}\n" for w in sorted(wnids)))
    return {"train": _tensors(*train), "test": _tensors(test_images, test_labels)}


def write_mini_imagenet(root: Path, per_class: int = 6, size: int = 84) -> Written:
    """``root/mini-imagenet/images/*.jpg`` with the usual splits of 64, 16 and 20 classes."""
    folder, rng = root / "mini-imagenet", np.random.default_rng(0)
    parts: dict[str, tuple[list[np.ndarray], list[int]]] = {"train": ([], []), "test": ([], [])}
    first = 0
    for split, classes in {"train": 64, "val": 16, "test": 20}.items():
        rows = []
        for label in range(first, first + classes):
            for i in range(per_class):
                name = f"n{99 - label:04d}{i:04d}.jpg"
                part = parts["train" if i < per_class * 5 // 6 else "test"]
                part[0].append(_save(folder / "images" / name, rng, (size, size)))
                part[1].append(label)
                rows.append((name, f"n{99 - label:04d}"))
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("filename", "label"), *rows])
        first += classes
    return {part: _tensors(*content) for part, content in parts.items()}


def write_image_folder(root: Path, classes: int = 4, per_class: int = 40, size: tuple[int, int] = (10, 12)) -> Written:
    """``root/{train,test}/class_<c>/`` with PNG images, half of them one folder deeper."""
    rng = np.random.default_rng(0)
    written = {}
    for part, n in {"train": per_class, "test": 4}.items():
        images, labels = [], []
        for c in range(classes):
            for i in range(n):
                inner = "" if 2 * i < n else "more"  # a folder sorts after the files
                images.append(_save(root / part / f"class_{c}" / inner / f"{i:04d}.png", rng, size))
                labels.append(c)
        written[part] = _tensors(images, labels)
    return written
