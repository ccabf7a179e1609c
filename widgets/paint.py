"""The widget as a still picture, by PIL alone: the picture, then one small map per word, a row per method.

For saved notebooks, code hosts and nbconvert, where no script runs. Same colours and one scale per
method, as in the page. The text uses the font that ships inside Pillow, so the bytes follow Pillow's version only.
"""

from __future__ import annotations

import io
import unicodedata
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from widgets.pack import Layers, is_control, probability
from widgets.palette import COLORS, colors_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llava_lab.results import Run, Target

WIDTH = 960  # of the whole, pixels
MARGIN, GAP = 20, 10
MOST_WORDS, MOST_METHODS, MOST_LINES = 14, 4, 3
SMALLEST, LARGEST = 116, 190  # longer side of one small map, pixels
HEAD = 176  # longer side of the picture at the top
TITLE, CAPTION = 38, 26  # height of a method's title, of the words under a line of maps
OPACITY = 0.85  # as in the page
PALER = 0.6  # how much of the picture's own colour gives way to the map's, as in the page
PNG_LIMIT = 300_000  # bytes; beyond it the colours are reduced to 256, so that notebooks stay small
INK, SOFT, PAPER, WASH = "#16181d", "#5b6270", "#ffffff", "#f1f2f4"
UNSEEN = np.array([17, 20, 28], np.float64)
PLAIN = str.maketrans({"×": "x", "−": "-", "–": "-", "→": ">", "“": '"', "”": '"', "’": "'"})
KNOWN = "·"
LUMINANCE = np.array([0.3, 0.59, 0.11])

Size = tuple[int, int]
Range = tuple[float, float]


