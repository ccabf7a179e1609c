"""What each widget shows, as one still picture: for saved notebooks, code hosts and nbconvert, where no script runs.

One function for each widget, from results alone, with the colours of the page (`llava_lab.plots.palette`). Each gives a
matplotlib Figure 960 units wide; `png` gives its bytes, as many pixels wide, the same bytes for the same result.

    figure = stills.word_maps(run, {"rollout": relevance})
    data = stills.png(figure)
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from PIL import Image

from llava_lab.plots.palette import COLORS, FLOWS, INK, LINES, PAPER, RULE, SOFT, WASH, colors_of, diverging, sequential

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from llava_lab.results import FlowSweep, HeadMaps, LogitLens, NearestWords, PatchGrid, Relevance, Run, Target

WIDTH, MARGIN, GAP = 960, 20, 10  # units; 100 are an inch
DENSITY = 1  # pixels for each unit; at two, a notebook with three stills is over a megabyte
PNG_LIMIT = 300_000  # bytes; beyond it the colours are reduced to 256, so that notebooks stay small
FONT = "DejaVu Sans"  # it comes with matplotlib, so the bytes are the same on every machine
HEAD = 176  # longer side of the picture at the top
OPACITY = 0.85  # as in the page
PALER = 0.6  # how much of the picture's own colour gives way to the map's, as in the page
LUMINANCE = np.array([0.3, 0.59, 0.11])
UNSEEN = np.array([17, 20, 28], np.float64)
MOST_WORDS, MOST_METHODS, MOST_TILES = 14, 4, 30
BAR, HIT = "#b9cff2", "#d98a1f"  # of the lens's words: how likely, and the word looked for

Scale = tuple[float, float]
Size = tuple[int, int]


def _plain_style(draw: Callable[..., Any]) -> Callable[..., Any]:
    """The same picture whatever the reader's own matplotlib settings are."""

    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        with style.context("default"), matplotlib.rc_context({"font.family": FONT}):
            return draw(*args, **kwargs)

    return drawn


