"""Figures of what goes on inside a model: how it works, from the numbers of one real run, and its sinks, circuits and subspaces.

`journey` follows a picture through the three parts of a LLaVA to its answer; `matrices` shows small
matrices with their numbers, for arithmetic done by hand. What such a drawing needs beyond the run is given as plain numbers.

    journey(run, widths=(1024, 4096))
    matrices({"A": np.eye(2)}, labels=("the", "car"))

`sinks`, `circuit`, `interchange` and `mark_sinks` draw results. Each takes ``ax=`` and returns its Axes. No model and no torch.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.checks import array_of, entry, has_picture, is_list, is_whole, shown
from llava_lab.errors import OptionError
from llava_lab.geometry import PictureMap
from llava_lab.plots.axes import AS_TEXT, figure_of, new_axes, open_frame, panels
from llava_lab.plots.palette import BLUE, GREY, MARKERS, ORANGE, OTHER, RED, SEGMENTS, colormap, ink_on
from llava_lab.results import Circuit, Interchange, Run, Sinks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (10.0, 4.3)  # inches; one inch is one unit of the drawing
SIDE = 1.75  # of the picture and of its patches
TOP, BOTTOM = 3.15, 0.85  # heights at which the two rows are centred
INK, SOFT = "#2b303a", "#6a7280"
BOX_COLOR, PAD_COLOR = "#eef1f5", 0.88
PATCH_PIXELS, GAP_PIXELS, FINER = 20, 5, 3
MOST_DIGITS = 9
LARGEST_MATRIX = 64  # rows and columns of which each number can be written
ARROW = {"arrowstyle": "-|>", "color": SOFT, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}

Box = tuple[float, float, float, float]  # left, right, bottom, top


@entry
def journey(run: Run, *, widths: tuple[int, int] | None = None, ax: Axes | None = None) -> Axes:
    """Picture -> patches -> image tokens -> answer, with this run's own counts.

    `widths` is (numbers per patch after the vision encoder, numbers per token after the connector).

    >>> texts = [text.get_text() for text in plots.journey(run).texts]
    >>> "12 × 12 patches" in texts
    True
    """
    has_picture(run)
    if widths is not None and not (
        is_list(widths) and len(widths) == 2 and all(is_whole(width) and width > 0 for width in widths)
    ):
        raise OptionError(f"widths must be two whole numbers from 1, of a patch's and a token's vector, got {shown(widths)}")
    ax = _canvas(SIZE) if ax is None else ax
    ax.set(xlim=(0, SIZE[0]), ylim=(0, SIZE[1]), aspect="equal")
    ax.axis("off")
    rows, cols = run.map.rows, run.map.cols
    count = run.segments["image"][1] - run.segments["image"][0]
    _picture(ax, run.picture, 0.1, "the picture")
    _arrow(ax, 1.95, 2.4, TOP)
    _picture(ax, patch_mosaic(run.picture, run.map), 2.5, f"{rows} × {cols} patches")
    _arrow(ax, 4.35, 4.8, TOP)
    _part(ax, (4.9, 6.3, TOP - 0.5, TOP + 0.5), "vision\nencoder")
    _arrow(ax, 6.4, 7.55, TOP)
    _part(ax, (7.65, 9.05, TOP - 0.5, TOP + 0.5), "connector")
    if widths is not None:
        _under(ax, 6.97, TOP - 0.13, f"{count} vectors\nof {widths[0]} numbers")
        _under(ax, 8.35, TOP - 0.6, f"{count} vectors\nof {widths[1]} numbers")
    image = _strip(ax, run, 0.1, 5.7)
    bend = TOP - 1.3
    ax.plot([9.15, 9.5, 9.5, image], [TOP, TOP, bend, bend], color=SOFT, linewidth=1.2)
    ax.annotate("", (image, BOTTOM + 0.25), (image, bend), arrowprops=ARROW)
    _arrow(ax, 5.8, 6.2, BOTTOM)
    _part(ax, (6.3, 7.7, BOTTOM - 0.5, BOTTOM + 0.5), "language\nmodel")
    _arrow(ax, 7.8, 8.2, BOTTOM)
    answer = textwrap.fill(textwrap.shorten(run.answer_shown, 80, placeholder=" …"), 16)
    ax.text(8.3, BOTTOM, answer, ha="left", va="center", fontsize=12, color=SEGMENTS["answer"], weight="bold", **AS_TEXT)
    return ax


@entry
def matrices(
    given: Mapping[str, np.ndarray], *, labels: Sequence[str] = (), ax: Sequence[Axes] | None = None, digits: int = 2
) -> Figure:
    """Small matrices side by side, darker for larger, each number written in its cell; zeros are left blank.

    >>> figure = plots.matrices({"A": np.eye(2), "B": np.ones((2, 2))}, labels=("the", "car"))
    >>> [ax.get_title() for ax in figure.axes]
    ['A', 'B']
    """
    if not given:
        raise OptionError("expected at least one matrix to draw, got none")
    numbers = {name: _numbers(name, values) for name, values in given.items()}
    if not 0 <= digits <= MOST_DIGITS:
        raise OptionError(f"digits must be from 0 to {MOST_DIGITS}, got {digits}")
    high, wide = next(iter(numbers.values())).shape
    drawn = panels(ax, len(numbers), (0.62 * wide + 0.75, 0.62 * high + 0.6))
    for panel, (title, values) in zip(drawn, numbers.items(), strict=True):
        _matrix(panel, values, title, labels, digits)
    return figure_of(drawn[0])


@entry
def patch_mosaic(picture: np.ndarray, where: PictureMap) -> np.ndarray:
    """The model's square as its patches with white gaps, float (height, width, 3) in 0..1; padding is light grey.

    >>> plots.patch_mosaic(run.picture, run.map).shape  # 12 patches of 20 pixels, with gaps of 5
    (295, 295, 3)
    """
    picture = array_of("picture", picture)
    if picture.shape != (where.height, where.width, 3) or not picture.size or picture.dtype.kind not in "uif":
        wanted = f"({where.height}, {where.width}, 3)"
        raise OptionError(f"picture must be that of the map, numbers of the shape {wanted}, got {picture.shape}")
    height, width = picture.shape[:2]
    fine = PATCH_PIXELS * FINER
    y = ((np.arange(where.rows * fine) + 0.5) * where.size / (where.rows * fine) - where.offset_y) / where.scale_y
    x = ((np.arange(where.cols * fine) + 0.5) * where.size / (where.cols * fine) - where.offset_x) / where.scale_x
    there = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))[None, :]
    iy, ix = np.clip(y.astype(int), 0, height - 1), np.clip(x.astype(int), 0, width - 1)
    square = np.where(there[..., None], picture[iy][:, ix] / 255.0, PAD_COLOR)
    patches = square.reshape(where.rows, PATCH_PIXELS, FINER, where.cols, PATCH_PIXELS, FINER, 3).mean((2, 5))
    step = PATCH_PIXELS + GAP_PIXELS
    mosaic = np.ones((where.rows, step, where.cols, step, 3))
    mosaic[:, :PATCH_PIXELS, :, :PATCH_PIXELS] = patches
    return mosaic.reshape(where.rows * step, where.cols * step, 3)[:-GAP_PIXELS, :-GAP_PIXELS]


def _numbers(name: Any, values: Any) -> np.ndarray:
    """A small matrix as floats. Raises OptionError."""
    array = array_of(f"the matrix {name!r}", values)
    if array.ndim != 2 or not array.size or array.dtype.kind not in "biuf" or max(array.shape) > LARGEST_MATRIX:
        wanted = f"rows and columns of numbers, at most {LARGEST_MATRIX} of each"
        raise OptionError(f"the matrix {name!r} must have {wanted}, got {array.dtype} of the shape {array.shape}")
    return array.astype(float)


def _canvas(size: tuple[float, float]) -> Axes:
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=size)
    return figure.add_axes((0, 0, 1, 1))


def _picture(ax: Axes, pixels: np.ndarray, left: float, label: str) -> None:
    height, width = pixels.shape[:2]
    w, h = SIDE * width / max(width, height) / 2, SIDE * height / max(width, height) / 2
    middle = left + SIDE / 2
    ax.imshow(pixels, extent=(middle - w, middle + w, TOP - h, TOP + h), interpolation="antialiased")
    ax.set(xlim=(0, SIZE[0]), ylim=(0, SIZE[1]))  # imshow moves them
    _under(ax, middle, TOP - SIDE / 2 - 0.08, label)


def _part(ax: Axes, box: Box, name: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    left, right, bottom, top = box
    style = "round,pad=0,rounding_size=0.12"
    ax.add_patch(FancyBboxPatch((left, bottom), right - left, top - bottom, boxstyle=style, facecolor=BOX_COLOR, edgecolor=SOFT))
    ax.text((left + right) / 2, (bottom + top) / 2, name, ha="center", va="center", fontsize=12, color=INK)


def _strip(ax: Axes, run: Run, left: float, right: float) -> float:
    """The prompt as coloured blocks, wider for more tokens (by the root, so that all can be read); the image's middle."""
    from matplotlib.patches import Rectangle

    blocks = {name: stop - start for name, (start, stop) in run.segments.items() if name != "answer" and stop > start}
    sizes = np.sqrt(np.array(list(blocks.values()), float))
    sizes = np.maximum(sizes / sizes.sum(), 0.15)
    edges = left + np.concatenate([[0], np.cumsum(sizes / sizes.sum())]) * (right - left)
    middles = dict(zip(blocks, (edges[:-1] + edges[1:]) / 2, strict=True))
    for i, (name, count) in enumerate(blocks.items()):
        color = SEGMENTS.get(name, OTHER)
        ax.add_patch(Rectangle((edges[i], BOTTOM - 0.2), edges[i + 1] - edges[i] - 0.05, 0.4, facecolor=color, linewidth=0))
        ax.text(middles[name], BOTTOM, name, ha="center", va="center", fontsize=9, color="white", weight="bold")
        _under(ax, middles[name], BOTTOM - 0.26, f"{count}")
    _under(ax, (left + right) / 2, BOTTOM - 0.48, "tokens of the prompt, in order")
    return float(middles["image"])


