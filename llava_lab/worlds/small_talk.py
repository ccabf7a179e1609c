"""The picture book talked about in many wordings, formal and casual, as people write when nobody gave them a form.

`paraphrases.retell` puts the world's own questions in other words; `chat` asks what the world's
eight types do not: lists, what stands at an edge, what is left when something goes, one thing described, two compared, a
short story, and things that are not there, which are refused ("There is no dog in the picture."). `account` tells a whole
scene as prose. Every answer follows from the scene; where a margin is missing the question is not asked. Held-out pairs of
colour and kind are never named.

    chat(scene, rng)  # ("Which things are small?", "A red car and a blue cup.")
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llava_lab.worlds.paraphrases import Pair, pick
from llava_lab.worlds.questions import MARGIN, NUMBERS, article, at, names_for, place_of, plural
from llava_lab.worlds.scenes import HELD_OUT, Scene, Thing

ABSENT = (
    *("dog", "cat", "horse", "bird", "person", "child", "bicycle", "train", "plane", "clock", "chair", "table", "book", "ball"),
    *("apple", "banana", "hat", "shoe", "key", "lamp", "guitar", "dragon", "robot", "castle", "bridge", "cow", "duck", "cloud"),
)
DESCRIBE = (
    *("Describe the picture in detail.", "What's going on in this image?"),
    *("what am I looking at?", "Tell me about this picture."),
    *("Please describe what you see.", "Give me a description of the image.", "Can you explain what is shown here?"),
    *("I cannot see the picture. What does it show?", "What does this drawing show?", "describe this", "what's in the pic?"),
)


def account(scene: Scene, rng: np.random.Generator) -> str:
    """A scene in flowing prose: how many things, then each with its place where a clear one exists."""
    n = len(scene.things)
    order = scene.left_to_right
    parts = []
    for i in order:
        place = place_of(scene.things[i])
        parts.append(f"{_full(scene.things[i])}{' ' + at(place) if place else ''}")
    listed = _join(parts)
    forms = ["The picture shows {}.", "I can see {}.", "This is a drawing of {}."]
    text = pick(rng, forms).format(listed)
    if n > 1 and rng.random() < 0.5:
        text = f"There are {NUMBERS[n]} things in the picture. " + text
    return text


def chat(scene: Scene, rng: np.random.Generator) -> Pair | None:
    """One free question with its answer, or None when the drawn kind of question does not fit this scene."""
    made = _CHATS[int(rng.integers(len(_CHATS)))](scene, rng)
    if made is None or any(f"{color} {kind}" in made[0] for color, kind in HELD_OUT):
        return None
    return made


def _full(thing: Thing) -> str:
    return article(f"{thing.size} {thing.color} {thing.kind}")


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _up(text: str) -> str:
    return text[0].upper() + text[1:]


def _absent(scene: Scene, rng: np.random.Generator) -> str:
    """A noun for something that is not there: from outside the world, or near to what is there."""
    roll = rng.random()
    kinds = [kind for kind in scene.kinds if all(kind != thing.kind for thing in scene.things)]
    if roll < 0.4:
        return pick(rng, ABSENT)
    if roll < 0.7:
        return pick(rng, kinds)
    thing = scene.things[int(rng.integers(len(scene.things)))]
    pairs = {(t.color, t.kind) for t in scene.things} | HELD_OUT
    colors = [color for color in scene.colors if (color, thing.kind) not in pairs]
    return f"{pick(rng, colors)} {thing.kind}"


def _refuse(scene: Scene, rng: np.random.Generator) -> Pair:
    noun = _absent(scene, rng)
    asked = (
        *(f"What color is the {noun}?", f"Where is the {noun}?", f"How big is the {noun}?", f"what colour's the {noun}?"),
        *(f"Tell me about the {noun}.", f"Is the {noun} small or large?", f"What is next to the {noun}?", f"where's the {noun}?"),
    )
    return pick(rng, asked), f"There is no {noun} in the picture."


def _seen(scene: Scene, rng: np.random.Generator) -> Pair:
    noun = _absent(scene, rng)
    asked = (
        f"Is there {article(noun)}?",
        f"Do you see {article(noun)}?",
        f"Is {article(noun)} in the picture?",
        f"any {plural(noun)}?",
    )
    return pick(rng, asked), f"No, there is no {noun}."


def _list(scene: Scene, rng: np.random.Generator) -> Pair:
    asked = ("List the things in the picture.", "What objects are there?", "Name everything you see.", "what things can you see?")
    return pick(rng, asked), _up(_join([article(scene.things[i].kind) for i in scene.left_to_right])) + "."


def _colors(scene: Scene, rng: np.random.Generator) -> Pair:
    colors = list(dict.fromkeys(scene.things[i].color for i in scene.left_to_right))
    if rng.random() < 0.4:
        asked = ("How many different colors do the things have?", "how many colours can you see?", "Count the different colors.")
        count = "is one color" if len(colors) == 1 else f"are {NUMBERS[len(colors)]} colors"
        return pick(rng, asked), f"There {count}: {_join(colors)}."
    asked = ("Which colors do you see?", "What colours are used?", "List the colors of the things.")
    return pick(rng, asked), f"{_up(_join(colors))}."


def _one(scene: Scene, rng: np.random.Generator) -> Pair | None:
    i = int(rng.integers(len(scene.things)))
    if not (names := names_for(scene, i)):
        return None
    name, thing = pick(rng, names), scene.things[i]
    place = place_of(thing)
    asked = (
        f"Tell me about the {name}.",
        f"Describe the {name}.",
        f"what can you say about the {name}?",
        f"What does the {name} look like?",
    )
    return pick(rng, asked), f"The {thing.kind} is {thing.size} and {thing.color}" + (f", {at(place)}." if place else ".")


def _differ(scene: Scene, rng: np.random.Generator) -> Pair | None:
    if len(scene.things) < 2:
        return None
    first, second = (int(i) for i in rng.permutation(len(scene.things))[:2])
    a, b = scene.things[first], scene.things[second]
    if not (names_a := names_for(scene, first)) or not (names_b := names_for(scene, second)):
        return None
    one, two = pick(rng, names_a), pick(rng, names_b)
    asked = (
        f"How do the {one} and the {two} differ?",
        f"Compare the {one} with the {two}.",
        f"What is different about the {one} and the {two}?",
    )
    return pick(rng, asked), f"The {one} is {a.size} and {a.color}, the {two} is {b.size} and {b.color}."


def _edge(scene: Scene, rng: np.random.Generator) -> Pair | None:
    word, axis, sign = (("leftmost", 0, 1), ("rightmost", 0, -1), ("highest", 1, 1), ("lowest", 1, -1))[int(rng.integers(4))]
    if len(scene.things) < 2:
        return None
    ends = sorted(scene.things, key=lambda thing: sign * (thing.x, thing.y)[axis])
    if abs((ends[0].x, ends[0].y)[axis] - (ends[1].x, ends[1].y)[axis]) < MARGIN:
        return None
    side = {
        "leftmost": "furthest to the left",
        "rightmost": "furthest to the right",
        "highest": "at the very top",
        "lowest": "lowest down",
    }
    asked = (f"Which thing is {side[word]}?", f"What is the {word} thing?", f"what's the {word} object?")
    return pick(rng, asked), f"The {word} thing is {_full(ends[0])}."


def _sizes(scene: Scene, rng: np.random.Generator) -> Pair:
    size = pick(rng, ("small", "large"))
    nouns = [
        article(f"{scene.things[i].color} {scene.things[i].kind}") for i in scene.left_to_right if scene.things[i].size == size
    ]
    asked = (f"Which things are {size}?", f"List the {size} things.", f"what is {size} here?")
    return pick(rng, asked), _up(_join(nouns)) + "." if nouns else f"There is no {size} thing."


def _left(scene: Scene, rng: np.random.Generator) -> Pair | None:
    i = int(rng.integers(len(scene.things)))
    if not (names := names_for(scene, i)):
        return None
    name, n = pick(rng, names), len(scene.things) - 1
    asked = (f"If I take away the {name}, how many things are left?", f"How many things are there besides the {name}?")
    rest = "Nothing is left." if not n else "One thing is left." if n == 1 else f"{_up(NUMBERS[n])} things are left."
    return pick(rng, asked), rest


def _alike(scene: Scene, rng: np.random.Generator) -> Pair | None:
    if len(scene.things) < 2:
        return None
    colors = list(dict.fromkeys(scene.things[i].color for i in scene.left_to_right))
    kinds = list(dict.fromkeys(scene.things[i].kind for i in scene.left_to_right))
    if rng.random() < 0.5:
        answer = f"Yes, all are {colors[0]}." if len(colors) == 1 else f"No, the colors are {_join(colors)}."
        return pick(rng, ("Are all things the same color?", "does everything have the same colour?")), answer
    answer = (
        f"Yes, all are {plural(kinds[0])}." if len(kinds) == 1 else f"No, there are {_join([article(kind) for kind in kinds])}."
    )
    return pick(rng, ("Are all things of the same kind?", "is it all the same kind of thing?")), answer


def _story(scene: Scene, rng: np.random.Generator) -> Pair:
    things = [article(f"{scene.things[i].color} {scene.things[i].kind}") for i in scene.left_to_right]
    if rng.random() < 0.5:
        return pick(rng, ("Give the picture a title.", "What would be a good title?", "title for this?")), _up(_join(things))
    opened = "Once upon a time there was" if len(things) == 1 else "Once upon a time there were"
    return pick(rng, ("Tell a short story about it.", "Start a story about this picture.")), f"{opened} {_join(things)}."


def _told(scene: Scene, rng: np.random.Generator) -> Pair:
    return pick(rng, DESCRIBE), account(scene, rng)


_CHATS: tuple[Callable[[Scene, np.random.Generator], Pair | None], ...] = (
    *(_refuse, _refuse, _seen, _list, _colors, _one, _one, _differ, _edge, _edge, _sizes, _left, _alike, _story, _told, _told),
)
