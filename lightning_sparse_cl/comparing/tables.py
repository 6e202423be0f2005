"""A comparison as tables: for the screen, as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterable, Sequence
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_sparse_cl.comparing.quantities import Quantity
from lightning_sparse_cl.comparing.statistics import Spread

Cells = list[list[str]]
"""Rows of a table, the first of which is its header."""
Show = Literal["mean", "median"]
IN_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"$<$", ">": r"$>$",
    "[": "{[}", "]": "{]}", "*": "{*}",
}  # fmt: skip


def cell(spread: Spread | None, quantity: Quantity, show: Show, runs: int) -> str:
    """``98.3 ± 0.4``, mean and deviation; or ``98.3 (97.8 to 98.6)``, median and range. A single value alone.

    If not all ``runs`` have the quantity, the cell says how many do.
    """
    if spread is None:
        return "-"
    return _spread(spread, quantity, show) + (f" [{spread.n}]" if spread.n < runs else "")


def _spread(spread: Spread, quantity: Quantity, show: Show) -> str:
    first = quantity.written(spread.mean if show == "mean" else spread.median)
    least, greatest = quantity.written(spread.least), quantity.written(spread.greatest)
    if least == greatest:
        return first
    return f"{first} ± {quantity.written(spread.deviation)}" if show == "mean" else f"{first} ({least} to {greatest})"


def on_screen(title: str, cells: Cells) -> Table:
    """For :func:`rich.print`."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for i, name in enumerate(cells[0]):
        is_text = i == 0 or not name  # numbers stay on one line
        least = min(16, max(len(row[0]) for row in cells)) if i == 0 else None
        table.add_column(
            _narrow(name), min_width=least, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold"
        )
    for row in cells[1:]:
        table.add_row(*map(Text, row))
    return table


def _narrow(name: str) -> str:
    """A title over several lines, none of them much longer than a number."""
    return "\n".join(textwrap.wrap(name, 11)) or name


def as_csv(rows: Iterable[Sequence[object]]) -> str:
    """Rows of values, the first of which is the header."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(["" if v is None or v != v else v for v in row] for row in rows)
    return text.getvalue()


def as_markdown(cells: Cells) -> str:
    """A table of GitHub's Markdown."""
    rows = [[text.replace("|", r"\|") for text in row] for row in cells]
    rule = ["---", *["---:"] * (len(cells[0]) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], rule, *rows[1:]])


def as_latex(cells: Cells) -> str:
    r"""A ``tabular`` with the rules of the package booktabs."""
    rows = [" & ".join(map(_escaped, row)) + r" \\" for row in cells]
    lines = [
        rf"\begin{{tabular}}{{l{'r' * (len(cells[0]) - 1)}}}", r"\toprule", rows[0], r"\midrule",
        *rows[1:], r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return "".join(IN_LATEX.get(letter, letter) for letter in text)
