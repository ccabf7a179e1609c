"""FlowView as a still picture: the curves of the sweep beside the heat map of the patching, for viewers that run no code.

The same colours, marks and scales as in the page. Shapes are drawn large and made small, which smooths their edges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from widgets.flow_pack import what_of, window_name
from widgets.palette import diverging
from widgets.still import INK, MARGIN, PAPER, SOFT, WIDTH, encode, font_of, footnote, heading, stack, write

if TYPE_CHECKING:
    from llava_lab.results import FlowSweep, PatchGrid, Run, Target

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's
GRID_LINE, ZERO_LINE = "#e3e5e9", "#767c88"
FINER = 3  # shapes are drawn so many times larger
HEIGHT, TOP, BOTTOM = 352, 62, 46
AXIS, NAMES, SITES = 50, 136, 74  # room for numbers, for the flows' names, for the sites' names
BETWEEN = 34  # the two halves
MARK, GAP = 4, 15
TALLEST, SMALLEST = 240, 3  # a heat map's height; a cell's
FITS = 30  # a cell this wide has room for its number
LARGEST_REACH = 2.0

Point = tuple[float, float]


def draw_flow(
    run: Run, sweep: FlowSweep | None, grid: PatchGrid | None, target: Target, *, component: int, selected: dict[str, Any]
) -> bytes:
    """Both halves for one target as PNG bytes; a half without the target is left out."""
    halves: list[Callable[[int], Image.Image]] = []
    parts = [heading(run)]
    if sweep is not None and target in sweep.targets:
        halves.append(lambda width: curves(sweep, target, width))
        spot = selected.get("flow")
        parts += [footnote(cut_sentence(sweep, target, spot))] if spot else []
    if grid is not None and target in grid.targets:
        halves.append(lambda width: cells(grid, target, component, width))
        spot = selected.get("cell")
        parts += [footnote(patch_sentence(grid, target, component, spot))] if spot else []
    room = (WIDTH - 2 * MARGIN - BETWEEN * (len(halves) - 1)) // len(halves)
    drawn = [half(min(room, 640)) for half in halves]
    row = Image.new("RGB", (WIDTH, max(one.height for one in drawn)), PAPER)
    for i, one in enumerate(drawn):
        row.paste(one, (MARGIN + i * (room + BETWEEN), 0))
    return encode(stack([parts[0], row, *parts[1:]]))


def curves(sweep: FlowSweep, target: Target, width: int) -> Image.Image:
    """The change each flow's cut makes, a line per flow, its name at its end."""
    change = sweep.change[..., sweep.targets.index(target)]
    plot = Axes.around(change, sweep.windows, width)
    names = spread_out([plot.end(row, sweep.centres)[1] for row in change], GAP, TOP, plot.bottom)

    def shapes(pen: Pen) -> None:
        for value in plot.ticks:
            pen.line([(plot.left, plot.y(value)), (plot.right, plot.y(value))], GRID_LINE if value else ZERO_LINE, 1)
        for i, row in enumerate(change):
            color, end = COLORS[i % len(COLORS)], plot.end(row, sweep.centres)
            points = [(plot.x(float(centre)), plot.y(float(value))) for centre, value in zip(sweep.centres, row, strict=True)]
            for part in unbroken(points, np.isfinite(row)):
                pen.line(part, color, 2)
            pen.line([(end[0] + 8, end[1]), (plot.right + 6, names[i])], "#c4c8d0", 1)
            for point, value in zip(points, row, strict=True):
                if np.isfinite(value):
                    pen.mark(i, point)
                else:
                    pen.cross((point[0] + 7 * (i % len(COLORS)) - 7, plot.bottom - 11), color)
            pen.mark(i, (plot.right + 10, names[i]))

    image, pen = _drawn(width, HEIGHT, shapes)
    _titles(pen, "What cutting costs", f"change of {what_of(target)}, {'logits' if target.against_ids else 'nats'}", width)
    for value in plot.ticks:
        said = f"{value:+g}" if value else "0"
        write(pen, (plot.left - 8 - pen.textlength(said, font=font_of(12)), plot.y(value) - 8), said, 12, SOFT, plot.left)
    layers = range(plot.first, plot.last + 1)
    for layer in layers[:: max(1, int(np.ceil(20 * len(layers) / (plot.right - plot.left))))]:
        _middle(pen, plot.x(layer), plot.bottom + 6, str(layer))
    _middle(pen, (plot.left + plot.right) / 2, plot.bottom + 25, "layer (centre of the window that is cut)")
    for i, name in enumerate(sweep.flows):
        write(pen, (plot.right + 18, names[i] - 8), name, 13, INK, width - plot.right - 18)
    return image


