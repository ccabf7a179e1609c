"""Figures from saved results: maps drawn on the original picture, with what the model never saw marked.

Every function takes ``ax=``; single panels return their Axes, panels side by side their Figure. No model and no torch.

    overlay(run, relevance, target=2)  # one map on the picture
    words_figure(run, relevance)  # every word's map, on one colour scale

Colours are those of the widgets (`llava_lab.plots.palette`): one-sided maps run from clear to bright, maps with
negative values are centred on 0 (orange more, blue less, clear nothing). The colour bar shows the same blend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.checks import entry, has_picture
from llava_lab.errors import OptionError
from llava_lab.plots.axes import AS_TEXT, figure_of, new_axes, open_frame, panels
from llava_lab.plots.palette import OTHER, SEGMENTS, colormap
from llava_lab.results import Relevance, Run
from llava_lab.results.table import NEGLIGIBLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

CLIP = 99.5  # percentile of the absolute values that gets the full colour; one odd patch must not hide the rest
PANEL = 2.4  # inches per small panel
UNSEEN: dict[str, Any] = {"facecolor": (0.45, 0.45, 0.45, 0.55), "edgecolor": (1, 1, 1, 0.7), "hatch": "///", "linewidth": 0}
NOTE: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}

SCORED = {"logodds": "log-odds", "logprob": "log-probability"}

Scale = tuple[float, float]


@entry
def overlay(
    run: Run,
    rel: Relevance,
    *,
    target: int = 0,
    ax: Axes | None = None,
    opacity: float = 0.75,
    smooth: bool = False,
    cmap: str | None = None,
    scale: Scale | None = None,
    colorbar: bool = True,
    title: str | None = None,
) -> Axes:
    """One target's map on the picture it explains; hatched where the model never looked.

    `scale` is (lowest, highest) for the colours, by default shared by all targets of `rel`.

    >>> relevance = ll.attribute(lab, run, method="attention", target="red")
    >>> plots.overlay(run, relevance).get_title()
    '“red” by attention'
    """
    _check(run, rel, target)
    if not 0 < opacity <= 1:
        raise OptionError(f"opacity must be above 0 and at most 1, got {opacity!r}")
    ax = _axes(ax, run)
    scale = color_scale([rel]) if scale is None else scale
    colors, norm = _colors(scale, cmap, opacity)
    height, width = run.picture.shape[:2]
    extent = (0, width, height, 0)
    ax.imshow(run.picture, extent=extent, interpolation="nearest")
    ax.imshow(np.ma.masked_invalid(rel.on_picture(target, smooth=smooth)), extent=extent, cmap=colors, norm=norm)
    _mark_unseen(ax, run)
    ax.set_title(f"{_quoted(rel, target)} by {rel.method}" if title is None else title, fontsize=10, **AS_TEXT)
    ax.set_xlabel("\n".join(filter(None, (_padding_note(rel, target), _noise_note(rel, target)))), fontsize=7, color="0.35")
    if colorbar:
        _bar([ax], rel, scale, colors, norm)
    return ax


@entry
def words_figure(
    run: Run,
    rel: Relevance,
    *,
    ax: Sequence[Axes] | None = None,
    columns: int = 5,
    opacity: float = 0.75,
    smooth: bool = False,
    cmap: str | None = None,
) -> Figure:
    """Every target of `rel` as a small map, all on one colour scale with one legend.

    >>> relevance = ll.attribute(lab, run, method="attention", target=["red", "answer"])
    >>> len(plots.words_figure(run, relevance).axes)  # a map for each, and the colour bar
    3
    """
    _check(run, rel, 0)
    maps = _grid(run, len(rel.targets), columns, ax)
    scale = color_scale([rel])
    for i, panel in enumerate(maps):
        title = _quoted(rel, i, 24)
        overlay(run, rel, target=i, ax=panel, opacity=opacity, smooth=smooth, cmap=cmap, scale=scale, colorbar=False, title=title)
    _bar(maps, rel, scale, *_colors(scale, cmap, opacity))
    figure = figure_of(maps[0])
    if ax is None:
        figure.suptitle(f"{_short(run.question)}\n{_short(run.answer_shown)}", fontsize=10, **AS_TEXT)
    return figure


@entry
def compare_figure(
    run: Run,
    maps: Mapping[str, Relevance],
    *,
    target: int = 0,
    ax: Sequence[Axes] | None = None,
    columns: int = 4,
    opacity: float = 0.75,
    smooth: bool = False,
) -> Figure:
    """The same target explained in several ways, side by side, each on its own colour scale: units differ.

    >>> maps = {name: ll.attribute(lab, run, method=name) for name in ("attention", "rollout")}
    >>> [ax.get_title() for ax in plots.compare_figure(run, maps).axes[:2]]
    ['attention', 'rollout']
    """
    if not maps:
        raise OptionError("expected at least one map to compare, got none")
    for rel in maps.values():
        _check(run, rel, target)
    shown = _grid(run, len(maps), columns, ax, beside=0.8)
    for panel, (name, rel) in zip(shown, maps.items(), strict=True):
        overlay(run, rel, target=target, ax=panel, opacity=opacity, smooth=smooth, title=name)
    figure = figure_of(shown[0])
    if ax is None:
        which = _quoted(next(iter(maps.values())), target)
        figure.suptitle(f"Which patches made {which}?\n{_short(run.question)}", fontsize=10, **AS_TEXT)
    return figure


@entry
def segment_bars(run: Run, rel: Relevance, *, ax: Axes | None = None) -> Axes:
    """Where each target's attention mass lies in the sequence, and, when known, where it would lie by the mask alone.

    >>> ax = plots.segment_bars(run, ll.attribute(lab, run, method="attention"))
    >>> ax.get_xlabel()
    'share of the row'
    """
    _check(run, rel, 0)
    shares = [*rel.extras.get("mass", [None]), *(rel.extras.get("null_mass") or ())[:1]]
    if not all(isinstance(part, dict) and all(isinstance(share, (int, float)) for share in part.values()) for part in shares):
        raise OptionError(f"expected a map with mass per segment (rollout, attention), got one by {rel.method!r}")
    bars = [(_quoted(rel, i), mass) for i, mass in enumerate(rel.extras["mass"])]
    if rel.extras.get("null_mass"):
        bars.append(("mask alone", rel.extras["null_mass"][0]))
    if ax is None:
        ax = new_axes((6.0, 0.9 + 0.32 * len(bars)))
    left = np.zeros(len(bars))
    for name in (*SEGMENTS, "other"):
        sizes = np.array([mass.get(name, 0.0) if name != "other" else max(1 - sum(mass.values()), 0.0) for _, mass in bars])
        if sizes.max() > 5e-4:
            ax.barh(range(len(bars)), sizes, left=left, color=SEGMENTS.get(name, OTHER), label=name, height=0.7)
        left += sizes
    ax.set_yticks(range(len(bars)), [text for text, _ in bars], fontsize=8, **AS_TEXT)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of the row", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    open_frame(ax)
    ax.legend(ncols=6, fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return ax


@entry
def color_scale(maps: Sequence[Relevance]) -> Scale:
    """(lowest, highest) for colours over all targets of `maps`: from 0 when nothing is negative, else symmetric about 0.

    >>> low, high = plots.color_scale([ll.attribute(lab, run, method="attention")])
    >>> low, high > 0
    (0.0, True)
    """
    values = np.concatenate([np.zeros(0), *(rel.values.ravel() for rel in maps)])
    if not values.size:
        raise OptionError("expected at least one map for the colours, got none")
    top = float(np.percentile(np.abs(values), CLIP)) or float(np.abs(values).max()) or 1.0
    return (-top, top) if (values < 0).any() else (0.0, top)


def _quoted(rel: Relevance, target: int, width: int = 48) -> str:
    return f"“{_short(rel.targets[target].text, width)}”"


def _short(text: str, width: int = 90) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def _check(run: Run, rel: Relevance, target: int) -> None:
    has_picture(run)
    if rel.map != run.map or rel.fingerprint != run.fingerprint:
        raise OptionError("expected a map of this run, got one made for another picture or by another checkpoint")
    if not rel.targets:
        raise OptionError("expected a map of at least one target, got one of none")
    if not 0 <= target < len(rel.targets):
        raise OptionError(f"targets run from 0 to {len(rel.targets) - 1}, got {target}")


def _colors(scale: Scale, cmap: str | None, opacity: float) -> tuple[Colormap, Normalize]:
    """A colour map that fades to clear at 0, so that the picture shows where there is nothing to show."""
    import matplotlib
    from matplotlib.colors import ListedColormap, Normalize

    two_sided = scale[0] < 0
    if cmap is not None and cmap not in matplotlib.colormaps:
        raise OptionError(f"cmap must be None or a matplotlib colour map such as 'viridis' or 'gray', got {cmap!r}")
    at = np.linspace(0, 1, 256)
    table = (colormap(two_sided) if cmap is None else matplotlib.colormaps[cmap])(at)
    strength = np.abs(2 * at - 1) if two_sided else at
    table[:, 3] = opacity * np.sqrt(strength)  # the root keeps weak values visible
    return ListedColormap(table), Normalize(*scale, clip=True)


def _bar(axes: Sequence[Axes], rel: Relevance, scale: Scale, colors: Colormap, norm: Normalize) -> None:
    from matplotlib.cm import ScalarMappable

    clipped = float(np.abs(rel.values).max()) > scale[1] * (1 + 1e-6)
    extend = "neither" if not clipped else "both" if scale[0] < 0 else "max"
    bar = axes[0].figure.colorbar(ScalarMappable(norm, colors), ax=list(axes), shrink=0.8, fraction=0.05, extend=extend)
    bar.set_label(_unit(rel), fontsize=7)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _unit(rel: Relevance) -> str:
    if rel.options.get("null") == "causal":
        return "log-ratio to mask alone"
    if "unit" in rel.extras:
        return f"drop of {SCORED[rel.extras['unit']]}"
    return {"rollout": "share", "attention": "share"}.get(rel.method, "relevance")


def _mark_unseen(ax: Axes, run: Run) -> None:
    """Hatch the parts of the picture outside the model's square."""
    from matplotlib.patches import Rectangle

    left, top, right, bottom = run.map.seen_box
    height, width = run.picture.shape[:2]
    parts = ((0, 0, width, top), (0, bottom, width, height), (0, top, left, bottom), (right, top, width, bottom))
    hidden = [part for part in parts if part[2] - part[0] > 0.5 and part[3] - part[1] > 0.5]
    for x0, y0, x1, y1 in hidden:
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, label="never seen by the model", **UNSEEN))
    if hidden:
        x0, y0, x1, y1 = max(hidden, key=lambda part: (part[2] - part[0]) * (part[3] - part[1]))
        turned = 90 if y1 - y0 > x1 - x0 else 0
        tag = {"boxstyle": "round,pad=0.3", "facecolor": (0.25, 0.25, 0.25, 0.85), "linewidth": 0}
        ax.text((x0 + x1) / 2, (y0 + y1) / 2, "never seen", rotation=turned, bbox=tag, color="white", **NOTE)


