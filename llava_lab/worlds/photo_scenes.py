"""Pictures with known contents, made of photographs, and questions and answers about them.

A scene is a photograph alone, two or four side by side, or several laid on a plain ground. Where each lies is exact, so place,
presence, number and relation can be asked about natural texture. Everything random comes from the generator given.

    scene = draw_scene(photos, np.random.default_rng(0))
    scene.picture  # a PIL picture; .items says what is where

What is asked: what it is, is there one, where, how many, what one does with it. Answers are whole sentences in several wordings;
a share of the questions asks for a single word, as LLaVA's do. The no's of presence questions are half near misses: things of
the same kind that are not in the picture.

    talk_about(scene, things, rng)  # blocks: first questions, each [(question, answer)], or the turns of a conversation
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from llava_lab.worlds.photo_names import Photo, Thing, with_article
from llava_lab.worlds.picturebook import SHORT

SIDE = 480  # pixels of a collage; a photograph alone keeps its shape
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
FORMS = ("alone", "quarters", "beside", "stacked", "laid")
SHARES = (0.1, 0.5, 0.12, 0.1, 0.18)  # of the forms
BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Item:
    """One thing in a picture: its box in pixels (left, top, right, bottom) and, in a collage, its place in words."""

    thing: Thing
    box: tuple[int, int, int, int]
    place: str = ""


@dataclass(frozen=True)
class PhotoScene:
    """A picture, how it was put together, and what is in it."""

    picture: Image.Image
    form: str
    items: tuple[Item, ...]


def draw_scene(photos: Sequence[Photo], rng: np.random.Generator, *, form: str | None = None) -> PhotoScene:
    """A scene of one of `FORMS` from photographs chosen by `rng`, each cut, mirrored and lit a little differently."""
    form = form or str(rng.choice(FORMS, p=SHARES))
    if form == "alone":
        photo = photos[int(rng.integers(len(photos)))]
        picture = _varied(photo, rng, smallest=0.45)
        return PhotoScene(picture, form, (Item(photo.thing, (0, 0, *picture.size)),))
    if form == "laid":
        return _laid(photos, rng)
    return collage(_chosen(photos, 4 if form == "quarters" else 2, rng), form, rng)


def collage(photos: Sequence[Photo], form: str, rng: np.random.Generator | None = None, *, side: int = SIDE) -> PhotoScene:
    """Photographs in a grid, each cut to its cell: "quarters" (4), "beside" (2) or "stacked" (2); `rng` None cuts the middle."""
    half = side // 2
    boxes = {
        "quarters": [(0, 0, half, half), (half, 0, side, half), (0, half, half, side), (half, half, side, side)],
        "beside": [(0, 0, half, half), (half, 0, side, half)],
        "stacked": [(0, 0, half, half), (0, half, half, side)],
    }[form]
    places = {"quarters": QUARTERS, "beside": ("left", "right"), "stacked": ("top", "bottom")}[form]
    canvas = Image.new("RGB", (max(b[2] for b in boxes), max(b[3] for b in boxes)))
    items = []
    for photo, box, place in zip(photos, boxes, places, strict=True):
        cell = opened(photo) if rng is None else _varied(photo, rng, smallest=0.7)
        canvas.paste(ImageOps.fit(cell, (box[2] - box[0], box[3] - box[1]), BICUBIC), box[:2])
        items.append(Item(photo.thing, box, place))
    return PhotoScene(canvas, form, tuple(items))


def _laid(photos: Sequence[Photo], rng: np.random.Generator) -> PhotoScene:
    """One to three photographs on a plain ground, not over each other: each in its own third or half of the width."""
    chosen = _chosen(photos, int(rng.integers(1, 4)), rng)
    canvas = Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in rng.integers(40, 220, 3)))
    strip = SIDE // len(chosen)
    items = []
    for number, photo in enumerate(chosen):
        cut = _varied(photo, rng, smallest=0.7)
        width = int(strip * rng.uniform(0.7, 0.95))
        cut = cut.resize((width, max(16, round(cut.height * width / cut.width))), BICUBIC)
        cut = cut.crop((0, 0, width, min(cut.height, SIDE)))
        left = number * strip + int(rng.integers(0, strip - width + 1))
        top = int(rng.integers(0, SIDE - cut.height + 1))
        canvas.paste(cut, (left, top))
        items.append(Item(photo.thing, (left, top, left + width, top + cut.height)))
    if len(chosen) == 2:
        items = [Item(item.thing, item.box, place) for item, place in zip(items, ("left", "right"), strict=True)]
    return PhotoScene(canvas, "laid", tuple(items))


def _chosen(photos: Sequence[Photo], count: int, rng: np.random.Generator) -> list[Photo]:
    """Photographs of different things; now and then two of one kind, so that something can be counted."""
    chosen: list[Photo] = []
    while len(chosen) < count:
        photo = photos[int(rng.integers(len(photos)))]
        if all(photo.thing.name != other.thing.name for other in chosen) or len({p.thing.name for p in photos}) < count:
            chosen.append(photo)
    return chosen


def opened(photo: Photo) -> Image.Image:
    with Image.open(photo.path) as file:
        across, down = (part[1] - part[0] for part in (photo.box[::2], photo.box[1::2]))
        file.draft("RGB", (round(SIDE / across), round(SIDE / down)))
        picture = ImageOps.exif_transpose(file).convert("RGB")
    left, top, right, bottom = (round(share * side) for share, side in zip(photo.box, picture.size * 2, strict=True))
    return picture.crop((left, top, right, bottom))


def _varied(photo: Photo, rng: np.random.Generator, *, smallest: float) -> Image.Image:
    """A cut of at least `smallest` of the area, perhaps mirrored, in slightly other light."""
    picture = opened(photo)
    share = rng.uniform(smallest, 1.0) if rng.random() < 0.8 else 1.0
    stretch = np.exp(rng.uniform(-0.15, 0.15))
    width = min(picture.width, round(picture.width * np.sqrt(share) * stretch))
    height = min(picture.height, round(picture.height * np.sqrt(share) / stretch))
    left, top = (int(rng.integers(0, whole - part + 1)) for whole, part in ((picture.width, width), (picture.height, height)))
    picture = picture.crop((left, top, left + width, top + height))
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    if rng.random() < 0.6:
        picture = ImageEnhance.Brightness(picture).enhance(float(rng.uniform(0.75, 1.25)))
        picture = ImageEnhance.Color(picture).enhance(float(rng.uniform(0.6, 1.3)))
    return picture


# -- questions and answers ------------------------------------------------------------------

T = TypeVar("T")
Block = list[tuple[str, str]]

WHAT = (
    *("What is this?", "What is in this picture?", "What is in the picture?", "What do you see?", "What does the picture show?"),
    *("What can you see in this picture?", "What is shown here?", "Can you tell me what this is?", "What is in this photo?"),
    *("Name the thing in the picture.", "What am I looking at?", "What is it?"),
)
SAY_WHAT = (
    "The picture shows {}.",
    "This is {}.",
    "It is {}.",
    "There is {} in the picture.",
    "I can see {}.",
    "The photo shows {}.",
)
PRESENT = (
    *("Is there {} in the picture?", "Is there {} in this picture?", "Can you see {}?", "Do you see {} in the picture?"),
    *("Is there {} here?", "Does the picture show {}?", "Is {} in the picture?"),
)
YES = ("Yes, there is {}.", "Yes, there is {} in the picture.", "Yes, I can see {}.")
NO = ("No, there is no {}.", "No, there is no {} in the picture.", "No, I cannot see any {}.")
KIND = (
    "What kind of thing is it?",
    "What kind of thing is this?",
    "What sort of thing does the picture show?",
    "Is it an animal, a food, a vehicle or something else?",
)
DESCRIBE = (
    "Describe the picture.",
    "Describe this image.",
    "Describe what you see.",
    "Tell me about this picture.",
    "Give a short description of the picture.",
)
WHERE = ("Where is the {}?", "Where in the picture is the {}?", "Where can I find the {}?")
AT_PLACE = (
    "What is at the {}?",
    "What do you see at the {}?",
    "What is in the {} of the picture?",
    "What is on the {}?",
    "Which thing is at the {}?",
)
ABILITIES = {
    "Could you eat it?": {"fruit", "vegetable", "food", "mushroom"},
    "Is it alive?": {"animal", "person", "plant", "mushroom"},
    "Is it an animal?": {"animal"},
    "Can you travel in it?": {"vehicle"},
    "Could you play music on it?": {"musical instrument"},
    "Could you wear it?": {"piece of clothing"},
    "Is it something to eat?": {"fruit", "vegetable", "food"},
    "Is it a vehicle?": {"vehicle"},
}
WHICH_OF_KIND = (
    "What {} is this?",
    "Which {} is this?",
    "What kind of {} is this?",
    "What {} do you see?",
    "Which {} is in the picture?",
)
WHICH_COULD = {
    "Which of these could you eat?": ABILITIES["Could you eat it?"],
    "Which of these is alive?": ABILITIES["Is it alive?"],
    "Which of these could you travel in?": ABILITIES["Can you travel in it?"],
    "Which of these could you play music on?": ABILITIES["Could you play music on it?"],
    "Which of these could you wear?": ABILITIES["Could you wear it?"],
}
NUMBERS = ("no", "one", "two", "three", "four")
PLURALS = {
    "fish": "fish",
    "sheep": "sheep",
    "knife": "knives",
    "wolf": "wolves",
    "person": "people",
    "piece of clothing": "pieces of clothing",
}
PLURALS |= {
    "piece of furniture": "pieces of furniture",
    "piece of sports equipment": "pieces of sports equipment",
    "food": "foods",
}


def talk_about(scene: PhotoScene, things: Sequence[Thing], rng: np.random.Generator, *, short: float = 0.2) -> list[Block]:
    """Ten to fifteen blocks on one scene; each place of a collage is asked about twice.

    `things` are what the no's are chosen from, `short` the share asked in a single word.
    """
    one = len(scene.items) == 1
    placed = [scene.items[int(i)] for i in rng.permutation(len(scene.items)) if scene.items[int(i)].place]
    blocks = [_what(scene, rng)] if one else [_place(scene, item, rng) for item in placed * 2]
    blocks += [_what(scene, rng)]
    blocks += [present(scene, rng), present(scene, rng), absent(scene, things, rng), absent(scene, things, rng)]
    if one:
        blocks += [_kind(scene, rng), _ability(scene, rng), _of_kind(scene, rng), _either(scene, things, rng)]
    else:
        blocks += [_relation(scene, rng), _count(scene, things, rng), _which_could(scene, rng)]
    if rng.random() < 0.3:
        blocks.append([(_pick(rng, DESCRIBE), describe(scene, rng))])
    if rng.random() < 0.35:
        turns = [_what(scene, rng), present(scene, rng), absent(scene, things, rng)]
        turns += [_ability(scene, rng), _kind(scene, rng)] if one else [_count(scene, things, rng)]
        order = [0, *(1 + rng.permutation(len(turns) - 1)[:2])]
        blocks.append([turns[int(i)][0] for i in order if turns[int(i)]])
    return [_shortened(block, scene, rng) if rng.random() < short else block for block in blocks if block]


def describe(scene: PhotoScene, rng: np.random.Generator) -> str:
    """One or two sentences that name everything and where it is."""
    if len(scene.items) == 1:
        thing = scene.items[0].thing
        more = f" It is {with_article(thing.kind)}." if thing.kind not in ("", "thing") else ""
        return f"The picture shows {full_name(thing)}.{more}"
    named = [f"{call(item.thing, rng)}" + (f" at the {item.place}" if item.place else "") for item in scene.items]
    return f"The picture shows {_joined(named)}."


def full_name(thing: Thing) -> str:
    """Name and what one calls it: "a tench, a kind of fish"."""
    if thing.basic and thing.basic not in thing.name.lower().split():
        return f"{with_article(thing.name)}, a kind of {thing.basic}"
    return with_article(thing.name)


def call(thing: Thing, rng: np.random.Generator) -> str:
    """The everyday word two times in three where there is one."""
    return with_article(thing.basic if thing.basic and rng.random() < 0.5 else thing.name)


def present(scene: PhotoScene, rng: np.random.Generator) -> Block:
    """A presence question whose answer is yes."""
    thing = _pick(rng, scene.items).thing
    words = thing.words[: 2 if rng.random() < 0.7 else 3]
    said = with_article(_pick(rng, words))
    return [(_pick(rng, PRESENT).format(said), _pick(rng, YES).format(said))]


def absent(scene: PhotoScene, things: Sequence[Thing], rng: np.random.Generator, *, near: bool | None = None) -> Block:
    """A presence question whose answer is no; `near`: about something of the same kind (None: half of the time)."""
    near = bool(rng.random() < 0.5) if near is None else near
    shown = {word.lower() for item in scene.items for word in item.thing.words}
    kinds = {item.thing.kind for item in scene.items}
    for _ in range(60):
        thing = _pick(rng, things)
        if near and thing.kind not in kinds:
            continue
        word = thing.basic if thing.basic and rng.random() < 0.5 else thing.name
        if word.lower() in shown or any(word.lower() in other or other in word.lower() for other in shown):
            continue
        said = with_article(word)
        answer = _pick(rng, NO).format(word)
        if len(scene.items) == 1 and rng.random() < 0.4:
            answer = f"{answer[:-1]}; it shows {call(scene.items[0].thing, rng)}."
        return [(_pick(rng, PRESENT).format(said), answer)]
    return []


def _what(scene: PhotoScene, rng: np.random.Generator) -> Block:
    if len(scene.items) == 1:
        thing = scene.items[0].thing
        said = full_name(thing) if rng.random() < 0.8 else call(thing, rng)
        return [(_pick(rng, WHAT), _pick(rng, SAY_WHAT).format(said))]
    return [
        (
            _pick(rng, WHAT[1:7]),
            _pick(rng, SAY_WHAT[:1] + SAY_WHAT[3:]).format(_joined([call(i.thing, rng) for i in scene.items])),
        )
    ]


def _place(scene: PhotoScene, item: Item, rng: np.random.Generator) -> Block:
    if rng.random() < 0.7 or not _lone(scene, item):
        said = full_name(item.thing) if rng.random() < 0.5 else call(item.thing, rng)
        answer = (f"At the {item.place} there is {said}.", f"There is {said} at the {item.place}.")
        return [(_pick(rng, AT_PLACE).format(item.place), _pick(rng, answer))]
    word = item.thing.basic or item.thing.name
    return [(_pick(rng, WHERE).format(word), f"The {word} is at the {item.place}.")]


def _lone(scene: PhotoScene, item: Item) -> bool:
    """Whether its everyday word names nothing else in the scene."""
    word = item.thing.basic or item.thing.name
    return sum(word in other.thing.words for other in scene.items) == 1


def _relation(scene: PhotoScene, rng: np.random.Generator) -> Block:
    first, second = (scene.items[int(i)] for i in rng.permutation(len(scene.items))[:2])
    if not (_lone(scene, first) and _lone(scene, second)):
        return []
    centres = [((item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2) for item in (first, second)]
    across, down = centres[0][0] - centres[1][0], centres[0][1] - centres[1][1]
    if max(abs(across), abs(down)) < 60:
        return []
    names = [item.thing.basic or item.thing.name for item in (first, second)]
    sideways = abs(across) >= abs(down)
    truth = ("left of" if across < 0 else "right of") if sideways else ("above" if down < 0 else "below")
    other = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[truth]
    asked = truth if rng.random() < 0.5 else other
    said = f"the {names[0]} is {truth} the {names[1]}"
    if rng.random() < 0.5:
        return [(f"Is the {names[0]} {asked} the {names[1]}?", f"{'Yes' if asked == truth else 'No'}, {said}.")]
    return [
        (
            f"Which is further {'left' if sideways else 'up'}, the {names[0]} or the {names[1]}?",
            f"The {names[0] if truth in ('left of', 'above') else names[1]}.",
        )
    ]


def _count(scene: PhotoScene, things: Sequence[Thing], rng: np.random.Generator) -> Block:
    kinds = [item.thing.kind for item in scene.items if item.thing.kind not in ("", "thing")]
    kind = _pick(rng, kinds) if kinds and rng.random() < 0.8 else _pick(rng, things).kind
    if kind in ("", "thing"):
        return [("How many things are in the picture?", f"There are {NUMBERS[len(scene.items)]} things in the picture.")]
    number = sum(item.thing.kind == kind for item in scene.items)
    many = PLURALS.get(kind, f"{kind}s")
    verb, noun = ("is", kind) if number == 1 else ("are", many)
    return [(f"How many {many} are in the picture?", f"There {verb} {NUMBERS[number]} {noun} in the picture.")]


def _kind(scene: PhotoScene, rng: np.random.Generator) -> Block:
    thing = scene.items[0].thing
    if thing.kind in ("", "thing"):
        return []
    return [(_pick(rng, KIND), f"It is {with_article(thing.kind)}.")]


def _ability(scene: PhotoScene, rng: np.random.Generator) -> Block:
    thing = scene.items[0].thing
    if thing.kind in ("", "thing"):
        return []
    true = [question for question, kinds in ABILITIES.items() if thing.kind in kinds]
    false = [question for question, kinds in ABILITIES.items() if thing.kind not in kinds]
    question = _pick(rng, true) if true and rng.random() < 0.5 else _pick(rng, false)
    yes = question in true
    return [(question, f"{'Yes' if yes else 'No'}, it is {call(thing, rng)}.")]


def _of_kind(scene: PhotoScene, rng: np.random.Generator) -> Block:
    thing = scene.items[0].thing
    if thing.kind in ("", "thing"):
        return []
    return [(_pick(rng, WHICH_OF_KIND).format(thing.kind), _pick(rng, SAY_WHAT[1:3]).format(full_name(thing)))]


def _either(scene: PhotoScene, things: Sequence[Thing], rng: np.random.Generator) -> Block:
    thing, other = scene.items[0].thing, _pick(rng, things)
    said, unsaid = call(thing, rng), call(other, rng)
    if set(thing.words[:2]) & set(other.words[:2]):
        return []
    first, second = (said, unsaid) if rng.random() < 0.5 else (unsaid, said)
    return [(f"Is this {first} or {second}?", f"It is {said}.")]


def _which_could(scene: PhotoScene, rng: np.random.Generator) -> Block:
    """Which of several things one could eat, wear, play: about half of the time at least one."""
    known = [item for item in scene.items if item.thing.kind not in ("", "thing")]
    if len(known) < len(scene.items):
        return []
    some = [question for question, kinds in WHICH_COULD.items() if any(item.thing.kind in kinds for item in known)]
    question = _pick(rng, some) if some and rng.random() < 0.7 else _pick(rng, tuple(WHICH_COULD))
    named = [call(item.thing, rng) for item in known if item.thing.kind in WHICH_COULD[question]]
    said = _joined(named) if named else "none of them"
    return [(question, f"{said[0].upper()}{said[1:]}.")]


def _shortened(block: Block, scene: PhotoScene, rng: np.random.Generator) -> Block:
    """The first question again, for a single word, where its answer is one."""
    question, answer = block[0]
    if answer.startswith(("Yes", "No")):
        return [(f"{question}\n{SHORT}", answer[: 3 if answer.startswith("Yes") else 2])]
    if question in WHAT and len(scene.items) == 1:
        thing = scene.items[0].thing
        return [(f"{question}\n{SHORT}", (thing.basic or thing.name).capitalize())]
    return block


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]
