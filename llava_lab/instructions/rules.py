"""A teacher without a model: rows made by rules from what is known of a picture, and lies at a stated rate.

Of a scene of our own it asks the picture book's questions and describes every thing; of captions and boxes it asks what boxes
can answer (which things, how many, where). So the whole way from contexts to a training file runs without a network, and
where every true answer is known, so is every lie: with `lie` above 0 that share of answers says something false instead,
never the question. A lie changes one word that matters (a colour, a kind, a number, a place, yes for no) and is false by
construction, not because a check said so. The same seed asks the same questions whatever the rate, so two runs differ
exactly in the lies. Where no lie is possible (nothing can be moved away from the middle) the truth is told.

    RuleTeacher(lie=0.3).ask(read_kinds(["conversation"])["conversation"], context, seed=0).text

The idea of rows by program comes from ProVision (arXiv 2412.07012); the rules are our own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llava_lab.errors import OptionError
from llava_lab.instructions.context import KINDS, Context, Kind
from llava_lab.instructions.facts import at_place
from llava_lab.instructions.teachers import Told
from llava_lab.worlds.photo_names import with_article
from llava_lab.worlds.picturebook import Question, Scene, Thing, ask_about
from llava_lab.worlds.questions import MARGIN, NUMBERS, OPPOSITE, PLACES, article, at, place_of, plural

TURNS = (3, 6)  # of a conversation, fewest and most
EVERY_PLACE = tuple(place for row in PLACES for place in row)
TERMS = "rules of llava-lab, no model: rows are Apache-2.0 like the package, beside what the pictures themselves allow"

Told2 = tuple[str, str, str | None]  # question, true answer, and a false one if there is any


class RuleTeacher:
    """Answers by rules; `lie` is the share of answers that are false where a lie is possible."""

    parallel = 1
    keeps = False  # a rule is quicker than a file

    def __init__(self, lie: float = 0.0) -> None:
        """Raises OptionError for a rate outside 0 to 1."""
        if not 0 <= lie <= 1:
            raise OptionError(f"lie must be a share from 0 to 1, got {lie!r}")
        self.lie = float(lie)
        self.name = "rules" if not lie else f"rules, lying {lie:g}"
        self.terms = TERMS
        self.settings = {"teacher": "rules", "lie": self.lie}

    def ask(self, kind: Kind, context: Context, *, seed: int) -> Told:
        """What a teacher would write for this picture, in the layout of the kind."""
        mark = (seed, int(context.hash, 16), KINDS.index(kind.name) if kind.name in KINDS else len(KINDS))
        rng, liar = np.random.default_rng((*mark, 1)), np.random.default_rng((*mark, 2))
        if kind.form == "turns":
            rows = _talk(context, rng)
        elif kind.form == "turn":
            rows = [_reason(context, rng)]
        else:
            rows = _describe(context, rng)
        said = []
        for question, answer, wrong in rows:
            lies = liar.random() < self.lie  # drawn for each, so that later ones do not move
            said.append((question, wrong if lies and wrong is not None else answer))
        if kind.form == "answer":
            return Told(" ".join(answer for _, answer in said))
        return Told("".join(f"Question:\n{question}\n===\nAnswer:\n{answer}\n===\n" for question, answer in said))


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


# -- conversations -------------------------------------------------------------------------


def _talk(context: Context, rng: np.random.Generator) -> list[Told2]:
    count = int(rng.integers(TURNS[0], TURNS[1] + 1))
    if context.scene is not None:
        scene = context.scene
        return [(q.text, q.answer, wrong_answer(scene, q, rng)) for q in ask_about(scene, rng, count)]
    makers = (_how_many, _is_there, _is_absent, _where)
    made: dict[str, Told2] = {}
    for number in range(4 * count):
        row = makers[number % len(makers)](context, rng)
        if row is not None and len(made) < count:
            made.setdefault(row[0], row)
    return list(made.values()) or [_caption_of(context, rng)]


def wrong_answer(scene: Scene, question: Question, rng: np.random.Generator) -> str | None:
    """A false answer to one of the picture book's questions, in the form of the true one; None where none is sure to be."""
    answer, short, things = question.answer, question.short, scene.things
    if question.type in ("color", "kind", "size"):
        pool = {"color": scene.colors, "kind": scene.kinds, "size": ("small", "large")}[question.type]
        other = _pick(rng, [value for value in pool if value != short])
        return f"It is {article(other)}." if question.type == "kind" else answer.replace(f" is {short}.", f" is {other}.")
    if question.type == "place":
        thing = things[question.deciding[0]]
        place = _far_place(thing, rng)
        return None if place is None else answer.replace(f" is {at(short)}.", f" is {at(place)}.")
    if question.type == "count":
        return _wrong_count(question, rng)
    if question.type == "existence":
        if short == "yes":
            return answer.replace("Yes, there is an ", "No, there is no ").replace("Yes, there is a ", "No, there is no ")
        noun = answer.removeprefix("No, there is no ").removesuffix(".")
        return f"Yes, there is {article(noun)}."
    if question.type == "relation":
        if short in ("yes", "no"):
            true = next(relation for relation in OPPOSITE if f" is {relation} the " in answer)
            turned = {"Yes": "No", "No": "Yes"}[answer.split(",")[0]]
            return f"{turned}, " + answer.split(", ", 1)[1].replace(f" is {true} the ", f" is {OPPOSITE[true]} the ")
        present = {thing.kind for thing in things}
        other = _pick(rng, [kind for kind in scene.kinds if kind not in present])
        return f"{article(other).capitalize()}{answer[len(article(short)) :]}"
    return _wrong_comparison(scene, question)


