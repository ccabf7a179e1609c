"""A result as it is shown: rows of text for the command line and a notebook, and small pictures for a notebook alone.

    table = Table(("method", "gain"), (("rollout", "0.31"), ("random", "0.02")), title="two methods")
    print(table)  # aligned columns, as `llava-lab compare` prints them

The pictures are the one a run is about, and maps in the colours of every figure. No viewer and no matplotlib: Pillow makes a
PNG that stands in the result's HTML. Every text is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

NEGLIGIBLE = "negligible"  # what does not reach its noise floor; pale where colours can say so


@dataclass(frozen=True)
class Table:
    """Rows under headings, with a title above, more tables and notes below. All of it is text, escaped when shown as HTML."""

    headings: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    title: str | None = None  # "" is an empty line
    below: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    line: str = ""  # how a row reads in plain text, where a sentence says more than columns: "{0}: {1}"

    def titled(self, title: str | None) -> Table:
        """The same table under another title."""
        return replace(self, title=title)

    def __str__(self) -> str:
        lines = [] if self.title is None else [self.title]
        lines += [self.line.format(*row) for row in self.rows] if self.line else aligned(self.headings, self.rows)
        return "\n".join([*lines, *map(str, self.below), *self.notes])

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{html.escape(self.title.strip())}</b></p>"] if self.title and self.title.strip() else []
        if self.rows:
            head = "".join(f"<th>{html.escape(heading)}</th>" for heading in self.headings)
            rows = ("".join(_cell(cell) for cell in row) for row in self.rows)
            body = "".join(f"<tr>{row}</tr>" for row in rows)
            parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        parts += [table._repr_html_() for table in self.below]
        parts += [f"<p>{html.escape(note)}</p>" for note in self.notes if note]
        return "".join(parts)


def _cell(text: str) -> str:
    """One cell as HTML, dimmed where it says that there is nothing to tell."""
    dimmed = ' style="opacity: 0.5"' if text == NEGLIGIBLE else ""
    return f"<td{dimmed}>{html.escape(text)}</td>"


def aligned(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns, each as wide as its widest cell."""
    if not headings:
        return []
    every = [list(headings), *map(list, rows)]
    widths = [max(len(row[i]) for row in every) for i in range(len(headings))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in every]


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays, tuples and dataclasses as lists and dicts, what is not finite as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def figure(value: float, form: str = "z.3f") -> str:
    """A number as a cell; "-" where there is none."""
    return format(value, form) if value == value else "-"


def percent(value: float) -> str:
    """A share as percent with one decimal, without the sign; "-" where there is none."""
    return figure(100 * value, "z.1f")


def pairs(options: Mapping[str, Any]) -> str:
    """Options as ``name=value, ...``."""
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "none"


# -- pictures -------------------------------------------------------------------------------

SIDE = 144  # pixels of a picture's longer side
MAP_SIDE = 96  # of a map's
MOST = 8  # maps shown


def thumbnail(picture: np.ndarray, name: str) -> str:
    """A picture, uint8 (height, width, 3), as an ``<img>``; nothing for an empty one."""
    if not picture.size:
        return ""
    image = Image.fromarray(picture)
    image.thumbnail((SIDE, SIDE))
    return _img(image, name)


def map_row(maps: Iterable[tuple[str, np.ndarray]]) -> str:
    """The first maps, each (rows, cols) with its name below, side by side; each on its own scale, in the figures' colours."""
    shown = list(maps)
    cells = [_map(name, values) for name, values in shown[:MOST]]
    more = f"<span>and {len(shown) - MOST} more</span>" if len(shown) > MOST else ""
    style = "display: flex; flex-wrap: wrap; gap: 8px; align-items: flex-end"
    return f'<div style="{style}">{"".join(cells)}{more}</div>' if cells else ""


def _map(name: str, values: np.ndarray) -> str:
    from llava_lab.plots import palette  # a table of colours; the rest of that room draws with results

    known = np.nan_to_num(np.asarray(values, np.float64))
    signed = bool(known.min() < 0)
    low, high = (-np.abs(known).max(), np.abs(known).max()) if signed else (known.min(), known.max())
    levels = np.rint(255 * (known - low) / (high - low if high > low else 1)).astype(np.uint8)
    colors = palette.colors_of(signed)[levels].astype(np.float64)
    alpha = colors[..., 3:] / 255
    image = Image.fromarray((colors[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8))
    scale = max(1, MAP_SIDE // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    text = html.escape(name)
    return (
        f'<figure style="margin: 0; text-align: center">{_img(image, f"map of {name}")}<figcaption>{text}</figcaption></figure>'
    )


def _img(image: Image.Image, name: str) -> str:
    return f'<img alt="{html.escape(name)}" width="{image.width}" height="{image.height}" src="{png_address(image)}">'


def png_address(image: Image.Image) -> str:
    """A picture as a PNG that is its own address, ``data:image/png;base64,...``."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
