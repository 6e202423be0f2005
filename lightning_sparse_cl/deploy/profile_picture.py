"""The picture of a profile: panels of bars side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

BAR, GAP, WIDTH, MARGIN = 18, 6, 180, 30
COLOUR = (8, 69, 148)


def draw_bars(names: Sequence[str], panels: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw horizontal bars: a row per name and a panel per measure, each panel on a scale of its own, from zero.

    Args:
        names: names of the rows.
        panels: by title, one number per row.
        path: the PNG file.
    """
    font = ImageFont.load_default(12)
    left = MARGIN + int(max((font.getlength(name) for name in names), default=0))
    across, room = WIDTH + 70, (BAR + GAP) * len(names)
    image = Image.new("RGB", (left + across * len(panels) + MARGIN, room + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(image)
    for i, name in enumerate(names):
        draw.text((left - 8, MARGIN + (BAR + GAP) * i + BAR / 2), name, fill="black", font=font, anchor="rm")
    for j, (title, values) in enumerate(panels.items()):
        start, most = left + across * j, max(max(values, default=0), 1e-30)
        draw.text((start, 8), title, fill="black", font=font)
        for i, value in enumerate(values):
            top, length = MARGIN + (BAR + GAP) * i, round(WIDTH * value / most)
            draw.rectangle((start, top, start + length, top + BAR), fill=COLOUR)
            draw.text((start + length + 4, top + BAR / 2), f"{value:.3g}", fill="black", font=font, anchor="lm")
    image.save(path, "PNG")
