"""What each widget shows, as one still picture: for saved notebooks, code hosts and nbconvert, where no script runs.

One function for each widget, from results alone, with the colours of the page (`llava_lab.plots.palette`). Each gives a
matplotlib Figure 960 units wide; `png` gives its bytes, as many pixels wide, the same bytes for the same result.

    figure = stills.word_maps(run, {"rollout": relevance})
    data = stills.png(figure)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from llava_lab.plots.palette import FLOWS, INK, LINES, PAPER, RULE, SOFT, WASH, colormap, ink_on
from llava_lab.plots.sheet import (
    GAP,
    MARGIN,
    WIDTH,
    Scale,
    Sheet,
    fit,
    overlay,
    plain_style,
    png,
    quiet,
    range_over,
    titled,
)
from llava_lab.results.run import above_noise
from llava_lab.results.table import NEGLIGIBLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from llava_lab.geometry import PictureMap
    from llava_lab.results import FlowSweep, HeadMaps, LogitLens, NearestWords, PatchGrid, Relevance, Run, Target

__all__ = [
    "connector_maps",
    "fit",
    "flow_and_patching",
    "head_maps",
    "lens_states",
    "losses",
    "method_maps",
    "overlay",
    "png",
    "range_over",
    "some_states",
    "word_maps",
]

MOST_WORDS, MOST_METHODS, MOST_TILES = 14, 4, 30
BAR, HIT = "#b9cff2", "#d98a1f"  # of the lens's words: how likely, and the word looked for


@plain_style
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
    sheet = Sheet(run)
    shown = dict(list(maps.items())[:MOST_METHODS])
    explained = list(dict.fromkeys(target for rel in shown.values() for target in rel.targets))
    every = [target for target in run.word_targets() if target in explained] or explained
    fitting = (WIDTH - 2 * MARGIN + GAP) // (116 + GAP)
    columns = _strongest(every, next(iter(shown.values())), MOST_WORDS if len(shown) == 1 else fitting)
    per_line = min(len(columns), fitting)
    side = min(190, (WIDTH - 2 * MARGIN + GAP) // per_line - GAP)
    tile = fit(run, side)
    for name, rel in shown.items():
        scale = (scales or {}).get(name) or range_over([rel.values])
        better = (beats or {}).get(name, ())
        sheet.title(f"{name} (control)" if name in controls else name, scale)
        below = {t: _below(rel.drawn[i], run.map, rel.noise_floor[i]) for i, t in enumerate(rel.targets) if t in columns}
        nothing = {target for target, (count, whole) in below.items() if count == whole}
        said = _said_below([below[target] for target in below if target not in nothing])
        left = MARGIN + sheet.measure(name, 16) + (80 if name in controls else 0) + 16
        beside = sheet.fits(said, 13, WIDTH - MARGIN - 320 - left)  # the colours' numbers and strip
        if said and beside:
            sheet.write(left, sheet.top - 25, said, 13, SOFT)
        for x, y, target in sheet.tiles(columns, per_line, (side, tile[1]), caption=26):
            if target in rel.targets:
                index = rel.targets.index(target)
                sheet.tile(run, rel.drawn[index], scale, (x, y), tile, doubtful=bool(better) and better[index] is False)
            else:
                sheet.box(x, y, *tile, facecolor=WASH)
                sheet.write(x + 10, y + tile[1] / 2 - 8, "no map", color=SOFT)
            text, likely = _with_probability(run, target)
            sheet.write(x, y + tile[1] + 4, text, 14, SOFT if target in nothing else INK, room=side, end=likely)
            if target in nothing:
                _tag(sheet, x, y + tile[1])
        if said and not beside:
            sheet.line(said)
    left_out = [f"{len(columns)} of {len(every)} words, those with the highest peaks"] if len(columns) < len(every) else []
    left_out += [f"{len(shown)} of {len(maps)} methods"] if len(shown) < len(maps) else []
    left_out += [note] if note else []
    if left_out:
        sheet.line("Shown here: " + "; ".join(left_out))
    return sheet.done()


@plain_style
def method_maps(
    run: Run,
    maps: Mapping[str, np.ndarray | None],
    *,
    about: str = "",
    scores: Mapping[str, float | None] | None = None,
    doubtful: Collection[str] = (),
    floors: Mapping[str, float] | None = None,
    columns: int = 5,
) -> Figure:
    """One small map per method, in the order given, with its score: the still of `CompareView`.

    `maps` are (rows, cols), None where a method has no map of this target. Each has the colours of its own range; those
    named in `doubtful` were not shown to beat random maps and are grey. `floors` are the noise floors of the maps that have
    one: what does not reach it is 0 in the map and negligible. `about` is the sentence above them.
    """
    sheet = Sheet(run)
    if about:
        sheet.line(about)
    side = (WIDTH - 2 * MARGIN + GAP) // columns - GAP
    tile, shown = fit(run, side), list(maps.items())[:MOST_TILES]
    said = {name: "" if score is None else f"{score:.3g}" for name, score in (scores or {}).items()}
    under = {name: _below(values, run.map, (floors or {}).get(name, 0.0)) for name, values in shown if values is not None}
    nothing = {name for name, (count, whole) in under.items() if count == whole}
    below = any(sheet.measure(name, 14) + sheet.measure(said.get(name, ""), 14) > side - 8 for name, _ in shown)
    for x, y, (name, values) in sheet.tiles(shown, columns, (side, tile[1]), caption=54 if below else 38):
        if values is None:
            sheet.box(x, y, *tile, facecolor=WASH)
            sheet.write(x + 10, y + tile[1] / 2 - 8, "no map for this", color=SOFT)
        else:
            sheet.tile(run, values, range_over([values]), (x, y), tile, doubtful=name in doubtful)
            if name in nothing:
                _tag(sheet, x, y + tile[1])
        text, color = said.get(name, ""), SOFT if values is None or name in doubtful or name in nothing else INK
        sheet.write(x, y + tile[1] + 5, name, 14, color, room=side if below else side - sheet.measure(text, 14) - 8)
        if below:
            sheet.write(x, y + tile[1] + 24, text, 14, color)
        else:
            sheet.write(x + side, y + tile[1] + 5, text, 14, color, ha="right")
    notes = ["Grey: not shown to beat random maps."] if any(name in doubtful for name, _ in shown) else []
    notes.append(_said_below([counts for name, counts in under.items() if name not in nothing]))
    if any(notes):
        sheet.line(" ".join(filter(None, notes)))
    if len(shown) < len(maps):
        sheet.line(f"Shown here: {len(shown)} of {len(maps)} methods.")
    return sheet.done()


@plain_style
def head_maps(run: Run, heads: HeadMaps, targets: Sequence[int], *, rows: int = 5, best: int = 3) -> Figure:
    """Per word its layers-by-heads matrix and the maps of the heads that look most: the still of `HeadGrid`.

    One colour scale for all matrices; each map has the colours of its own range. The last `rows` of `targets` are drawn.
    Attention is read off, not an effect on a score, so it has no noise floor.
    """
    sheet = Sheet(run)
    shares = heads.image_share
    top = float(shares[list(targets)].max())
    sheet.line(f"Attention of each head on the picture, from 0% to {top:.0%}; rows are layers, columns heads.")
    shown, (layers, count) = targets[-rows:], shares.shape[1:]
    cell = max(2, 250 // max(layers, count))
    first = MARGIN + 34 + count * cell + 3 * GAP
    side = min(250, (WIDTH - MARGIN - first + GAP) // best - GAP)
    tile = fit(run, side)
    for index in shown:
        share, target = shares[index], heads.targets[index]
        text = "whole answer" if target.kind == "answer" else target.text
        sheet.title(f'"{text}"', end=f": {share.mean():.1%} of its attention on the picture, mean over all heads")
        axes = sheet.axes(MARGIN + 34, sheet.top, count * cell, layers * cell)
        axes.imshow(share, cmap=colormap(False), vmin=0, vmax=top or 1, aspect="auto", interpolation="nearest")
        step = max(1, 2 ** math.ceil(math.log2(14 / cell))) if cell < 14 else 1
        axes.set_yticks(range(0, layers, step), [str(layer) for layer in range(0, layers, step)])
        axes.set_xticks([])
        quiet(axes)
        for place, flat in enumerate(np.argsort(-share, axis=None, kind="stable")[:best]):
            layer, head = divmod(int(flat), count)
            x, values = first + place * (side + GAP), heads.values[index, layer, head].astype(np.float32)
            sheet.tile(run, values, (0.0, float(values.max())), (x, sheet.top), tile)
            caption = f"layer {layer}, head {head}: {share[layer, head]:.0%}"
            sheet.write(x, sheet.top + tile[1] + 5, caption, 14, room=side)
        sheet.top += max(layers * cell, tile[1] + 26) + GAP
    if len(shown) < len(heads.targets):
        sheet.line(f"Shown here: {len(shown)} of {len(heads.targets)} words.")
    return sheet.done()


@plain_style
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

    Entropy where no `word` is looked for or none is known. `patch` counts row by row; by default it is where on the picture
    the word is likeliest, else the one the last state is surest of, the first of those that are as likely in whole per cent.
    """
    sheet = Sheet(run)
    known = lens.knows(word)
    values = lens.probability_of(word) if known else lens.entropy.astype(np.float64)
    if patch is None:
        sure = values.max(0) if known else lens.top_probs[-1, :, 0]
        # in per cent, as it is written: among patches that are as sure, rounding in the last bit shall not choose
        patch = int(np.where(lens.map.coverage().ravel() > 0, np.round(100 * sure), -1).argmax())
    shown = some_states(len(lens.states), 7, None if state is None else lens.states.index(state))
    side = min(220, (WIDTH - 2 * MARGIN + GAP) // len(shown) - GAP)
    tile = fit(run, side)
    scale = (0.0, float(values.max())) if known else range_over([values])
    by = {"logit": "", "tuned": ", by the tuned lens", "jacobian": ", by the Jacobian lens"}[lens.lens]
    if known:
        sheet.title(f'Probability of "{word}', scale, end=f'"{by}')
    else:
        sheet.title("Entropy in nats: how undecided each patch is", scale, end=by)
    grids = [values[number].reshape(run.map.rows, run.map.cols) for number in shown]
    names = [f"state {lens.states[number]}" for number in shown]
    numbers = [f"at most {grid.max():.0%}" if known else f"mean {grid.mean():.2f}" for grid in grids]
    size = 13 if len(shown) < 6 else 11
    below = any(sheet.measure(f"{name}: {number}", size) > side for name, number in zip(names, numbers, strict=True))
    tiles = sheet.tiles(zip(grids, names, numbers, strict=True), len(shown), (side, tile[1]), caption=42 if below else 26)
    for x, y, (grid, name, number) in tiles:
        sheet.tile(run, grid, scale, (x, y), tile)
        if below:
            sheet.write(x, y + tile[1] + 4, name, 13, room=side)
            sheet.write(x, y + tile[1] + 21, number, 13, room=side)
        else:
            sheet.write(x, y + tile[1] + 4, f"{name}: {number}", size, room=side)
    _words_of_patch(sheet, lens, word, divmod(patch, run.map.cols))
    if near is not None:
        words = ", ".join(f"{_readable(text)} {cosine:.2f}" for text, cosine in near.at(*divmod(patch, run.map.cols)))
        sheet.line(f"Nearest words of this projected token: {words}. Norm {near.norms[patch]:.3g}.")
    if word and not known:
        sheet.line(f'"{word}" is never among the top {lens.top_ids.shape[2]} words kept; the maps show entropy.')
    return sheet.done()


@plain_style
def connector_maps(
    run: Run,
    first: tuple[str, str, np.ndarray],
    second: tuple[str, str, np.ndarray],
    *,
    floors: tuple[float, float] = (0.0, 0.0),
) -> Figure:
    """Two connectors' maps on one scale, and what the second has more of: the still of `ConnectorBench`.

    Each side is (name, answer, map (rows, cols)). `floors` are the maps' noise floors, 0 where there is none; what the
    difference of two maps must reach is both taken together.
    """
    sheet = Sheet(run)
    sheet.top += 8
    together = float(np.hypot(*floors))
    difference = above_noise(second[2] - first[2], together)
    reach, scale = float(np.abs(difference).max()), range_over([first[2], second[2]])
    side = (WIDTH - 2 * MARGIN - 2 * GAP) // 3
    tile = fit(run, side)
    last = (f"{second[0]} − {first[0]}", f"orange: more, blue: less, full at {reach:.3g}", difference)
    sides = (first, second, last)
    below = [_below(values, run.map, floor) for (_, _, values), floor in zip(sides, (*floors, together), strict=True)]
    nothing = [count == whole for count, whole in below]
    tiles = sheet.tiles(zip(sides, nothing, strict=True), 3, (side, tile[1]), caption=52)
    for x, y, ((name, text, values), flat) in tiles:
        sheet.tile(run, values, (-reach, reach) if values is difference else scale, (x, y), tile)
        sheet.write(x, y + tile[1] + 6, name, 15, room=side)
        if flat:
            _tag(sheet, x, y + tile[1])
        sheet.write(x, y + tile[1] + 27, text, 13, SOFT, room=side)
    if said := _said_below([counts for counts, flat in zip(below, nothing, strict=True) if not flat]):
        sheet.line(said)
    return sheet.done()


@plain_style
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
    sheet = Sheet(run)
    halves: list[tuple[Callable[[Axes, Sequence[str]], None], str]] = []
    if sweep is not None and target in sweep.targets:
        unit = "logits" if target.against_ids else "nats"
        about = f"change of {target.scored_as(sweep.score)}, {unit}"
        halves.append((lambda ax, lines: _cutting(ax, sweep, target, lines), about))
    if grid is not None and target in grid.targets:
        sites = [sheet.shortened(site, 12, 58) for site in grid.sites]
        about = f"share of clean {target.scored_as(grid.score)}, corrupted by {grid.corruption}"
        halves.append((lambda ax, lines: _patching(ax, grid, target, component, sites, lines), about))
    room = (WIDTH - 2 * MARGIN) / len(halves)
    wide = min(room, 640) - 84
    said = [sheet.wrapped(about, 12.5, wide, 2) for _, about in halves]
    sheet.top += 16 * (max(map(len, said)) - 1)
    for place, ((half, _), lines) in enumerate(zip(halves, said, strict=True)):
        half(sheet.axes(MARGIN + place * room + 64, sheet.top + 56, wide, 236), lines)
    sheet.top += 420 if grid is not None and target in grid.targets else 360
    for note in notes:
        sheet.line(note)
    return sheet.done()


@plain_style
def losses(curves: Mapping[str, Sequence[tuple[float, float]]], *, log: bool = False) -> Figure:
    """Loss by step, a line per curve, its last value in the legend: the still of `LossPlot`. Points are (step, loss)."""
    sheet = Sheet()
    points = {name: [(s, v) for s, v in rows if math.isfinite(v) and (v > 0 or not log)] for name, rows in curves.items()}
    if not any(points.values()):
        sheet.line("No step was logged yet. The curve appears here while the training runs.")
        return sheet.done()
    wide = WIDTH - 2 * MARGIN - 54
    ends = {name: f" {rows[-1][1]:.3f}" if rows else "" for name, rows in points.items()}
    labels = [sheet.shortened(name, 14, wide - 60, end=end) for name, end in ends.items()]
    across = max(1, min(4, int(wide / (max(sheet.measure(label, 14) for label in labels) + 60))))
    sheet.top += 20 * (math.ceil(len(labels) / across) - 1)  # of the legend's lines
    ax = sheet.axes(MARGIN + 44, sheet.top + 34, wide, 260)
    for place, (rows, label) in enumerate(zip(points.values(), labels, strict=True)):
        steps, values = zip(*rows, strict=True) if rows else ((), ())
        ax.plot(steps, values, color=LINES[place % len(LINES)], linewidth=1.5, label=label)
    if log:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.set_xlim(left=0)
    quiet(ax)
    ax.grid(color=RULE)
    ax.set_xlabel("step", fontsize=9, color=SOFT)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=across, frameon=False, fontsize=10)
    sheet.top += 346
    return sheet.done()


