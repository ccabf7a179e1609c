"""Twins: two scenes that are the same but for one variable of one thing, with the question it decides.

    for pair in twins("color", n=8):
        pair.question.text, pair.question.short, pair.other_short  # "What color is the car?", "red", "blue"

Colour changes on the thing itself; a kind is drawn in the other's square; a place is one where the thing touches no other. Twins
show no pair of colour and kind that a split holds out, and the question must have one answer in each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from llava_lab.errors import DataError, OptionError
from llava_lab.worlds.questions import Question, ask_about, names_for, place_of
from llava_lab.worlds.scenes import COLOR_NAMES, GAP, HELD_OUT, KIND_NAMES, SIZE, Scene, Thing, scene

VARIABLES = ("color", "kind", "place")
TRIES = 30  # other values drawn before a scene is given up
FAR = 400  # scenes looked at for each pair wanted


@dataclass(frozen=True)
class Twins:
    """Two scenes and one question, whose answers differ."""

    scene: Scene
    other: Scene
    question: Question  # about `scene`
    other_short: str  # the answer's word about `other`


def twins(variable: str = "color", *, n: int = 8, split: str = "test", seed: int = 0, begin: int = 0) -> Iterator[Twins]:
    """Up to `n` pairs from the scenes of a split, from scene `begin` on; the same arguments give the same pairs.

    Raises OptionError for an unknown variable, DataError where the split has too few.
    """
    if variable not in VARIABLES:
        raise OptionError(f"variable must be one of {', '.join(VARIABLES)}, got {variable!r}")
    made = 0
    for index in range(begin, begin + FAR * n):
        if made == n:
            return
        drawn = scene(split, index, seed=seed)
        rng = np.random.default_rng((seed, index, VARIABLES.index(variable), 83))
        asked = ask_about(drawn, rng, 1, (variable,))
        if asked and (pair := _twin(drawn, asked[0], variable, rng)) is not None:
            made += 1
            yield pair
    raise DataError(f"found {made} of {n} twins that differ in {variable} in split {split!r}; ask for fewer")


def _twin(drawn: Scene, question: Question, variable: str, rng: np.random.Generator) -> Twins | None:
    (which,) = question.deciding
    for _ in range(TRIES):
        changed = _changed(drawn, which, variable, rng)
        if changed is None:
            continue
        things = (*drawn.things[:which], changed, *drawn.things[which + 1 :])
        other = replace(drawn, things=things)
        short = {"color": changed.color, "kind": changed.kind, "place": place_of(changed)}[variable]
        # the question's own words must still pick out this thing and no other
        mine = [name for name in names_for(drawn, which, without=variable) if name in question.text]
        if short and short != question.short and any(name in names_for(other, which, without=variable) for name in mine):
            return Twins(drawn, other, question, short)
    return None


def _changed(drawn: Scene, which: int, variable: str, rng: np.random.Generator) -> Thing | None:
    """The thing with another value, or None where that value may not be drawn."""
    thing = drawn.things[which]
    if variable == "color":
        new = replace(thing, color=COLOR_NAMES[int(rng.integers(len(COLOR_NAMES)))])
    elif variable == "kind":
        new = replace(thing, kind=KIND_NAMES[int(rng.integers(len(KIND_NAMES)))])
    else:
        half = thing.side / 2
        x, y = (float(value) for value in rng.uniform(half + 2 / SIZE, 1 - half - 2 / SIZE, 2))
        new = replace(thing, x=x, y=y)
        for number, other in enumerate(drawn.things):
            reach = half + other.side / 2 + GAP / SIZE
            if number != which and abs(x - other.x) < reach and abs(y - other.y) < reach:
                return None
    return None if (new.color, new.kind) in HELD_OUT else new