def _wrong_count(question: Question, rng: np.random.Generator) -> str:
    true = NUMBERS.index(question.short)
    number = int(rng.choice([n for n in range(1, len(NUMBERS)) if n != true]))
    noun = question.answer.removeprefix("There are ").removeprefix("There is ").removesuffix(".").split(" ", 1)[1]
    one = noun if true == 1 or noun == "fish" or noun.endswith(" fish") else noun.removesuffix("s")
    return f"There is one {one}." if number == 1 else f"There are {NUMBERS[number]} {plural(one)}."


def _wrong_comparison(scene: Scene, question: Question) -> str | None:
    answer, things = question.answer, scene.things
    if answer == "No, there are equally many.":
        kind = question.text.split(" more ")[1].split(" than ")[0]
        return f"Yes, there are more {kind}."
    if "there are more" in answer:
        one, two = question.text.rstrip("?").split(" more ")[1].split(" than ")
        said, other = (one, two) if answer.startswith("Yes") else (two, one)
        return answer.replace(f"more {said}", f"more {other}").replace(
            "Yes," if said == one else "No,", "No," if said == one else "Yes,"
        )
    a, _b = (things[i] for i in question.deciding)
    if answer.startswith("Yes, both"):
        other = next(color for color in scene.colors if color != a.color)
        return f"No, they are {a.color} and {other}."
    if answer.startswith("No, they are"):
        return f"Yes, both are {a.color}."
    names = question.text.rstrip("?").split(", the ")[1].split(" or the ")
    return f"The {names[0] if question.short in ('same', names[1]) else names[1]} is bigger."


def _far_place(thing: Thing, rng: np.random.Generator) -> str | None:
    """A place at the other end of the picture for a thing that is clearly at a side."""
    cell = place_of(thing)
    far = [place for place in EVERY_PLACE if cell and at_place(thing.x, thing.y, place) is False and _opposite(cell, place)]
    return _pick(rng, far) if far else None


def _opposite(one: str, other: str) -> bool:
    return any(a in one and b in other for a, b in (("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top")))


# -- of boxes ------------------------------------------------------------------------------


def _counts(context: Context) -> Counter[str]:
    """How many boxes each name has, where all of them were counted."""
    crowds = {box.name for box in context.boxes if box.crowd}
    return Counter(box.name for box in context.boxes if box.name not in crowds)


def _many(name: str, number: int) -> str:
    words = {"person": "people", "sheep": "sheep", "skis": "skis", "scissors": "scissors", "broccoli": "broccoli"}
    more = words.get(name) or (name + "es" if name.endswith(("s", "ch", "sh", "x")) else name + "s")
    return f"one {name}" if number == 1 else f"{NUMBERS[number] if number < len(NUMBERS) else number} {more}"


def _how_many(context: Context, rng: np.random.Generator) -> Told2 | None:
    counts = _counts(context)
    if not counts:
        return None
    name = _pick(rng, sorted(counts))
    number, other = counts[name], counts[name] + int(rng.integers(1, 4))
    many = _many(name, 2).split(" ", 1)[1]
    return f"How many {many} are there?", _there(_many(name, number), number), _there(_many(name, other), other)


def _there(noun: str, number: int) -> str:
    return f"There {'is' if number == 1 else 'are'} {noun}."


def _is_there(context: Context, rng: np.random.Generator) -> Told2 | None:
    if not context.boxes:
        return None
    noun = with_article(_pick(rng, sorted({box.name for box in context.boxes})))
    bare = noun.removeprefix("an ").removeprefix("a ")
    return f"Is there {noun} in the picture?", f"Yes, there is {noun}.", f"No, there is no {bare}."


def _is_absent(context: Context, rng: np.random.Generator) -> Told2 | None:
    said = " ".join(context.captions).lower()
    absent = [name for name in context.complete if name not in said and all(box.name != name for box in context.boxes)]
    if not absent:
        return None
    name = _pick(rng, absent)
    return f"Is there {with_article(name)} in the picture?", f"No, there is no {name}.", f"Yes, there is {with_article(name)}."


def _where(context: Context, rng: np.random.Generator) -> Told2 | None:
    alone = [box for box in context.boxes if _counts(context)[box.name] == 1]
    told = [(box.name, side) for box in alone for side in ("left", "right") if at_place(*box.center, side)]
    if not told:
        return None
    name, side = told[int(rng.integers(len(told)))]
    other = {"left": "right", "right": "left"}[side]
    return f"Where is the {name}?", f"The {name} is on the {side}.", f"The {name} is on the {other}."


