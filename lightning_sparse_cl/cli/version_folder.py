"""Folders of runs: named by method and data, and two for two runs that start at the same moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_sparse_cl.callbacks.run_description import method_name

DEFAULT_NAME = "lightning_logs"
"""Of Lightning's loggers, if none was chosen."""
NUMBERED = {CSVLogger.__name__, TensorBoardLogger.__name__}
"""Loggers that look for the next free ``version_N``, and use it later."""


def run_name(model: Any, data: Any) -> str:
    """``EsaCL-DERpp-SplitDigits``: the method, as :func:`method_name` gives it, and the class of the data.

    Args:
        model: the configuration of the method: ``class_path`` and ``init_args``.
        data: that of the data.
    """
    options = model.get("init_args") or {}
    method, objective = _class(model), options.get("objective")
    name = method_name(
        method, None if objective is None else _class(objective), map(_class, options.get("policies") or ())
    )
    return f"{name}-{_class(data)}"


def _class(part: Any) -> str:
    return part["class_path"].rpartition(".")[2]


@contextmanager
def claimed(logger: Any, name: str) -> Iterator[list[Path]]:
    """Inside, the configurations of loggers name folders, ``version_N``, that have just been made for this run.

    Args:
        logger: what the Trainer's ``logger`` is configured with: one, a list, or no logger.
        name: of the folder above, where none was chosen.
    """
    for each in logger if isinstance(logger, list) else [logger]:
        if _is_numbered(each) and each.init_args.get("name") == DEFAULT_NAME:
            each.init_args["name"] = name
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


def _is_numbered(logger: Any) -> bool:
    return getattr(logger, "init_args", None) is not None and logger.class_path.rpartition(".")[2] in NUMBERED


def _needs_number(logger: Any) -> bool:
    if not _is_numbered(logger):
        return False
    return logger.init_args.get("version") is None and "~" not in str(logger.init_args.save_dir)


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
