"""The figures of a run as tables, readable in 80 columns for any number of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lightning_sparse_cl.callbacks.blocks import Value, blocks, ends, labels, means
from lightning_sparse_cl.callbacks.class_lists import class_lines, class_lists
from lightning_sparse_cl.callbacks.evaluation import SCENARIOS

TITLES = {"class_il": "Class-IL", "task_il": "Task-IL"}
MOST_COLUMNS, MOST_LINES = 10, 20
"""Tasks that a table shows beside and below each other; means of blocks where there are more."""


def print_report(metrics: Mapping[str, Any], console: Console | None = None, is_written: bool = True) -> None:
    """Print what ``metrics.json`` holds: accuracies in percent, spending against plain training.

    Args:
        metrics: the contents of the file.
        console: where to print; the standard output if None.
        is_written: whether there is a file to point to.
    """
    console = console or Console()
    scenarios, figure = [s for s in SCENARIOS if s in metrics], metrics.get("figure", "accuracy")
    for scenario in scenarios:
        _print_matrix(f"{TITLES[scenario]} {figure}", metrics[scenario], console, is_written)
    if scenarios:
        summary = _table("", *(TITLES[s] for s in scenarios))
        mean = "ACC" if figure == "accuracy" else f"mean {figure}"
        for key, name in {"acc": mean, "bwt": "BWT", "fwt": "FWT", "forgetting": "forgetting"}.items():
            summary.add_row(name, *(percent(metrics[s][key]) for s in scenarios))
        if before := [metrics[f"{s}_before"]["acc"] for s in scenarios if f"{s}_before" in metrics]:
            summary.add_row(f"{mean} before the last pruning", *map(percent, before))
        _print("Summary, %", summary, console)
        _print_classes(class_lists(metrics.get("classes", ())), console)
    console.print()
    console.print(_spending(metrics))


def _print_matrix(title: str, result: Mapping[str, Any], console: Console, is_written: bool) -> None:
    """R: the row of a block is that of its last task, and the columns are means over blocks."""
    tasks, stages = len(result["baseline"]), len(result["matrix"])
    most = MOST_COLUMNS if tasks <= 100 else MOST_COLUMNS - 2  # "101-200" is wider than a figure
    table = _table("after", *labels(tasks, most))
    table.add_row("none", *map(percent, means(result["baseline"], most)))
    for stage in ends(stages, most):
        table.add_row(str(stage + 1), *map(percent, means(result["matrix"][stage], most)))
    _print(f"{title} on each task (column) after each task (row), %", table, console)
    if tasks > most:
        where = "; the whole matrix is in metrics.json" if is_written else ""
        console.print(f"Columns are means over blocks of tasks{where}.")
    rows = [row for row in result["matrix"] if any(_is_figure(value) for value in row)]
    if not all(_is_figure(value) for row in rows for value in row):
        console.print("-: not measured; the task's test data are not there, or it was not known yet.")


def _spending(metrics: Mapping[str, Any]) -> Table:
    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    lines.add_row("sparsity of the pruned layers", f"{100 * metrics['sparsity']:.2f} %")
    shared, growth = metrics.get("subnetworks"), metrics.get("growth")
    if shared and shared["used"]:
        lines.add_row("weights used by any task", f"{100 * shared['used'][-1]:.2f} % of one network's")
    if growth:
        grew = [str(t + 1) for t, g in enumerate(growth["grew"]) if g]
        tasks = f"{len(grew)} of {len(growth['grew'])}" if len(grew) > MOST_COLUMNS else ", ".join(grew) or "none"
        lines.add_row("  allocated", f"{100 * growth['allocated'][-1]:.2f} % (grew in tasks: {tasks})")
    flops, memory, size = (metrics.get(name, {}) for name in ("flops", "memory", "size"))
    if flops.get("dense"):  # modules that do not call themselves are not counted
        lines.add_row("samples served", f"{flops['samples']:,}")
        for direction in ("forward", "backward"):
            ratio = flops[direction] / max(1, flops["samples"])
            lines.add_row(f"samples sent {direction}", f"{flops[direction]:,} ({ratio:.2f} x plain training)")
        share = 100 * flops["training"] / flops["dense"]
        lines.add_row("training FLOPs", f"{flops['training']:.3g} ({share:.1f} % of plain, dense training)")
        lines.add_row("  as SparCL's tables count", f"{flops['papers']:.3g}")
        if flops["scoring"]:
            share = 100 * flops["scoring"] / flops["dense"]
            lines.add_row("  to find masks, in addition", f"{flops['scoring']:.3g} ({share:.1f} %)")
    if "formula" in memory:
        lines.add_row(
            "memory, SparCL's formula", f"{memory['formula'] / 1e6:.1f} MB (dense {memory['dense'] / 1e6:.1f})"
        )
    if "peak" in memory:
        lines.add_row(f"memory, peak of the {memory['source']}", f"{memory['peak'] / 1e6:.1f} MB")
    if size:
        lines.add_row("network on disk", f"{size['bytes'] / 1e6:.2f} MB (dense {size['dense_bytes'] / 1e6:.2f})")
    lines.add_row("time", f"{metrics['seconds']:.1f} s")
    return lines


def print_tested(
    figures: Mapping[str, float], console: Console | None = None, classes: Sequence[Sequence[str]] = (),
    figure: str = "accuracy",
) -> None:  # fmt: skip
    """Print the accuracies that ``trainer.test`` or ``trainer.validate`` found, in percent; nothing without them.

    Args:
        figures: fractions by name, as :class:`ContinualEvaluation` logs them; others are left out.
        console: where to print; the standard output if None.
        classes: names of each task's classes; nothing is said of them without.
        figure: what was measured.
    """
    console = console or Console()
    scenarios = [s for s in SCENARIOS if f"{s}/acc" in figures]
    if not scenarios:
        return
    start = f"{scenarios[0]}/task_"
    tasks = sorted(int(name.removeprefix(start)) for name in figures if name.startswith(start))
    table = _table("task", *(TITLES[s] for s in scenarios))
    columns = [means([figures[f"{s}/task_{t}"] for t in tasks], MOST_LINES) for s in scenarios]
    for name, *row in zip(_named(tasks, MOST_LINES), *columns, strict=True):
        table.add_row(name, *map(percent, row))
    table.add_section()
    table.add_row("ACC" if figure == "accuracy" else "mean", *(percent(figures[f"{s}/acc"]) for s in scenarios))
    _print(f"{figure[0].upper()}{figure[1:]} on each task, %", table, console)
    _print_classes(class_lists(classes, tasks) if classes else {}, console)


def _named(tasks: Sequence[int], most: int) -> list[str]:
    """Blocks of tasks by their first and last number, counted from 1."""
    found = [(tasks[block[0]] + 1, tasks[block[-1]] + 1) for block in blocks(len(tasks), most)]
    return [f"{first}-{last}" if first < last else str(first) for first, last in found]


def _print_classes(lists: Mapping[str, Sequence[str]], console: Console) -> None:
    """Under a table: which classes its tasks have."""
    if lists:
        title = Text("Classes of each task", style="bold")
        console.print(Padding(title, (1, 0, 0, 0), expand=False))
        for line in class_lines(lists, min(console.width, 80), cell_len):
            console.print(Text(line))


def _table(first: str, *others: str) -> Table:
    """Columns of figures without lines between them: ten have room in 80 columns, and nothing is ever cut."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", min_width=6, overflow="fold")
    return table


def _print(title: str, table: Table, console: Console) -> None:
    console.print(Padding(Text(title, style="bold"), (1, 0, 0, 0), expand=False), table)


def _is_figure(value: Value) -> bool:
    return value is not None and value == value


def percent(value: Value) -> str:
    """A fraction in percent with two decimals, "-" if it is not defined."""
    return f"{100 * value:.2f}" if value is not None and _is_figure(value) else "-"
