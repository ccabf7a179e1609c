"""Questions about a scene, as people ask them, each with its answer and the things that decide it.

Eight types: color, kind, size, place, count, existence, relation, comparison. Every question is
unambiguous by construction: a thing is named only by words that pick it out, places and
directions only where a clear margin separates them. Yes and no are balanced, and the "no" of
existence is mostly a near miss (right kind in another colour, right colour on another kind).

    scene = picturebook.scene("test", 0)
    ask_about(scene, np.random.default_rng(0), 4)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llava_lab.worlds.scenes import HELD_OUT, Scene, Thing

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


# -- the questions ------------------------------------------------------------------------


def ask_about(scene: Scene, rng: np.random.Generator, count: int, types: tuple[str, ...] = ()) -> list[Question]:
    """Up to `count` different questions, types in turn from a random start; fewer when the scene has no more.

    Beside `TYPES` the names in `RARE` ask for a comparison that seldom comes up by chance.
    """
    names = list(types or TYPES)
    order = [names[i] for i in rng.permutation(len(names))]
    questions: dict[str, Question] = {}
    for attempt in range(count * 4):
        question = (MAKERS | RARE)[order[attempt % len(order)]](scene, rng)
        if question and question.text not in questions and _concerns(scene, question):
            questions[question.text] = question
            if len(questions) == count:
                break
    return list(questions.values())


def _concerns(scene: Scene, question: Question) -> bool:
    """In `compositions` a question must turn on a held-out pair; elsewhere it must not mention one."""
    mentioned = any(f"{color} {kind}" in question.text for color, kind in HELD_OUT)
    if scene.split == "compositions":
        return mentioned or any(scene.things[i].held_out for i in question.deciding)
    return not mentioned


def _pick(rng: np.random.Generator, options: list[str] | tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _named(scene: Scene, rng: np.random.Generator, *, without: str = "") -> tuple[int, str] | None:
    """A random thing that has a name, with one of its names."""
    for i in rng.permutation(len(scene.things)):
        phrases = names_for(scene, int(i), without=without)
        if phrases:
            return int(i), _pick(rng, phrases)
    return None


def _color(scene: Scene, rng: np.random.Generator) -> Question | None:
    if not (chosen := _named(scene, rng, without="color")):
        return None
    i, name = chosen
    forms = (f"What color is the {name}?", f"Which color does the {name} have?", f"Can you tell me the color of the {name}?")
    color = scene.things[i].color
    return Question("color", _pick(rng, forms), f"The {name} is {color}.", color, (i,))


def _kind(scene: Scene, rng: np.random.Generator) -> Question | None:
    forms = ["What is the {}?", "What kind of thing is the {}?", "Can you name the {}?"]
    places = [place_of(t) for t in scene.things]
    alone = [i for i, p in enumerate(places) if p and places.count(p) == 1 and None not in places]
    if alone and rng.random() < 0.4:
        i = alone[int(rng.integers(len(alone)))]
        spot = at(places[i] or "")
        text = _pick(rng, (f"What is {spot}?", f"What do you see {spot}?", f"Which thing is {spot}?"))
    elif chosen := _named(scene, rng, without="kind"):
        i, name = chosen
        text = _pick(rng, forms).format(name)
    else:
        return None
    kind = scene.things[i].kind
    return Question("kind", text, f"It is {article(kind)}.", kind, (i,))


def _size(scene: Scene, rng: np.random.Generator) -> Question | None:
    if not (chosen := _named(scene, rng, without="size")):
        return None
    i, name = chosen
    forms = (f"How big is the {name}?", f"Is the {name} small or large?", f"What size is the {name}?")
    size = scene.things[i].size
    return Question("size", _pick(rng, forms), f"The {name} is {size}.", size, (i,))


def _place(scene: Scene, rng: np.random.Generator) -> Question | None:
    if not (chosen := _named(scene, rng)) or not (place := place_of(scene.things[chosen[0]])):
        return None
    i, name = chosen
    forms = (f"Where is the {name}?", f"Where can I find the {name}?", f"In which part of the picture is the {name}?")
    return Question("place", _pick(rng, forms), f"The {name} is {at(place)}.", place, (i,))


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    things, roll = scene.things, rng.random()
    if roll < 0.25:
        noun, chosen = "thing", list(range(len(things)))
    elif roll < 0.65:
        kind = _pick(rng, scene.kinds) if rng.random() < 0.2 else things[int(rng.integers(len(things)))].kind
        noun, chosen = kind, [i for i, t in enumerate(things) if t.kind == kind]
    else:
        color = _pick(rng, scene.colors) if rng.random() < 0.2 else things[int(rng.integers(len(things)))].color
        noun, chosen = f"{color} thing", [i for i, t in enumerate(things) if t.color == color]
    n, many = len(chosen), plural(noun)
    forms = (f"How many {many} are there?", f"How many {many} do you see?", f"Count the {many}.")
    answer = f"There is one {noun}." if n == 1 else f"There are {NUMBERS[n]} {many}."
    return Question("count", _pick(rng, forms), answer, NUMBERS[n], tuple(chosen))


def _existence(scene: Scene, rng: np.random.Generator) -> Question | None:
    yes, form = bool(rng.random() < 0.5), rng.random()
    thing = scene.things[int(rng.integers(len(scene.things)))]
    for _ in range(20):  # a "no" is drawn until it is one; a "yes" is one at once
        color, kind = (thing.color, thing.kind) if yes else _near_miss(scene, thing, rng)
        if form < 0.60:
            noun, deciding = f"{color} {kind}", [(t.color, t.kind) == (color, kind) for t in scene.things]
        elif form < 0.80:
            noun, deciding = kind, [t.kind == kind for t in scene.things]
        else:
            noun, deciding = f"{color} thing", [t.color == color for t in scene.things]
        if any(deciding) == yes:
            break
    else:
        return None
    forms = (f"Is there {article(noun)}?", f"Do you see {article(noun)}?", f"Can you find {article(noun)} in the picture?")
    answer = f"Yes, there is {article(noun)}." if yes else f"No, there is no {noun}."
    chosen = tuple(i for i, decides in enumerate(deciding) if decides)
    return Question("existence", _pick(rng, forms), answer, "yes" if yes else "no", chosen)


def _near_miss(scene: Scene, thing: Thing, rng: np.random.Generator) -> tuple[str, str]:
    """A colour and kind like the thing's, with one of them (now and then both) drawn anew."""
    roll = rng.random()
    color = _pick(rng, scene.colors) if roll < 0.5 or roll > 0.9 else thing.color
    kind = _pick(rng, scene.kinds) if roll > 0.5 else thing.kind
    return color, kind


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.things) < 2:
        return None
    first, second = (int(i) for i in rng.permutation(len(scene.things))[:2])
    relation, wanted = _pick(rng, tuple(DIRECTIONS)), rng.random() < 0.5
    axis, sign = DIRECTIONS[relation]
    a, b = scene.things[first], scene.things[second]
    gap = ((a.x, a.y)[axis] - (b.x, b.y)[axis]) * sign  # above MARGIN: first is `relation` second
    if (gap > 0) != wanted:
        relation, gap = OPPOSITE[relation], -gap
    names_a, names_b = names_for(scene, first), names_for(scene, second)
    if abs(gap) < MARGIN or not names_b:
        return None
    name_b = _pick(rng, names_b)
    if rng.random() < 0.3:
        if gap < 0:
            relation = OPPOSITE[relation]
        return _what_is(scene, rng, first, second, relation, name_b)
    if not names_a:
        return None
    name_a = _pick(rng, names_a)
    forms = (f"Is the {name_a} {relation} the {name_b}?", f"Can you see the {name_a} {relation} the {name_b}?")
    true = relation if gap > 0 else OPPOSITE[relation]
    word = "Yes" if gap > 0 else "No"
    answer = f"{word}, the {name_a} is {true} the {name_b}."
    return Question("relation", _pick(rng, forms), answer, word.lower(), (first, second))


