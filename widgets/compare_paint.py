"""CompareView as a still picture: one small map per method, in rows, with the score that orders them.

For viewers that run no code. Each map has colours of its own range, as in the page; grey ones were not shown
to beat random ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from widgets.compare_data import in_order, score_of
from widgets.still import (
    GAP,
    INK,
    MARGIN,
    PAPER,
    SOFT,
    WASH,
    WIDTH,
    encode,
    fit,
    font_of,
    footnote,
    heading,
    overlay,
    range_over,
    stack,
    write,
)

if TYPE_CHECKING:
    from llava_lab.results import Run

PER_LINE = 5
MOST = 30  # maps; beyond these the live widget is the place
TITLE = 38  # height of what stands under a map


def draw_comparison(run: Run, maps: Sequence[np.ndarray], spec: Mapping[str, Any], chip: int, sort: str) -> bytes:
    """The maps of one chip as PNG bytes, in the order of a score ("" for the order given).

    `maps` has each method's values (targets, rows, cols), as the methods of `spec` come.
    """
    methods = spec["methods"]
    order = in_order(methods, sort, chip)[:MOST]
    by = f", sorted by {sort}, the best first" if sort else ""
    parts = [heading(run), footnote(f"Maps of {_what(spec['chips'][chip])}{by}.")]
    for first in range(0, len(order), PER_LINE):
        parts.append(_line(run, [(methods[i], maps[i]) for i in order[first : first + PER_LINE]], chip, sort))
    if any(_doubt(methods[i], chip) for i in order):
        parts.append(footnote("Grey: not shown to beat random maps."))
    if len(methods) > MOST:
        parts.append(footnote(f"Shown here: {MOST} of {len(methods)} methods."))
    return encode(stack(parts))


def _line(run: Run, several: Sequence[tuple[Mapping[str, Any], np.ndarray]], chip: int, sort: str) -> Image.Image:
    """Up to PER_LINE maps side by side, each with its name and score."""
    side = (WIDTH - 2 * MARGIN + GAP) // PER_LINE - GAP
    tile = fit(run, side)
    line = Image.new("RGB", (WIDTH, tile[1] + TITLE), PAPER)
    pen = ImageDraw.Draw(line)
    for place, (method, values) in enumerate(several):
        x, target = MARGIN + place * (side + GAP), method["chips"][chip]
        doubt = _doubt(method, chip)
        if target < 0:
            pen.rectangle([x, 0, x + tile[0] - 1, tile[1] - 1], fill=WASH)
            write(pen, (x + 10, tile[1] / 2 - 8), "no map for this", 13, SOFT, tile[0] - 20)
        else:
            line.paste(overlay(run, values[target], range_over([values[target]]), tile, doubtful=doubt), (x, 0))
        score = score_of(method, sort, chip)
        said = "" if score is None else f"{score:.3g}"
        wide = pen.textlength(said, font=font_of(14))
        ink = SOFT if doubt or target < 0 else INK
        write(pen, (x, tile[1] + 5), method["name"], 14, ink, tile[0] - wide - 8)
        write(pen, (x + tile[0] - wide, tile[1] + 5), said, 14, ink, wide + 2)
    return line


def _doubt(method: Mapping[str, Any], chip: int) -> bool:
    target = method["chips"][chip]
    return target >= 0 and method["beats"][target] is False


def _what(chip: Mapping[str, Any]) -> str:
    return "the whole answer" if chip["kind"] == "answer" else f'"{chip["text"]}"'
