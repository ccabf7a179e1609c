"""Maps that know nothing about the answer, to show beside every map that claims to.

A map that does no better than these has found nothing. They run no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.attribution.base import Maps, Method, Targets, whole_number
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

SPREAD = 0.25  # standard deviation of the centre bump, as a share of the grid


def _random(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    rng = np.random.default_rng(whole_number("seed", options["seed"]))
    values = rng.random((len(targets), run.map.rows, run.map.cols))
    return Maps(values, {}, ("Uniform random numbers: a control, not an explanation.",))


def _center(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    rows, cols = run.map.rows, run.map.cols
    y = (np.arange(rows) + 0.5) / rows - 0.5
    x = (np.arange(cols) + 0.5) / cols - 0.5
    bump = np.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * SPREAD**2))
    return Maps(np.repeat(bump[None], len(targets), 0), {}, ("A bump at the picture's centre: a control, not an explanation.",))


RANDOM = Method(
    name="random",
    truth="Uniform random numbers, the same for the same seed.",
    source="control",
    cost="none",
    blind_to="everything",
    options={"seed": 0},
    compute=_random,
)

CENTER = Method(
    name="center",
    truth="A smooth bump at the middle of the picture, because photographers centre what matters.",
    source="control",
    cost="none",
    blind_to="everything but position",
    options={},
    compute=_center,
)
