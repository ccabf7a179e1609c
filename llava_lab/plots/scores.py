"""Figures of scores and interventions: leaderboards, curves beside random maps, sanity checks, knockout sweeps.

Every function takes ``ax=``; single panels return their Axes, panels side by side their Figure. No model and no torch.
Grey always means: not told apart from random (blue is better, red is worse).

    leaderboard(board)  # several measures side by side
    curves(score)  # deletion and insertion of one map
    flows(sweeps)  # a panel per flow, over many questions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.checks import array_of, entry, shown
from llava_lab.errors import OptionError
from llava_lab.plots.axes import AS_TEXT, figure_of, named_rows, new_axes, open_frame, panels
from llava_lab.plots.palette import BAND, BLUE, GREY, LINES, RED, colormap, ink_on
from llava_lab.results import Comparison, Faithfulness, FlowSweep, Leaderboard, Pruning, Sanity
from llava_lab.results.scores import COST
from llava_lab.stats import cluster_bootstrap, percentiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("deletion", "insertion")
AGREEMENT = {"spearman": "rank correlation", "overlap": "share of the top patches in common"}
WORDS = {
    "gain": "faithful: insertion minus\ndeletion area (0: random)",
    "deletion": "area under deletion\n(lower is better)",
    "insertion": "area under insertion\n(higher is better)",
    "better": "pictures on which the map\nbeats random maps, share",
    "object": "the thing the answer needs most\nis marked most, share of pictures",
    "pointing": "highest patch on a deciding\nthing, share of pictures",
    "mass": "share of the map on\nthe deciding things",
    "auc": "deciding patches\nabove others (AUC)",
    "iou": "overlap with the\ndeciding things (IoU)",
    "forward": "forward passes",
    "backward": "backward passes",
    "seconds": "seconds",
}
UNSURE = 0.45  # opacity of a number that is not told apart from random
ROUNDING = 1e-6  # that the end of an interval may be off by
QUICKEST = 1e-3  # seconds; what is quicker is drawn here, since a logarithm needs an end


@entry
def dots(
    board: Leaderboard, measure: str = "gain", *, kind: str = "all", ax: Axes | None = None, sort: str | None = None
) -> Axes:
    """Every method's mean with its 95% interval over pictures, the highest at the top; the tick is random on the same pictures.

    Grey where the interval of the paired difference from random includes 0, red where random is better.
    `sort` names the measure to order by.

    >>> ax = plots.dots(ll.shipped_leaderboard(lab), "gain")
    >>> ax.get_xlabel().splitlines()[0]
    'faithful: insertion minus'
    """
    names = board.order(sort or measure, kind)[::-1]
    cells = [board.at(name, measure, kind) for name in names]
    ax = ax if ax is not None else new_axes((6.0, 0.8 + 0.26 * len(names)))
    for height, cell in enumerate(cells):
        color = _color(cell, measure)
        least = QUICKEST if measure == "seconds" else -np.inf
        low, high = np.maximum(cell["interval"], least)
        if low == low:
            ax.plot([low, high], [height, height], color=color, linewidth=2, solid_capstyle="round")
        ax.plot(np.maximum(cell["mean"], least), height, "o", color=color, markersize=5)
        if cell["against"] == cell["against"]:
            ax.plot(cell["mean"] - cell["against"], height, "|", color="0.25", markersize=9)
    ax.set_yticks(range(len(names)), list(names), fontsize=8, **AS_TEXT)
    ax.set_ylim(-0.7, len(names) - 0.3)
    counts = [cell["n"] for cell in cells]
    ax.set_xlabel(f"{WORDS.get(measure, measure)}\n{kind} questions, {max(counts)} pictures", fontsize=8)
    named_rows(ax)
    if measure == "seconds":
        ax.set_xscale("log")
    return ax


@entry
def leaderboard(
    board: Leaderboard,
    measures: Sequence[str] = ("gain", "pointing", "seconds"),
    *,
    kind: str = "all",
    ax: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Several measures beside one another, methods in the order of the first. Each is its own axis: they are never combined.

    >>> figure = plots.leaderboard(ll.shipped_leaderboard(lab), ("gain", "pointing"))
    >>> len(figure.axes)
    2
    """
    if not len(measures):
        raise OptionError(f"expected at least one measure, got none; there are {', '.join(board.measures)}")
    drawn = panels(ax, len(measures), (3.4, 1.0 + 0.26 * len(board.methods)))
    for number, (panel, measure) in enumerate(zip(drawn, measures, strict=True)):
        dots(board, measure, kind=kind, ax=panel, sort=measures[0])
        if number:
            panel.set_yticklabels([])
    if ax is None:
        note = "| random on the same pictures    grey: not told apart from it    red: worse    lines: 95% over pictures"
        figure_of(drawn[0]).supxlabel(note, fontsize=7, color="0.35")
    return figure_of(drawn[0])


