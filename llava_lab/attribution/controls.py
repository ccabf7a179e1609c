"""Maps that know nothing about the answer, to show beside every map that claims to.

A map that does no better than these has shown nothing. ``inverse`` runs the method whose map it reverses; the others
run no model.

    attribute(lab, run, method="center")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np

from llava_lab.attribution.method import REGISTERED, Maps, Seed, method
from llava_lab.checks import shown
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.replay.targets import Targets
from llava_lab.results import Run

SPREAD = 0.25  # standard deviation of the centre bump, as a share of the grid


@method(
    truth="Uniform random numbers, the same for the same seed.",
    source="control",
    cost="none",
    blind_to="everything",
    reach="pixels",
    control=True,
)
def random(lab: Lab, run: Run, targets: Targets, *, seed: Seed = 0) -> Maps:
    values = np.random.default_rng(seed).random((len(targets), run.map.rows, run.map.cols))
    return Maps(values, {}, ("Uniform random numbers: a control, not an explanation.",))


@method(
    truth="A smooth bump at the middle of the picture, because photographers centre what matters.",
    source="control",
    cost="none",
    blind_to="everything but position",
    reach="pixels",
    control=True,
)
def center(lab: Lab, run: Run, targets: Targets) -> Maps:
    bump = center_bump(run.map.rows, run.map.cols)
    return Maps(np.repeat(bump[None], len(targets), 0), {}, ("A bump at the picture's centre: a control, not an explanation.",))


def center_bump(rows: int, cols: int) -> np.ndarray:
    """A smooth bump over a patch grid, float64 (rows, cols), largest in the middle."""
    y = (np.arange(rows) + 0.5) / rows - 0.5
    x = (np.arange(cols) + 0.5) / cols - 0.5
    return np.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * SPREAD**2))


@method(
    truth="How strongly brightness changes within the patch, whatever was asked.",
    source="control; Adebayo et al. 2018 (arXiv 1810.03292) on saliency maps that are edge detectors",
    cost="none",
    blind_to="the question, the answer and the model",
    reach="pixels",
    control=True,
)
def edges(lab: Lab, run: Run, targets: Targets) -> Maps:
    inside = run.map.coverage()
    strength = run.map.mask_to_patches(edge_strength(run.picture)) / np.maximum(inside, 1e-6)  # of the picture alone
    values = np.repeat(strength[None] * (inside > 0), len(targets), 0)
    return Maps(values, {}, ("Edges of the picture: a control, not an explanation.",))


def edge_strength(picture: np.ndarray) -> np.ndarray:
    """Length of the brightness gradient at each pixel of a uint8 picture, float32 (height, width), 0 to 1."""
    bright = picture.astype(np.float32).mean(2) / 255
    steps = [np.gradient(bright, axis=axis) for axis in (0, 1) if bright.shape[axis] > 1]
    return np.sqrt(sum((step**2 for step in steps), np.zeros_like(bright)))


def other_method(name: str, value: Any) -> str:
    """The option `of`, checked."""
    known = [entry for entry in REGISTERED if entry != "inverse"]
    if not isinstance(value, str) or value not in known:
        raise OptionError(f"{name} must be the name of another method, one of {', '.join(known)}; got {shown(value)}")
    return value


def options_by_name(name: str, value: Any) -> Mapping[str, Any] | None:
    """The option `options`, checked; what is in it the other method checks itself."""
    if value is not None and not isinstance(value, Mapping):
        raise OptionError(f"{name} must be the other method's options by name, or None; got {shown(value)}")
    return value


@method(
    truth="Another method's map turned round, the least relevant patch first.",
    source="control",
    cost="that of the method it turns round",
    blind_to="what the method it turns round is blind to",
    reach="tokens",
    control=True,
)
def inverse(
    lab: Lab,
    run: Run,
    targets: Targets,
    *,
    of: Annotated[str, other_method] = "rollout",
    options: Annotated[Mapping[str, Any] | None, options_by_name] = None,
) -> Maps:
    """Largest becomes smallest, within the same range; padding stays last, or the control would only point there."""
    other = REGISTERED[of]
    maps = other.compute(lab, run, targets, options or {})
    seen = run.map.coverage() > 0
    inner = maps.values[:, seen]
    low, high = inner.min(1), inner.max(1)
    values = np.where(seen, (low + high)[:, None, None] - maps.values, low[:, None, None])
    notes = (f"The map of {other.name} turned round: a control, not an explanation.", *maps.notes)
    return Maps(values, maps.passes, notes, maps.extras, interrupted=maps.interrupted)
