"""Pictures of a run, drawn with Pillow (which torchvision brings): plotting libraries weigh 70 MB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

CELL, MARGIN = 44, 30
LOW, HIGH = (247, 251, 255), (8, 69, 148)

Panel = tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[float | None]]]
"""Title, labels of the rows and of the columns, and the fractions to show, percent in the cells."""


def draw_matrices(matrices: Mapping[str, Sequence[Sequence[float | None]]], path: Path) -> None:
    """Draw R (fractions) side by side as heat maps, percent in the cells: row = after task, column = on task."""
    draw_panels([(f"{title}, %", _numbers(R), _numbers(R[0]), R) for title, R in matrices.items()], path)


def draw_subnetworks(shared: Mapping[str, Any], growth: Mapping[str, Any] | None, path: Path) -> None:
    """Draw what tasks share, by task from left to right.

    Four panels: density per layer; overlap of masks, the part of the row's weights that the column's task uses too; use
    of the backbone; model size, allocated where it grows, and of each task's compact network alone.

    Args:
        shared: the summary of :class:`TaskSubnetworks`.
        growth: the summary of :class:`SparseGrowth`, where there is one.
        path: the file.
    """
    density, tasks = shared["density"], _numbers(shared["used"])
    layers = [name.removesuffix(".weight").removeprefix("backbone.") for name in density]
    use = {"used by any task": shared["used"], "new in its mask": shared["free_in_mask"]}
    size = {"stored": shared["used"], "network of the task": shared["compact"]}
    if growth:
        size = {"allocated": growth["allocated"]} | size
    draw_panels(
        [
            ("density per layer and task, %", layers, tasks, list(density.values())),
            ("overlap of task masks, %", tasks, tasks, shared["overlap"]),
            ("use of the backbone, %", list(use), tasks, list(use.values())),
            ("model size, % of the whole network", list(size), tasks, list(size.values())),
        ],
        path,
    )


def draw_panels(panels: Sequence[Panel], path: Path) -> None:
    """Draw heat maps side by side."""
    font = ImageFont.load_default(12)
    lefts = [MARGIN + max(int(font.getlength(label)) for label in rows) for _, rows, _, _ in panels]
    widths = [
        max(left + CELL * len(columns), left + int(font.getlength(title)))
        for left, (title, _, columns, _) in zip(lefts, panels, strict=True)
    ]
    height = 2 * MARGIN + CELL * max(len(values) for *_, values in panels)
    image = Image.new("RGB", (sum(widths) + MARGIN, height), "white")
    draw = ImageDraw.Draw(image)
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


def _numbers(values: Sequence[Any]) -> list[str]:
    return [str(i + 1) for i in range(len(values))]
