"""The widget as a still picture, by PIL alone: the picture, then one small map per word, a row per method.

For saved notebooks, code hosts and nbconvert, where no script runs. Same colours and one scale per
method, as in the page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from widgets.pack import Layers, is_control, probability
from widgets.still import (
    GAP,
    INK,
    MARGIN,
    PAPER,
    SOFT,
    WASH,
    WIDTH,
    Range,
    Size,
    encode,
    fit,
    footnote,
    heading,
    overlay,
    range_over,
    scale_strip,
    stack,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llava_lab.results import Run, Target

MOST_WORDS, MOST_METHODS = 14, 4
SMALLEST, LARGEST = 116, 190  # longer side of one small map, pixels
TITLE, CAPTION = 38, 26  # height of a method's title, of the words under a line of maps


def draw(run: Run, relevance: Mapping[str, Layers], *, beats: Mapping[str, Sequence[bool | None]] | None = None) -> bytes:
    """Small multiples as PNG bytes: a row per method, a column per word, the last layer where there are several.

    `beats` says of each method's targets whether their maps are better than random ones; those not shown to be are grey.
    """
    shown = dict(list(relevance.items())[:MOST_METHODS])
    fitting = (WIDTH - 2 * MARGIN + GAP) // (SMALLEST + GAP)
    every = columns_of(run, shown)
    columns = strongest_of(every, shown, MOST_WORDS if len(shown) == 1 else fitting)
    per_line = min(len(columns), fitting)
    side = min(LARGEST, (WIDTH - 2 * MARGIN + GAP) // per_line - GAP)
    tile = fit(run, side)
    known = beats or {}
    blocks = [_block(run, name, layers, columns, tile, per_line, known.get(name, ())) for name, layers in shown.items()]
    parts = [heading(run), *blocks]
    if said := _left_out(relevance, len(columns), len(every)):
        parts.append(footnote("Shown here: " + "; ".join(said)))
    return encode(stack(parts))


def columns_of(run: Run, relevance: Mapping[str, Layers]) -> list[Target]:
    """The targets that get a column: words that some method explains, else whatever is explained."""
    explained = [target for layers in relevance.values() for target in layers[-1][1].targets]
    words = [target for target in run.word_targets() if target in explained]
    return words or list(dict.fromkeys(explained))


def strongest_of(columns: list[Target], relevance: Mapping[str, Layers], most: int) -> list[Target]:
    """Where there are more targets than room: those with the highest peaks in the first method, in reading order."""
    rel = next(iter(relevance.values()))[-1][1]
    peaks = [float(rel.values[rel.targets.index(t)].max()) if t in rel.targets else -np.inf for t in columns]
    best = np.argsort(-np.array(peaks), kind="stable")[:most]
    return [columns[i] for i in sorted(best)]


def range_of(layers: Layers) -> Range:
    """The colour range one method shares over words and layers; centred on zero where anything is negative."""
    return range_over([rel.values for _, rel in layers])


# -- private ----------------------------------------------------------------------------------


def _block(
    run: Run, name: str, layers: Layers, columns: list[Target], tile: Size, per_line: int, beats: Sequence[bool | None]
) -> Image.Image:
    """One method: its name and scale, then a map per column in lines of `per_line`."""
    scale, rel = range_of(layers), layers[-1][1]
    step, line = tile[0] + GAP, tile[1] + CAPTION
    block = Image.new("RGB", (WIDTH, TITLE + -(-len(columns) // per_line) * line), PAPER)
    pen = ImageDraw.Draw(block)
    title = f"{name} (control)" if is_control(name, rel.method) else name
    write(pen, (MARGIN, 12), title, 16, INK, 420)
    scale_strip(block, pen, scale, MARGIN + min(per_line, len(columns)) * step - GAP)
    for place, target in enumerate(columns):
        x, y = MARGIN + place % per_line * step, TITLE + place // per_line * line
        if target in rel.targets:
            index = rel.targets.index(target)
            doubtful = bool(beats) and beats[index] is False
            block.paste(overlay(run, rel.values[index], scale, tile, doubtful=doubtful), (x, y))
        else:
            pen.rectangle([x, y, x + tile[0] - 1, y + tile[1] - 1], fill=WASH)
            write(pen, (x + 10, y + tile[1] / 2 - 8), "no map", 13, SOFT, tile[0] - 20)
        write(pen, (x, y + tile[1] + 4), _said(run, target), 14, INK, tile[0])
    return block


def _said(run: Run, target: Target) -> str:
    if target.kind == "answer":
        return "whole answer"
    if target.kind != "word":
        return f"{target.kind} {target.text}"
    p = probability(run, target.positions[0] + 1, target.positions[-1] + 2)
    return target.text if p is None else f"{target.text}  {p:.0%}"


def _left_out(relevance: Mapping[str, Layers], columns: int, every: int) -> list[str]:
    """What the still picture does not show, and the live widget does."""
    said = []
    if columns < every:
        said.append(f"{columns} of {every} words, those with the highest peaks")
    if len(relevance) > MOST_METHODS:
        said.append(f"{MOST_METHODS} of {len(relevance)} methods")
    if any(len(layers) > 1 for layers in relevance.values()):
        said.append("the last layer of each method")
    return said
