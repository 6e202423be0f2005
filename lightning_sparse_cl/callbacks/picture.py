"""Pictures of a run, drawn with Pillow (which torchvision brings): plotting libraries weigh 70 MB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from lightning_sparse_cl.callbacks.blocks import Value, blocks, ends, labels, mean, means
from lightning_sparse_cl.callbacks.class_lists import class_lines, class_lists

CELL, MARGIN, LINE = 44, 30, 16
MOST = 20
"""The most cells per row and column; with more tasks or layers, a cell is the mean of a block."""
LOW, HIGH = (247, 251, 255), (8, 69, 148)

Panel = tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[Value]]]
"""Title, labels of the rows and of the columns, and the fractions to show, percent in the cells."""


def draw_matrices(
    matrices: Mapping[str, Sequence[Sequence[Value]]], path: Path, classes: Sequence[Sequence[str]] = ()
) -> None:
    """Draw R (fractions) side by side as heat maps, percent in the cells: row = after task, column = on task.

    With more than 20 tasks, a column is the mean over a block of tasks, and a row the state after a block's last task.
    Otherwise the classes of each task are written under the heat maps, as far as there is room.

    Args:
        matrices: R by title.
        path: the file.
        classes: names of each task's classes. If empty, they are left out.
    """
    panels = []
    for title, R in matrices.items():
        after = ends(len(R), MOST)
        columns = labels(len(R[0]), MOST)
        panels.append((f"{title}, %", [str(i + 1) for i in after], columns, [means(R[i], MOST) for i in after]))
    draw_panels(panels, path, classes)


def draw_subnetworks(
    shared: Mapping[str, Any], growth: Mapping[str, Any] | None, path: Path, classes: Sequence[Sequence[str]] = ()
) -> None:
    """Draw what tasks share, by task from left to right; above 20 tasks or layers, a cell is the mean over a block.

    Four panels: density per layer; overlap of masks, the part of the row's weights that the column's task uses too; use
    of the backbone; model size, allocated if it grows, and of each task's compact network.

    Args:
        shared: the summary of :class:`TaskSubnetworks`.
        growth: the summary of :class:`SparseGrowth`, if there is one.
        path: the file.
        classes: as for :func:`draw_matrices`.
    """
    density, tasks = shared["density"], labels(len(shared["used"]), MOST)
    layers = [name.removesuffix(".weight").removeprefix("backbone.") for name in density]
    use = {"used by any task": shared["used"], "new in its mask": shared["free_in_mask"]}
    size = {"stored": shared["used"], "network of the task": shared["compact"]}
    if growth:
        size = {"allocated": growth["allocated"]} | size
    draw_panels(
        [
            ("density per layer and task, %", _names(layers), tasks, _cells(list(density.values()))),
            ("overlap of task masks, %", tasks, tasks, _cells(shared["overlap"])),
            ("use of the backbone, %", list(use), tasks, _cells(list(use.values()))),
            ("model size, % of the whole network", list(size), tasks, _cells(list(size.values()))),
        ],
        path,
        classes,
    )


def _names(layers: Sequence[str]) -> list[str]:
    """The name of the first layer of each block."""
    return [layers[b[0]] + (f" and {len(b) - 1} more" if len(b) > 1 else "") for b in blocks(len(layers), MOST)]


def _cells(values: Sequence[Sequence[Value]]) -> list[list[Value]]:
    """Means over blocks of rows and of columns."""
    rows = [means(row, MOST) for row in values]
    return [[mean(column) for column in zip(*(rows[i] for i in b), strict=True)] for b in blocks(len(rows), MOST)]


def draw_panels(panels: Sequence[Panel], path: Path, classes: Sequence[Sequence[str]] = ()) -> None:
    """Draw heat maps side by side; below them, for up to 20 tasks, the names of each task's classes."""
    font = ImageFont.load_default(12)
    lefts = [MARGIN + max(int(font.getlength(label)) for label in rows) for _, rows, _, _ in panels]
    widths = [
        max(left + CELL * len(columns), left + int(font.getlength(title)))
        for left, (title, _, columns, _) in zip(lefts, panels, strict=True)
    ]
    height = 2 * MARGIN + CELL * max(len(values) for *_, values in panels)
    lists = class_lists(classes) if 0 < len(classes) <= MOST else {}
    notes = class_lines(lists, sum(widths) - MARGIN, font.getlength) if lists else []
    image = Image.new("RGB", (sum(widths) + MARGIN, height + LINE * len(notes)), "white")
    draw = ImageDraw.Draw(image)
    for i, note in enumerate(notes):
        draw.text((MARGIN, height - MARGIN / 2 + LINE * i), note, fill="black", font=font)
    start = 0
    for (title, rows, columns, values), left, width in zip(panels, lefts, widths, strict=True):
        left += start
        draw.text((left, 2), title, fill="black", font=font)
        for i, (label, row) in enumerate(zip(rows, values, strict=True)):
            draw.text((left - 8, MARGIN + CELL * (i + 0.5)), label, fill="black", font=font, anchor="rm")
            for j, value in enumerate(row):
                x, y, v = left + CELL * j, MARGIN + CELL * i, min(value or 0.0, 1.0)
                colour = tuple(round(a + (b - a) * v) for a, b in zip(LOW, HIGH, strict=True))
                draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), fill=colour)
                text = "-" if value is None else f"{100 * value:.1f}"
                draw.text((x + CELL / 2, y + CELL / 2), text, "white" if v > 0.5 else "black", font, anchor="mm")
        for j, label in enumerate(columns):
            draw.text((left + CELL * (j + 0.5), MARGIN - 6), label, fill="black", font=font, anchor="mm")
        start += width
    image.save(path)
