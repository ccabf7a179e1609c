"""What every attribution method has in common: its entry in the registry, its options, its answer.

A method is a plain function ``compute(lab, run, targets, options) -> Maps``; `Method` is the card
that says what the numbers mean. Nothing here runs a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.errors import OptionError, TargetError
from llava_lab.results import Run, Target

if TYPE_CHECKING:
    from llava_lab.models import Lab

Targets = tuple[Target, ...]


class Outside(ABC):
    """Stands where a method expects a `Lab` and scores pictures itself: there is no model of ours to run.

    `llava_lab.remote.explain` is the one of closed models. What `open_level`, `target_score` and
    `fill_pixels` make of a Lab, it makes in its own way; `model` is empty, for `capture.undisturbed`.
    """

    name: str
    fingerprint: str
    model: nn.Module

    @abstractmethod
    def open_level(self, targets: Targets, *, at: str, fill: str, seed: int, fills: tuple[str, ...]) -> Any: ...

    @abstractmethod
    def target_score(self, targets: Targets) -> tuple[Tensor, Callable[[Tensor], Tensor]]: ...

    @abstractmethod
    def fill_pixels(self, pixels: Tensor, fill: str, *, seed: int) -> Tensor: ...


@dataclass(frozen=True)
class Maps:
    """What a method found: one map per target, and what to know before reading them."""

    values: np.ndarray  # float32 (targets, rows, cols)
    passes: dict[str, int]  # {"forward": n, "backward": m}, one picture through the model counted once
    notes: tuple[str, ...] = ()
    extras: dict[str, Any] = field(default_factory=dict)  # JSON-able
    views: tuple[np.ndarray, ...] = ()  # float32 (targets, rows, cols) of each of the run's views, where it has several


@dataclass(frozen=True)
class Method:
    """One way to say which patches mattered, and what it does not say."""

    name: str
    truth: str  # what the number is, in one sentence
    source: str
    cost: str  # in passes through the model
    blind_to: str  # what it cannot see
    options: Mapping[str, Any]  # name -> default
    compute: Callable[[Lab, Run, Targets, dict[str, Any]], Maps]

    def with_defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given` filled up with the defaults. Raises OptionError on a name the method does not have."""
        unknown = [name for name in given if name not in self.options]
        if unknown:
            known = ", ".join(f"{name}={default!r}" for name, default in self.options.items()) or "none"
            raise OptionError(f"method {self.name!r} has no option {unknown[0]!r}; its options are {known}")
        return {**self.options, **given}


def outside(lab: Any, run: Run) -> Outside | None:
    """What scores altered pictures of `run` in the lab's place, or None where the lab's own pixels can be altered."""
    if isinstance(lab, Outside):
        return lab
    if not run.views:
        return None
    from llava_lab.replay.alter import TiledLooks  # it builds on what imports this file

    return TiledLooks(lab, run)


def refuse_contrast(method: str, targets: Targets) -> None:
    """Attention at a position is the same whatever word is predicted there, so it cannot tell two words apart."""
    for target in targets:
        if target.kind == "contrast":
            raise TargetError(
                f"method {method!r} cannot tell {target.text!r}: attention is the same for every word predicted at a "
                "position; use method='occlusion' for a contrast, or explain the word alone"
            )


def predicting_rows(targets: Targets) -> tuple[int, ...]:
    """Every position that predicts a token of some target, sorted."""
    return tuple(sorted({position for target in targets for position in target.positions}))


def target_rows(rows: Float[Tensor, "Q K"], at: Sequence[int], targets: Targets) -> Float[Tensor, "N K"]:
    """Mean row of each target; `at` names the position of each row given."""
    where = {position: i for i, position in enumerate(at)}
    return torch.stack([rows[[where[position] for position in target.positions]].mean(0) for target in targets])


def image_values(rows: Float[Tensor, "N K"], run: Run) -> np.ndarray:
    """The image columns of each target's row, float32 (targets, rows, cols); of the first view where there are several."""
    if run.views:
        return view_values(rows, run)[0]
    start, stop = run.segments["image"]
    return rows[:, start:stop].float().cpu().numpy().reshape(len(rows), run.map.rows, run.map.cols)


def view_values(rows: Float[Tensor, "N K"], run: Run) -> tuple[np.ndarray, ...]:
    """The same for each view, newline tokens left out; nothing where the run has one."""
    return tuple(rows.float().cpu().numpy()[:, view.positions] for view in run.views)


def segment_mass(rows: Float[Tensor, "N K"], run: Run) -> list[dict[str, float]]:
    """How much of each target's row lies on each segment of the sequence."""
    return [{name: float(row[start:stop].sum()) for name, (start, stop) in run.segments.items()} for row in rows]
