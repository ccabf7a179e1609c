"""Short true statements about a scene: the densest text there is about what goes with what.

A conversation spends most tokens on form. "The color of the car is red." is a handful of tokens,
one of which can only be known by looking the car up. Stage 0b reads many of these per scene
before it meets whole questions; nothing else uses them.
"""

from __future__ import annotations

import numpy as np

from llava_lab.worlds.scenes import Scene
from llava_lab.worlds.wording import MARGIN, NUMBERS, article, names_for, place_of, plural

Statement = tuple[str, str]  # what is given, what is to be known
FORMS = ("color", "size", "kind", "place") + ("number",) * 3 + ("direction",) * 5


def statements(scene: Scene, rng: np.random.Generator, count: int) -> list[Statement]:
    """`count` statements, each true and each with one attribute, kind, place, number or direction to be known."""
    made: list[Statement] = []
    while len(made) < count:
        form = FORMS[int(rng.integers(len(FORMS)))]
        i = int(rng.integers(len(scene.things)))
        if statement := _number(scene, i, rng) if form == "number" else _about(scene, i, form, rng):
            made.append(statement)
    return made


def _about(scene: Scene, i: int, form: str, rng: np.random.Generator) -> Statement | None:
    thing = scene.things[i]
    names = names_for(scene, i, without=form)
    if not names:
        return None
    name = names[int(rng.integers(len(names)))]
    if form == "direction":
        return _direction(scene, i, name, rng)
    if form == "place":
        place = place_of(thing)
        return (f" The place of the {name} is", f" {place}.") if place else None
    if form == "kind":
        return f" The {name} is", f" {article(thing.kind)}."
    return f" The {form} of the {name} is", f" {getattr(thing, form)}."


def _number(scene: Scene, i: int, rng: np.random.Generator) -> Statement:
    thing, roll = scene.things[i], rng.random()
    if roll < 0.2:
        return " The number of things is", f" {NUMBERS[len(scene.things)]}."
    if roll < 0.6:
        return f" The number of {plural(thing.kind)} is", f" {NUMBERS[sum(t.kind == thing.kind for t in scene.things)]}."
    return f" The number of {thing.color} things is", f" {NUMBERS[sum(t.color == thing.color for t in scene.things)]}."


def _direction(scene: Scene, i: int, name: str, rng: np.random.Generator) -> Statement | None:
    """Where thing i lies as seen from another: across or up and down, never left open which."""
    j = int(rng.integers(len(scene.things)))
    others = names_for(scene, j)
    if j == i or not others:
        return None
    across = bool(rng.random() < 0.5)
    a, b = scene.things[i], scene.things[j]
    gap = a.x - b.x if across else a.y - b.y
    if abs(gap) < MARGIN:
        return None
    other = others[int(rng.integers(len(others)))]
    if across:
        return f" Across from the {other} the {name} is", " right." if gap > 0 else " left."
    return f" Up or down from the {other} the {name} is", " below." if gap > 0 else " above."
