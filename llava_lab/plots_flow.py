"""Figures of interventions: knockout sweeps over many questions, and how often an answer stays.

Numbers come from `llava_lab.results_interventions` and from the caller; no model, no torch. Every function takes ``ax=``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.errors import OptionError
from llava_lab.plots_scores import TEXT, _new_axes, _root, _row_of
from llava_lab.results_interventions import FlowSweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5")
DRAWS = 2000  # resamples of questions
EDGES = (0.025, 0.975)


def mean_sweep(sweeps: Sequence[FlowSweep], *, target: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, low, high) of `FlowSweep.relative` over questions, each (flows, windows), with a 95% interval by resampling them.

    Raises OptionError unless the sweeps have the same flows and windows and are whole.
    """
    if not sweeps:
        raise OptionError("expected at least one sweep, got none")
    first = sweeps[0]
    if any(one.flows != first.flows or not np.array_equal(one.windows, first.windows) for one in sweeps):
        raise OptionError("expected sweeps of the same flows and windows; sweep every question with the same options")
    values = np.stack([one.relative[..., target] for one in sweeps]).astype(float)
    if np.isnan(values).any():
        raise OptionError("expected whole sweeps of a target with a probability, got cells that are not a number")
    drawn = np.random.default_rng(seed).integers(0, len(values), (DRAWS, len(values)))
    means = np.stack([values[rows].mean(0) for rows in drawn])
    low, high = np.quantile(means, EDGES, axis=0)
    return values.mean(0), low, high


def flows(sweeps: Sequence[FlowSweep], *, target: int = 0, ax: Any = None) -> Figure:
    """One panel per flow: relative change of the answer's probability, mean and 95% interval over questions."""
    mean, low, high = 100 * np.stack(mean_sweep(sweeps, target=target))
    first = sweeps[0]
    axes = _row_of(ax, len(first.flows), (3.4, 2.7), sharey=True)
    for number, one in enumerate(axes):
        color = COLORS[number % len(COLORS)]
        one.axhline(0, color="0.7", linewidth=1)
        one.fill_between(first.centres, low[number], high[number], color=color, alpha=0.2, linewidth=0)
        one.plot(first.centres, mean[number], color=color, marker="o")
        one.set_title(first.flows[number].replace("->", "→"), fontsize=10, **TEXT)
        one.set(xlabel="layer in the middle of the window", ylim=(-105, 8))
        one.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("change of the answer's\nprobability, %")
    return _root(axes[0])


def stays(shares: Mapping[str, Sequence[Sequence[float]]], *, xlabel: str = "", ax: Axes | None = None) -> Axes:
    """How often the answer stays, one line per name; each point is (share, low, high), 0 to 1, at 0, 1, 2 ... along x."""
    ax = ax if ax is not None else _new_axes((5.0, 2.9))
    for number, (name, points) in enumerate(shares.items()):
        mean, low, high = 100 * np.asarray(points, float).T
        at = np.arange(len(mean)) + 0.06 * (number - (len(shares) - 1) / 2)  # aside, so that intervals do not cover each other
        bars = (mean - low, high - mean)
        ax.errorbar(at, mean, bars, color=COLORS[number % len(COLORS)], marker="o", capsize=3, label=name)
    ax.set(xlabel=xlabel, ylabel="answer stays, %", ylim=(-5, 105))
    ax.legend(frameon=False, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