def _matrix(ax: Axes, values: np.ndarray, title: str, labels: Sequence[str], digits: int) -> None:
    shown = ax.imshow(values, cmap=colormap(False), vmin=0, vmax=max(float(values.max()), 1e-9))
    for (row, col), value in np.ndenumerate(values):
        if value:
            color = ink_on(shown.to_rgba(value))
            ax.text(col, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=9, color=color)
    for axis, size in ((ax.xaxis, values.shape[1]), (ax.yaxis, values.shape[0])):
        axis.set_ticks(range(size), list(labels) if len(labels) == size else [""] * size, fontsize=9, **AS_TEXT)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=10, **AS_TEXT)


def _arrow(ax: Axes, start: float, stop: float, height: float) -> None:
    ax.annotate("", (stop, height), (start, height), arrowprops=ARROW)


def _under(ax: Axes, x: float, y: float, text: str) -> None:
    ax.text(x, y, text, ha="center", va="top", fontsize=9, color=SOFT, linespacing=1.25)


# -- sinks, circuits, subspaces -------------------------------------------------------------


@entry
def sinks(result: Sinks, *, ax: Axes | None = None) -> Axes:
    """By layer: what the most attended patch draws (blue) and how long the longest state is (red), beside the first position.

    Full where a patch, dashed where the first position; dotted lines are what makes a sink, and it needs both.

    >>> ax = plots.sinks(ll.sinks(lab, run, progress=False))
    >>> ax.get_ylabel()
    'times even share; times median'
    """
    ax = ax if ax is not None else new_axes((max(4.6, 1.6 + 0.22 * len(result.layers)), 3.2))
    at = np.arange(len(result.layers))
    for number, (values, color, limit, name) in enumerate(
        ((result.drawn, BLUE, "attended", "drawn"), (result.length, RED, "long", "length"))
    ):
        ax.plot(at, values.max((0, 2, 3)), color=color, marker="o", markersize=3, label=f"{name}, largest patch")
        ax.plot(at, result.first[:, number], color=color, linestyle="--", linewidth=1, label=f"{name}, first position")
        ax.axhline(result.limits[limit], color=color, linestyle=":", linewidth=1)
    ax.set_yscale("symlog", linthresh=1)
    ax.set_ylim(0, None)
    ticks = [tick for tick in (0, *(step * 10**power for power in range(6) for step in (1, 2, 5))) if tick <= ax.get_ylim()[1]]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xticks(at, [name.replace("language", "LM") for name in result.layers], rotation=90, fontsize=7)
    ax.set_ylabel("times even share; times median", fontsize=8)
    ax.legend(frameon=False, fontsize=7)
    open_frame(ax)
    return ax


