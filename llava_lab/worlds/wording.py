"""The words questions and statements are made of: names for things, places, numbers, and the question itself.

A thing is named only by words that pick it out in its scene.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava_lab.worlds.scenes import Scene, Thing

MARGIN = 0.12  # share of the picture that must separate two centres before a direction is asked
EDGE = 0.035  # a place is asked only this far from the lines between thirds
SHORT = "Answer the question using a single word or phrase."  # LLaVA-1.5's response format, paper section 3.2

NUMBERS = ("no", "one", "two", "three", "four")
PLACES = (("top left", "top", "top right"), ("left", "middle", "right"), ("bottom left", "bottom", "bottom right"))
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis (0 is x), sign
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Question:
    """One question with its only right answer."""

    type: str
    text: str
    answer: str  # a sentence
    short: str  # the same as a word or phrase
    deciding: tuple[int, ...]  # indices of the things that decide it; empty when an absence does


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(kind: str) -> str:
    return kind if kind == "fish" else kind + "s"


def place_of(thing: Thing) -> str | None:
    """Its third of the picture across and down, or None too near a dividing line."""
    cells = []
    for v in (thing.y, thing.x):
        if min(abs(v - 1 / 3), abs(v - 2 / 3)) < EDGE:
            return None
        cells.append(int(v * 3))
    return PLACES[cells[0]][cells[1]]


def at(place: str) -> str:
    return {"middle": "in the middle", "left": "on the left", "right": "on the right"}.get(place, f"at the {place}")


def names_for(scene: Scene, i: int, *, without: str = "") -> list[str]:
    """Noun phrases that pick out thing i and no other, leaving out the attribute named by `without`."""
    thing, others = scene.things[i], [t for j, t in enumerate(scene.things) if j != i]
    phrases = []
    if without != "kind":
        if all(t.kind != thing.kind for t in others):
            phrases.append(thing.kind)
        if without != "color" and all((t.color, t.kind) != (thing.color, thing.kind) for t in others):
            phrases.append(f"{thing.color} {thing.kind}")
        if without != "size" and all((t.size, t.kind) != (thing.size, thing.kind) for t in others):
            phrases.append(f"{thing.size} {thing.kind}")
    else:
        if all(t.color != thing.color for t in others):
            phrases.append(f"{thing.color} thing")
        if all(t.size != thing.size for t in others):
            phrases.append(f"{thing.size} thing")
        if all((t.size, t.color) != (thing.size, thing.color) for t in others):
            phrases.append(f"{thing.size} {thing.color} thing")
    return phrases