def _what_is(scene: Scene, rng: np.random.Generator, first: int, second: int, relation: str, name_b: str) -> Question | None:
    """Ask which thing stands in a relation, when just one does and no other is near the line."""
    axis, sign = DIRECTIONS[relation]
    b = scene.things[second]
    for i, other in enumerate(scene.things):
        gap = ((other.x, other.y)[axis] - (b.x, b.y)[axis]) * sign
        if i not in (first, second) and gap > -MARGIN / 2:
            return None
    kind = scene.things[first].kind
    text = _pick(rng, (f"What is {relation} the {name_b}?", f"Which thing is {relation} the {name_b}?"))
    return Question("relation", text, f"{article(kind).capitalize()} is {relation} the {name_b}.", kind, (first, second))


def _comparison(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.things) < 2:
        return None
    roll = rng.random()
    if roll < 0.3:
        return _more(scene, rng)
    first, second = (int(i) for i in rng.permutation(len(scene.things))[:2])
    a, b = scene.things[first], scene.things[second]
    hidden = "size" if roll < 0.65 else "color"
    names_a, names_b = names_for(scene, first, without=hidden), names_for(scene, second, without=hidden)
    if not names_a or not names_b:
        return None
    name_a, name_b = _pick(rng, names_a), _pick(rng, names_b)
    if hidden == "size":
        forms = (f"Which is bigger, the {name_a} or the {name_b}?", f"What is larger, the {name_a} or the {name_b}?")
        if a.size == b.size:
            answer, short = "They are the same size.", "same"
        else:
            short = name_a if a.size == "large" else name_b
            answer = f"The {short} is bigger."
        return Question("comparison", _pick(rng, forms), answer, short, (first, second))
    if a.color != b.color and rng.random() < 0.5:
        return None  # different colours are far more common: keep yes and no nearer to balance
    return _colors_alike(scene, rng, first, second, name_a, name_b)


