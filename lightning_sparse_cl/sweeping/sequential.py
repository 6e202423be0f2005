"""Trials one after the other, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_sparse_cl.sweeping.progress import SweepProgress
from lightning_sparse_cl.sweeping.space import Space, Trial
from lightning_sparse_cl.sweeping.trials import Fit, is_over, record_of, run_trial


def run_sequentially(space: Space, points: Sequence[Trial], fit: Fit, progress: SweepProgress) -> None:
    """Run what is not over yet; a trial that fails is told, and the others go on.

    Args:
        space: what is tried.
        points: of the space, from which trials are drawn.
        fit: how a trial is run.
        progress: is told of what happens.
    """
    root, trials = Path(space.folder), space.drawn(points)
    left = [trial for trial in trials if not is_over(root, trial)]
    progress.begin(len(trials), len(trials) - len(left))
    for trial in left:
        try:
            figures = run_trial(trial, root, fit, lambda f, name=trial.name: progress.update(name, f))  # type: ignore[misc]  # bound now
        except Exception:
            progress.failed(trial.name, record_of(root / trial.name)["error"])
        else:
            progress.finished(trial.name, figures)