@_plain_style
def png(figure: Figure) -> bytes:
    """A still's bytes, without date or version, so that a notebook that runs again stays the same file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100 * DENSITY, metadata={"Software": None})
    image = Image.open(buffer).convert("RGB")
    for smaller in (image, image.quantize(COLORS)):
        buffer = io.BytesIO()
        smaller.save(buffer, "PNG", optimize=True)
        if buffer.tell() <= PNG_LIMIT:
            break
    return buffer.getvalue()


@_plain_style
def word_maps(
    run: Run,
    maps: Mapping[str, Relevance],
    *,
    scales: Mapping[str, Scale] | None = None,
    beats: Mapping[str, Sequence[bool | None]] | None = None,
    controls: Collection[str] = (),
    note: str = "",
) -> Figure:
    """A row per method, a column per explained word: the still of `PatchExplorer`.

    `scales` are the methods' colour ranges where more than these maps share them (other layers). `beats` says of each
    method's targets whether their maps are better than random ones; those not shown to be are grey. `controls` names the
    methods that are controls, `note` what the still leaves out.
    """
    sheet = _Sheet()
    sheet.heading(run)
    shown = dict(list(maps.items())[:MOST_METHODS])
    explained = list(dict.fromkeys(target for rel in shown.values() for target in rel.targets))
    every = [target for target in run.word_targets() if target in explained] or explained
    fitting = (WIDTH - 2 * MARGIN + GAP) // (116 + GAP)
    columns = _strongest(every, next(iter(shown.values())), MOST_WORDS if len(shown) == 1 else fitting)
    per_line = min(len(columns), fitting)
    tile = fit(run, min(190, (WIDTH - 2 * MARGIN + GAP) // per_line - GAP))
    for name, rel in shown.items():
        scale = (scales or {}).get(name) or range_over([rel.values])
        told = (beats or {}).get(name, ())
        sheet.title(f"{name} (control)" if name in controls else name, scale)
        for place, target in enumerate(columns):
            x, y = sheet.cell(place, per_line, tile, caption=26)
            if target in rel.targets:
                index = rel.targets.index(target)
                sheet.tile(run, rel.values[index], scale, (x, y), tile, doubtful=bool(told) and told[index] is False)
            else:
                sheet.box(x, y, *tile, facecolor=WASH)
                sheet.write(x + 10, y + tile[1] / 2 - 8, "no map", color=SOFT)
            sheet.write(x, y + tile[1] + 4, _said(run, target), 14, room=tile[0])
        sheet.next_line(len(columns), per_line, tile, caption=26)
    left_out = [f"{len(columns)} of {len(every)} words, those with the highest peaks"] if len(columns) < len(every) else []
    left_out += [f"{len(shown)} of {len(maps)} methods"] if len(shown) < len(maps) else []
    left_out += [note] if note else []
    if left_out:
        sheet.line("Shown here: " + "; ".join(left_out))
    return sheet.done()


@_plain_style
def method_maps(
    run: Run,
    maps: Mapping[str, np.ndarray | None],
    *,
    about: str = "",
    scores: Mapping[str, float | None] | None = None,
    doubtful: Collection[str] = (),
    columns: int = 5,
) -> Figure:
    """One small map per method, in the order given, with its score: the still of `CompareView`.

    `maps` are (rows, cols), None where a method has no map of this target. Each has the colours of its own range; those
    named in `doubtful` were not shown to beat random maps and are grey. `about` is the sentence above them.
    """
    sheet = _Sheet()
    sheet.heading(run)
    if about:
        sheet.line(about)
    side = (WIDTH - 2 * MARGIN + GAP) // columns - GAP
    tile, shown = fit(run, side), list(maps.items())[:MOST_TILES]
    for place, (name, values) in enumerate(shown):
        x, y = sheet.cell(place, columns, (side, tile[1]), caption=38)
        if values is None:
            sheet.box(x, y, *tile, facecolor=WASH)
            sheet.write(x + 10, y + tile[1] / 2 - 8, "no map for this", color=SOFT)
        else:
            sheet.tile(run, values, range_over([values]), (x, y), tile, doubtful=name in doubtful)
        score = (scores or {}).get(name)
        text = "" if score is None else f"{score:.3g}"
        color = SOFT if values is None or name in doubtful else INK
        sheet.write(x, y + tile[1] + 5, name, 14, color, room=tile[0] - sheet.measure(text, 14) - 8)
        sheet.write(x + tile[0], y + tile[1] + 5, text, 14, color, ha="right")
    sheet.next_line(len(shown), columns, tile, caption=38)
    if any(name in doubtful for name, _ in shown):
        sheet.line("Grey: not shown to beat random maps.")
    if len(shown) < len(maps):
        sheet.line(f"Shown here: {len(shown)} of {len(maps)} methods.")
    return sheet.done()


@_plain_style
def head_maps(run: Run, heads: HeadMaps, targets: Sequence[int], *, rows: int = 5, best: int = 3) -> Figure:
    """Per word its layers-by-heads matrix and the maps of the heads that look most: the still of `HeadGrid`.

    One colour scale for all matrices; each map has the colours of its own range. The last `rows` of `targets` are drawn.
    """
    sheet = _Sheet()
    sheet.heading(run)
    shares = heads.image_share
    top = float(shares[list(targets)].max())
    sheet.line(f"Attention of each head on the picture, from 0% to {top:.0%}; rows are layers, columns heads.")
    shown, (layers, count) = targets[-rows:], shares.shape[1:]
    cell = max(2, 250 // max(layers, count))
    first = MARGIN + 34 + count * cell + 3 * GAP
    tile = fit(run, min(250, (WIDTH - MARGIN - first + GAP) // best - GAP))
    for index in shown:
        share, target = shares[index], heads.targets[index]
        text = "whole answer" if target.kind == "answer" else target.text
        sheet.title(f'"{text}": {share.mean():.1%} of its attention on the picture, mean over all heads')
        axes = sheet.axes(MARGIN + 34, sheet.top, count * cell, layers * cell)
        axes.imshow(share, cmap=_colormap(sequential()), vmin=0, vmax=top or 1, aspect="auto", interpolation="nearest")
        step = max(1, 2 ** math.ceil(math.log2(14 / cell))) if cell < 14 else 1
        axes.set_yticks(range(0, layers, step), [str(layer) for layer in range(0, layers, step)])
        axes.set_xticks([])
        _quiet(axes)
        for place, flat in enumerate(np.argsort(-share, axis=None, kind="stable")[:best]):
            layer, head = divmod(int(flat), count)
            x, values = first + place * (tile[0] + GAP), heads.values[index, layer, head].astype(np.float32)
            sheet.tile(run, values, (0.0, float(values.max())), (x, sheet.top), tile)
            caption = f"layer {layer}, head {head}: {share[layer, head]:.0%}"
            sheet.write(x, sheet.top + tile[1] + 5, caption, 14, room=tile[0])
        sheet.top += max(layers * cell, tile[1] + 26) + GAP
    if len(shown) < len(heads.targets):
        sheet.line(f"Shown here: {len(shown)} of {len(heads.targets)} words.")
    return sheet.done()


@_plain_style
def lens_states(
    run: Run,
    lens: LogitLens,
    near: NearestWords | None = None,
    *,
    word: str = "",
    state: int | None = None,
    patch: int | None = None,
) -> Figure:
    """Maps over states, then one patch's likeliest words at them: the still of `TokenLens`.

    Entropy where no `word` is looked for or none is known. `patch` counts row by row; by default it is where the word is
    likeliest, else the one the last state is surest of.
    """
    sheet = _Sheet()
    sheet.heading(run)
    known = lens.knows(word)
    values = lens.probability_of(word) if known else lens.entropy.astype(np.float64)
    if patch is None:
        patch = int(values.max(0).argmax()) if known else int(lens.top_probs[-1, :, 0].argmax())
    shown = some_states(len(lens.states), 7, None if state is None else lens.states.index(state))
    tile = fit(run, min(220, (WIDTH - 2 * MARGIN + GAP) // len(shown) - GAP))
    scale = (0.0, float(values.max())) if known else range_over([values])
    sheet.title(f'Probability of "{word}"' if known else "Entropy in nats: how undecided each patch is", scale)
    for place, number in enumerate(shown):
        x, y = sheet.cell(place, len(shown), tile, caption=26)
        grid = values[number].reshape(run.map.rows, run.map.cols)
        sheet.tile(run, grid, scale, (x, y), tile)
        most = f"at most {grid.max():.0%}" if known else f"mean {grid.mean():.2f}"
        size = 13 if len(shown) < 6 else 11
        sheet.write(x, y + tile[1] + 4, f"state {lens.states[number]}: {most}", size, room=tile[0])
    sheet.next_line(len(shown), len(shown), tile, caption=26)
    _words_of_patch(sheet, lens, word, divmod(patch, run.map.cols))
    if near is not None:
        words = ", ".join(f"{_readable(text)} {cosine:.2f}" for text, cosine in near.at(*divmod(patch, run.map.cols)))
        sheet.line(f"Nearest words of this projected token: {words}. Norm {near.norms[patch]:.3g}.")
    if word and not known:
        sheet.line(f'"{word}" is never among the top {lens.top_ids.shape[2]} words kept; the maps show entropy.')
    return sheet.done()


@_plain_style
def connector_maps(run: Run, first: tuple[str, str, np.ndarray], second: tuple[str, str, np.ndarray]) -> Figure:
    """Two connectors' maps on one scale, and what the second has more of: the still of `ConnectorBench`.

    Each side is (name, answer, map (rows, cols)).
    """
    sheet = _Sheet()
    sheet.heading(run)
    sheet.top += 8
    difference = second[2] - first[2]
    reach, scale = float(np.abs(difference).max()), range_over([first[2], second[2]])
    tile = fit(run, (WIDTH - 2 * MARGIN - 2 * GAP) // 3)
    last = (f"{second[0]} − {first[0]}", f"orange: more, blue: less, full at {reach:.3g}", difference)
    for place, (name, text, values) in enumerate((first, second, last)):
        x, y = sheet.cell(place, 3, tile, caption=52)
        sheet.tile(run, values, scale if place < 2 else (-reach, reach), (x, y), tile)
        sheet.write(x, y + tile[1] + 6, name, 15, room=tile[0])
        sheet.write(x, y + tile[1] + 27, text, 13, SOFT, room=tile[0])
    sheet.next_line(3, 3, tile, caption=52)
    return sheet.done()


@_plain_style
def flow_and_patching(
    run: Run,
    sweep: FlowSweep | None,
    grid: PatchGrid | None,
    target: Target,
    *,
    component: int = 0,
    notes: Sequence[str] = (),
) -> Figure:
    """What cutting costs beside what patching brings back, for one target: the still of `FlowView`.

    A half that is None, or that was not measured for the target, is left out. `notes` are written below.
    """
    sheet = _Sheet()
    sheet.heading(run)
    halves: list[Callable[[Axes], None]] = []
    if sweep is not None and target in sweep.targets:
        halves.append(lambda ax: _cutting(ax, sweep, target))
    if grid is not None and target in grid.targets:
        halves.append(lambda ax: _patching(ax, grid, target, component))
    room = (WIDTH - 2 * MARGIN) / len(halves)
    for place, half in enumerate(halves):
        half(sheet.axes(MARGIN + place * room + 64, sheet.top + 56, min(room, 640) - 84, 236))
    sheet.top += 420 if grid is not None and target in grid.targets else 360
    for note in notes:
        sheet.line(note)
    return sheet.done()


@_plain_style
def losses(curves: Mapping[str, Sequence[tuple[float, float]]], *, log: bool = False) -> Figure:
    """Loss by step, a line per curve, its last value in the legend: the still of `LossPlot`. Points are (step, loss)."""
    sheet = _Sheet()
    points = {name: [(s, v) for s, v in rows if math.isfinite(v) and (v > 0 or not log)] for name, rows in curves.items()}
    if not any(points.values()):
        sheet.line("No step was logged yet. The curve appears here while the training runs.")
        return sheet.done()
    ax = sheet.axes(MARGIN + 44, sheet.top + 34, WIDTH - 2 * MARGIN - 54, 260)
    for place, (name, rows) in enumerate(points.items()):
        steps, values = zip(*rows, strict=True) if rows else ((), ())
        label = f"{name} {values[-1]:.3f}" if rows else name
        ax.plot(steps, values, color=LINES[place % len(LINES)], linewidth=1.5, label=label)
    if log:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.set_xlim(left=0)
    _quiet(ax)
    ax.grid(color=RULE)
    ax.set_xlabel("step", fontsize=9, color=SOFT)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=10)
    sheet.top += 346
    return sheet.done()


# -- what the stills share ------------------------------------------------------------------


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


def some_states(count: int, most: int, wanted: int | None = None) -> list[int]:
    """At most `most` of 0 .. count-1, evenly spread with both ends; `wanted` takes the place of its nearest."""
    picked = sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})
    if wanted is not None and wanted not in picked:
        picked[int(np.abs(np.array(picked) - wanted).argmin())] = wanted
    return picked


class _Sheet:
    """A page drawn from the top down: one axes in units, y downwards; `top` is where the next thing goes."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH / 100, 1), dpi=100, facecolor=PAPER)
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()
        self.ax = self.figure.add_axes((0, 0, 1, 1))
        self.ax.axis("off")
        # nothing drawn may move the edges of the page
        self.ax.set(xlim=(0, WIDTH), autoscale_on=False, aspect="auto")
        self.top = float(MARGIN)
        self._inside: list[tuple[Axes, tuple[float, float, float, float]]] = []

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

    def write(
        self, x: float, y: float, text: str, size: float = 13, color: str = INK, *, room: float | None = None, ha: str = "left"
    ) -> None:
        """One line of text, its top at `y`, shortened to `room` units."""
        shown = _in_font(" ".join(text.split()))
        while room is not None and len(shown) > 1 and self.measure(shown, size) > room:
            shown = shown[:-2].rstrip() + "…"
        self.ax.text(x, y, shown, fontsize=size * 0.72, color=color, ha=ha, va="top", parse_math=False)

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

    def cell(self, place: int, per_line: int, tile: Size, *, caption: float) -> tuple[float, float]:
        """Where the tile number `place` of a block of lines begins."""
        line, column = divmod(place, per_line)
        return MARGIN + column * (tile[0] + GAP), self.top + line * (tile[1] + caption)

    def next_line(self, count: int, per_line: int, tile: Size, *, caption: float) -> None:
        """Go below a block of `count` tiles."""
        self.top += math.ceil(count / per_line) * (tile[1] + caption)

    def line(self, text: str) -> None:
        """A footnote over the whole width."""
        self.write(MARGIN, self.top + 6, text, 13, SOFT, room=WIDTH - 2 * MARGIN)
        self.top += 26

    def title(self, text: str, scale: Scale | None = None) -> None:
        """A block's title, and its colour strip with real numbers at the right."""
        self.write(MARGIN, self.top + 12, text, 16, room=WIDTH - 2 * MARGIN if scale is None else 560)
        if scale is not None:
            color = colors_of(scale[0] < 0).astype(np.float64)
            alpha = color[:, 3:] / 255
            strip = (color[:, :3] * alpha + 225 * (1 - alpha)).round().astype(np.uint8)
            self.image(np.repeat(strip[None], 2, 0), WIDTH - MARGIN - 220, self.top + 17, 150, 10)
            low, high = (_figures(value, scale) for value in scale)
            self.write(WIDTH - MARGIN - 228, self.top + 13, low, 13, SOFT, ha="right")
            self.write(WIDTH - MARGIN - 62, self.top + 13, high, 13, SOFT)
        self.top += 40

    def heading(self, run: Run) -> None:
        """The picture, and beside it the question, the answer, and what answered."""
        size = fit(run, HEAD)
        left, bottom = MARGIN + size[0] + 22, self.top + 28
        room = WIDTH - MARGIN - left
        pixels = Image.fromarray(run.picture).resize((size[0] * DENSITY, size[1] * DENSITY), Image.Resampling.LANCZOS)
        self.image(np.asarray(pixels), MARGIN, self.top, *size)
        self.write(left, self.top, run.question, 18, SOFT, room=room)
        answer = _in_font(" ".join(run.answer.split()))
        height = 30 if self.measure(answer, 30) <= room else 20
        lines = [""]
        for word in answer.split():
            # the last of three lines takes the rest, and is shortened
            fits = self.measure(f"{lines[-1]} {word}", height) <= room
            lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if fits or len(lines) == 3 else [*lines, word]
        for line in lines:
            self.write(left, bottom, line, height, room=room)
            bottom += round(1.3 * height)
        about = f"{run.model}, seed {run.seed}, {run.map.rows} × {run.map.cols} patches"
        self.write(left, bottom + 8, about, 14, SOFT, room=room)
        self.top += max(size[1], bottom + 26 - self.top) + 6


