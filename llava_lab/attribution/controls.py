"""Maps that know nothing about the answer, to show beside every map that claims to.

A map that does no better than these has found nothing. ``inverse`` runs whatever it turns round; the others
run no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.attribution.method import Maps, Method
from llava_lab.checks import whole_number
from llava_lab.errors import OptionError
from llava_lab.replay.targets import Targets
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


def edge_strength(picture: np.ndarray) -> np.ndarray:
    """Length of the brightness gradient at each pixel of a uint8 picture, float32 (height, width), 0 to 1."""
    bright = picture.astype(np.float32).mean(2) / 255
    steps = [np.gradient(bright, axis=axis) for axis in (0, 1) if bright.shape[axis] > 1]
    return np.sqrt(sum((step**2 for step in steps), np.zeros_like(bright)))


def _edges(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    inside = run.map.coverage()
    strength = run.map.mask_to_patches(edge_strength(run.picture)) / np.maximum(inside, 1e-6)  # of the picture alone
    return Maps(
        np.repeat(strength[None] * (inside > 0), len(targets), 0), {}, ("Edges of the picture: a control, not an explanation.",)
    )


def _inverse(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    """Largest becomes smallest, within the same range; padding stays last, or the control would only point there."""
    from llava_lab.attribution.registry import METHODS  # the registry lists this file

    known = [name for name in METHODS if name != "inverse"]
    if options["of"] not in known:
        raise OptionError(f"of must be the name of another method, one of {', '.join(known)}; got {options['of']!r}")
    given = options["options"] or {}
    if not isinstance(given, Mapping):
        raise OptionError(f"options must be the other method's options by name, or None; got {given!r}")
    method = METHODS[options["of"]]
    maps = method.compute(lab, run, targets, method.with_defaults(given))
    seen = run.map.coverage() > 0
    inner = maps.values[:, seen]
    low, high = inner.min(1), inner.max(1)
    values = np.where(seen, (low + high)[:, None, None] - maps.values, low[:, None, None])
    notes = (f"The map of {method.name} turned round: a control, not an explanation.", *maps.notes)
    return Maps(values, maps.passes, notes, maps.extras)


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

EDGES = Method(
    name="edges",
    truth="How strongly brightness changes within the patch, whatever was asked.",
    source="control; Adebayo et al. 2018 (arXiv 1810.03292) on saliency maps that are edge detectors",
    cost="none",
    blind_to="the question, the answer and the model",
    options={},
    compute=_edges,
)

INVERSE = Method(
    name="inverse",
    truth="Another method's map turned round, the least relevant patch first.",
    source="control",
    cost="that of the method it turns round",
    blind_to="what the method it turns round is blind to",
    options={"of": "rollout", "options": None},
    compute=_inverse,
)