def draw(run: Run, relevance: Mapping[str, Layers]) -> bytes:
    """Small multiples as PNG bytes: a row per method, a column per word, the last layer where there are several."""
    shown = dict(list(relevance.items())[:MOST_METHODS])
    fitting = (WIDTH - 2 * MARGIN + GAP) // (SMALLEST + GAP)
    every = columns_of(run, shown)
    columns = strongest_of(every, shown, MOST_WORDS if len(shown) == 1 else fitting)
    per_line = min(len(columns), fitting)
    side = min(LARGEST, (WIDTH - 2 * MARGIN + GAP) // per_line - GAP)
    tile = fit(run, side)
    parts = [_head(run), *(_block(run, name, layers, columns, tile, per_line) for name, layers in shown.items())]
    if said := _left_out(relevance, len(columns), len(every)):
        parts.append(_line("Shown here: " + "; ".join(said)))
    canvas = Image.new("RGB", (WIDTH, sum(part.height for part in parts) + MARGIN), PAPER)
    top = 0
    for part in parts:
        canvas.paste(part, (0, top))
        top += part.height
    return _png(canvas)


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
    values = [rel.values for _, rel in layers]
    lo, hi = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    return (-max(-lo, hi), max(-lo, hi)) if lo < 0 else (lo, hi)


def overlay(run: Run, values: np.ndarray, scale: Range, size: Size) -> Image.Image:
    """The picture at `size` with one map (rows, cols) over it; what the model did not see is dark."""
    lo, hi = scale
    picture = np.asarray(Image.fromarray(run.picture).resize(size, Image.Resampling.LANCZOS), np.float64)
    grey = (picture @ LUMINANCE)[..., None]
    ground = picture + (grey - picture) * PALER * OPACITY
    cells, seen = _cells(run, size)
    place = (values.ravel()[cells] - lo) / (hi - lo) if hi > lo else np.zeros(cells.shape)
    index = np.rint(np.clip(place, 0, 1) * (COLORS - 1)).astype(int)
    color = colors_of(lo < 0)[index].astype(np.float64)
    alpha = color[..., 3:] / 255 * OPACITY
    painted = ground * (1 - alpha) + color[..., :3] * alpha
    hidden = picture * 0.32 + UNSEEN * 0.68
    return Image.fromarray(np.where(seen[..., None], painted, hidden).round().astype(np.uint8))


def in_font(text: str) -> str:
    """The font inside Pillow knows ASCII: accents are dropped, other signs become "?" (the page shows them all)."""
    bare = "".join(sign for sign in unicodedata.normalize("NFKD", text.translate(PLAIN)) if not unicodedata.combining(sign))
    return "".join(sign if sign.isascii() or sign in KNOWN else "?" for sign in bare)


def fit(run: Run, side: int) -> Size:
    """The picture's width and height when its longer side is `side`."""
    height, width = run.picture.shape[:2]
    scale = side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


# -- private ----------------------------------------------------------------------------------


def _cells(run: Run, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """For every pixel of a picture drawn at `size`: its patch's flat index, and whether the model saw it."""
    m = run.map
    x = (np.arange(size[0]) + 0.5) * m.width / size[0] * m.scale_x + m.offset_x
    y = (np.arange(size[1]) + 0.5) * m.height / size[1] * m.scale_y + m.offset_y
    col, row = np.floor(x * m.cols / m.size).astype(int), np.floor(y * m.rows / m.size).astype(int)
    seen = ((row >= 0) & (row < m.rows))[:, None] & ((col >= 0) & (col < m.cols))[None, :]
    return np.clip(row, 0, m.rows - 1)[:, None] * m.cols + np.clip(col, 0, m.cols - 1)[None, :], seen


def _head(run: Run) -> Image.Image:
    """The picture, and beside it the question, the answer, and what answered."""
    size = fit(run, HEAD)
    strip = Image.new("RGB", (WIDTH, size[1] + MARGIN + 6), PAPER)
    strip.paste(Image.fromarray(run.picture).resize(size, Image.Resampling.LANCZOS), (MARGIN, MARGIN))
    pen, left = ImageDraw.Draw(strip), MARGIN + size[0] + 22
    room = WIDTH - MARGIN - left
    _text(pen, (left, MARGIN), run.question, 18, SOFT, room)
    size_of_type = 30 if pen.textlength(run.answer, font=_font(30)) <= room else 20
    bottom = MARGIN + 28
    for line in _wrapped(pen, run.answer, size_of_type, room):
        _text(pen, (left, bottom), line, size_of_type, INK, room)
        bottom += round(1.3 * size_of_type)
    about = f"{run.model}, seed {run.seed}, {run.map.rows} x {run.map.cols} patches"
    _text(pen, (left, bottom + 8), about, 14, SOFT, room)
    return strip


def _wrapped(pen: ImageDraw.ImageDraw, text: str, size: int, room: float) -> list[str]:
    """At most MOST_LINES lines; `_text` shortens the last where it is too long."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if len(lines) == MOST_LINES or pen.textlength(longer, font=_font(size)) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _block(run: Run, name: str, layers: Layers, columns: list[Target], tile: Size, per_line: int) -> Image.Image:
    """One method: its name and scale, then a map per column in lines of `per_line`."""
    scale, rel = range_of(layers), layers[-1][1]
    step, line = tile[0] + GAP, tile[1] + CAPTION
    block = Image.new("RGB", (WIDTH, TITLE + -(-len(columns) // per_line) * line), PAPER)
    pen = ImageDraw.Draw(block)
    title = f"{name} (control)" if is_control(name, rel.method) else name
    _text(pen, (MARGIN, 12), title, 16, INK, 420)
    _legend(block, pen, scale, MARGIN + min(per_line, len(columns)) * step - GAP)
    for place, target in enumerate(columns):
        x, y = MARGIN + place % per_line * step, TITLE + place // per_line * line
        if target in rel.targets:
            block.paste(overlay(run, rel.values[rel.targets.index(target)], scale, tile), (x, y))
        else:
            pen.rectangle([x, y, x + tile[0] - 1, y + tile[1] - 1], fill=WASH)
            _text(pen, (x + 10, y + tile[1] / 2 - 8), "no map", 13, SOFT, tile[0] - 20)
        _text(pen, (x, y + tile[1] + 4), _said(run, target), 14, INK, tile[0])
    return block


def _said(run: Run, target: Target) -> str:
    if target.kind == "answer":
        return "whole answer"
    if target.kind != "word":
        return f"{target.kind} {target.text}"
    p = probability(run, target.positions[0] + 1, target.positions[-1] + 2)
    return target.text if p is None else f"{target.text}  {p:.0%}"


def _legend(block: Image.Image, pen: ImageDraw.ImageDraw, scale: Range, edge: int) -> None:
    """The colour strip with real numbers, ending at `edge`."""
    width = 150
    low, high = _number(scale[0], scale), _number(scale[1], scale)
    right = max(edge, 420) - int(pen.textlength(high, font=_font(13))) - 8
    color = colors_of(scale[0] < 0).astype(np.float64)
    alpha = color[:, 3:] / 255
    strip = (color[:, :3] * alpha + 225 * (1 - alpha)).round().astype(np.uint8)
    block.paste(Image.fromarray(np.broadcast_to(strip[None], (10, COLORS, 3)).copy()).resize((width, 10)), (right - width, 17))
    _text(pen, (right - width - 8 - pen.textlength(low, font=_font(13)), 13), low, 13, SOFT, 80)
    _text(pen, (right + 8, 13), high, 13, SOFT, 80)


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


def _line(text: str) -> Image.Image:
    strip = Image.new("RGB", (WIDTH, 26), PAPER)
    _text(ImageDraw.Draw(strip), (MARGIN, 6), text, 13, SOFT, WIDTH - 2 * MARGIN)
    return strip


def _number(value: float, scale: Range) -> str:
    """Three figures; what is nothing beside the range is zero."""
    return f"{value:.3g}" if abs(value) > 1e-3 * (scale[1] - scale[0]) else "0"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _text(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, ink: str, room: float) -> None:
    font, shown = _font(size), " ".join(in_font(text).split())
    while len(shown) > 1 and pen.textlength(shown, font=font) > room:
        shown = shown[:-2].rstrip() + "…"
    pen.text(at, shown, fill=ink, font=font)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    if buffer.tell() > PNG_LIMIT:
        buffer = io.BytesIO()
        image.quantize(256).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
