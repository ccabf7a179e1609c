"""What every attribution method has in common: its entry in the registry, its options, its answer.

A method is a plain function ``compute(lab, run, targets, options) -> Maps``; `Method` is the card
that says what the numbers mean. Nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.errors import OptionError, TargetError
from llava_lab.replay.targets import Targets
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab


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


def refuse_contrast(method: str, targets: Targets) -> None:
    """Attention at a position is the same whatever word is predicted there, so it cannot tell two words apart."""
    for target in targets:
        if target.kind == "contrast":
            raise TargetError(
                f"method {method!r} cannot tell {target.text!r}: attention is the same for every word predicted at a "
                "position; use method='occlusion' for a contrast, or explain the word alone"
            )