@entry
def by_type(board: Leaderboard, measure: str = "gain", *, ax: Axes | None = None) -> Axes:
    """Methods by types of question, each cell the mean; pale numbers where it does not differ from random.

    >>> ax = plots.by_type(ll.shipped_leaderboard(lab), "pointing")
    >>> ax.get_title()
    'highest patch on a deciding thing, share of pictures'
    """
    names = board.order(measure)
    ax = ax if ax is not None else new_axes((1.6 + 0.75 * len(board.types), 0.8 + 0.28 * len(names)))
    cells = [[board.at(name, measure, kind) for kind in board.types] for name in names]
    values = np.array([[cell["mean"] for cell in row] for row in cells])
    sure = np.array([[measure in COST or _differs(cell) for cell in row] for row in cells])
    _matrix(ax, values, names, board.types, _reach(values, measure), sure)
    ax.set_title(WORDS.get(measure, measure).replace("\n", " "), fontsize=9)
    return ax


@entry
def agreement(result: Comparison | Leaderboard, which: str = "spearman", *, ax: Axes | None = None) -> Axes:
    """How far every two methods agree, methods by methods. `which`: ``spearman``, or for one example ``overlap``.

    >>> plots.agreement(ll.shipped_leaderboard(lab)).get_title()
    'rank correlation'
    """
    kinds = tuple(AGREEMENT) if isinstance(result, Comparison) else ("spearman",)
    if which not in kinds:
        raise OptionError(f"which must be one of {', '.join(kinds)} here, got {which!r}")
    values, names = getattr(result, which), result.methods
    side = 1.8 + 0.36 * len(names)
    ax = ax if ax is not None else new_axes((side, side))
    _matrix(ax, values, names, names, (-1.0, 1.0) if which == "spearman" else (0.0, 1.0), ~np.isnan(values))
    note = f"; by chance {result.chance:.2f}" if which == "overlap" and isinstance(result, Comparison) else ""
    ax.set_title(f"{AGREEMENT[which]}{note}", fontsize=9)
    return ax


