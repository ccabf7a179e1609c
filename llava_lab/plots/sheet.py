"""The page that stills are drawn on: a picture's heading, maps over it, text that fits, and the PNG.

A `Sheet` is one axes in units with y downwards; things are put on it from the top down, and it ends where the last one
does. Text is in the font that comes with matplotlib, so the bytes are the same on every machine.

    sheet = Sheet(run)  # begins with the picture, the question and the answer
    sheet.line("Grey: not shown to beat random maps.")
    data = png(sheet.done())
"""

from __future__ import annotations

import bisect
import functools
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from PIL import Image

from llava_lab.plots.palette import COLORS, INK, LUMINANCE, PAPER, SOFT, colors_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from llava_lab.results import Run

Item = TypeVar("Item")

WIDTH, MARGIN, GAP = 960, 20, 10  # units; 100 are an inch
DENSITY = 1  # pixels for each unit; at two, a notebook with three stills is over a megabyte
PNG_LIMIT = 300_000  # bytes; beyond it the colours are reduced to 256, so that notebooks stay small
FONT = "DejaVu Sans"  # it comes with matplotlib, so the bytes are the same on every machine
HEAD = 176  # longer side of the picture at the top
OPACITY = 0.85  # as in the page
PALER = 0.6  # how much of the picture's own colour gives way to the map's, as in the page
UNSEEN = np.array([17, 20, 28], np.float64)

Scale = tuple[float, float]
Size = tuple[int, int]


def plain_style(draw: Callable[..., Any]) -> Callable[..., Any]:
    """The same picture whatever the reader's own matplotlib settings are."""

    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        with style.context("default"), matplotlib.rc_context({"font.family": FONT}):
            return draw(*args, **kwargs)

    return drawn


