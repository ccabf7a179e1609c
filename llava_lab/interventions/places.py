"""Where to touch a sequence: segments, patches and positions, all resolved to positions of one run.

What reaches to the sequence's end (``last``, ``answer``, ``all``) is *open*: it goes on through tokens that are
generated later, so that decoding step by step is treated like the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from llava_lab.errors import OptionError
from llava_lab.results import Run

OPEN = ("last", "answer", "all")


@dataclass(frozen=True)
class Spots:
    """Some positions of a run's sequence."""

    name: str
    positions: tuple[int, ...]  # sorted, each once
    length: int  # of the run's sequence
    open: bool = False  # every later position belongs too

    def holds(self, at: Tensor) -> Bool[Tensor, " N"]:
        """Whether each position `at` belongs."""
        found = torch.isin(at, torch.tensor(self.positions, dtype=at.dtype, device=at.device))
        return found | (at >= self.length) if self.open else found


def spots(run: Run, what: Any, *, option: str) -> Spots:
    """`what` as positions: a segment's name, ``last``, ``all``, patches [(row, col), ...], a bool grid, or positions.

    ``last`` is every position that predicts the answer: the prompt's last and the answer's own. Raises OptionError on
    an unknown name, an empty set, a patch outside the grid or a position outside the sequence.
    """
    length = len(run.token_ids)
    if isinstance(what, Spots):
        return what
    if isinstance(what, str):
        return Spots(what, _named(run, what, option), length, what in OPEN)
    if isinstance(what, np.ndarray) and what.dtype == bool:
        if what.shape != (run.map.rows, run.map.cols):
            raise OptionError(f"{option} as a grid must be {run.map.rows}x{run.map.cols} bool, got shape {what.shape}")
        what = [tuple(cell) for cell in np.argwhere(what).tolist()]
    items = [int(one) if isinstance(one, Integral) else one for one in what] if _listed(what) else None
    if not items:
        raise OptionError(f"{option} must be {_choices(run)}, patches [(row, col), ...] or positions, none empty; got {what!r}")
    if all(isinstance(one, int) for one in items):
        wrong = [one for one in items if not 0 <= one < length]
        if wrong:
            raise OptionError(f"{option}: positions run from 0 to {length - 1}, got {wrong[0]}")
        return Spots(_count(len(set(items)), "position"), tuple(sorted(set(items))), length)
    return patch_spots(run, items, option=option)


def patch_spots(run: Run, patches: Any, *, option: str = "patches") -> Spots:
    """Patches (row, col) as the positions of their image tokens."""
    if isinstance(patches, np.ndarray) and patches.dtype == bool:
        return spots(run, patches, option=option)
    found = []
    for one in patches if _listed(patches) else ():
        fine = isinstance(one, Sequence | np.ndarray) and len(one) == 2 and all(isinstance(v, Integral) for v in one)
        if not fine or not (0 <= one[0] < run.map.rows and 0 <= one[1] < run.map.cols):
            last = f"rows 0 to {run.map.rows - 1} and columns 0 to {run.map.cols - 1}"
            raise OptionError(f"{option}: a patch is (row, col) with {last}, got {one!r}")
        found.append(run.segments["image"][0] + int(one[0]) * run.map.cols + int(one[1]))
    if not found:
        raise OptionError(f"{option}: expected at least one patch (row, col), got {patches!r}")
    return Spots(_count(len(set(found)), "patch"), tuple(sorted(set(found))), len(run.token_ids))


def is_patches(run: Run, place: Spots) -> bool:
    """Whether the positions are some, but not all, of the picture's."""
    start, stop = run.segments["image"]
    return all(start <= one < stop for one in place.positions) and len(place.positions) < stop - start


def _named(run: Run, name: str, option: str) -> tuple[int, ...]:
    start, stop = run.segments["answer"]
    if name == "last":
        return tuple(range(start - 1, max(stop - 1, start)))
    if name == "all":
        return tuple(range(len(run.token_ids)))
    if name not in run.segments:
        raise OptionError(f"{option}: no segment {name!r}; there is {_choices(run)}")
    found = tuple(range(*run.segments[name]))
    if not found:
        raise OptionError(f"{option}: the segment {name!r} of this run is empty; choose another of {_choices(run)}")
    return found


def _choices(run: Run) -> str:
    return ", ".join([*run.segments, "last", "all"])


def _listed(what: Any) -> bool:
    return isinstance(what, Sequence | range | set | frozenset | np.ndarray) and len(what) > 0


def _count(number: int, noun: str) -> str:
    plural = "patches" if noun == "patch" else noun + "s"
    return f"{number} {noun if number == 1 else plural}"