@dataclass(frozen=True)
class Axes:
    """Where layers and changes lie in the picture of the curves."""

    left: float
    right: float
    bottom: float
    lo: float
    hi: float
    first: int
    last: int

    @classmethod
    def around(cls, change: np.ndarray, windows: np.ndarray, width: int) -> Axes:
        known = change[np.isfinite(change)]
        lo, hi = float(known.min(initial=0)), float(known.max(initial=0))
        air = 0.08 * (hi - lo) or 1.0
        return cls(AXIS, width - NAMES, HEIGHT - BOTTOM, lo - air, hi + air, int(windows.min()), int(windows.max()) - 1)

    @property
    def ticks(self) -> list[float]:
        return nice_ticks(self.lo, self.hi, 5)

    def x(self, layer: float) -> float:
        return self.left + (layer - self.first + 0.5) / (self.last - self.first + 1) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.lo) / (self.hi - self.lo) * (self.bottom - TOP)

    def end(self, row: np.ndarray, centres: np.ndarray) -> Point:
        """Where a curve ends; the corner of the plot where nothing of it was measured."""
        at = np.flatnonzero(np.isfinite(row))
        return (self.x(float(centres[at[-1]])), self.y(float(row[at[-1]]))) if len(at) else (self.right, self.bottom)


def cells(grid: PatchGrid, target: Target, component: int, width: int) -> Image.Image:
    """The share each place brings back, in colours from blue (below 0) over grey (0) to orange (1)."""
    values = grid.values[component, ..., grid.targets.index(target)]
    rows, columns = values.shape
    wide, high = (width - SITES) / columns, max(SMALLEST, min(56, TALLEST // rows))
    bottom, reach, low = TOP + rows * high, reach_of(values), min(0.0, float(np.nanmin(values, initial=0)))

    def shapes(pen: Pen) -> None:
        for (row, column), value in np.ndenumerate(values):
            left, top = SITES + column * wide, TOP + row * high
            box = [left, top, left + wide - (1 if wide > 9 else 0), top + high - (1 if high > 9 else 0)]
            if np.isfinite(value):
                pen.box(box, share_color(value, reach))
            else:
                pen.line([(box[0], box[3]), (box[2], box[1])], ZERO_LINE, 1)
        for step in range(120):
            share = low + step / 119 * (max(1.0, reach) - low)
            pen.box([SITES + step * 1.5, bottom + 58, SITES + step * 1.5 + 2, bottom + 68], share_color(share, reach))

    image, pen = _drawn(width, bottom + BOTTOM + 42, shapes)
    about = f"share of clean {what_of(target)}, corrupted by {grid.corruption}"
    _titles(pen, f"What patching brings back: {grid.components[component]}", about, width)
    for row in range(0, rows, max(1, int(np.ceil(14 / high)))):
        said = grid.sites[row]
        room = min(SITES - 8, pen.textlength(said, font=font_of(13)))
        write(pen, (SITES - 8 - room, TOP + (row + 0.5) * high - 9), said, 13, INK, SITES - 8)
    names = [str(start) if stop - start == 1 else f"{start}-{stop - 1}" for start, stop in grid.windows.tolist()]
    room = 10 + max(pen.textlength(name, font=font_of(12)) for name in names)
    for column in range(0, columns, max(1, int(np.ceil(room / wide)))):
        _middle(pen, SITES + (column + 0.5) * wide, bottom + 6, names[column])
    alone = all(stop - start == 1 for start, stop in grid.windows.tolist())
    _middle(pen, SITES + columns * wide / 2, bottom + 25, "layer patched" if alone else "layers patched together")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value) and wide >= FITS and high >= 16:
            ink = "#ffffff" if np.dot(share_color(value, reach), (0.299, 0.587, 0.114)) < 140 else INK
            _middle(pen, SITES + (column + 0.5) * wide, TOP + (row + 0.5) * high - 8, plain(float(value)), ink)
    write(pen, (SITES + 188, bottom + 54), f"{low:.2g} to {reach:.2g}; 0 as corrupted, 1 as clean", 12, SOFT, width)
    return image


def share_color(value: float, reach: float) -> tuple[int, int, int]:
    """The colour of a share, as in the page."""
    red, green, blue, _ = diverging()[round(255 * (float(np.clip(value / reach, -1, 1)) + 1) / 2)]
    return int(red), int(green), int(blue)


def cut_sentence(sweep: FlowSweep, target: Target, spot: Sequence[int]) -> str:
    """What one cut did, in words."""
    at = sweep.targets.index(target)
    cut = f"Cutting {sweep.flows[spot[0]]} in {window_name(sweep.windows[spot[1]])}"
    after = float(sweep.after[spot[0], spot[1], at])
    if not np.isfinite(after):
        return f"{cut}: not measured."
    change = after - float(sweep.before[at])
    way = "lowers" if change < 0 else "raises"
    return f"{cut} {way} {what_of(target)} by {abs(change):.2f}, from {plain(float(sweep.before[at]))} to {plain(after)}."


def patch_sentence(grid: PatchGrid, target: Target, component: int, spot: Sequence[int]) -> str:
    """What one patched place brought back, in words."""
    at = (component, spot[0], spot[1], grid.targets.index(target))
    put = f"Clean {grid.components[component]} at {grid.sites[spot[0]]}, {window_name(grid.windows[spot[1]])}"
    if not np.isfinite(grid.values[at]):
        return f"{put}: not measured, or nothing to bring back."
    said = f'the answer is "{grid.answers[at[:3]]}" (clean "{grid.clean_answer}", corrupted "{grid.corrupt_answer}")'
    return f"{put}, brings back {plain(float(grid.values[at]))} of what {what_of(target)} lost; {said}."


def plain(value: float) -> str:
    """Two decimals, and no minus before nothing."""
    said = f"{value:.2f}"
    return "0.00" if said == "-0.00" else said


def reach_of(values: np.ndarray) -> float:
    """How far the colours reach either side of zero: at least to one."""
    known = np.abs(values[np.isfinite(values)])
    return float(min(LARGEST_REACH, max(1.0, known.max(initial=0.0))))


def nice_ticks(lo: float, hi: float, most: int) -> list[float]:
    """Round numbers that span a range, zero among them where it lies inside."""
    rough = (hi - lo) / most
    ten = 10.0 ** np.floor(np.log10(rough))
    gap = next(step * ten for step in (1, 2, 5, 10) if step * ten >= rough)
    return [float(f"{i * gap:.10g}") for i in range(int(np.ceil(lo / gap - 1e-9)), int(np.floor(hi / gap + 1e-9)) + 1)]


def spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near to those wanted as a gap between them allows."""
    out, before, after = list(wanted), low - gap, high + gap
    order = sorted(range(len(out)), key=lambda i: wanted[i])
    for i in order:
        before = out[i] = max(out[i], before + gap)
    for i in reversed(order):
        after = out[i] = min(out[i], after - gap)
    return out


def unbroken(points: Sequence[Point], known: np.ndarray) -> list[list[Point]]:
    """The points in runs without a gap."""
    runs: list[list[Point]] = [[]]
    for point, one in zip(points, known, strict=True):
        if one:
            runs[-1].append(point)
        else:
            runs.append([])
    return [one for one in runs if len(one) > 1]


class Pen:
    """Draws in page pixels on a canvas `FINER` times larger."""

    def __init__(self, image: Image.Image) -> None:
        self.pen = ImageDraw.Draw(image)

    def line(self, points: Sequence[Point], color: str, width: int) -> None:
        self.pen.line([(x * FINER, y * FINER) for x, y in points], fill=color, width=width * FINER, joint="curve")

    def box(self, box: Sequence[float], color: Any) -> None:
        left, top, right, bottom = (round(one * FINER) for one in box)
        self.pen.rectangle([left, top, right - 1, bottom - 1], fill=color)

    def cross(self, at: Point, color: str) -> None:
        x, y = at
        self.line([(x - 3, y - 3), (x + 3, y + 3)], color, 1)
        self.line([(x - 3, y + 3), (x + 3, y - 3)], color, 1)

    def mark(self, flow: int, at: Point) -> None:
        """A disc, square, triangle or diamond in the flow's colour."""
        x, y, size, color = at[0] * FINER, at[1] * FINER, MARK * FINER, COLORS[flow % len(COLORS)]
        if flow % 4 == 0:
            self.pen.ellipse([x - size, y - size, x + size, y + size], fill=color)
            return
        corners = (
            [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
            [(0, -1.3), (1.2, 0.9), (-1.2, 0.9)],
            [(0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)],
        )[flow % 4 - 1]
        self.pen.polygon([(x + size * a, y + size * b) for a, b in corners], fill=color)


def _drawn(width: int, height: int, shapes: Callable[[Pen], None]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    large = Image.new("RGB", (width * FINER, height * FINER), PAPER)
    shapes(Pen(large))
    image = large.resize((width, height), Image.Resampling.BOX)
    return image, ImageDraw.Draw(image)


def _titles(pen: ImageDraw.ImageDraw, title: str, about: str, width: int) -> None:
    write(pen, (0, 10), title, 16, INK, width)
    write(pen, (0, 35), about, 13, SOFT, width)


def _middle(pen: ImageDraw.ImageDraw, x: float, y: float, text: str, ink: str = SOFT) -> None:
    write(pen, (x - pen.textlength(text, font=font_of(12)) / 2, y), text, 12, ink, WIDTH)
