"""Two runs that start at the same moment have two folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

NUMBERED = {CSVLogger.__name__, TensorBoardLogger.__name__}
"""Loggers that look for the next free ``version_N``, and use it later."""


@contextmanager
def claimed(logger: Any) -> Iterator[list[Path]]:
    """Inside, the configurations of loggers name folders, ``version_N``, that have just been made for this run.

    Args:
        logger: what the Trainer's ``logger`` is configured with: one, a list, or no logger.
    """
    loggers = [each for each in (logger if isinstance(logger, list) else [logger]) if _needs_number(each)]
    if getattr(rank_zero_only, "rank", 0):  # it is told by the first process
        loggers = []
    folders = [_make_next(Path(each.init_args.save_dir, each.init_args.get("name") or "")) for each in loggers]
    for each, folder in zip(loggers, folders, strict=True):
        each.init_args["version"] = int(folder.name.removeprefix("version_"))
    try:
        yield folders
    finally:
        for each in loggers:
            each.init_args["version"] = None  # a later run of this configuration has a folder of its own


def _needs_number(logger: Any) -> bool:
    options = getattr(logger, "init_args", None)
    if options is None or logger.class_path.rpartition(".")[2] not in NUMBERED:
        return False
    return options.get("version") is None and "~" not in str(options.save_dir)


def _make_next(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    numbers = [int(n) for p in root.glob("version_*") if (n := p.name.removeprefix("version_")).isdigit()]
    version = max(numbers, default=-1) + 1
    while True:
        folder = root / f"version_{version}"
        try:
            folder.mkdir()
        except FileExistsError:
            version += 1
            continue
        return folder