def _strongest(columns: list[Target], rel: Relevance, most: int) -> list[Target]:
    """Where there are more targets than room: those with the highest peaks in the first method, in reading order."""
    peaks = [float(rel.values[rel.targets.index(t)].max()) if t in rel.targets else -np.inf for t in columns]
    return [columns[i] for i in sorted(np.argsort(-np.array(peaks), kind="stable")[:most])]


def _said(run: Run, target: Target) -> str:
    """A word with its probability."""
    if target.kind == "answer":
        return "whole answer"
    if target.kind != "word":
        return f"{target.kind} {target.text}"
    start = run.segments["answer"][0]
    known = run.logprobs[target.positions[0] + 1 - start : target.positions[-1] + 2 - start]
    return f"{target.text}  {math.exp(float(known.sum())):.0%}" if len(known) == len(target.positions) else target.text


def _words_of_patch(sheet: _Sheet, lens: LogitLens, word: str, patch: tuple[int, int]) -> None:
    """A row per state: the patch's likeliest words, bars as long as they are probable."""
    sheet.title(f"Likeliest words at row {patch[0]}, column {patch[1]}")
    columns = min(lens.top_ids.shape[2], 5)
    wide, high = (WIDTH - 2 * MARGIN - 74 + GAP) // columns - GAP, 22
    hits = lens.matching(word)
    for number in some_states(len(lens.states), 9):
        sheet.write(MARGIN, sheet.top + 4, f"state {lens.states[number]}", 13, SOFT)
        ids = lens.top_ids[number, patch[0] * lens.map.cols + patch[1]]
        for place, (text, share) in enumerate(lens.at(lens.states[number], *patch)[:columns]):
            x = MARGIN + 74 + place * (wide + GAP)
            sheet.box(x, sheet.top, wide, high, facecolor=WASH)
            sheet.box(x, sheet.top, wide * share, high, facecolor=BAR)
            if ids[place] in hits:
                sheet.box(x, sheet.top, wide, high, facecolor="none", edgecolor=HIT, linewidth=1.5)
            sheet.write(x + 7, sheet.top + 4, _readable(text), 13, room=wide - 62)
            sheet.write(x + wide - 7, sheet.top + 5, f"{share:.0%}", 12, SOFT, ha="right")
        sheet.top += high + 4
    sheet.top += GAP