@entry
def circuit(result: Circuit, *, ax: Axes | None = None) -> Axes:
    """Faithfulness against the share of edges kept, with its 95% interval over pairs; grey are random circuits, a line a draw.

    >>> found = ll.circuit(lab, n=1, held=1, shares=(0.05, 1.0), draws=1, progress=False)
    >>> plots.circuit(found).get_xlabel()
    'edges kept, % of 6628'
    """
    ax = ax if ax is not None else new_axes((5.0, 3.2))
    at = 100 * result.shares
    for number, drawn in enumerate(result.chance):
        label = f"random (CPR {result.random_cpr:.2f}, CMD {result.random_cmd:.2f})" if number == 0 else None
        ax.plot(at, drawn.mean(1), color="0.6", linewidth=1, label=label)
    low, high = result.interval().T
    ax.fill_between(at, low, high, color=BLUE, alpha=0.2, linewidth=0)
    mean = result.faithfulness.mean(1)
    ax.plot(at, mean, color=BLUE, marker="o", markersize=4, label=f"best edges (CPR {result.cpr:.2f}, CMD {result.cmd:.2f})")
    for level in (0, 1):
        ax.axhline(level, color="0.8", linewidth=0.8, zorder=0)
    ax.set_xscale("log")
    ax.set(xlabel=f"edges kept, % of {result.edges}", ylabel="faithfulness (1: the whole model)", title=result.variable)
    ax.legend(frameon=False, fontsize=8)
    open_frame(ax)
    return ax


