"""Fingerprints of tasks: a run that goes on can tell whether its data are the same."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_sparse_cl.data.items import Items
from lightning_sparse_cl.data.loader import SampleTensors
from lightning_sparse_cl.nests import tensors
from lightning_sparse_cl.thread_pool import thread_pool

DIGITS = 16


def fingerprints(train: Sequence[SampleTensors | Items], test: Sequence[SampleTensors | Items]) -> list[str]:
    """A short hexadecimal digest of each task: its training and test samples as they are stored, and their labels.

    It is the same on every process, machine and device. Nothing is decoded of data that are read item by item: the
    digest covers their number and labels, the arrays that the data set holds (``data``, ``tensors``), and names, sizes
    and times of modification of the files that it lists (``samples``, ``imgs``, ``paths``), also through ``Subset``,
    ``ConcatDataset`` and data sets that hold another one as ``data`` or ``dataset``.

    All of CIFAR-10 in memory (60,000 images, 184 MB) takes 0.11 s on one core, the median of five; 60,000 listed files
    take 0.32 s.
    """
    with thread_pool(2) as pool:  # hashing does not hold the interpreter lock
        return list(pool.map(lambda pair: _digest(part for data in pair for part in _parts(data)), zip(train, test)))


def combined(fingerprints: Sequence[str]) -> str:
    """One fingerprint of several tasks that are trained at once."""
    return _digest(f.encode() for f in fingerprints)


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    total = sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:DIGITS]


def _parts(data: SampleTensors | Items) -> Iterator[bytes | memoryview]:
    if isinstance(data, SampleTensors):
        for tensor in tensors(data.inputs):
            yield from _values(tensor)
        yield from _values(data.labels)
    else:
        yield from _values(data.targets)
        yield from _behind(data.data, torch.arange(len(data)))


def _values(values: Tensor, at: Tensor | None = None) -> Iterator[bytes | memoryview]:
    """Type, shape and bytes of a tensor, or of its rows ``at``, in pieces of a few megabytes."""
    count = len(values) if at is None else len(at)
    yield f"{values.dtype} {(count, *values.shape[1:])} ".encode()
    step = max(1, 2**22 // max(1, values[0].numel())) if count else 1
    for i in range(0, count, step):
        rows = values[i : i + step] if at is None else values[at[i : i + step].to(values.device)]
        yield rows.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _behind(data: Any, at: Tensor) -> Iterator[bytes | memoryview]:
    """What a data set holds or lists about the items ``at``, without reading them."""
    if isinstance(data, Subset):
        yield from _behind(data.dataset, torch.as_tensor(data.indices, dtype=torch.long)[at])
    elif isinstance(data, ConcatDataset):
        first = 0
        for part, end in zip(data.datasets, data.cumulative_sizes, strict=True):
            yield from _behind(part, at[(at >= first) & (at < end)] - first)
            first = end
    elif isinstance(data, SampleTensors):
        for tensor in tensors(data.inputs):
            yield from _values(tensor, at)
    else:
        inner = next((d for d in (getattr(data, "data", None), getattr(data, "dataset", None)) if _is_set(d)), None)
        if inner is not None and len(inner) == len(data):  # a data set that makes each item from an item of another
            yield from _behind(inner, at)
            return
        yield f"{len(at)} items ".encode()
        for held in (getattr(data, "data", None), *(getattr(data, "tensors", None) or ())):
            held = torch.from_numpy(held) if isinstance(held, np.ndarray) and held.dtype.kind in "biuf" else held
            if isinstance(held, Tensor) and held.ndim and len(held) == len(data):
                yield from _values(held, at)
        for name in ("samples", "imgs", "paths"):
            if files := _paths(getattr(data, name, None), len(data)):
                yield from (_file(files[i]) for i in at.tolist())
                break


def _is_set(data: Any) -> bool:
    return isinstance(data, Dataset) and hasattr(data, "__len__")


def _paths(listed: Any, count: int) -> list[str]:
    """Paths of ``count`` files, which are listed alone or with their labels; empty if ``listed`` is anything else."""
    if not isinstance(listed, list | tuple) or len(listed) != count:
        return []
    paths = [entry[0] if isinstance(entry, tuple | list) and entry else entry for entry in listed]
    return [os.fspath(path) for path in paths] if all(isinstance(p, str | os.PathLike) for p in paths) else []


def _file(path: str) -> bytes:
    """Folder, name, size and time of modification; without the path to the folder, which may differ elsewhere."""
    name = "/".join(path.replace(os.sep, "/").rsplit("/", 2)[-2:])
    try:
        found = os.stat(path)
    except OSError:  # inside an archive, or gone
        return f"{name} ".encode()
    return f"{name} {found.st_size} {found.st_mtime_ns} ".encode()