@entry
def curve(
    score: Faithfulness, kind: str = "deletion", *, target: int = 0, fill: str | None = None, ax: Axes | None = None
) -> Axes:
    """One curve with the band of random maps, the centre and the map upside down; mean over fills, or one `fill`.

    >>> relevance = ll.attribute(lab, run, method="attention", target="car")
    >>> plots.curve(ll.faithfulness(lab, run, relevance, steps=2, seeds=2)).get_title()
    'deletion: “car”'
    """
    if kind not in KINDS:
        raise OptionError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    _check_target(target, score.targets)
    if fill is not None and fill not in score.fills:
        raise OptionError(f"fill must be one of {', '.join(score.fills)}, got {fill!r}")
    ax = ax if ax is not None else new_axes((4.2, 3.2))
    which = KINDS.index(kind)
    chosen = slice(None) if fill is None else slice(score.fills.index(fill), score.fills.index(fill) + 1)

    def line(curves: np.ndarray) -> np.ndarray:  # (..., fills, steps) -> (..., steps)
        """Mean over the fills that tell something."""
        part = curves[..., chosen, :]
        known = ~np.isnan(part).any(-1)[..., None]
        total, count = np.where(known, part, 0).sum(-2), known.sum(-2)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    at = 100 * score.fractions
    both_ways = np.concatenate(
        [score.random[which], score.random[1 - which][..., ::-1]]
    )  # a ranking read backwards is random too
    band = line(both_ways[:, target])
    ax.fill_between(at, band.min(0), band.max(0), color=BAND, linewidth=0, label=f"{len(band)} random maps")
    ax.plot(at, line(score.center[which, target]), color="0.45", linewidth=1, linestyle="--", label="centre")
    ax.plot(at, line(score.inverse[which, target]), color=RED, linewidth=1, linestyle=":", label="upside down")
    color = BLUE if score.beats_random[target] else GREY
    ax.plot(at, line(getattr(score, kind)[target]), color=color, marker="o", markersize=3, label=score.method)
    ax.axhline(0, color="0.8", linewidth=0.8)
    done = "taken away" if kind == "deletion" else "given back"
    ax.set_xlabel(f"patches {done}, %", fontsize=8)
    ax.set_ylabel(f"{score.scale}, 1 whole, 0 filled", fontsize=8)
    ax.set_title(f"{kind}: “{score.targets[target].text}”", fontsize=9, **AS_TEXT)
    ax.tick_params(labelsize=8)
    open_frame(ax)
    ax.legend(fontsize=7, framealpha=0.8, edgecolor="none")
    return ax


@entry
def curves(score: Faithfulness, *, target: int = 0, fill: str | None = None, ax: Axes | Sequence[Axes] | None = None) -> Figure:
    """Deletion and insertion side by side.

    >>> relevance = ll.attribute(lab, run, method="attention", target="car")
    >>> len(plots.curves(ll.faithfulness(lab, run, relevance, steps=2, seeds=2)).axes)
    2
    """
    drawn = panels(ax, 2, (4.0, 3.2), sharey=True)
    for panel, kind in zip(drawn, KINDS, strict=True):
        curve(score, kind, target=target, fill=fill, ax=panel)
    return figure_of(drawn[0])


@entry
def sanity(score: Sanity, *, target: int = 0, ax: Axes | None = None) -> Axes:
    """How alike the map stays while the model is randomised from the top down, and (diamonds) after other questions.

    The band is where unrelated maps lie. Red is a map that never left what it was.

    >>> check = ll.sanity(lab, run, "attention", groups=2)
    >>> plots.sanity(check).get_ylabel()
    'rank correlation with the first map'
    """
    _check_target(target, score.targets)
    ax = ax if ax is not None else new_axes((4.2, 3.2))
    steps, asked = len(score.steps), len(score.questions)
    at, others = np.arange(steps + 1), steps + 1.0 + np.arange(asked)
    draws = (score.random_spearman[:, target], score.moved_spearman[:, target])
    ax.axhspan(
        min(np.quantile(values, 0.05) for values in draws), score.limit[target], color=BAND, linewidth=0, label="unrelated maps"
    )
    ax.axhline(0, color="0.8", linewidth=0.8)
    colors = {name: RED if verdict == "unchanged" else BLUE for name, verdict in score.verdict.items()}
    if steps:
        ax.plot(at, [1, *score.spearman[:, target]], color=colors["model"], marker="o", markersize=4, label="layers randomised")
    if asked:
        ax.axvline(steps + 0.5, color="0.85", linewidth=0.8)
        ax.plot(others, score.question_spearman[:, target], "D", color=colors["question"], markersize=5, label="another question")
    names = ["as it is", *(f"+ {name}" for name in score.steps), *(f"question {number + 1}" for number in range(asked))]
    ax.set_xticks([*at, *others], names, fontsize=7, rotation=60, ha="right", rotation_mode="anchor", **AS_TEXT)
    ax.set_ylim(min(-0.35, float(np.nanmin([*score.spearman.ravel(), *score.question_spearman.ravel(), 0])) - 0.1), 1.08)
    ax.set_ylabel("rank correlation with the first map", fontsize=8)
    ax.set_title(f"{score.method}\n{_verdicts(score)}", fontsize=9, **AS_TEXT)
    ax.tick_params(axis="y", labelsize=8)
    open_frame(ax)
    return ax