def _cutting(ax: Axes, sweep: FlowSweep, target: Target) -> None:
    """The change each flow's cut makes, a line per flow; a cross at the foot where nothing was measured."""
    change = sweep.change[..., sweep.targets.index(target)]
    ax.axhline(0, color="#767c88", linewidth=0.8)
    for number, (name, row) in enumerate(zip(sweep.flows, change, strict=True)):
        color, marker = FLOWS[number % len(FLOWS)], "os^D"[number % 4]
        ax.plot(sweep.centres, row, color=color, marker=marker, markersize=5, linewidth=1.5, label=name.replace("->", "→"))
        unmeasured = sweep.centres[~np.isfinite(row)]
        ax.plot(unmeasured, np.full(len(unmeasured), 0.03), "x", color=color, markersize=5, transform=ax.get_xaxis_transform())
    first, last = int(sweep.windows.min()), int(sweep.windows.max()) - 1
    layers = range(first, last + 1)
    ax.set_xticks(layers[:: math.ceil(len(layers) / 16)])
    ax.set_xlim(first - 0.5, last + 0.5)
    ax.margins(y=0.08)
    ax.grid(axis="y", color=RULE)
    _quiet(ax)
    ax.set_xlabel("layer (centre of the window that is cut)", fontsize=9, color=SOFT)
    unit = "logits" if target.against_ids else "nats"
    _titled(ax, "What cutting costs", f"change of {target.scored}, {unit}")
    ax.legend(fontsize=8, framealpha=0.8, edgecolor="none", loc="best", prop={"size": 8})