def some_states(count: int, most: int, wanted: int | None = None) -> list[int]:
    """At most `most` of 0 .. count-1, evenly spread with both ends; `wanted` takes the place of its nearest."""
    picked = sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})
    if wanted is not None and wanted not in picked:
        picked[int(np.abs(np.array(picked) - wanted).argmin())] = wanted
    return picked


def _strongest(columns: list[Target], rel: Relevance, most: int) -> list[Target]:
    """Where there are more targets than room: those with the highest peaks in the first method, in reading order."""
    peaks = [float(rel.values[rel.targets.index(t)].max()) if t in rel.targets else -np.inf for t in columns]
    return [columns[i] for i in sorted(np.argsort(-np.array(peaks), kind="stable")[:most])]


def _with_probability(run: Run, target: Target) -> tuple[str, str]:
    """A word, and how likely it was where that is known."""
    if target.kind == "answer":
        return "whole answer", ""
    if target.kind != "word":
        return f"{target.kind} {target.text}", ""
    start = run.segments["answer"][0]
    known = run.logprobs[target.positions[0] + 1 - start : target.positions[-1] + 2 - start]
    return target.text, f" {math.exp(float(known.sum())):.0%}" if len(known) == len(target.positions) else ""


def _words_of_patch(sheet: Sheet, lens: LogitLens, word: str, patch: tuple[int, int]) -> None:
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