@entry
def sanities(scores: Sequence[Sanity], *, target: int = 0, ax: Axes | Sequence[Axes] | None = None) -> Figure:
    """Several methods' sanity checks side by side, the legend in the first.

    >>> checks = [ll.sanity(lab, run, name, groups=1) for name in ("attention", "center")]
    >>> len(plots.sanities(checks).axes)
    2
    """
    _check_all(scores, target)
    drawn = panels(ax, len(scores), (3.1, 3.5), sharey=True)
    for panel, score in zip(drawn, scores, strict=True):
        sanity(score, target=target, ax=panel)
        panel.set_ylabel(panel.get_ylabel() if panel is drawn[0] else "")
    drawn[0].legend(fontsize=7, framealpha=0.8, edgecolor="none")
    return figure_of(drawn[0])


@entry
def sanity_maps(scores: Sequence[Sanity], *, target: int = 0, ax: Axes | Sequence[Axes] | None = None) -> Figure:
    """A row per method: its map, its maps when half of the layers and when all are random, and after another question.

    >>> figure = plots.sanity_maps([ll.sanity(lab, run, "attention", groups=2)])
    >>> figure.axes[0].get_title()
    'attention'
    """
    _check_all(scores, target)
    drawn = panels(ax, 4 * len(scores), (1.7, 1.8), columns=4)
    for number, score in enumerate(scores):
        row, maps = drawn[4 * number : 4 * number + 4], {score.method: score.original[target]}
        if len(score.steps):
            half = len(score.steps) // 2
            maps |= {f"to {score.steps[half]}": score.maps[half, target], "all random": score.maps[-1, target]}
        if len(score.questions):
            maps["another question"] = score.question_maps[-1, target]
        for panel, (title, values) in zip(row, maps.items(), strict=False):
            low, high = float(values.min()), float(np.abs(values).max())
            panel.imshow(values, cmap=colormap(low < 0), vmin=-high if low < 0 else low, vmax=high)
            panel.set_title(title, fontsize=9, **AS_TEXT)
        for panel in row:
            panel.axis("off")
    return figure_of(drawn[0])


@entry
def comparison(result: Comparison, *, target: int = 0, ax: Axes | Sequence[Axes] | None = None) -> Figure:
    """One example: each method's gain with its interval against random, and how far the methods agree.

    >>> figure = plots.comparison(ll.compare(lab, run, ["attention", "center"], target="car", steps=2, seeds=2))
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()] != []
    True
    """
    _check_target(target, result.targets)
    size = (max(1.8 + 0.36 * len(result.methods), 4.2), max(1.4 + 0.34 * len(result.methods), 3.0))
    drawn = panels(ax, 2, size)
    rows = result.rows(target)[::-1]
    left = drawn[0]
    for height, row in enumerate(rows):
        color = BLUE if row["beats_random"] else GREY
        if row["interval"][0] == row["interval"][0]:
            left.plot(row["interval"], [height, height], color=color, linewidth=2)
        left.plot(row["gain"], height, "o", color=color, markersize=5)
    left.axvline(0, color="0.25", linewidth=0.8)
    left.set_yticks(range(len(rows)), [row["method"] for row in rows], fontsize=8, **AS_TEXT)
    left.set_xlabel("gain, and its 95% interval against one random map\n(grey: not told apart from random)", fontsize=8)
    left.tick_params(axis="x", labelsize=8)
    open_frame(left)
    agreement(result, ax=drawn[1])
    return figure_of(left)


def _check_target(target: int, targets: Sequence[Any]) -> None:
    if not 0 <= target < len(targets):
        raise OptionError(f"targets run from 0 to {len(targets) - 1}, got {target}")


