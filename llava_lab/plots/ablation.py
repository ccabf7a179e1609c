"""Figures of a comparison of connectors: accuracies with every seed, differences with their two intervals, the rate sweep.

Every function takes ``ax=`` and returns its Axes. No model and no torch. Accuracies are percent, differences percent
points. With stage 1 is blue and round, without it orange and square; in differences grey always means: not told apart
(blue is better, red is worse).

    accuracies(result, split="compositions")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llava_lab.checks import entry
from llava_lab.errors import OptionError
from llava_lab.plots.axes import AS_TEXT, named_rows, new_axes, open_frame
from llava_lab.plots.palette import BLUE, LINES, MARKERS, ORANGE, VERDICTS
from llava_lab.results import ALL, MANY, WORDS, Ablation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STAGES = {True: (BLUE, "o", "with stage 1"), False: (ORANGE, "s", "without stage 1")}
MINUS = "\N{MINUS SIGN}"

_APART, _WITHIN = 0.17, 0.07  # rows: between the two stage settings, and between the seeds and their mean
_GAP = 0.9  # rows between two groups of differences


@entry
def accuracies(result: Ablation, *, split: str | None = None, type: str = ALL, ax: Axes | None = None) -> Axes:  # noqa: A002
    """Percent right of every connector, with and without stage 1 side by side, at the result's first budget.

    A pale dot per seed; the mean over seeds with its 95% interval (resampling pictures) below them. The first connector is
    at the top. `type` is a type of question ("all" for every one). Raises OptionError for a split or type that was not tested.

    >>> plots.accuracies(ll.shipped_ablation()).get_title()
    'test, equal samples'
    """
    (x, y), arms = _cell(result, split, type), _arms(result)
    names = list(dict.fromkeys(result.connectors[arm] for arm in arms))
    both = len({bool(result.stage1[arm]) for arm in arms}) == 2
    ax = ax if ax is not None else new_axes((6.2, 1.1 + 0.62 * len(names)))
    asked = (result.question_split == x) & ((y == 0) | (result.question_type == y))
    labelled: set[bool] = set()
    for arm in arms:
        aligned = bool(result.stage1[arm])
        color, marker, label = STAGES[aligned]
        height = names.index(result.connectors[arm]) + (_APART * (-1 if aligned else 1) if both else 0)
        seeds = 100 * result.right[arm][:, asked].mean(1)
        ax.plot(seeds, np.full(len(seeds), height - _WITHIN), marker, color=color, alpha=0.35, markersize=5, markeredgewidth=0)
        low, high = 100 * result.accuracy_interval[arm, x, y]
        ax.plot([low, high], [height + _WITHIN] * 2, color=color, linewidth=2, solid_capstyle="round")
        mean = 100 * result.accuracy[arm, x, y]
        legend = None if aligned in labelled else label
        ax.plot(mean, height + _WITHIN, marker, color=color, markersize=7, markeredgecolor="white", label=legend)
        labelled.add(aligned)
    ax.set_yticks(range(len(names)), names, fontsize=9, **AS_TEXT)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(
        f"right, % of {int(result.questions[x, y]):,} questions\npale: each of {len(result.seeds)} seeds    "
        "strong: their mean, 95% over pictures",
        fontsize=8,
    )
    ax.set_title(f"{_asked(result, x, y)}, equal {result.budgets[arms[0]]}", fontsize=10, **AS_TEXT)
    named_rows(ax)
    ax.tick_params(axis="y", length=0)
    ax.legend(fontsize=8, framealpha=0.9, edgecolor="none", loc="best")
    return ax


@entry
def differences(result: Ablation, *, split: str | None = None, type: str = ALL, ax: Axes | None = None) -> Axes:  # noqa: A002
    """Every two connectors under the same stages: second minus first in percent points, at the result's first budget.

    Thick: the effect with its 95% interval over seeds, what a repetition would give; thin, below it: over pictures, of
    these very models. The verdict stands beside each, with the seeds that would tell where it is "not distinguishable".
    Raises OptionError for a split that was not tested.

    >>> ax = plots.differences(ll.shipped_ablation())
    >>> ax.get_xlabel().splitlines()[0]
    'difference of what is right, percent points'
    """
    (x, y), arms = _cell(result, split, type), set(_arms(result))
    groups = [
        (
            aligned,
            [n for n, (i, j) in enumerate(result.pairs) if {i, j} <= arms and result.stage1[i] == result.stage1[j] == aligned],
        )
        for aligned in (True, False)
    ]
    groups = [(aligned, pairs) for aligned, pairs in groups if pairs]
    count = sum(len(pairs) for _, pairs in groups)
    ax = ax if ax is not None else new_axes((7.6, 1.2 + 0.36 * (count + _GAP * len(groups))))
    ax.axvline(0, color="0.25", linewidth=0.9)
    height = 0.0
    places: list[float] = []
    names: list[str] = []
    heads: list[int] = []
    for aligned, pairs in groups:
        places.append(height)
        names.append(STAGES[aligned][2])
        heads.append(len(names) - 1)
        height += _GAP
        for pair in pairs:
            _difference(ax, result, (pair, x, y), height)
            first, second = (result.connectors[arm] for arm in result.pairs[pair])
            places.append(height)
            names.append(f"{second} {MINUS} {first}")
            height += 1
    ax.set_yticks(places, names, fontsize=8, **AS_TEXT)
    for number in heads:
        ax.get_yticklabels()[number].set(weight="bold", fontsize=9)
    ax.set_ylim(height - 0.4, -0.6)
    ax.set_xlabel(
        "difference of what is right, percent points\nthick: 95% over seeds    thin: 95% over pictures    grey: not told apart",
        fontsize=8,
    )
    ax.set_title(f"{_asked(result, x, y)}, equal {result.budgets[min(arms)]}, {len(result.seeds)} seeds", fontsize=10, **AS_TEXT)
    named_rows(ax)
    ax.tick_params(axis="y", length=0)
    return ax


@entry
def sweep(result: Ablation, *, ax: Axes | None = None) -> Axes:
    """Validation loss against the connector's peak rate, at the result's first budget; a ring marks the rate that was chosen.

    Solid with stage 1, dashed without. A rate at which training diverged has no point.

    >>> plots.sweep(ll.shipped_ablation()).get_xlabel()
    'peak rate of the connector'
    """
    arms = _arms(result)
    names = list(dict.fromkeys(result.connectors[arm] for arm in arms))
    ax = ax if ax is not None else new_axes((6.2, 3.6))
    rates = result.sweep_rates
    for arm in arms:
        number = names.index(result.connectors[arm])
        color, marker = LINES[number % len(LINES)], MARKERS[number % len(MARKERS)]
        losses = np.where(np.isfinite(result.sweep_loss[arm]), result.sweep_loss[arm], np.nan)
        style = "-" if result.stage1[arm] else "--"
        ax.plot(rates, losses, style, color=color, marker=marker, markersize=5, linewidth=1.6, label=result.connectors[arm])
        chosen = np.isclose(rates, result.rate[arm])
        ax.plot(
            rates[chosen], losses[chosen], "o", markersize=12, markerfacecolor="none", markeredgecolor=color, markeredgewidth=1.4
        )
    ax.set_xscale("log")
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.minorticks_off()
    ax.margins(x=0.08, y=0.12)
    ax.set_xlabel("peak rate of the connector", fontsize=8)
    ax.set_ylabel("validation loss, nats per token", fontsize=8)
    ax.set_title("each connector's own rate (ring: chosen)", fontsize=10)
    ax.tick_params(labelsize=8)
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    open_frame(ax)
    _sweep_legend(ax, names, {bool(result.stage1[arm]) for arm in arms})
    return ax


def _difference(ax: Axes, result: Ablation, cell: tuple[int, int, int], height: float) -> None:
    verdict = int(result.verdict[cell])
    color = VERDICTS[verdict]
    of_seeds, of_pictures = (100 * values[cell] for values in (result.seed_interval, result.picture_interval))
    ax.plot(of_seeds, [height - 0.08] * 2, color=color, linewidth=3.2, solid_capstyle="round")
    ax.plot(of_pictures, [height + 0.22] * 2, color=color, linewidth=1, solid_capstyle="butt")
    ax.plot(100 * result.effect[cell], height - 0.08, "o", color=color, markersize=6.5, markeredgecolor="white")
    text = WORDS[verdict]
    needed = float(result.seeds_needed[cell])
    if verdict == 0 and result.stated:
        text += f"; {_seeds(needed, len(result.seeds), result.stated)}"
    ax.text(
        1.015,
        height,
        text,
        transform=ax.get_yaxis_transform(),
        fontsize=8,
        va="center",
        color="0.35" if verdict == 0 else color,
        weight="normal" if verdict == 0 else "bold",
    )


def _seeds(needed: float, seeds: int, stated: float) -> str:
    points = f"{100 * stated:g} points"
    if needed <= seeds:
        return f"{points} would be found"
    return f"{points}: {f'{needed:,.0f}' if needed <= MANY else f'more than {MANY:,}'} seeds"


def _sweep_legend(ax: Axes, names: list[str], stages: set[bool]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=LINES[number % len(LINES)], marker=MARKERS[number % len(MARKERS)], markersize=5, label=name)
        for number, name in enumerate(names)
    ]
    if len(stages) == 2:
        handles += [Line2D([], [], color="0.4", linestyle="-" if key else "--", label=STAGES[key][2]) for key in (True, False)]
    ax.legend(handles=handles, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _arms(result: Ablation) -> list[int]:
    """The arms of the first budget."""
    return [arm for arm, budget in enumerate(result.budgets) if budget == result.budgets[0]]


def _cell(result: Ablation, split: str | None, type: str) -> tuple[int, int]:  # noqa: A002
    """Numbers of a split and a type of question. Raises OptionError for one that was not tested."""
    if split is not None and split not in result.splits:
        raise OptionError(f"split must be one of {', '.join(result.splits)}, got {split!r}")
    if type not in result.types:
        raise OptionError(f"type must be one of {', '.join(result.types)}, got {type!r}")
    return (0 if split is None else result.splits.index(split)), result.types.index(type)


def _asked(result: Ablation, x: int, y: int) -> str:
    return result.splits[x] if y == 0 else f"{result.splits[x]}, {result.types[y]}"
