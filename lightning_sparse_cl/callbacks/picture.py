"""A picture of accuracy matrices, drawn with Pillow (which torchvision brings): plotting libraries weigh 70 MB."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL, MARGIN = 44, 30
LOW, HIGH = (247, 251, 255), (8, 69, 148)


def draw_matrices(matrices: dict[str, list[list[float | None]]], path: Path) -> None:
    """Draw R (fractions) side by side as heat maps, percent in the cells: row = after task, column = on task."""
    font = ImageFont.load_default(12)
    width = sum(MARGIN + CELL * len(R[0]) for R in matrices.values()) + MARGIN
    height = 2 * MARGIN + CELL * max(len(R) for R in matrices.values())
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    left = MARGIN
    for title, R in matrices.items():
        draw.text((left, 2), f"{title}, %", fill="black", font=font)
        for i, row in enumerate(R):
            draw.text((left - 8, MARGIN + CELL * (i + 0.5)), str(i + 1), fill="black", font=font, anchor="rm")
            for j, value in enumerate(row):
                x, y, v = left + CELL * j, MARGIN + CELL * i, value or 0.0
                colour = tuple(round(a + (b - a) * v) for a, b in zip(LOW, HIGH, strict=True))
                draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), fill=colour)
                text = "-" if value is None else f"{100 * value:.1f}"
                draw.text((x + CELL / 2, y + CELL / 2), text, "white" if v > 0.5 else "black", font, anchor="mm")
        for j in range(len(R[0])):
            draw.text((left + CELL * (j + 0.5), MARGIN - 6), str(j + 1), fill="black", font=font, anchor="mm")
        left += MARGIN + CELL * len(R[0])
    image.save(path)