def _caption_of(context: Context, rng: np.random.Generator) -> Told2:
    if context.captions:
        return "What is in the picture?", _pick(rng, context.captions), None
    return "What is in the picture?", _listed(context), None


def _listed(context: Context) -> str:
    nouns = [_many(name, number) for name, number in sorted(_counts(context).items())] or [context.boxes[0].name]
    listed = f"{', '.join(nouns[:-1])} and {nouns[-1]}" if nouns[1:] else nouns[0]
    return f"There {'is' if nouns[0].startswith('one ') else 'are'} {listed}."


# -- descriptions --------------------------------------------------------------------------


def _describe(context: Context, rng: np.random.Generator) -> list[Told2]:
    """A sentence per thing of a scene; else the captions and a count of every name."""
    if context.scene is None:
        rows: list[Told2] = [("", caption, None) for caption in context.captions]
        for name, number in sorted(_counts(context).items()):
            other = number + int(rng.integers(1, 4))
            rows.append(("", _there(_many(name, number), number), _there(_many(name, other), other)))
        return rows or [("", _listed(context), None)]
    rows = []
    for i in rng.permutation(len(context.scene.things)):
        thing = context.scene.things[int(i)]
        form = _pick(rng, ("There is {}{}.", "I see {}{}.", "The picture shows {}{}."))
        place = place_of(thing)
        wrong = wrong_thing(context.scene, thing, place, rng)
        rows.append(("", _sentence(form, thing, place), wrong and _sentence(form, *wrong)))
    return rows


def _sentence(form: str, thing: Thing, place: str | None) -> str:
    return form.format(article(f"{thing.size} {thing.color} {thing.kind}"), f" {at(place)}" if place else "")


def wrong_thing(scene: Scene, thing: Thing, place: str | None, rng: np.random.Generator) -> tuple[Thing, str | None] | None:
    """The thing with one attribute, or its place, changed so that nothing in the scene is like it."""
    options: list[tuple[Thing, str | None]] = []
    present = {(t.kind, t.color) for t in scene.things}
    colors = [color for color in scene.colors if (thing.kind, color) not in present]
    kinds = [kind for kind in scene.kinds if all(t.kind != kind for t in scene.things)]
    options += [(replace(thing, color=_pick(rng, colors)), place), (replace(thing, kind=_pick(rng, kinds)), place)]
    size = {"small": "large", "large": "small"}[thing.size]
    if all((t.kind, t.color, t.size) != (thing.kind, thing.color, size) for t in scene.things):
        options.append((replace(thing, size=size), place))
    far = _far_place(thing, rng) if place else None
    if far and not any(t.kind == thing.kind and at_place(t.x, t.y, far) is not False for t in scene.things):
        options.append((thing, far))
    return options[int(rng.integers(len(options)))]


# -- reasoning -----------------------------------------------------------------------------


def _reason(context: Context, rng: np.random.Generator) -> Told2:
    """A question that takes a step beyond what is seen, and its answer."""
    if context.scene is None:
        return _reason_of_boxes(context, rng)
    scene = context.scene
    first = scene.things[scene.left_to_right[0]]
    noun = article(f"{first.size} {first.color} {first.kind}")
    wrong = wrong_thing(scene, first, None, rng)
    false = wrong and article(f"{wrong[0].size} {wrong[0].color} {wrong[0].kind}")
    if len(scene.things) == 1:
        question = "What would have to be added here to make a pair?"
        form = "There is one thing in the picture, {}. A pair needs two of a kind. So one more like it would make a pair."
        return question, form.format(noun), false and form.format(false)
    x = [scene.things[i].x for i in scene.left_to_right]
    if rng.random() < 0.5 and x[1] - x[0] > MARGIN:
        question = "What would be furthest to the right if one looked at this picture in a mirror?"
        form = (
            "The thing furthest to the left is {}. A mirror swaps left and right. So this thing would be furthest to the right."
        )
        return question, form.format(noun), false and form.format(false)
    common, number = Counter(thing.kind for thing in scene.things).most_common(1)[0]
    total, question = len(scene.things), "If one took away everything of the most common kind, how many things would be left?"

    def answer(count: int) -> str:
        said = f"There is one {common}" if count == 1 else f"There are {NUMBERS[count]} {plural(common)}"
        rest = f"So {NUMBERS[total - number] if total > number else 'none'} would be left."
        return f"There are {NUMBERS[total]} things. {said}, and no kind has more. {rest}"

    other = int(rng.choice([n for n in range(1, len(NUMBERS)) if n != number]))
    return question, answer(number), answer(other)


def _reason_of_boxes(context: Context, rng: np.random.Generator) -> Told2:
    counts = _counts(context)
    if not counts:
        return _caption_of(context, rng)
    name, number = counts.most_common(1)[0]
    other = number + int(rng.integers(1, 4))
    question = "If everything of the most common kind were taken away, what would be missing?"
    form = "{} No other kind is seen as often. So these would be missing."
    return question, form.format(_there(_many(name, number), number)), form.format(_there(_many(name, other), other))
