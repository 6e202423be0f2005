"""A comparison as pictures; needs matplotlib, which the extra ``compare`` brings."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_sparse_cl.comparing.statistics import Spread

Matrix = Sequence[Sequence[float | None]]
MOST_NUMBERS = 12
"""Up to so many tasks, the cells of a matrix have their numbers."""
MOST_NAMES = 60
"""Letters of names under an axis, all together; where there are more, tasks are numbered."""


class Point(NamedTuple):
    """A method in a picture of two quantities."""

    name: str
    x: Spread
    y: Spread


def draw_curves(axes: Any, curves: Mapping[str, Sequence[Spread]], title: str, tasks: Sequence[str] = ()) -> None:
    """ACC over the tasks learnt so far: the median over seeds, and their range as a band.

    Args:
        axes: of matplotlib.
        curves: by method, after each task, in percent.
        title: above.
        tasks: their names; if there are none, or no room for them, they are numbered.
    """
    length = max(map(len, curves.values()), default=0)
    for i, (name, points) in enumerate(curves.items()):
        at = range(1, len(points) + 1)
        (line,) = axes.plot(at, [p.median for p in points], marker=MARKERS[i % len(MARKERS)], markersize=4, label=name)
        axes.fill_between(
            at, [p.least for p in points], [p.greatest for p in points], color=line.get_color(), alpha=0.2
        )
    axes.set_title(title)
    axes.set_xlabel("after learning task")
    axes.set_ylabel("ACC over the tasks so far, %")
    _name_ticks(axes.xaxis, length, tasks, first=1)


def draw_matrix(matrix: Matrix, axes: Any = None, title: str = "", tasks: Sequence[str] = ()) -> Any:
    """An accuracy matrix as a heat map, percent in its cells: row = after task, column = on task.

    Args:
        matrix: R as fractions; None or nan where nothing was measured.
        axes: of matplotlib. If None, those of a new figure.
        title: above.
        tasks: names of the columns; if there are none, or no room for them, they are numbered.

    Returns:
        The figure and the axes.
    """
    if axes is None:
        axes = pyplot().subplots(layout="constrained")[1]
    values = [[float("nan") if v is None else 100 * v for v in row] for row in matrix]
    axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    if len(values[0]) <= MOST_NUMBERS:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                text = "-" if value != value else f"{value:.0f}"
                axes.text(j, i, text, ha="center", va="center", color="white" if value > 60 else "black", fontsize=8)
    axes.set_title(title)
    axes.set_xlabel("on task")
    axes.set_ylabel("after learning task")
    _name_ticks(axes.xaxis, len(values[0]), tasks, first=0)
    _name_ticks(axes.yaxis, len(values), (), first=0)
    return axes.figure, axes


def draw_points(axes: Any, points: Sequence[Point], x: str, y: str, less_is_better: bool) -> None:
    """Methods by two quantities: medians with ranges; where less of x is better, the Pareto front as a line."""
    for i, point in enumerate(points):
        (px, ex), (py, ey) = _with_range(point.x), _with_range(point.y)
        axes.errorbar(px, py, xerr=ex, yerr=ey, fmt=MARKERS[i % len(MARKERS)], capsize=2, label=point.name)
    if less_is_better:
        front = pareto(points)
        axes.plot([p.x.median for p in front], [p.y.median for p in front], color="grey", linestyle=":", zorder=0)
        values = [p.x.median for p in points if p.x.median > 0]
        if values and max(values) > 10 * min(values):
            axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def draw_over(axes: Any, lines: Mapping[str, Sequence[Point]], x: str, y: str) -> None:
    """A line for each method: medians of y over x, with ranges."""
    for i, (name, points) in enumerate(lines.items()):
        ordered = sorted(points, key=lambda p: p.x.median)
        heights = [_with_range(p.y) for p in ordered]
        errors = [[low for _, ((low,), _) in heights], [high for _, (_, (high,)) in heights]]
        marker = MARKERS[i % len(MARKERS)]
        axes.errorbar(
            [p.x.median for p in ordered], [m for m, _ in heights], errors, marker=marker, capsize=2, label=name
        )
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def pareto(points: Sequence[Point]) -> list[Point]:
    """Points that no other one beats with as little x and as much y, by medians; in the order of x."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x.median, -p.y.median)):
        if not front or point.y.median > front[-1].y.median:
            front.append(point)
    return front


MARKERS = "osD^vP*X<>hp"


def pyplot() -> Any:
    """matplotlib's pyplot.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need matplotlib: pip install 'lightning_sparse_cl[compare]'", name="matplotlib"
        ) from error
    return pyplot


def figure(rows: int, columns: int, width: float = 5.0, height: float = 4.0) -> tuple[Any, list[Any]]:
    """A figure that no window shows, but a notebook, and its axes, row by row. Its size is per panel, in inches."""
    pyplot()  # says what is missing
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Picture(Figure):
        def _repr_png_(self) -> bytes:  # matplotlib's own for notebooks are those of pyplot alone
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=72)
            return file.getvalue()

    made = Picture((columns * width, rows * height), layout="constrained")
    FigureCanvasAgg(made)
    return made, list(made.subplots(rows, columns, squeeze=False).flat)


def legend(made: Any, axes: Any) -> None:
    """The names of what is drawn on ``axes``, below all panels, where they hide nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = max(1, min(len(labels), 4, 100 // max(map(len, labels))))
        made.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _with_range(spread: Spread) -> tuple[float, tuple[list[float], list[float]]]:
    return spread.median, ([spread.median - spread.least], [spread.greatest - spread.median])


def _name_ticks(axis: Any, length: int, names: Sequence[str], first: int) -> None:
    """Whole numbers from 1 on or, if there is room for them, names."""
    if len(names) == length and sum(map(len, names)) <= MOST_NAMES:
        axis.set_ticks(range(first, first + length), [f"{i + 1}\n{name}" for i, name in enumerate(names)], fontsize=8)
    else:
        step = -(-length // 10) or 1
        axis.set_ticks(range(first, first + length, step), [str(i + 1) for i in range(0, length, step)])
