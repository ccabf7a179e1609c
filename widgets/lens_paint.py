"""TokenLens as a still picture: the map of some states over the picture, and one patch's likeliest words at them.

For viewers that run no code. One colour scale for all states. The patch is the locked one, else where the word looked
for is likeliest, else the one the last state is surest of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from widgets.lens_words import matching, seen, word_values
from widgets.still import (
    GAP,
    INK,
    MARGIN,
    PAPER,
    SOFT,
    WIDTH,
    encode,
    fit,
    font_of,
    footnote,
    heading,
    overlay,
    range_over,
    scale_strip,
    stack,
    write,
)

if TYPE_CHECKING:
    from llava_lab.results import LogitLens, NearestWords, Run

MOST_TILES, MOST_ROWS, MOST_WORDS = 7, 9, 5
LARGEST = 220  # longest side of a tile, pixels
TITLE, UNDER, ROW = 40, 26, 26
LABEL = 74  # room for "state 31"
BAR, HIT, CELL = "#b9cff2", "#d98a1f", "#f1f2f4"


def draw_lens(
    run: Run, lens: LogitLens, near: NearestWords | None, *, word: str = "", state: int | None = None, patch: int | None = None
) -> bytes:
    """Maps over states, then words over states, as PNG bytes; entropy where no word is looked for, or none is known."""
    known = bool(word) and seen(lens, word)
    values = word_values(lens, word) if known else lens.entropy.astype(np.float64)
    if patch is None:
        patch = int(values.max(0).argmax()) if known else int(lens.top_probs[-1, :, 0].argmax())
    parts = [heading(run), _maps(run, lens, values, word if known else "", state), _words(run, lens, word, patch)]
    if near is not None:
        said = ", ".join(f"{_plain(text)} {cosine:.2f}" for text, cosine in near.at(*divmod(patch, run.map.cols)))
        parts.append(footnote(f"Nearest words of this projected token: {said}. Norm {near.norms[patch]:.3g}."))
    if word and not known:
        parts.append(footnote(f'"{word}" is never among the top {lens.top_ids.shape[2]} words kept; the maps show entropy.'))
    return encode(stack(parts))


def some_states(count: int, most: int, wanted: int | None = None) -> list[int]:
    """At most `most` of 0 .. count-1, evenly spread with both ends; `wanted` takes the place of its nearest."""
    picked = sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})
    if wanted is not None and wanted not in picked:
        picked[int(np.abs(np.array(picked) - wanted).argmin())] = wanted
    return picked


def _maps(run: Run, lens: LogitLens, values: np.ndarray, word: str, state: int | None) -> Image.Image:
    """A tile per state, all on one scale."""
    wanted = None if state is None else lens.states.index(state)
    shown = some_states(len(lens.states), MOST_TILES, wanted)
    tile = fit(run, min(LARGEST, (WIDTH - 2 * MARGIN + GAP) // len(shown) - GAP))
    block = Image.new("RGB", (WIDTH, TITLE + tile[1] + UNDER), PAPER)
    pen = ImageDraw.Draw(block)
    scale = (0.0, float(values.max())) if word else range_over([values])
    title = f'Probability of "{word}"' if word else "Entropy in nats: how undecided each patch is"
    write(pen, (MARGIN, 12), title, 16, INK, 420)
    scale_strip(block, pen, scale, WIDTH - MARGIN)
    for place, number in enumerate(shown):
        x = MARGIN + place * (tile[0] + GAP)
        grid = values[number].reshape(run.map.rows, run.map.cols)
        block.paste(overlay(run, grid, scale, tile), (x, TITLE))
        most = f"at most {grid.max():.0%}" if word else f"mean {grid.mean():.2f}"
        write(pen, (x, TITLE + tile[1] + 4), f"state {lens.states[number]}: {most}", 13, INK, tile[0])
    return block


def _words(run: Run, lens: LogitLens, word: str, patch: int) -> Image.Image:
    """A row per state: the patch's likeliest words, bars as long as they are probable."""
    shown = some_states(len(lens.states), MOST_ROWS)
    columns = min(lens.top_ids.shape[2], MOST_WORDS)
    wide = (WIDTH - 2 * MARGIN - LABEL + GAP) // columns - GAP
    block = Image.new("RGB", (WIDTH, TITLE + len(shown) * ROW + GAP), PAPER)
    pen = ImageDraw.Draw(block)
    row, col = divmod(patch, run.map.cols)
    write(pen, (MARGIN, 12), f"Likeliest words at row {row}, column {col}", 16, INK, WIDTH - 2 * MARGIN)
    hits = matching(lens, word)
    for line, number in enumerate(shown):
        y = TITLE + line * ROW
        write(pen, (MARGIN, y + 4), f"state {lens.states[number]}", 13, SOFT, LABEL)
        for place, (text, share) in enumerate(lens.at(lens.states[number], row, col)[:columns]):
            x = MARGIN + LABEL + place * (wide + GAP)
            pen.rectangle([x, y, x + wide, y + ROW - 4], fill=CELL)
            pen.rectangle([x, y, x + round(wide * share), y + ROW - 4], fill=BAR)
            if lens.top_ids[number, patch, place] in hits:
                pen.rectangle([x, y, x + wide, y + ROW - 4], outline=HIT, width=2)
            said = f"{share:.0%}"
            edge = x + wide - 7 - pen.textlength(said, font=font_of(12))
            write(pen, (x + 7, y + 3), _plain(text), 13, INK, edge - x - 14)
            write(pen, (edge, y + 4), said, 12, SOFT, 50)
    return block


def _plain(piece: str) -> str:
    """A piece as the still picture can write it."""
    return "".join(sign if sign.isprintable() else "?" for sign in piece.strip()) or "(space)"