def _cutting(ax: Axes, sweep: FlowSweep, target: Target, about: Sequence[str]) -> None:
    """The change each flow's cut makes, a line per flow; a cross at the foot where nothing was measured."""
    at = sweep.targets.index(target)
    change, floor = sweep.drawn[..., at], sweep.floors[at]
    ax.axhline(0, color="#767c88", linewidth=0.8)
    for number, (name, row) in enumerate(zip(sweep.flows, change, strict=True)):
        color, marker = FLOWS[number % len(FLOWS)], "os^D"[number % 4]
        negligible = (row == 0) & (floor > 0)
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5}
        told: dict[str, Any] = {"markevery": np.flatnonzero(~negligible).tolist(), "label": name.replace("->", "→")}
        ax.plot(sweep.centres, row, linewidth=1.5, **style, **told)
        if negligible.any():
            ax.plot(sweep.centres[negligible], row[negligible], linestyle="", markerfacecolor=PAPER, **style)
        unmeasured = sweep.centres[~np.isfinite(row)]
        ax.plot(unmeasured, np.full(len(unmeasured), 0.03), "x", color=color, markersize=5, transform=ax.get_xaxis_transform())
    if floor > 0 and (change == 0).any():
        label = f"{NEGLIGIBLE} (below the noise floor)"
        ax.plot([], [], "o", color=SOFT, markerfacecolor=PAPER, markersize=5, label=label)
    first, last = int(sweep.windows.min()), int(sweep.windows.max()) - 1
    layers = range(first, last + 1)
    ax.set_xticks(layers[:: math.ceil(len(layers) / 16)])
    ax.set_xlim(first - 0.5, last + 0.5)
    ax.margins(y=0.08)
    ax.grid(axis="y", color=RULE)
    quiet(ax)
    ax.set_xlabel("layer (centre of the window that is cut)", fontsize=9, color=SOFT)
    titled(ax, "What cutting costs", *about)
    ax.legend(fontsize=8, framealpha=0.8, edgecolor="none", loc="best", prop={"size": 8})


