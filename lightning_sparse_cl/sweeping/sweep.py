"""A sweep from its beginning to its end."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lightning_sparse_cl.callbacks.claims import Claim
from lightning_sparse_cl.sweeping.on_ray import run_on_ray
from lightning_sparse_cl.sweeping.progress import SweepProgress
from lightning_sparse_cl.sweeping.sequential import run_sequentially
from lightning_sparse_cl.sweeping.space import Space
from lightning_sparse_cl.sweeping.trials import Fit


def run_sweep(
    space: Space, files: Sequence[str], rest: Sequence[str], fit: Fit, console: Console | None = None
) -> dict[str, str]:
    """Run the trials of a space that are not over yet, on Ray or one after the other.

    Args:
        space: what is tried.
        files: configurations, over which the space lays its own.
        rest: further arguments of ``sparsecl fit`` for all trials.
        fit: how a trial is run.
        console: where to print. If None, the standard output.

    Returns:
        Why trials failed, by their names.

    Raises:
        ValueError: if another sweep runs in the folder, it is one of other arguments, or names repeat.
        ModuleNotFoundError: if Ray is asked for and is not installed.
    """
    has_ray = importlib.util.find_spec("ray") is not None
    console = console or Console()
    if space.engine == "ray" or space.method == "optuna" or (space.engine == "auto" and has_ray):
        if not has_ray:
            raise ModuleNotFoundError("sweeps on Ray need it: pip install 'lightning_sparse_cl[sweep]'", name="ray")
        run = run_on_ray
    else:
        run = run_sequentially
        if space.engine == "auto":
            console.print("Ray is not installed: trials run one after the other (extra 'sweep')")
        if space.stop_early is not None:
            console.print("sweep.stop_early: trials that run one after the other are not stopped early")
    points = space.points(files, rest)
    names = [point.name for point in points]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"sweep: two trials would be called {min(repeated)}; name their configurations differently")
    root = Path(space.folder)
    root.mkdir(parents=True, exist_ok=True)
    mine = Claim(root / "sweep")
    if not mine.take():
        raise ValueError(f"sweep.folder={root}: another sweep is running there")
    try:
        with SweepProgress(console) as progress:
            run(space, points, fit, progress)
    finally:
        mine.release()
    return progress.failures
