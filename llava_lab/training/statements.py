"""Short true statements about a scene: the densest text there is about what goes with what.

A conversation spends most tokens on form. "The color of the car is red." is a handful of tokens,
one of which can only be known by looking the car up. Stage 0b reads many of these per scene
before it meets whole questions; nothing else uses them.
"""

from __future__ import annotations

import numpy as np

from llava_lab.worlds.questions import article, names_for, place_of
from llava_lab.worlds.scenes import Scene

Statement = tuple[str, str]  # what is given, what is to be known


def statements(scene: Scene, rng: np.random.Generator, count: int) -> list[Statement]:
    """`count` statements, each true and each with one thing's attribute, kind or place to be known."""
    made: list[Statement] = []
    while len(made) < count:
        i, form = int(rng.integers(len(scene.things))), int(rng.integers(9))
        thing = scene.things[i]
        if form == 8:
            words = [thing.size] * bool(rng.random() < 0.5) + [thing.color]
            made.append((" There is", f" {article(' '.join([*words, thing.kind]))}."))
            continue
        hidden = ("color", "size", "kind", "place")[form % 4]
        names = names_for(scene, i, without=hidden)
        if not names:
            continue
        name = names[int(rng.integers(len(names)))]
        if hidden == "place":
            place = place_of(thing)
            if place:
                made.append((f" The place of the {name} is", f" {place}."))
        elif hidden == "kind":
            made.append((f" The {name} is", f" {article(thing.kind)}."))
        else:
            made.append((f" The {hidden} of the {name} is", f" {getattr(thing, hidden)}."))
    return made