def _patching(ax: Axes, grid: PatchGrid, target: Target, component: int, sites: Sequence[str], about: Sequence[str]) -> None:
    """The share each place brings back, from blue (below 0) over grey (0) to orange (1); white where not measured."""
    at = grid.targets.index(target)
    values, floor = grid.drawn[component, ..., at], grid.floors[at]
    reach = float(min(2.0, max(1.0, np.nanmax(np.abs(values), initial=0.0))))
    colors = colormap(True)
    shown = ax.imshow(np.ma.masked_invalid(values), cmap=colors, vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
    rows, columns = values.shape
    windows = [str(start) if stop - start == 1 else f"{start}-{stop - 1}" for start, stop in grid.windows.tolist()]
    across, down = math.ceil(columns * (0.6 + 0.4 * max(map(len, windows))) / 16), math.ceil(rows / 18)
    ax.set_xticks(range(0, columns, across), windows[::across])
    ax.set_yticks(range(0, rows, down), sites[::down], parse_math=False)
    if columns <= 12 and rows <= 14:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                color = ink_on(colors((value / reach + 1) / 2))
                # a dot: nothing that can be told from rounding
                text = "·" if value == 0 < floor else f"{value:z.2f}"
                ax.text(column, row, text, color=color, fontsize=8, ha="center", va="center")
        if ((values == 0) & (floor > 0)).any():
            ax.text(1, -0.4, f"·  {NEGLIGIBLE}", transform=ax.transAxes, fontsize=8, color=SOFT, ha="right", va="bottom")
    quiet(ax)
    alone = all(stop - start == 1 for start, stop in grid.windows.tolist())
    ax.set_xlabel("layer patched" if alone else "layers patched together", fontsize=9, color=SOFT)
    titled(ax, f"What patching brings back: {grid.components[component]}", *about)
    bar = ax.figure.colorbar(shown, cax=ax.inset_axes((0, -0.36, 0.45, 0.05)), orientation="horizontal", ticks=[0, 1])
    bar.ax.set_xlim(min(0.0, float(np.nanmin(values, initial=0))), reach)
    bar.ax.set_xticks([0, 1], ["0 as corrupted", "1 as clean"], fontsize=8, color=SOFT)
    bar.outline.set_visible(False)


def _below(drawn: np.ndarray, where: PictureMap, floor: float) -> tuple[int, int]:
    """How many of the patches on the picture do not reach a map's noise floor, which `drawn` holds as 0, and of how many."""
    inside = drawn[where.coverage() > 0]
    return (int((inside == 0).sum()) if floor > 0 else 0, inside.size)


def _said_below(counts: Sequence[tuple[int, int]]) -> str:
    """How many patches are not drawn because nothing can be told of them; empty where there are none."""
    some = sorted(count for count, _ in counts if count)
    many = f"{some[0]}" if len(set(some)) == 1 else f"{some[0]} to {some[-1]}" if some else ""
    return f"{NEGLIGIBLE.capitalize()} (below the noise floor), not drawn: {many} of {counts[0][1]} patches." if some else ""


def _tag(sheet: Sheet, x: float, bottom: float) -> None:
    """The word in the lower left corner of a map that has nothing to show."""
    sheet.box(x, bottom - 19, sheet.measure(NEGLIGIBLE, 12) + 10, 19, facecolor=PAPER)
    sheet.write(x + 5, bottom - 16, NEGLIGIBLE, 12, SOFT)


def _readable(piece: str) -> str:
    """A piece of a word as a picture can write it."""
    return "".join(sign if sign.isprintable() else "?" for sign in piece.strip()) or "(space)"