def _colors_alike(scene: Scene, rng: np.random.Generator, first: int, second: int, name_a: str, name_b: str) -> Question:
    a, b = scene.things[first], scene.things[second]
    same = a.color == b.color
    forms = (f"Do the {name_a} and the {name_b} have the same color?", f"Are the {name_a} and the {name_b} the same color?")
    answer = f"Yes, both are {a.color}." if same else f"No, they are {a.color} and {b.color}."
    return Question("comparison", _pick(rng, forms), answer, "yes" if same else "no", (first, second))


def _same_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Ask of two things of one colour whether they have one; None when no two do."""
    return _color_pair(scene, rng, same=True)


def _different_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Ask of two things of different colours whether they have one; None when no two do."""
    return _color_pair(scene, rng, same=False)


def _color_pair(scene: Scene, rng: np.random.Generator, *, same: bool) -> Question | None:
    order = [int(i) for i in rng.permutation(len(scene.things))]
    colors = [thing.color for thing in scene.things]
    for first, second in ((i, j) for i in order for j in order if i != j and (colors[i] == colors[j]) == same):
        names_a, names_b = names_for(scene, first, without="color"), names_for(scene, second, without="color")
        if names_a and names_b:
            return _colors_alike(scene, rng, first, second, _pick(rng, names_a), _pick(rng, names_b))
    return None


def _unequal(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Compare the numbers of two kinds that differ in it."""
    for _ in range(4):
        question = _more(scene, rng)
        if question and "equally" not in question.answer:
            return question
    return None


def _more(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Compare the numbers of two kinds that are both there."""
    kinds = sorted({t.kind for t in scene.things})
    if len(kinds) < 2:
        return None
    one, two = (kinds[int(i)] for i in rng.permutation(len(kinds))[:2])
    n_one, n_two = (sum(t.kind == k for t in scene.things) for k in (one, two))
    if n_one == n_two and rng.random() < 0.6:
        return None  # equal numbers are far more common
    deciding = tuple(i for i, t in enumerate(scene.things) if t.kind in (one, two))
    text = _pick(rng, (f"Are there more {plural(one)} than {plural(two)}?", f"Do you see more {plural(one)} than {plural(two)}?"))
    if n_one == n_two:
        return Question("comparison", text, "No, there are equally many.", "no", deciding)
    most = plural(one if n_one > n_two else two)
    word = "Yes" if n_one > n_two else "No"
    return Question("comparison", text, f"{word}, there are more {most}.", word.lower(), deciding)


MAKERS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "color": _color,
    "kind": _kind,
    "size": _size,
    "place": _place,
    "count": _count,
    "existence": _existence,
    "relation": _relation,
    "comparison": _comparison,
}
TYPES = tuple(MAKERS)
RARE: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "same color": _same_color,
    "different color": _different_color,
    "unequal": _unequal,
}
