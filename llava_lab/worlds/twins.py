"""Twins: two scenes that are the same but for one variable of one thing, with the question it decides.

    for pair in twins("color", n=8):
        pair.question.text, pair.question.short, pair.other_short  # "What color is the car?", "red", "blue"

Colour changes on the thing itself; a kind is drawn in the other's square; a place is one where the thing touches no other. Twins
show no pair of colour and kind that a split holds out, and the question must have one answer in each.

*Crossed* scenes are several that all differ in two variables of one thing, so that what carries the one can be told from what
carries the other. Questions about them name the thing by its size, which stays.

    for some in crossed("color", n=8, count=3):
        some.questions[0], some.shorts  # "What color is the large thing?", (("red", "car"), ("blue", "cup"), ("pink", "tree"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from llava_lab.errors import DataError, OptionError
from llava_lab.worlds.questions import Question, ask_about, names_for, place_of
from llava_lab.worlds.scenes import COLOR_NAMES, GAP, HELD_OUT, KIND_NAMES, SIZE, Scene, Thing, scene

VARIABLES = ("color", "kind", "place")
BESIDE = {"color": "kind", "kind": "color", "place": "kind"}  # the second variable in which crossed scenes differ
ASKED = {"color": "What color is the {}?", "kind": "What is the {}?", "place": "Where is the {}?"}
TRIES = 30  # other values drawn before a scene is given up
FAR = 400  # scenes looked at for each pair wanted


@dataclass(frozen=True)
class Twins:
    """Two scenes and one question, whose answers differ."""

    scene: Scene
    other: Scene
    question: Question  # about `scene`
    other_short: str  # the answer's word about `other`


@dataclass(frozen=True)
class Crossed:
    """Scenes whose one thing has other values of two variables in each, and a question about either that names it by its size."""

    scenes: tuple[Scene, ...]
    which: int  # the thing
    questions: tuple[str, str]  # about the variable, about the other one
    shorts: tuple[tuple[str, str], ...]  # the answers' words, of each scene


Drawn = TypeVar("Drawn")


def twins(variable: str = "color", *, n: int = 8, split: str = "test", seed: int = 0, begin: int = 0) -> Iterator[Twins]:
    """Up to `n` pairs from the scenes of a split, from scene `begin` on; the same arguments give the same pairs.

    Raises OptionError for an unknown variable, DataError where the split has too few.
    """

    def pair_of(drawn: Scene, rng: np.random.Generator) -> Twins | None:
        asked = ask_about(drawn, rng, 1, (variable,))
        return _twin(drawn, asked[0], variable, rng) if asked else None

    yield from _from_scenes(pair_of, variable, n, split, seed, begin, 83)


def crossed(
    variable: str = "color", *, n: int = 8, count: int = 2, split: str = "test", seed: int = 0, begin: int = 0
) -> Iterator[Crossed]:
    """Up to `n` times `count` scenes that differ in `variable` and in its `BESIDE`; else as `twins`."""
    yield from _from_scenes(lambda drawn, rng: _crossed(drawn, variable, count, rng), variable, n, split, seed, begin, 89)


def _from_scenes(
    make: Callable[[Scene, np.random.Generator], Drawn | None],
    variable: str,
    n: int,
    split: str,
    seed: int,
    begin: int,
    salt: int,
) -> Iterator[Drawn]:
    """What `make` gives of one scene after another, `n` times."""
    if variable not in VARIABLES:
        raise OptionError(f"variable must be one of {', '.join(VARIABLES)}, got {variable!r}")
    made = 0
    for index in range(begin, begin + FAR * n):
        if made == n:
            return
        rng = np.random.default_rng((seed, index, VARIABLES.index(variable), salt))
        if (pair := make(scene(split, index, seed=seed), rng)) is not None:
            made += 1
            yield pair
    raise DataError(f"found {made} of {n} pairs that differ in {variable} in split {split!r}; ask for fewer")


def _twin(drawn: Scene, question: Question, variable: str, rng: np.random.Generator) -> Twins | None:
    (which,) = question.deciding
    for _ in range(TRIES):
        changed = _changed(drawn, which, variable, rng)
        if changed is None:
            continue
        other = _with_thing(drawn, which, changed)
        short = value_of(changed, variable)
        # the question's own words must still pick out this thing and no other
        mine = [name for name in names_for(drawn, which, without=variable) if name in question.text]
        if short and short != question.short and any(name in names_for(other, which, without=variable) for name in mine):
            return Twins(drawn, other, question, short)
    return None


def _crossed(drawn: Scene, variable: str, count: int, rng: np.random.Generator) -> Crossed | None:
    sizes = [thing.size for thing in drawn.things]
    alone = [number for number, size in enumerate(sizes) if sizes.count(size) == 1]
    if not alone:
        return None
    which = alone[int(rng.integers(len(alone)))]
    both = variable, BESIDE[variable]
    things = [drawn.things[which]]
    scenes = [drawn]
    for _ in range(TRIES * count):
        if len(things) == count:
            break
        changed = _changed(drawn, which, both[0], rng)
        changed = changed and _changed(_with_thing(drawn, which, changed), which, both[1], rng)
        # also the colour of one on the kind of another is a thing that may be drawn
        if (
            changed is not None
            and all(value_of(changed, name) != value_of(thing, name) for thing in things for name in both)
            and not {pair for thing in things for pair in ((thing.color, changed.kind), (changed.color, thing.kind))} & HELD_OUT
        ):
            things.append(changed)
            scenes.append(_with_thing(drawn, which, changed))
    shorts = tuple((value_of(thing, both[0]), value_of(thing, both[1])) for thing in things)
    if len(things) < count or any(None in pair for pair in shorts):
        return None
    questions = tuple(ASKED[name].format(f"{sizes[which]} thing") for name in both)
    return Crossed(tuple(scenes), which, questions, shorts)  # type: ignore[arg-type]


def value_of(thing: Thing, variable: str) -> str | None:
    """A thing's colour, kind or place; no place too near a dividing line."""
    return {"color": thing.color, "kind": thing.kind, "place": place_of(thing)}[variable]


def _with_thing(drawn: Scene, which: int, thing: Thing) -> Scene:
    return replace(drawn, things=(*drawn.things[:which], thing, *drawn.things[which + 1 :]))


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
