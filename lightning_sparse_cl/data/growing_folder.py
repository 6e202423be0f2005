"""A folder that fills while it is learnt: one folder of images per task."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_sparse_cl.data.image_files import ImageFolderSource
from lightning_sparse_cl.data.loader import SampleTensors
from lightning_sparse_cl.data.open_tasks import OpenTasks

MARKER = "complete"
"""A file of this name says that a task's folder is complete."""
POLL = 0.5
"""Seconds between two looks at the folder."""


class GrowingImageFolder(OpenTasks):
    """Tasks in folders ``root/task_001``, ``root/task_002``, ..., each as :class:`ImageFolderSource` reads it.

    A task is learnt once its folder is complete: as soon as it holds a file named ``complete``, or when nothing in it
    has changed for ``settled`` seconds. Tasks are learnt in the order of their names; one that is not complete holds
    back those after it. Folders of tasks that were learnt may be removed.

    ``sparsecl fit`` and :func:`learn` end when no further task is complete within ``wait`` seconds; a later run goes on
    with what has come since (``--continue_from``).

    Args:
        root: the folder.
        size: side in pixels that images are resized to. If None, they keep their sizes, which must all be equal.
        crop: zero padding in pixels before a random crop in training; 0 is none.
        flip: mirror half of the training images.
        settled: seconds without a change after which a folder is complete. If None, only the file ``complete`` counts.
        wait: seconds to wait for a further task.
        kwargs: see :class:`TaskDataModule`.

    Raises:
        ValueError: if a number is negative.
        FileNotFoundError: if there is no such folder, or no complete task in it.
    """

    def __init__(
        self, root: str, size: int | None = None, crop: int = 0, flip: bool = False, settled: float | None = 10.0,
        wait: float = 0.0, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        for name, value in (("settled", settled), ("wait", wait)):
            if value is not None and not value >= 0:
                raise ValueError(f"{type(self).__name__}({name}={value}): seconds, at least 0")
        self.root, self.size, self.crop, self.flip = root, size, crop, flip
        self.settled, self.wait = settled, wait
        self._read: dict[Path, tuple[list[str], SampleTensors, SampleTensors]] = {}

    def complete(self) -> list[Path]:
        """The folders of the tasks that are complete, in order."""
        if not Path(self.root).is_dir():
            raise FileNotFoundError(f"{type(self).__name__}(root={self.root!r}): there is no such folder")
        found = []
        for folder in sorted(path for path in Path(self.root).glob("task_*") if path.is_dir()):
            if not self._is_complete(folder):
                break
            found.append(folder)
        return found

    def _is_complete(self, folder: Path) -> bool:
        if (folder / MARKER).exists():
            return True
        if self.settled is None:
            return False
        changes = [path.stat().st_mtime for path in (folder, *folder.rglob("*")) if path.exists()]
        return any(path.is_file() for path in folder.rglob("*")) and time.time() - max(changes) >= self.settled

    def more(self) -> bool:
        end = time.monotonic() + self.wait
        while not (new := self.left_for_later > 0 or not set(self.complete()) <= set(self._read)):
            if time.monotonic() >= end:
                return False
            time.sleep(POLL)
        self.unload()
        return new

    def load(self) -> tuple[Sequence[Dataset], Sequence[Dataset]]:
        end = time.monotonic() + self.wait
        while not (folders := self.complete()) and time.monotonic() < end:
            time.sleep(POLL)
        if not folders:
            raise FileNotFoundError(
                f"{type(self).__name__}(root={self.root!r}): there is no complete folder task_...; place a file named "
                f"{MARKER!r} in one that is complete"
            )
        self._read = {folder: self._read.get(folder) or self._task(folder) for folder in folders}
        self.class_names = list(dict.fromkeys(name for names, _, _ in self._read.values() for name in names))
        parts: tuple[list[Dataset], list[Dataset]] = ([], [])
        for names, *sets in self._read.values():
            label = torch.tensor([self.class_names.index(name) for name in names])
            for part, data in zip(parts, sets, strict=True):
                part.append(SampleTensors(data.inputs, label[data.labels]))
        if self.transform is None:
            self.transform = self._normalised(parts[0][0], self.crop, self.flip)
        return parts

    def _task(self, folder: Path) -> tuple[list[str], SampleTensors, SampleTensors]:
        source = ImageFolderSource(str(folder), self.size, self.crop, self.flip)
        if only := source.tested_only():
            raise ValueError(f"{source}: there are test images of the class {only[0]!r}, but none for training")
        train, test = (SampleTensors(*source.read(part)) for part in (True, False))
        return source.names(), train, test
