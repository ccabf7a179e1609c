"""The axes that figures draw on: the caller's, or new ones of a fitting size; matplotlib's pyplot is imported only then."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AS_TEXT: dict[str, Any] = {"parse_math": False}  # a model's words and a method's name are never a formula


def new_axes(size: tuple[float, float]) -> Axes:
    """One new Axes on a figure of `size` inches."""
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size, layout="constrained")[1]


def panels(
    ax: Any,
    count: int,
    size: tuple[float, float],
    *,
    columns: int | None = None,
    around: tuple[float, float] = (0.0, 0.0),
    sharey: bool = False,
    layout: str = "constrained",
) -> list[Axes]:
    """`count` Axes: the caller's, or new ones in rows of `columns`, each of `size` inches with `around` for the whole.

    Raises OptionError where the caller gave too few.
    """
    if ax is not None:
        every = list(np.ravel(np.asarray(ax, dtype=object)))
        if len(every) < count:
            raise OptionError(f"expected at least {count} axes, one per panel, got {len(every)}")
        return every[:count]
    from matplotlib import pyplot

    across = min(columns or count, count)
    down = math.ceil(count / across)
    figsize = (size[0] * across + around[0], size[1] * down + around[1])
    grid = pyplot.subplots(down, across, figsize=figsize, layout=layout, sharey=sharey, squeeze=False)[1]
    for spare in grid.ravel()[count:]:
        spare.remove()
    return list(grid.ravel()[:count])


def figure_of(ax: Axes) -> Figure:
    """The whole figure an Axes is on, also where it is on a part of one."""
    figure = ax.figure
    return figure if not hasattr(figure, "parent") else figure.figure  # type: ignore[return-value]


def open_frame(ax: Axes, *, left: bool = True) -> None:
    """Axes without the upper and right edge, and without the left one where rows have names."""
    ax.spines[["top", "right"] if left else ["top", "right", "left"]].set_visible(False)


def named_rows(ax: Axes) -> None:
    """The look of a figure whose rows are names: a pale grid for the numbers, no frame."""
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(axis="x", color="0.92")
    ax.set_axisbelow(True)
    open_frame(ax, left=False)
