"""The still pictures' common parts, by PIL alone: a map over the picture, text, a scale, a heading, the PNG itself.

Same colours as in the page. The text uses the font that ships inside Pillow, so the bytes follow
Pillow's version only. What goes where is decided in ``paint.py`` and its like.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from widgets.palette import COLORS, colors_of

if TYPE_CHECKING:
    from llava_lab.results import Run

WIDTH = 960  # of the whole, pixels
MARGIN, GAP = 20, 10
MOST_LINES = 3  # of an answer
HEAD = 176  # longer side of the picture at the top
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


def overlay(run: Run, values: np.ndarray, scale: Range, size: Size, *, doubtful: bool = False) -> Image.Image:
    """The picture at `size` with one map (rows, cols) over it; what the model did not see is dark."""
    lo, hi = scale
    picture = np.asarray(Image.fromarray(run.picture).resize(size, Image.Resampling.LANCZOS), np.float64)
    grey = (picture @ LUMINANCE)[..., None]
    picture = np.broadcast_to(grey, picture.shape) if doubtful else picture
    ground = picture + (grey - picture) * PALER * OPACITY
    cells, seen = _cells(run, size)
    place = (values.ravel()[cells] - lo) / (hi - lo) if hi > lo else np.zeros(cells.shape)
    index = np.rint(np.clip(place, 0, 1) * (COLORS - 1)).astype(int)
    color = colors_of(lo < 0, doubtful=doubtful)[index].astype(np.float64)
    alpha = color[..., 3:] / 255 * OPACITY
    painted = ground * (1 - alpha) + color[..., :3] * alpha
    hidden = picture * 0.32 + UNSEEN * 0.68
    return Image.fromarray(np.where(seen[..., None], painted, hidden).round().astype(np.uint8))


def range_over(values: Sequence[np.ndarray]) -> Range:
    """The colour range that maps share; centred on zero where anything is negative."""
    lo, hi = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    return (-max(-lo, hi), max(-lo, hi)) if lo < 0 else (lo, hi)


def in_font(text: str) -> str:
    """The font inside Pillow knows ASCII: accents are dropped, other signs become "?" (the page shows them all)."""
    bare = "".join(sign for sign in unicodedata.normalize("NFKD", text.translate(PLAIN)) if not unicodedata.combining(sign))
    return "".join(sign if sign.isascii() or sign in KNOWN else "?" for sign in bare)


def fit(run: Run, side: int) -> Size:
    """The picture's width and height when its longer side is `side`."""
    height, width = run.picture.shape[:2]
    scale = side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def heading(run: Run) -> Image.Image:
    """The picture, and beside it the question, the answer, and what answered."""
    size = fit(run, HEAD)
    strip = Image.new("RGB", (WIDTH, size[1] + MARGIN + 6), PAPER)
    strip.paste(Image.fromarray(run.picture).resize(size, Image.Resampling.LANCZOS), (MARGIN, MARGIN))
    pen, left = ImageDraw.Draw(strip), MARGIN + size[0] + 22
    room = WIDTH - MARGIN - left
    write(pen, (left, MARGIN), run.question, 18, SOFT, room)
    answer = " ".join(run.answer.split())  # an answer may have several lines, which cannot be measured
    size_of_type = 30 if pen.textlength(answer, font=font_of(30)) <= room else 20
    bottom = MARGIN + 28
    for line in _wrapped(pen, run.answer, size_of_type, room):
        write(pen, (left, bottom), line, size_of_type, INK, room)
        bottom += round(1.3 * size_of_type)
    about = f"{run.model}, seed {run.seed}, {run.map.rows} x {run.map.cols} patches"
    write(pen, (left, bottom + 8), about, 14, SOFT, room)
    return strip


def scale_strip(block: Image.Image, pen: ImageDraw.ImageDraw, scale: Range, edge: int) -> None:
    """The colour strip with real numbers, ending at `edge`."""
    width = 150
    low, high = short(scale[0], scale), short(scale[1], scale)
    right = max(edge, 420) - int(pen.textlength(high, font=font_of(13))) - 8
    color = colors_of(scale[0] < 0).astype(np.float64)
    alpha = color[:, 3:] / 255
    strip = (color[:, :3] * alpha + 225 * (1 - alpha)).round().astype(np.uint8)
    block.paste(Image.fromarray(np.broadcast_to(strip[None], (10, COLORS, 3)).copy()).resize((width, 10)), (right - width, 17))
    write(pen, (right - width - 8 - pen.textlength(low, font=font_of(13)), 13), low, 13, SOFT, 80)
    write(pen, (right + 8, 13), high, 13, SOFT, 80)


def footnote(text: str) -> Image.Image:
    strip = Image.new("RGB", (WIDTH, 26), PAPER)
    write(ImageDraw.Draw(strip), (MARGIN, 6), text, 13, SOFT, WIDTH - 2 * MARGIN)
    return strip


def short(value: float, scale: Range) -> str:
    """Three figures; what is nothing beside the range is zero."""
    return f"{value:.3g}" if abs(value) > 1e-3 * (scale[1] - scale[0]) else "0"


def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def write(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, ink: str, room: float) -> None:
    font, shown = font_of(size), " ".join(in_font(text).split())
    while len(shown) > 1 and pen.textlength(shown, font=font) > room:
        shown = shown[:-2].rstrip() + "…"
    pen.text(at, shown, fill=ink, font=font)


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    if buffer.tell() > PNG_LIMIT:
        buffer = io.BytesIO()
        image.quantize(256).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def stack(parts: Sequence[Image.Image]) -> Image.Image:
    """One under the other, with a margin at the end."""
    canvas = Image.new("RGB", (WIDTH, sum(part.height for part in parts) + MARGIN), PAPER)
    top = 0
    for part in parts:
        canvas.paste(part, (0, top))
        top += part.height
    return canvas


# -- private ----------------------------------------------------------------------------------


def _cells(run: Run, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """For every pixel of a picture drawn at `size`: its patch's flat index, and whether the model saw it."""
    m = run.map
    x = (np.arange(size[0]) + 0.5) * m.width / size[0] * m.scale_x + m.offset_x
    y = (np.arange(size[1]) + 0.5) * m.height / size[1] * m.scale_y + m.offset_y
    col, row = np.floor(x * m.cols / m.size).astype(int), np.floor(y * m.rows / m.size).astype(int)
    seen = ((row >= 0) & (row < m.rows))[:, None] & ((col >= 0) & (col < m.cols))[None, :]
    return np.clip(row, 0, m.rows - 1)[:, None] * m.cols + np.clip(col, 0, m.cols - 1)[None, :], seen


def _wrapped(pen: ImageDraw.ImageDraw, text: str, size: int, room: float) -> list[str]:
    """At most MOST_LINES lines; `_text` shortens the last where it is too long."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if len(lines) == MOST_LINES or pen.textlength(longer, font=font_of(size)) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