@plain_style
def png(figure: Figure) -> bytes:
    """A still's bytes, without date or version, so that a notebook that runs again stays the same file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100 * DENSITY, metadata={"Software": None})
    image = Image.open(buffer).convert("RGB")
    raw = _encoded(image)
    return raw if len(raw) <= PNG_LIMIT else _encoded(image.quantize(COLORS))


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


class Sheet:
    """A page drawn from the top down: one axes in units, y downwards; `top` is where the next thing goes."""

    def __init__(self, run: Run | None = None) -> None:
        self.figure = Figure(figsize=(WIDTH / 100, 1), dpi=100, facecolor=PAPER)
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()
        self.ax = self.figure.add_axes((0, 0, 1, 1))
        self.ax.axis("off")
        # nothing drawn may move the edges of the page
        self.ax.set(xlim=(0, WIDTH), autoscale_on=False, aspect="auto")
        self.top = float(MARGIN)
        self._inside: list[tuple[Axes, tuple[float, float, float, float]]] = []
        if run is not None:
            self._heading(run)

    def done(self) -> Figure:
        """The figure, as high as what was drawn."""
        height = round(self.top + MARGIN)
        self.figure.set_size_inches(WIDTH / 100, height / 100)
        self.ax.set(xlim=(0, WIDTH), ylim=(height, 0))
        for axes, (x, y, wide, high) in self._inside:
            axes.set_position((x / WIDTH, 1 - (y + high) / height, wide / WIDTH, high / height))
        return self.figure

    def measure(self, text: str, size: float) -> float:
        """Width of a text `size` units high."""
        font = FontProperties(family=FONT, size=size * 0.72)
        return self._renderer.get_text_width_height_descent(text, font, False)[0] if text else 0.0

    def fits(self, text: str, size: float, room: float) -> bool:
        """Whether a text `size` units high needs at most `room`; of a page of text only the beginning is measured."""
        ends = [1 << bits for bits in range(7, len(text).bit_length())] + [len(text)]
        return all(self.measure(text[:end], size) <= room for end in ends)

    def write(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 13,
        color: str = INK,
        *,
        room: float | None = None,
        ha: str = "left",
        end: str = "",
    ) -> None:
        """One line of text, its top at `y`, shortened to `room` units; `end`, a number say, is written whole."""
        shown = self.shortened(text, size, room, end=end)
        self.ax.text(x, y, shown, fontsize=size * 0.72, color=color, ha=ha, va="top", parse_math=False)

    def shortened(self, text: str, size: float, room: float | None, *, end: str = "") -> str:
        """A text on one line, as much of it as `room` units hold beside the whole `end`."""
        shown = in_font(" ".join(text.split()))
        if room is not None and len(shown) > 1 and not self.fits(shown + end, size, room):
            too_long = bisect.bisect_left(
                range(len(shown) - 1), True, key=lambda at: not self.fits(_cut(shown, at) + end, size, room)
            )
            shown = _cut(shown, max(0, too_long - 1))
        return shown + end

    def wrapped(self, text: str, size: float, room: float, most: int = 3) -> list[str]:
        """The lines a text takes when it is set at most `room` wide; the last of `most` has what is left."""
        lines, words = [""], in_font(" ".join(text.split())).split()
        for place, word in enumerate(words):
            if not lines[-1] or self.fits(f"{lines[-1]} {word}", size, room):
                lines[-1] = f"{lines[-1]} {word}".strip()
            elif len(lines) < most:
                lines.append(word)
            else:
                return [*lines[:-1], " ".join([lines[-1], *words[place:]])]
        return lines

    def box(self, x: float, y: float, width: float, height: float, **how: Any) -> None:
        self.ax.add_patch(Rectangle((x, y), width, height, **{"linewidth": 0, **how}))

    def image(self, pixels: np.ndarray, x: float, y: float, width: float, height: float) -> None:
        self.ax.imshow(pixels, extent=(x, x + width, y + height, y), aspect="auto", interpolation="antialiased")

    def tile(self, run: Run, values: np.ndarray, scale: Scale, at: tuple[float, float], size: Size, **how: Any) -> None:
        """A map over the picture."""
        self.image(overlay(run, values, scale, (size[0] * DENSITY, size[1] * DENSITY), **how), *at, *size)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes of their own in a box of the page."""
        axes = self.figure.add_axes((0, 0, 1, 1))
        self._inside.append((axes, (x, y, width, height)))
        return axes

    def tiles(self, items: Iterable[Item], per_line: int, size: Size, *, caption: float) -> Iterator[tuple[float, float, Item]]:
        """Each item with the left and top edge of its tile, in lines with room for a caption; the page goes on below them."""
        count = 0
        for count, item in enumerate(items, 1):
            line, column = divmod(count - 1, per_line)
            yield MARGIN + column * (size[0] + GAP), self.top + line * (size[1] + caption), item
        self.top += math.ceil(count / per_line) * (size[1] + caption)

    def line(self, text: str) -> None:
        """A footnote over the whole width, in as many as three lines."""
        room = WIDTH - 2 * MARGIN
        lines = self.wrapped(text, 13, room)
        for place, line in enumerate(lines):
            self.write(MARGIN, self.top + 6 + 18 * place, line, 13, SOFT, room=room)
        self.top += 26 + 18 * (len(lines) - 1)

    def title(self, text: str, scale: Scale | None = None, *, end: str = "") -> None:
        """A block's title, and its colour strip with real numbers at the right."""
        self.write(MARGIN, self.top + 12, text, 16, room=WIDTH - 2 * MARGIN if scale is None else 560, end=end)
        if scale is not None:
            self.strip(scale, WIDTH - MARGIN - 220, self.top + 17)
        self.top += 40

    def strip(self, scale: Scale, x: float, y: float) -> None:
        """A scale's colours, 150 units wide, between its real numbers."""
        color = colors_of(scale[0] < 0).astype(np.float64)
        alpha = color[:, 3:] / 255
        strip = (color[:, :3] * alpha + 225 * (1 - alpha)).round().astype(np.uint8)
        self.image(np.repeat(strip[None], 2, 0), x, y, 150, 10)
        low, high = (_figures(value, scale) for value in scale)
        self.write(x - 8, y - 4, low, 13, SOFT, ha="right")
        self.write(x + 158, y - 4, high, 13, SOFT)

    def _heading(self, run: Run) -> None:
        """The picture, and beside it the question, the answer, and what answered."""
        size = fit(run, HEAD)
        left, bottom = MARGIN + size[0] + 22, self.top + 28
        room = WIDTH - MARGIN - left
        pixels = Image.fromarray(run.picture).resize((size[0] * DENSITY, size[1] * DENSITY), Image.Resampling.LANCZOS)
        self.image(np.asarray(pixels), MARGIN, self.top, *size)
        self.write(left, self.top, run.question, 18, SOFT, room=room)
        answer = in_font(" ".join(run.answer_shown.split()))
        height = 30 if self.fits(answer, 30, room) else 20
        for line in self.wrapped(answer, height, room):
            self.write(left, bottom, line, height, room=room)
            bottom += round(1.3 * height)
        about = f"{run.model}, seed {run.seed}, {run.map.rows} × {run.map.cols} patches"
        self.write(left, bottom + 8, about, 14, SOFT, room=room)
        self.top += max(size[1], bottom + 26 - self.top) + 6


