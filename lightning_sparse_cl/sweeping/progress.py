"""How far a sweep is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_sparse_cl.sweeping.trials import told


class SweepProgress:
    """A bar over all trials, and a line for each that ends; a context manager.

    Args:
        console: where to print. If None, the standard output as it is now, whatever replaces it while trials run.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._bar = Progress(
            TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False), console=console or Console(file=sys.stdout),
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._line = self._bar.add_task("", total=None)
        self._running: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        """Why trials failed, by name."""

    def __enter__(self) -> SweepProgress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.update(self._line, description="")
        self._bar.stop()

    def __reduce__(self) -> tuple[type[SweepProgress], tuple[()]]:
        return SweepProgress, ()  # Ray keeps a copy of what it is given, and a bar is of its process

    def begin(self, trials: int, over: int) -> None:
        """So many trials there are, and so many were over before."""
        self._bar.start()
        self._bar.update(self._line, total=trials, completed=over)
        if over:
            self._bar.console.print(f"{over} of {trials} trials were over before")

    def update(self, name: str, figures: Mapping[str, float]) -> None:
        """A task has been learnt in a trial."""
        self._running[name] = f"{name}: {told(figures)}"
        self._bar.update(self._line, description="; ".join(list(self._running.values())[:2]))

    def finished(self, name: str, figures: Mapping[str, float], how: str = "") -> None:
        """A trial is over."""
        self._end(name, f"{name}: {told(figures)}{how}")

    def failed(self, name: str, why: str) -> None:
        """A trial could not be run."""
        self.failures[name] = why
        self._end(name, f"{name}: failed: {why}")

    def said(self, line: str) -> None:
        """Something that is worth a line."""
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _end(self, name: str, line: str) -> None:
        self._running.pop(name, None)
        self.said(line)
        self._bar.advance(self._line)
