"""The still pictures of ConnectorBench and LossPlot, by PIL alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from widgets.still import GAP, INK, MARGIN, PAPER, SOFT, WIDTH, encode, fit, heading, overlay, range_over, stack, write

if TYPE_CHECKING:
    from widgets.bench_pack import Seen

CURVES = ("#2563c9", "#d2691e", "#2a8c5a", "#8d4bb8", "#b8860b", "#c62860")
HEIGHT, LEFT, FOOT = 340, 78, 40  # of the loss plot, pixels


def draw_bench(one: Seen, two: Seen) -> bytes:
    """Both maps on one scale, and what the second has more of, as PNG bytes."""
    tile = fit(one.run, (WIDTH - 2 * MARGIN - 2 * GAP) // 3)
    difference = two.values - one.values
    reach = float(np.abs(difference).max())
    scale = range_over([one.values, two.values])
    line = Image.new("RGB", (WIDTH, tile[1] + 60), PAPER)
    pen = ImageDraw.Draw(line)
    shown = ((one.name, one.run.answer, one.values, scale), (two.name, two.run.answer, two.values, scale))
    last = (f"{two.name} - {one.name}", f"orange: more, blue: less, full at {reach:.3g}", difference, (-reach, reach))
    for place, (name, said, values, span) in enumerate((*shown, last)):
        x = MARGIN + place * (tile[0] + GAP)
        line.paste(overlay(one.run, values, span, tile), (x, 8))
        write(pen, (x, tile[1] + 14), name, 15, INK, tile[0])
        write(pen, (x, tile[1] + 35), said, 13, SOFT, tile[0])
    return encode(stack([heading(one.run), line]))


def draw_losses(curves: Mapping[str, Sequence[tuple[int, float]]], *, log: bool) -> bytes:
    """Loss by step as PNG bytes."""
    image = Image.new("RGB", (WIDTH, HEIGHT + 20), PAPER)
    pen = ImageDraw.Draw(image)
    points = {name: [(s, v) for s, v in rows if math.isfinite(v) and (v > 0 or not log)] for name, rows in curves.items()}
    every = [point for rows in points.values() for point in rows]
    if not every:
        write(pen, (MARGIN, 18), "No step was logged yet. The curve appears here while the training runs.", 15, SOFT, WIDTH)
        return encode(image.crop((0, 0, WIDTH, 54)))
    turn = math.log10 if log else float
    last = max(step for step, _ in every)
    lo, hi = min(turn(v) for _, v in every), max(turn(v) for _, v in every)
    lo, hi = (lo if log else min(lo, 0.0)), (hi if hi > lo else lo + 1)
    hi = hi if log or lo else round_top(hi)
    right, top, bottom = WIDTH - MARGIN, 44, HEIGHT - FOOT
    for part in range(5):
        y = bottom - part / 4 * (bottom - top)
        value = lo + part / 4 * (hi - lo)
        pen.line([(LEFT, y), (right, y)], fill="#e3e5e9")
        write(pen, (MARGIN, y - 8), f"{10**value if log else value:.3g}", 13, SOFT, LEFT - MARGIN)
        write(pen, (LEFT + part / 4 * (right - LEFT) - 12, bottom + 8), f"{part / 4 * last:.0f}", 13, SOFT, 60)
    write(pen, (right - 40, bottom + 24), "step", 13, SOFT, 60)
    at = LEFT
    for place, (name, rows) in enumerate(points.items()):
        color = CURVES[place % len(CURVES)]
        line = [(LEFT + s / max(1, last) * (right - LEFT), bottom - (turn(v) - lo) / (hi - lo) * (bottom - top)) for s, v in rows]
        if len(line) > 1:
            pen.line(line, fill=color, width=2)
        said = f"{name} {rows[-1][1]:.3f}" if rows else name
        write(pen, (at, 14), said, 15, color, 220)
        at += 230
    return encode(image)


def round_top(value: float) -> float:
    """The least four round steps from 0 that reach a positive value."""
    unit = 10.0 ** math.floor(math.log10(value / 4))
    return 4 * unit * next(step for step in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10) if step * unit >= value / 4 * (1 - 1e-9))