def _patching(ax: Axes, grid: PatchGrid, target: Target, component: int) -> None:
    """The share each place brings back, from blue (below 0) over grey (0) to orange (1); white where not measured."""
    values = grid.values[component, ..., grid.targets.index(target)]
    reach = float(min(2.0, max(1.0, np.nanmax(np.abs(values), initial=0.0))))
    colors = _colormap(diverging())
    shown = ax.imshow(np.ma.masked_invalid(values), cmap=colors, vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
    rows, columns = values.shape
    windows = [str(start) if stop - start == 1 else f"{start}-{stop - 1}" for start, stop in grid.windows.tolist()]
    across, down = math.ceil(columns * (0.6 + 0.4 * max(map(len, windows))) / 16), math.ceil(rows / 18)
    ax.set_xticks(range(0, columns, across), windows[::across])
    ax.set_yticks(range(0, rows, down), [_in_font(site) for site in grid.sites[::down]], parse_math=False)
    if columns <= 12 and rows <= 14:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = np.dot(colors((value / reach + 1) / 2)[:3], LUMINANCE) < 0.55
                ax.text(column, row, f"{value:.2f}".replace("-0.00", "0.00"), color=PAPER if dark else INK, fontsize=8,
                        ha="center", va="center")  # fmt: skip
    _quiet(ax)
    alone = all(stop - start == 1 for start, stop in grid.windows.tolist())
    ax.set_xlabel("layer patched" if alone else "layers patched together", fontsize=9, color=SOFT)
    about = f"share of clean {target.scored}, corrupted by {grid.corruption}"
    _titled(ax, f"What patching brings back: {grid.components[component]}", about)
    bar = ax.figure.colorbar(shown, cax=ax.inset_axes((0, -0.36, 0.45, 0.05)), orientation="horizontal", ticks=[0, 1])
    bar.ax.set_xlim(min(0.0, float(np.nanmin(values, initial=0))), reach)
    bar.ax.set_xticks([0, 1], ["0 as corrupted", "1 as clean"], fontsize=8, color=SOFT)
    bar.outline.set_visible(False)


def _titled(ax: Axes, title: str, about: str) -> None:
    ax.text(0, 1.14, _in_font(title), transform=ax.transAxes, fontsize=11.5, color=INK, parse_math=False)
    ax.text(0, 1.04, _in_font(about), transform=ax.transAxes, fontsize=9, color=SOFT, parse_math=False)


def _quiet(ax: Axes) -> None:
    ax.tick_params(length=0, labelsize=8.5, labelcolor=SOFT)
    ax.set_axisbelow(True)
    ax.spines[:].set_visible(False)


def _colormap(table: np.ndarray) -> ListedColormap:
    """A scale of the palette without its alpha; white where there is no number."""
    return ListedColormap(table[:, :3] / 255.0).with_extremes(bad=PAPER)


def _figures(value: float, scale: Scale) -> str:
    """Three figures; what is nothing beside the range is zero."""
    return f"{value:.3g}" if abs(value) > 1e-3 * (scale[1] - scale[0]) else "0"


def _readable(piece: str) -> str:
    """A piece of a word as a picture can write it."""
    return "".join(sign if sign.isprintable() else "?" for sign in piece.strip()) or "(space)"


def _in_font(text: str) -> str:
    """Signs that the font does not have as "?"; the page shows them all."""
    font = get_font(findfont(FONT))
    return "".join(sign if font.get_char_index(ord(sign)) else "?" for sign in text)
