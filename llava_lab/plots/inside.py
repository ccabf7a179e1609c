"""Figures of what goes on inside the model: sinks and circuits.

Every function takes ``ax=``; single panels return their Axes, panels side by side their Figure. No model and no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.errors import OptionError
from llava_lab.plots.axes import new_axes, open_frame
from llava_lab.plots.palette import BLUE, RED
from llava_lab.results import Circuit, Run, Sinks

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    ax.set_xticks(at, [name.replace("language", "LM") for name in result.layers], rotation=90, fontsize=7)
    ax.set_ylabel("times even share; times median", fontsize=8)
    ax.legend(frameon=False, fontsize=7)
    open_frame(ax)
    return ax


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