def overlay(run: Run, values: np.ndarray, scale: Scale, size: Size, *, doubtful: bool = False) -> np.ndarray:
    """The picture at `size` (width, height) with one map (rows, cols) over it, uint8 (height, width, 3).

    What the model did not see is dark; a doubtful map and its picture are grey.
    """
    lo, hi = scale
    picture = np.asarray(Image.fromarray(run.picture).resize(size, Image.Resampling.LANCZOS), np.float64)
    grey = (picture @ LUMINANCE)[..., None]
    picture = np.broadcast_to(grey, picture.shape) if doubtful else picture
    ground = picture + (grey - picture) * PALER * OPACITY
    painted = run.map.project(values, shape=size[::-1])
    seen = ~np.isnan(painted)
    place = (np.where(seen, painted, lo) - lo) / (hi - lo) if hi > lo else np.zeros(painted.shape)
    color = colors_of(lo < 0, doubtful=doubtful)[np.rint(np.clip(place, 0, 1) * (COLORS - 1)).astype(int)].astype(np.float64)
    alpha = color[..., 3:] / 255 * OPACITY
    shown = np.where(seen[..., None], ground * (1 - alpha) + color[..., :3] * alpha, picture * 0.32 + UNSEEN * 0.68)
    return shown.round().astype(np.uint8)


def range_over(values: Sequence[np.ndarray]) -> Scale:
    """The colour range that maps share; centred on zero where anything is negative."""
    lo, hi = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    return (-max(-lo, hi), max(-lo, hi)) if lo < 0 else (lo, hi)


def fit(run: Run, side: int) -> Size:
    """The picture's width and height when its longer side is `side`."""
    height, width = run.picture.shape[:2]
    scale = side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def titled(ax: Axes, title: str, *about: str) -> None:
    """A title above the axes, and under it a line or two of what is drawn."""
    for place, line in enumerate(reversed(about)):
        ax.text(0, 1.04 + 0.07 * place, in_font(line), transform=ax.transAxes, fontsize=9, color=SOFT, parse_math=False)
    above = 1.07 + 0.07 * len(about)
    ax.text(0, above, in_font(title), transform=ax.transAxes, fontsize=11.5, color=INK, parse_math=False)


def quiet(ax: Axes) -> None:
    ax.tick_params(length=0, labelsize=8.5, labelcolor=SOFT)
    ax.set_axisbelow(True)
    ax.spines[:].set_visible(False)


def in_font(text: str) -> str:
    """Signs that the font does not have as "?"; the page shows them all."""
    font = get_font(findfont(FONT))
    return "".join(sign if font.get_char_index(ord(sign)) else "?" for sign in text)


def _cut(text: str, end: int) -> str:
    return text[:end].rstrip() + "…"


def _figures(value: float, scale: Scale) -> str:
    """Three figures; what is nothing beside the range is zero."""
    return f"{value:.3g}" if abs(value) > 1e-3 * (scale[1] - scale[0]) else "0"