def _check_all(scores: Sequence[Sanity], target: int) -> None:
    if not len(scores):
        raise OptionError("expected at least one sanity check, got none")
    for score in scores:
        _check_target(target, score.targets)


def _verdicts(score: Sanity) -> str:
    verdicts = {name: verdict for name, verdict in score.verdict.items() if verdict != "not run"}
    return ", ".join(f"{name}: {verdict}" for name, verdict in verdicts.items())


def _color(cell: dict[str, Any], measure: str) -> str:
    if measure in COST:
        return BLUE
    return GREY if not _differs(cell) else BLUE if (cell["against"] > 0) != (measure == "deletion") else RED


def _differs(cell: dict[str, Any]) -> bool:
    low, high = cell["against_interval"]
    return low > 0 or high < 0


def _reach(values: np.ndarray, measure: str) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    top = float(np.abs(known).max()) if known.size else 1.0
    return (-top or -1.0, top or 1.0) if measure == "gain" else (0.0, top if measure in COST and top else 1.0)


def _matrix(
    ax: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], scale: tuple[float, float], sure: np.ndarray
) -> None:
    """Coloured cells with their numbers; `sure` says which numbers are printed in full."""
    image = ax.imshow(np.ma.masked_invalid(values), colormap(scale[0] < 0), vmin=scale[0], vmax=scale[1], aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if value == value:
            color, alpha = ink_on(image.to_rgba(value)), 1 if sure[row, column] else UNSURE
            ax.text(column, row, f"{value:z.2f}", ha="center", va="center", fontsize=6, color=color, alpha=alpha)
    ax.set_xticks(range(len(columns)), list(columns), fontsize=7, rotation=60, ha="right", rotation_mode="anchor", **AS_TEXT)
    ax.set_yticks(range(len(rows)), list(rows), fontsize=7, **AS_TEXT)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


@entry
def mean_sweep(sweeps: Sequence[FlowSweep], *, target: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, low, high) of `FlowSweep.relative` over questions, each (flows, windows), with a 95% interval by resampling them.

    Raises OptionError unless the sweeps have the same flows and windows and are whole.

    >>> sweep = ll.knockout_sweep(lab, run, metric="car")
    >>> mean, low, high = plots.mean_sweep([sweep])
    >>> mean.shape == (len(sweep.flows), len(sweep.windows))
    True
    """
    if not len(sweeps):
        raise OptionError("expected at least one sweep, got none")
    first = sweeps[0]
    if any(sweep.flows != first.flows or not np.array_equal(sweep.windows, first.windows) for sweep in sweeps):
        raise OptionError("expected sweeps of the same flows and windows; sweep every question with the same options")
    for one in sweeps:
        _check_target(target, one.targets)
    values = np.stack([sweep.relative[..., target] for sweep in sweeps]).astype(float)
    if np.isnan(values).any():
        raise OptionError("expected whole sweeps of a target with a probability, got cells that are not a number")

    def means(weights: np.ndarray) -> np.ndarray:
        return np.tensordot(weights, values, 1) / len(values)

    interval = percentiles(cluster_bootstrap(means, len(values), seed=seed, one_by_one=True))
    return values.mean(0), interval[..., 0], interval[..., 1]


@entry
def flows(sweeps: Sequence[FlowSweep], *, target: int = 0, ax: Axes | Sequence[Axes] | None = None) -> Figure:
    """One panel per flow: relative change of the answer's probability, mean and 95% interval over questions.

    >>> figure = plots.flows([ll.knockout_sweep(lab, run, metric="car")])
    >>> figure.axes[0].get_title()
    'image → question'
    """
    mean, low, high = 100 * np.stack(mean_sweep(sweeps, target=target))
    first = sweeps[0]
    axes = panels(ax, len(first.flows), (3.4, 2.7), sharey=True)
    for number, panel in enumerate(axes):
        color = LINES[number % len(LINES)]
        panel.axhline(0, color="0.7", linewidth=1)
        panel.fill_between(first.centres, low[number], high[number], color=color, alpha=0.2, linewidth=0)
        panel.plot(first.centres, mean[number], color=color, marker="o")
        panel.set_title(first.flows[number].replace("->", "→"), fontsize=10, **AS_TEXT)
        panel.set(xlabel="layer in the middle of the window", ylim=(-105, 8))
        open_frame(panel)
    axes[0].set_ylabel("change of the answer's\nprobability, %")
    return figure_of(axes[0])


@entry
def stays(shares: Mapping[str, Sequence[Sequence[float]]], *, xlabel: str = "", ax: Axes | None = None) -> Axes:
    """How often the answer stays, one line per name; each point is (share, low, high), 0 to 1, at 0, 1, 2 ... along x.

    >>> plots.stays({"half of the layers": [(0.5, 0.25, 0.75), (1.0, 0.8, 1.0)]}).get_ylabel()
    'answer stays, %'
    """
    lines = {name: array_of(f"the points of {name!r}", points) for name, points in shares.items()}
    for name, points in lines.items():
        whole = points.ndim == 2 and points.shape[1] == 3 and len(points) and points.dtype.kind in "biuf"
        if not whole or not ((points[:, 1] - ROUNDING <= points[:, 0]) & (points[:, 0] <= points[:, 2] + ROUNDING)).all():
            got = shown(points.tolist())
            raise OptionError(f"the points of {name!r} must be (share, low, high) each, low <= share <= high; got {got}")
    if not lines:
        raise OptionError("expected the points of at least one line, got none")
    ax = ax if ax is not None else new_axes((5.0, 2.9))
    for number, (name, points) in enumerate(lines.items()):
        mean, low, high = 100 * points.T.astype(float)
        at = np.arange(len(mean)) + 0.06 * (number - (len(shares) - 1) / 2)  # aside, so that intervals do not cover each other
        bars = np.maximum((mean - low, high - mean), 0)
        ax.errorbar(at, mean, bars, color=LINES[number % len(LINES)], marker="o", capsize=3, label=name)
    ax.set(xlabel=xlabel, ylabel="answer stays, %", ylim=(-5, 105))
    ax.legend(frameon=False, fontsize=9)
    open_frame(ax)
    return ax


@entry
def pruning(result: Pruning, *, ax: Axes | None = None) -> Axes:
    """Right answers against the number of image tokens kept, one line a ranking, with 95% intervals over pictures.

    >>> result = ll.prune_sweep(lab, n=2, keeps=(18, 72), by=("fastv", "random"), draws=1, progress=False)
    >>> plots.pruning(result).get_xlabel()
    'image tokens kept, of 144'
    """
    ax = ax if ax is not None else new_axes((5.4, 3.2))
    ax.axhline(100 * result.full.mean(), color="0.7", linewidth=1)
    ax.text(0, 100 * result.full.mean() + 1.5, "all tokens", fontsize=8, color="0.4")
    places = np.arange(len(result.keeps))
    for number, (name, accuracy, bounds) in enumerate(zip(result.rankings, result.accuracy, result.interval(), strict=True)):
        plain_line = name in ("random", "truth")
        aside = places + 0.05 * (number - (len(result.rankings) - 1) / 2)  # so that intervals do not cover each other
        bars = 100 * np.abs(np.array([accuracy - bounds[:, 0], bounds[:, 1] - accuracy]))
        color = "0.35" if plain_line else LINES[number % len(LINES)]
        style = {"random": ":", "truth": "--"}.get(name, "-")
        ax.errorbar(aside, 100 * accuracy, bars, color=color, linestyle=style, marker="o", markersize=3, capsize=2, label=name)
    ax.set_xticks(places, [str(keep) for keep in result.keeps])
    ax.set(xlabel=f"image tokens kept, of {result.tokens}", ylabel="right answers, %", ylim=(-3, 108))
    ax.legend(frameon=False, fontsize=8, ncols=2)
    open_frame(ax)
    return ax
