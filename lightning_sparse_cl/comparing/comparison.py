"""Many runs in one table, with tests and pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from lightning_sparse_cl.comparing import plots, tables
from lightning_sparse_cl.comparing.groups import Group, grouped
from lightning_sparse_cl.comparing.quantities import QUANTITIES, SHOWN, Quantity, quantity_named
from lightning_sparse_cl.comparing.runs import find_runs
from lightning_sparse_cl.comparing.statistics import (
    LEAST_PAIRS,
    TESTS,
    Interval,
    Spread,
    TestName,
    holm,
    p_value,
    paired,
)
from lightning_sparse_cl.comparing.tables import Cells, Show
from lightning_sparse_cl.comparing.tuning import tuned
from lightning_sparse_cl.whole_file import whole_file

SCENARIOS = {"class_il": "Class-IL", "task_il": "Task-IL"}
LEVEL = 0.05
TOO_FEW = "too few seeds"


class Difference(NamedTuple):
    """Of two methods in one quantity, on the seeds that both have."""

    one: str
    other: str
    quantity: Quantity
    seeds: int
    interval: Interval
    """Of one minus the other, in the unit of the quantity."""
    p: float
    corrected: float
    """By Holm, for all comparisons of the quantity."""
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, and the quantities that they are compared by; shows itself as a table in notebooks.

    Args:
        groups: a group for each configuration.
        quantities: the columns.
        reference: the name of the group that the others are tested against. If None, all pairs are tested.
        test: ``"t"``, the paired t-test, or ``"wilcoxon"``, the signed-rank test.
        left_out: runs that were found and are not in it, and why.
        notes: what else is to be known of it.
    """

    groups: Sequence[Group]
    quantities: Sequence[Quantity]
    reference: str | None = None
    test: TestName = "t"
    left_out: Sequence[str] = field(default=(), repr=False)
    notes: Sequence[str] = field(default=(), repr=False)

    def cells(self, show: Show = "mean") -> Cells:
        """A row for each group: its name, the quantities (``"mean"`` ± deviation, or ``"median"`` and range), seeds."""
        head = ["", *(q.title for q in self.quantities), "seeds"]
        rows = [
            [g.name, *(tables.cell(g.spread(q), q, show, len(g.runs)) for q in self.quantities), str(len(g.runs))]
            for g in self.groups
        ]
        return [head, *rows]

    def differences(self) -> list[Difference]:
        """Paired tests of the accuracies among the quantities, among groups of the same data.

        Raises:
            ModuleNotFoundError: without SciPy.
        """
        return [difference for quantity in self._tested() for difference in self._differences(quantity)]

    def _tested(self) -> list[Quantity]:
        found = [q for q in self.quantities if q.more_is_better]
        return found or [q for q in self.quantities if q.more_is_better is False]

    def _differences(self, quantity: Quantity) -> Iterator[Difference]:
        pairs = [pair for pair in self._pairs() if _common(*pair, quantity)]
        known = [_common(one, other, quantity) for one, other in pairs]
        columns = [([a for a, _ in values], [b for _, b in values]) for values in known]
        ps = [p_value(a, b, self.test) for a, b in columns]
        for (one, other), (a, b), p, corrected in zip(pairs, columns, ps, holm(ps)):
            interval = paired(a, b)
            told = self._verdict(one, other, quantity, len(a), len(pairs), interval, corrected)
            yield Difference(one.name, other.name, quantity, len(a), interval, p, corrected, told)

    def _pairs(self) -> Iterator[tuple[Group, Group]]:
        """Of groups that are tested against each other; the reference is the second one."""
        for one, other in combinations(self.groups, 2):
            if one.tested_on == other.tested_on and self.reference in (None, one.name, other.name):
                yield (other, one) if one.name == self.reference else (one, other)

    def _verdict(
        self, one: Group, other: Group, quantity: Quantity, seeds: int, comparisons: int, interval: Interval,
        corrected: float,
    ) -> str:  # fmt: skip
        if seeds < LEAST_PAIRS:
            return TOO_FEW
        if self.test == "wilcoxon" and comparisons * 2 ** (1 - seeds) > LEVEL:
            return TOO_FEW
        if not corrected <= LEVEL:
            return "not decidable"
        better = one if (interval.mean > 0) == (quantity.more_is_better is not False) else other
        return f"{better.name} is better"

    def difference_cells(self) -> dict[str, Cells]:
        """By title of the quantity, a row for each of :meth:`differences`."""
        name = {"t": "paired t", "wilcoxon": "Wilcoxon"}[self.test]
        found: dict[str, Cells] = {}
        for d in self.differences():
            head = ["", "difference (95 %)", "seeds", f"p, {name}", "p, Holm", ""]
            low, high = (d.quantity.written(v) for v in (d.interval.low, d.interval.high))
            interval = d.quantity.written(d.interval.mean, "+") + (f" ({low} to {high})" if low != "-" else "")
            ps = ["-" if p != p else "< .001" if p < 0.001 else f"{p:.3f}" for p in (d.p, d.corrected)]
            row = [f"{d.one} - {d.other}", interval, str(d.seeds), *ps, d.verdict]
            found.setdefault(d.quantity.title, [head]).append(row)
        return found

    # -- as text -----------------------------------------------------------------------------------------------

    def table(self, show: Show = "mean") -> Table:
        """For :func:`rich.print`."""
        return tables.on_screen(f"{TOLD[show]} over seeds", self.cells(show))

    def to_csv(self) -> str:
        """A row for each group and quantity, with everything that is known of it, as plain numbers."""
        rows: list[Sequence[object]] = [("method", "data", "quantity", *Spread._fields)]
        for group in self.groups:
            for quantity in self.quantities:
                if (spread := group.spread(quantity)) is not None:
                    rows.append((group.name, group.data, quantity.title, *spread))
        return tables.as_csv(rows)

    def to_markdown(self, show: Show = "mean") -> str:
        """A table of Markdown."""
        return tables.as_markdown(self.cells(show))

    def to_latex(self, show: Show = "mean") -> str:
        """A table of LaTeX, for the package booktabs."""
        return tables.as_latex(self.cells(show))

    def __repr__(self) -> str:
        groups = ", ".join(f"{group.name} ({len(group.runs)})" for group in self.groups)
        return f"Comparison of {len(self.groups)} methods (runs): {groups}"

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    # -- as pictures -------------------------------------------------------------------------------------------

    def plot_curves(self) -> Any:
        """ACC over the tasks learnt so far, after each task: medians with ranges; a panel for each scenario.

        Raises:
            ModuleNotFoundError: without matplotlib; so do the other pictures.
        """
        scenarios = self._scenarios()
        made, panels = plots.figure(1, len(scenarios))
        for axes, scenario in zip(panels, scenarios):
            curves = {group.name: group.curve(scenario) for group in self.groups}
            known = {name: curve for name, curve in curves.items() if curve}
            plots.draw_curves(axes, known, SCENARIOS[scenario], self._tasks())
        plots.legend(made, panels[0])
        return made

    def plot_matrices(self, scenario: str = "class_il") -> Any:
        """Accuracy matrices side by side, each the mean over seeds."""
        known = [(group, group.matrix(scenario)) for group in self.groups]
        shown = [(group, matrix) for group, matrix in known if matrix]
        columns = min(len(shown), 3)
        made, panels = plots.figure(-(-len(shown) // columns), columns)
        for axes, (group, matrix) in zip(panels, shown):
            plots.draw_matrix(matrix, axes, f"{group.name}, {SCENARIOS[scenario]}", group.tasks())
        for axes in panels[len(shown) :]:
            axes.set_axis_off()
        return made

    def plot_against(self, x: str, scenario: str = "class_il") -> Any:
        """ACC over what it costs (``"flops"``, ``"size"``, ``"seconds"``), with the Pareto front."""
        made, (axes,) = plots.figure(1, 1)
        cost, acc = QUANTITIES[x], QUANTITIES[scenario]
        plots.draw_points(axes, self._points(cost, acc), cost.title, acc.title, less_is_better=True)
        plots.legend(made, axes)
        return made

    def plot_over_sparsity(self, scenario: str = "class_il") -> Any:
        """ACC over sparsity: a line through the groups that have the same name but for their settings."""
        made, (axes,) = plots.figure(1, 1)
        sparsity, acc = QUANTITIES["sparsity"], QUANTITIES[scenario]
        lines: dict[str, list[plots.Point]] = {}
        for point in self._points(sparsity, acc):
            group = next(g for g in self.groups if g.name == point.name)
            base = group.name
            for name, value in group.settings.items():
                base = base.replace(f", {name}={value}", "") if "sparsity" in name else base
            lines.setdefault(base, []).append(point)
        plots.draw_over(axes, lines, sparsity.title, acc.title)
        plots.legend(made, axes)
        return made

    def _scenarios(self) -> list[str]:
        found = [s for s in SCENARIOS if any(s in run.metrics for g in self.groups for run in g.runs.values())]
        if not found:
            raise ValueError("compare: these runs have no accuracy matrix; put ContinualEvaluation among the callbacks")
        return found

    def _tasks(self) -> list[str]:
        """Names of the tasks; none if groups have other tasks."""
        found = {tuple(group.tasks()) for group in self.groups}
        return list(found.pop()) if len(found) == 1 else []

    def _points(self, x: Quantity, y: Quantity) -> list[plots.Point]:
        pairs = [(group.name, group.spread(x), group.spread(y)) for group in self.groups]
        return [plots.Point(name, a, b) for name, a, b in pairs if a is not None and b is not None]

    def save(self, folder: str | os.PathLike, show: Show = "mean", pictures: bool = True) -> list[Path]:
        """Write ``table.csv``, ``table.md``, ``table.tex``, ``differences.csv`` and, with matplotlib, the pictures.

        The pictures are ``curves.png``, ``matrices_class_il.png`` and ``matrices_task_il.png``, ``acc_over_flops.png``,
        ``acc_over_size.png`` and ``acc_over_sparsity.png``, as far as runs have what they show.

        Args:
            folder: made if it is not there.
            show: what tables show: ``"mean"`` or ``"median"``. The CSV file has both.
            pictures: whether to draw.

        Returns:
            The files.
        """
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        texts = {"table.csv": self.to_csv(), "table.md": self.to_markdown(show), "table.tex": self.to_latex(show)}
        rows: list[Sequence[object]] = [
            ("one", "other", "quantity", "seeds", *Interval._fields, "p", "holm", "verdict")
        ]
        rows += [(d.one, d.other, d.quantity.title, d.seeds, *d.interval, *d[5:]) for d in self.differences()]
        texts["differences.csv"] = tables.as_csv(rows)
        for name, text in texts.items():
            with whole_file(root / name) as part:
                part.write_text(text, encoding="utf-8")
        drawn = self._pictures() if pictures else {}
        for name, made in drawn.items():
            with whole_file(root / name) as part:
                made.savefig(part, format="png", dpi=150)
        return [root / name for name in (*texts, *drawn)]

    def _pictures(self) -> dict[str, Any]:
        scenarios = self._scenarios()
        found = {"curves.png": self.plot_curves()}
        found |= {f"matrices_{scenario}.png": self.plot_matrices(scenario) for scenario in scenarios}
        for name in ("flops", "size"):
            if self._points(QUANTITIES[name], QUANTITIES[scenarios[0]]):
                found[f"acc_over_{name}.png"] = self.plot_against(name, scenarios[0])
        sparsities = {
            round(point.x.median, 1) for point in self._points(QUANTITIES["sparsity"], QUANTITIES[scenarios[0]])
        }
        if len(sparsities) > 1:
            found["acc_over_sparsity.png"] = self.plot_over_sparsity(scenarios[0])
        return found

    def print(self, show: Show = "mean", console: Console | None = None) -> None:
        """The table, the tests and what was left out.

        Args:
            show: see :meth:`cells`.
            console: where to print. If None, the standard output.
        """
        console = console or Console()
        console.print(self.table(show))
        found = self.difference_cells()
        for title, cells in found.items():
            console.print()
            console.print(tables.on_screen(f"{title}: differences of runs with the same seed", cells))
        if any(row[-1] == TOO_FEW for cells in found.values() for row in cells):
            more = {"t": "", "wilcoxon": ", and more seeds for more pairs"}[self.test]
            console.print(f"{TOO_FEW}: it takes {LEAST_PAIRS} common seeds at least{more}", markup=False)
        for line in self.notes:
            console.print(line, highlight=False, markup=False)
        for line in self.left_out:
            console.print(f"left out: {line}", style="dim", highlight=False, markup=False)


TOLD = {"mean": "Mean ± deviation", "median": "Median (range)"}


def compare(
    *folders: str | os.PathLike,
    metrics: Sequence[str] | None = None,
    reference: str | None = None,
    test: TestName = "t",
    tune_on: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare the finished runs below folders, by their ``metrics.json``.

    Runs that differ in their seeds alone are one method of the table. It is called by the configurations that the run
    was started with or by its classes, and by the settings that set it apart from others of that name.

    Accuracies are tested in pairs, on the seeds that both methods have, with Holm's correction for all comparisons of a
    quantity. Below five common seeds the verdict is that they are too few.

    Args:
        folders: searched for runs to any depth.
        metrics: names in :data:`QUANTITIES`, or dotted paths of other numbers in ``metrics.json``. If None, those of
            :data:`SHOWN` that the runs have.
        reference: the method that the others are tested against. If None, all pairs.
        test: ``"t"``, the paired t-test, or ``"wilcoxon"``, which decides nothing below six seeds.
        tune_on: settings of the runs that are there to tune on, such as ``{"data.class_order": "1"}``: each method is
            then reported with the settings that were best there, on the other runs (:func:`tuned`).

    Raises:
        ValueError: if a folder, a metric, the reference or the test does not exist, or there is nothing to tune or to
            report.
        ModuleNotFoundError: without SciPy, when differences are asked for.
    """
    if test not in TESTS:
        raise ValueError(f"compare --test={test}: one of {', '.join(TESTS)}")
    names = dict.fromkeys(name.strip() for name in (SHOWN if metrics is None else metrics))
    asked = [quantity_named(name) for name in names if name]
    if not asked:
        raise ValueError("compare --metrics: at least one")
    found = find_runs(folders)
    runs, notes = found.runs, list[str]()
    if tune_on:
        by = next((q for q in asked if q.more_is_better is not None), asked[0])
        runs, notes = tuned(runs, tune_on, by)
    groups = grouped(runs)
    had = [q for q in asked if any(q.of(run) is not None for run in runs)]
    if metrics is not None and (missing := [q.name for q in asked if q not in had]):
        raise ValueError(
            f"compare --metrics={missing[0]}: no run has it; names are {', '.join(QUANTITIES)}, or the path of a "
            "number in metrics.json, such as flops.scoring"
        )
    if reference is not None and reference not in [group.name for group in groups]:
        raise ValueError(f"compare --reference={reference}: methods are {'; '.join(g.name for g in groups)}")
    return Comparison(groups, had, reference, test, found.left_out, [*notes, *_mixtures(groups)])


def _common(one: Group, other: Group, quantity: Quantity) -> list[tuple[float, float]]:
    """The quantity of both, for each seed that both have."""
    both = [(quantity.of(run), quantity.of(other.runs[seed])) for seed, run in one.runs.items() if seed in other.runs]
    return [(a, b) for a, b in both if a is not None and b is not None and a == a and b == b]


def _mixtures(groups: Sequence[Group]) -> list[str]:
    """Groups whose seeds were run by different code or on different machines."""
    found = []
    for group in groups:
        for key, called in (("commit", "commits"), ("versions", "versions"), ("machine", "machines")):
            if len({str(run.metrics.get(key)) for run in group.runs.values()}) > 1:
                found.append(f"note: the runs of {group.name} are of different {called}")
    return found
