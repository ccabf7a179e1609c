"""Results as small pictures in a notebook: the picture a run is about, and maps in the colours of every figure.

No viewer and no matplotlib: Pillow makes a PNG that stands in the result's HTML. Every text is escaped.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable

import numpy as np
from PIL import Image

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
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(name)}" width="{image.width}" height="{image.height}" src="data:image/png;base64,{data}">'
