"""A contact sheet of a data set: its figures, its classes, and pictures of it, as one HTML file or one PNG.

The HTML page needs nothing else, fits light and dark, and is made like the run's page; the PNG is for places that
show no HTML (a README, a chat, a terminal that draws).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from setformer_dist.core.files import replacing
from setformer_dist.core.words import plain_page

_TEMPLATE = "sheet.html.j2"
_JPEG_QUALITY = 88

# The PNG: pixels, and colours of the light page.
_GAP, _CAPTION, _MARGIN, _LINE = 14, 64, 28, 26
_PAGE, _CARD, _INK, _SOFT, _EDGE = "#f6f6f4", "#ffffff", "#1b1b1a", "#62615d", "#e3e2dd"


@dataclass(frozen=True)
class Cell:
    """One picture of the sheet.

    Attributes:
        pixels: (h, w, 3) uint8.
        title: what it shows.
        subtitle: which sample it is.
        detail: more of it, on a line of its own.
        damage: why it cannot be shown; "" where it can.
    """

    pixels: npt.NDArray[np.uint8]
    title: str
    subtitle: str
    detail: str
    damage: str = ""


@dataclass(frozen=True)
class ClassBar:
    """A class's share of the data: name, count in words, width of its bar from 0 to 1, colour in the pictures or ""."""

    name: str
    count: str
    width: float
    colour: str = ""


@dataclass(frozen=True)
class Sheet:
    """What is shown.

    Attributes:
        title: name of the data.
        lead: one sentence.
        tiles: (value, label) of the headline figures.
        bars: classes, in the order to be shown.
        bars_title: what the bars count.
        bars_note: what is not shown of them, or "".
        facts: (label, value) of the rest.
        cells: pictures.
        side: of a picture in pixels.
    """

    title: str
    lead: str
    tiles: Sequence[tuple[str, str]]
    bars: Sequence[ClassBar]
    bars_title: str
    bars_note: str
    facts: Sequence[tuple[str, str]]
    cells: Sequence[Cell]
    side: int


def write_html(sheet: Sheet, out: Path) -> None:
    """Write the sheet as a self-contained page, replaced in one move."""
    template = resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    text = environment.from_string(template).render(sheet=sheet, images=[_image(cell) for cell in sheet.cells])
    _replace(out, plain_page(text).encode())


def write_png(sheet: Sheet, out: Path, columns: int = 8) -> None:
    """Write title, headline figures and pictures as one image, replaced in one move."""
    columns = max(1, min(columns, len(sheet.cells)))
    rows = -(-len(sheet.cells) // columns)
    cell_width, cell_height = sheet.side + _GAP, sheet.side + _CAPTION + _GAP
    title, body, small = (_font(size) for size in (28, 15, 12))
    width = max(2 * _MARGIN + columns * cell_width - _GAP, 560)
    top = _MARGIN + 76
    legend = _legend(sheet, body, width - 2 * _MARGIN)
    height = top + rows * cell_height + len(legend) * _LINE + _MARGIN
    canvas = Image.new("RGB", (width, height), _PAGE)
    drawing = ImageDraw.Draw(canvas)
    drawing.text((_MARGIN, _MARGIN - 6), _cut(sheet.title, title, width - 2 * _MARGIN), _INK, title)
    figures = "  ·  ".join(f"{value} {label}" for value, label in sheet.tiles)
    drawing.text((_MARGIN, _MARGIN + 36), _cut(figures, body, width - 2 * _MARGIN), _SOFT, body)
    for number, cell in enumerate(sheet.cells):
        left, upper = _MARGIN + number % columns * cell_width, top + number // columns * cell_height
        box = (left, upper, left + sheet.side, upper + sheet.side + _CAPTION)
        drawing.rounded_rectangle(box, 8, _CARD, _EDGE)
        picture = Image.fromarray(cell.pixels)
        picture.thumbnail((sheet.side - 8, sheet.side - 8))
        canvas.paste(picture, (left + (sheet.side - picture.width) // 2, upper + (sheet.side - picture.height) // 2))
        room = sheet.side - 16
        drawing.text((left + 8, upper + sheet.side - 2), _cut(cell.title, body, room), _INK, body)
        drawing.text((left + 8, upper + sheet.side + 20), _cut(cell.damage or cell.subtitle, small, room), _SOFT, small)
        drawing.text((left + 8, upper + sheet.side + 38), _cut(cell.detail, small, room), _SOFT, small)
    for number, line in enumerate(legend):
        place, upper = float(_MARGIN), top + rows * cell_height + number * _LINE
        for bar in line:
            drawing.rounded_rectangle((place, upper + 3, place + 14, upper + 17), 3, bar.colour)
            drawing.text((place + 20, upper), bar.name, _INK, body)
            place += _legend_width(bar, body)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    _replace(out, buffer.getvalue())


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's own font, which has signs that PIL's lacks (×, …)."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _legend(sheet: Sheet, font: object, room: float) -> list[list[ClassBar]]:
    """Return the classes that have colours, in lines that fit into `room` pixels."""
    lines: list[list[ClassBar]] = []
    left = room
    for bar in sheet.bars:
        if not bar.colour:
            continue
        if left + _legend_width(bar, font) > room:
            lines.append([])
            left = 0.0
        lines[-1].append(bar)
        left += _legend_width(bar, font)
    return lines


def _legend_width(bar: ClassBar, font: Any) -> float:
    return float(font.getlength(bar.name)) + 44


def _cut(text: str, font: Any, room: float) -> str:
    """Return as much of a text as fits into `room` pixels."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"


def _image(cell: Cell) -> dict[str, str]:
    buffer = io.BytesIO()
    Image.fromarray(cell.pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {
        "source": source,
        "title": cell.title,
        "subtitle": cell.subtitle,
        "detail": cell.detail,
        "damage": cell.damage,
    }


def _replace(out: Path, data: bytes) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as aside:
        aside.write_bytes(data)
