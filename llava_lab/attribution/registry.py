"""Every attribution method under one name and one signature.

A method registers itself (`attribution.method`). To add one, write its function in the file of its family; a new file
needs its import here, and a place in `FAMILIES`.

    relevance = attribute(lab, run, method="occlusion", target="red")
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import singledispatch
from types import MappingProxyType
from typing import Any

import numpy as np

from llava_lab.attribution import (
    attention,
    controls,
    gradients,
    heads,
    logits,
    max_flow,
    occlusion,
    relevancy,
    rollout,
    shapley,
)
from llava_lab.attribution.method import REGISTERED, Maps, Method
from llava_lab.capture.watch import MEND
from llava_lab.checks import as_python, entry, is_list, known, same_model
from llava_lab.errors import LabError, OptionError
from llava_lab.models import connectors
from llava_lab.replay.targets import Targets, Wanted, resolve_targets
from llava_lab.results import Relevance, Run

FAMILIES = (rollout, attention, heads, max_flow, occlusion, shapley, gradients, relevancy, logits, controls)
UNPLACED = (
    "The connector's tokens have no place in the picture: where something was hidden in the pixels the map is a place, "
    "otherwise its cells are numbers of tokens."
)

# The order in which they are listed: the default first, controls last.
PLACE = {family.__name__: place for place, family in enumerate(FAMILIES)}
for card in sorted(REGISTERED.values(), key=lambda card: (card.control, PLACE.get(card.function.__module__, len(PLACE)))):
    REGISTERED[card.name] = REGISTERED.pop(card.name)
METHODS: Mapping[str, Method] = MappingProxyType(REGISTERED)


@entry
def attribute(lab: Any, run: Run, *, method: str = "rollout", target: Wanted = None, **options: Any) -> Relevance:
    """Which patches of the picture the answer came from, as `method` understands it.

    `target`: None or ``"answer"`` the whole answer, ``"words"`` a map per word, an int an answer token,
    a str a word, ``("red", "blue")`` the contrast of two words, a list several of these. Several targets
    share the passes. The options of each method, with defaults, are in ``METHODS[method].options``. On a closed
    model (`BlackBox`) the methods that need only answers work, within its budget of requests.

    Of a question about several pictures it is the map of the first (see `Run.about`); `view_values` holds one for each.

    Raises OptionError (unknown method or option, a question without a picture), TargetError (not in the answer),
    CheckpointError (the run was made by another checkpoint).

    >>> relevance = ll.attribute(lab, run, method="attention", target="words")
    >>> relevance.values.shape == (len(run.words), 12, 12)
    True
    """
    card = METHODS[known("method", method, METHODS)]
    refuse_unable(lab, card)
    chosen = card.with_defaults(options)
    weights = same_model(lab, run)
    targets = resolve_targets(lab, run, target)
    start = time.perf_counter()
    maps = compute_maps(lab, run, targets, card, chosen)
    notes = (*maps.notes, in_views(run, bool(maps.views))) if run.views else maps.notes
    return result_of(
        replace(maps, notes=notes),
        card,
        chosen,
        run,
        targets,
        model=lab.name,
        weights=weights,
        seconds=time.perf_counter() - start,
    )


@singledispatch
def refuse_unable(lab: Any, method: Method) -> None:
    """Raise OptionError where `method` cannot work on `lab`. Another kind of lab registers its own reasons."""
    method.refuse(lab, ())


@singledispatch
def compute_maps(lab: Any, run: Run, targets: Targets, method: Method, options: Mapping[str, Any]) -> Maps:
    """The maps that `method` makes of `run`. Another kind of lab registers its own way."""
    if run.others and method.reach == "inside":
        able = ", ".join(works_at("tokens"))
        raise OptionError(f"method {method.name!r} explains a question about one picture; with several work {able}")
    maps = method.compute(lab, run, targets, options)
    if run.others and not maps.views:
        maps = _each_picture(maps, lab, run, targets, method, options)
    return maps if connectors.placed(lab.model.config) else replace(maps, notes=(*maps.notes, UNPLACED))


def _each_picture(maps: Maps, lab: Any, run: Run, targets: Targets, method: Method, options: Mapping[str, Any]) -> Maps:
    """A method that alters one picture, made of each: `maps` is the first's. Where Ctrl-C ended it, what is left out is 0."""
    every = [maps]
    for number in range(1, len(run.views)):
        if every[-1].interrupted:
            where = run.views[number].map
            every.append(replace(maps, values=np.zeros((len(targets), where.rows, where.cols)), passes={}, interrupted=True))
        else:
            picture = sum(view.start < run.views[number].start for view in run.views)
            every.append(method.compute(lab, run.about(picture), targets, options))
    passes = {kind: sum(one.passes.get(kind, 0) for one in every) for kind in maps.passes}
    views = tuple(one.values for one in every)
    return replace(maps, passes=passes, views=views, interrupted=any(one.interrupted for one in every))


def result_of(
    maps: Maps,
    method: Method,
    options: Mapping[str, Any],
    run: Run,
    targets: Targets,
    *,
    model: str,
    weights: str,
    seconds: float,
) -> Relevance:
    """What a method gave, as the result that is kept."""
    if count := int((~np.isfinite(maps.values)).sum()):
        raise LabError(
            f"expected finite values of method {method.name!r}, got NaN or infinity in {count} of {maps.values.size}; {MEND}"
        )
    if "score" in options and "unit" in maps.extras:
        options = {**options, "score": maps.extras["unit"]}  # a closed model has but one
    relevance = Relevance(
        values=maps.values.astype(np.float32),
        targets=targets,
        method=method.name,
        options={name: _plain(value) for name, value in options.items()},
        map=run.map,
        model=model,
        fingerprint=weights,
        seconds=seconds,
        passes={"forward": 0, "backward": 0, **maps.passes},
        notes=maps.notes,
        extras=maps.extras,
        views=run.views if maps.views else (),
        view_values=tuple(values.astype(np.float32) for values in maps.views),
        control=method.control,
        interrupted=maps.interrupted,
    )
    return relevance.with_notes(*relevance.noise_notes())


def works_at(reach: str) -> tuple[str, ...]:
    """Names of the methods that work on closed models (``"pixels"``), or on tiles and several pictures (``"tokens"``)."""
    enough = ("pixels",) if reach == "pixels" else ("pixels", "tokens")
    return tuple(name for name, card in METHODS.items() if card.reach in enough)


def in_views(run: Run, apart: bool) -> str:
    """What to know of a map where the model looked at the picture several times, or at several pictures."""
    names = " and ".join(view.name for view in run.views)
    if run.others:
        return f"The question is about {names}: this is the map of {run.views[0].name}, `views` and `view_values` hold each."
    if apart:
        return f"The picture was seen as {names}: this is the {run.views[0].name}'s map, `views` and `view_values` hold each."
    return f"The picture was seen as {names}: cells were altered in the picture itself, so in both at once."


def _plain(value: Any) -> Any:
    """Tuples, ranges and arrays as lists, numbers as Python's own, also inside: what a saved result gives back."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if is_list(value) else as_python(value)
