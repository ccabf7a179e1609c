"""HeadGrid as a still picture: per word its layer x head matrix, and the maps of the heads that look most.

For viewers that run no code. One colour scale for all matrices; each map has colours of its own range, as in the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from widgets.palette import sequential
from widgets.still import GAP, INK, MARGIN, PAPER, SOFT, WIDTH, encode, fit, font_of, footnote, heading, overlay, stack, write

if TYPE_CHECKING:
    from llava_lab.results import HeadMaps, Run

MOST_WORDS, BEST = 5, 3  # rows; maps beside each matrix
MATRIX = 250  # longest side of a matrix, pixels
LEFT = 34  # room for the layers' numbers
TITLE, UNDER = 40, 26


def draw_heads(run: Run, maps: HeadMaps, kept: Sequence[int]) -> bytes:
    """A row per word of `kept` as PNG bytes."""
    shares = maps.image_share
    top = float(shares[list(kept)].max())
    shown = kept[-MOST_WORDS:]
    parts = [
        heading(run),
        footnote(f"Attention of each head on the picture, from 0% to {top:.0%}; rows are layers, columns heads."),
    ]
    parts += [_row(run, maps, index, shares[index], top) for index in shown]
    if len(shown) < len(maps.targets):
        parts.append(footnote(f"Shown here: {len(shown)} of {len(maps.targets)} words."))
    return encode(stack(parts))


def matrix(share: np.ndarray, top: float, cell: int) -> Image.Image:
    """Shares (layers, heads) as squares of `cell` pixels."""
    place = np.rint(np.clip(share / top if top > 0 else share, 0, 1) * 255).astype(int)
    colors = sequential()[place][..., :3]
    return Image.fromarray(colors.repeat(cell, 0).repeat(cell, 1))


def _row(run: Run, maps: HeadMaps, index: int, share: np.ndarray, top: float) -> Image.Image:
    """One word: its matrix, then its strongest heads' maps."""
    layers, heads = share.shape
    cell = max(2, MATRIX // max(layers, heads))
    square = matrix(share, top, cell)
    first = MARGIN + LEFT + square.width + 3 * GAP
    tile = fit(run, min(MATRIX, (WIDTH - MARGIN - first + GAP) // BEST - GAP))
    row = Image.new("RGB", (WIDTH, TITLE + max(square.height, tile[1] + UNDER) + GAP), PAPER)
    pen = ImageDraw.Draw(row)
    text = maps.targets[index].text if maps.targets[index].kind != "answer" else "whole answer"
    write(
        pen,
        (MARGIN, 14),
        f'"{text}": {share.mean():.1%} of its attention on the picture, mean over all heads',
        16,
        INK,
        WIDTH - 2 * MARGIN,
    )
    row.paste(square, (MARGIN + LEFT, TITLE))
    step = max(1, 2 ** int(np.ceil(np.log2(14 / cell)))) if cell < 14 else 1
    for layer in range(0, layers, step):
        said = str(layer)
        wide = pen.textlength(said, font=font_of(11))
        write(pen, (MARGIN + LEFT - 8 - wide, TITLE + (layer + 0.5) * cell - 7), said, 11, SOFT, 40)
    for place, flat in enumerate(np.argsort(-share, axis=None, kind="stable")[:BEST]):
        layer, head = divmod(int(flat), heads)
        x, values = first + place * (tile[0] + GAP), maps.values[index, layer, head].astype(np.float32)
        row.paste(overlay(run, values, (0.0, float(values.max())), tile), (x, TITLE))
        write(pen, (x, TITLE + tile[1] + 5), f"layer {layer}, head {head}: {share[layer, head]:.0%}", 14, INK, tile[0])
    return row