@entry
def interchange(result: Interchange, *, ax: Axes | None = None) -> Axes:
    """How often the answer becomes the source's, by layer, for the subspace that was found (blue) and beside it its placebos.

    Dashed: how often the answer about the other variable stays, with the found subspace. Bands are 95% intervals over pairs.

    >>> found = ll.interchange(lab, layers=[4], n=2, held=2, epochs=1, progress=False)
    >>> plots.interchange(found).get_xlabel()
    'after so many layers'
    """
    ax = ax if ax is not None else new_axes((5.0, 3.2))
    edges = result.interval()
    for arm, (name, color) in enumerate(zip(result.ARMS, (BLUE, GREY, ORANGE, RED, SOFT), strict=True)):
        label = {"found": f"{result.dim} dimensions, found", "whole": f"whole state, {result.width}"}.get(name, name)
        style: dict[str, Any] = {"linestyle": ":", "zorder": 1} if name == "whole" else {}
        ax.plot(result.layers, result.iia[:, arm], color=color, marker=MARKERS[arm], markersize=4, label=label, **style)
        if name == "found":
            ax.fill_between(result.layers, *edges[:, arm].T, color=color, alpha=0.2, linewidth=0)
            kept = result.alone[:, arm]
            ax.plot(result.layers, kept, color=color, linestyle="--", linewidth=1, label=f"found: the {result.beside} stays")
    ax.set_xticks(result.layers)
    ax.set_ylim(-0.03, 1.03)
    ax.set(xlabel="after so many layers", ylabel="share of answers", title=f"{result.variable}, at {result.position}")
    ax.legend(frameon=False, fontsize=8)
    open_frame(ax)
    return ax


@entry
def mark_sinks(ax: Axes, run: Run, result: Sinks, *, number: int = 0, part: str = "language") -> Axes:
    """Mark on a map drawn by `overlay` what draws attention in a part: rings are sinks, small crosses attended and no outlier.

    `number` says which run of `result` it is.

    >>> ax = plots.overlay(run, ll.attribute(lab, run, method="attention"))
    >>> len(plots.mark_sinks(ax, run, ll.sinks(lab, run, progress=False)).collections) > 0
    True
    """
    if result.fingerprint != run.fingerprint or (result.map.rows, result.map.cols) != (run.map.rows, run.map.cols):
        raise OptionError("expected the sinks of this run, got those of another checkpoint or grid")
    found = set(result.patches(part, run=number))
    attended = [patch for patch in result.patches(part, run=number, mark="attended") if patch not in found]
    marks: tuple[tuple[Any, dict[str, Any]], ...] = (
        (sorted(found), {"marker": "o", "s": 60, "facecolors": "none", "edgecolors": RED, "linewidths": 1.5, "label": "sink"}),
        (attended, {"marker": "x", "s": 14, "color": "0.25", "linewidths": 0.8, "label": "attended, no outlier"}),
    )
    for patches, style in marks:
        if patches:
            boxes = np.array([run.map.patch_box(row, col) for row, col in patches])
            ax.scatter(boxes[:, [0, 2]].mean(1), boxes[:, [1, 3]].mean(1), **style)
    if found or attended:
        ax.legend(frameon=True, fontsize=7, loc="lower right")
    return ax
