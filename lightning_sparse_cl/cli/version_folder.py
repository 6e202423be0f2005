"""Two runs that start at the same moment have two folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

NUMBERED = {CSVLogger.__name__, TensorBoardLogger.__name__}
"""Loggers that look for the next free ``version_N``, and use it later."""


def claim(logger: Any) -> Path | None:
    """Make the next ``version_N`` of a logger's configuration, and put N into it; None if it has one or needs none."""
    options = getattr(logger, "init_args", None)
    if options is None or logger.class_path.rpartition(".")[2] not in NUMBERED or options.get("version") is not None:
        return None
    if getattr(rank_zero_only, "rank", 0):  # it is told by the first process
        return None
    root = Path(options.save_dir, options.get("name") or "")
    numbers = [int(n) for p in root.glob("version_*") if (n := p.name.removeprefix("version_")).isdigit()]
    version = max(numbers, default=-1) + 1
    while True:
        folder = root / f"version_{version}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            version += 1
            continue
        options["version"] = version
        return folder