def _padding_note(rel: Relevance, target: int) -> str:
    outside = rel.map.coverage() == 0
    if not outside.any():
        return ""
    total = float(np.abs(rel.values[target]).sum())
    share = float(np.abs(rel.values[target][outside]).sum()) / total if total else 0.0
    return f"{int(outside.sum())} patches are padding, not drawn;\nthey hold {share:.0%} of the map"


def _noise_note(rel: Relevance, target: int) -> str:
    """How many patches are not drawn because nothing can be told of them; that it is all of them, where it is."""
    inside = rel.map.coverage() > 0
    below = int((np.abs(rel.values[target][inside]) < rel.noise_floor[target]).sum())
    floor = f"noise floor {rel.noise_floor[target]:.1g}"
    if below and below == inside.sum():
        return f"{NEGLIGIBLE} everywhere: no patch reaches the {floor}"
    return f"{below} patches {NEGLIGIBLE} ({floor}), not drawn" if below else ""


def _axes(ax: Axes | None, run: Run) -> Axes:
    if ax is None:
        height, width = run.picture.shape[:2]
        ax = new_axes((5.0, max(2.0, 4.2 * height / width)))
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    return ax


def _grid(run: Run, count: int, columns: int, ax: Sequence[Axes] | None, *, beside: float = 0.0) -> list[Axes]:
    """`count` Axes as wide and high as the picture wants, with `beside` inches each for a colour bar."""
    if columns < 1:
        raise OptionError(f"columns must be at least 1, got {columns}")
    height, width = run.picture.shape[:2]
    size = (PANEL + beside, PANEL * min(height / width, 2.0) + 0.35)
    return panels(ax, count, size, columns=columns, around=(0.9, 0.55), layout="compressed")
