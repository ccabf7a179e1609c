"""What is known to be in a picture, asked with yes, no or "cannot be told".

From a scene of our own everything is known: kinds, colours, sizes, places. From boxes it is what has a box: a kind that the
data set always marks (`Context.complete`) and that has none is not there; of others nothing is known. Colours are known from
captions alone, and only where a caption says them of that very thing. Groups that nobody counted (COCO's crowds) leave
numbers open.

    known = Facts.of(context)
    known.exists(Wanted(kind="car", color="red"))  # True, False, or None

The words for COCO's eighty categories are our own short list; "man" and "girl" name a person, and two men are not two persons.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from llava_lab.instructions.context import Context
from llava_lab.worlds.questions import EDGE, plural
from llava_lab.worlds.scenes import COLOR_NAMES

Verdict = bool | None  # None: cannot be told

SIDE = 0.05  # of the middle line: nearer than this, neither left nor right can be told
APART = 0.02  # share of the picture by which two centres must differ before a direction is told
COLORS = frozenset({*COLOR_NAMES, "black", "white", "gray", "grey", "golden", "silver", "violet", "beige", "tan"})
SAME_COLOR = {"grey": "gray", "golden": "yellow", "violet": "purple"}
SIZES = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large", "huge": "large"}
GENERIC = frozenset({"thing", "things", "object", "objects", "item", "items"})

_COCO = Path(__file__).with_name("coco_words.txt")


@cache
def coco() -> dict[str, dict[str, tuple[str, bool]]]:
    """Category -> word -> (category, whether the word means all of its members)."""
    table: dict[str, dict[str, tuple[str, bool]]] = {}
    for line in _COCO.read_text("utf-8").splitlines():
        if line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        same, _, part = rest.partition("|")
        words = {name: (name, True)}
        words |= {word.strip(): (name, True) for word in same.split(",") if word.strip()}
        table[name] = words | {word.strip(): (name, False) for word in part.split(",") if word.strip()}
    return table


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


@dataclass(frozen=True)
class Wanted:
    """What a phrase says of one thing; None says nothing. `word` is the noun as it stands in the text."""

    kind: str | None = None
    color: str | None = None
    size: str | None = None
    place: str | None = None
    word: str = ""

    def with_(self, **more: str | None) -> Wanted:
        return replace(self, **{name: value for name, value in more.items() if value is not None})


@dataclass(frozen=True)
class Seen:
    """One thing that is known to be there."""

    kind: str
    x: float
    y: float
    color: str | None = None
    size: str | None = None
    crowd: bool = False


@dataclass(frozen=True)
class Facts:
    """What is known of one picture."""

    things: tuple[Seen, ...]
    words: dict[str, tuple[str, bool]]  # noun -> (kind, does it mean all of that kind)
    complete: frozenset[str]  # kinds that would be among `things` if they were there
    exact: bool  # colours and sizes are known, and nothing else is in the picture
    captions: tuple[tuple[str, ...], ...] = ()  # in lower-case words

    @classmethod
    def of(cls, context: Context) -> Facts:
        """Everything a context says; of a scene of ours everything there is."""
        if context.scene is not None:
            scene = context.scene
            things = tuple(Seen(t.kind, t.x, t.y, t.color, t.size) for t in scene.things)
            words = {word: (kind, True) for kind in scene.kinds for word in (kind, plural(kind))}
            return cls(things, words, frozenset(scene.kinds), True)
        things = tuple(Seen(box.name, *box.center, crowd=box.crowd) for box in context.boxes)
        names = dict.fromkeys((*context.complete, *(box.name for box in context.boxes)))
        words = {}
        for name in names:
            words |= coco().get(name) or dict.fromkeys((name, f"{name}s", f"{name}es"), (name, True))
        captions = tuple(tuple(re.findall(r"[a-z]+", caption.lower())) for caption in context.captions)
        return cls(things, words, frozenset(context.complete), False, captions)

    # -- questions -------------------------------------------------------------------------

    def exists(self, wanted: Wanted) -> Verdict:
        """Whether there is such a thing."""
        found = [self._fits(thing, wanted) for thing in self.things]
        if True in found:
            return True
        if None in found:
            return True if self._said(wanted) else None
        if self._said(wanted):
            return True if wanted == Wanted(wanted.kind, word=wanted.word) or wanted.color else None
        return False if self._closed(wanted.kind) else None

    def count(self, wanted: Wanted) -> tuple[int, int | None]:
        """At least, and at most, so many such things; None is no limit."""
        found = [self._fits(thing, wanted) for thing in self.things]
        crowd = any(thing.crowd and fits is not False for thing, fits in zip(self.things, found, strict=True))
        partly = wanted.kind is not None and not self.words.get(wanted.word or wanted.kind, ("", True))[1]
        least = 0 if partly else found.count(True)
        return least, None if crowd or not self._closed(wanted.kind) else found.count(True) + found.count(None)

    def is_number(self, wanted: Wanted, number: int) -> Verdict:
        """Whether there are just so many."""
        least, most = self.count(wanted)
        if number < least or (most is not None and number > most):
            return False
        return True if least == most == number else None

    def lies(self, first: Wanted, relation: str, second: Wanted) -> Verdict:
        """Whether some such thing is ``left of``, ``right of``, ``above`` or ``below`` some other, by their centres."""
        axis, sign = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}[relation]
        verdicts: list[Verdict] = []
        for a, b in ((a, b) for a in self.things for b in self.things if a is not b):
            both = _all((self._fits(a, first), self._fits(b, second)))
            if both is not False:
                gap = (getattr(a, axis) - getattr(b, axis)) * sign
                verdicts.append(_all((both, True if gap > APART else False if gap < -APART else None)))
        if verdicts:
            return _any(verdicts)
        return False if self._closed(first.kind) and self._closed(second.kind) else None

    def those(self, wanted: Wanted) -> list[Seen]:
        """Every thing that surely fits."""
        return [thing for thing in self.things if self._fits(thing, wanted)]

    def _fits(self, thing: Seen, wanted: Wanted) -> Verdict:
        kind: Verdict = wanted.kind in (None, thing.kind)
        if kind and wanted.kind is not None and not self.words.get(wanted.word or wanted.kind, ("", True))[1]:
            # a person is there; whether a man is, a box cannot say
            kind = True if wanted == Wanted(wanted.kind, word=wanted.word) else None
        color: Verdict = True if wanted.color is None else _equal(thing.color, same_color(wanted.color))
        size: Verdict = True if wanted.size is None else _equal(thing.size, wanted.size)
        place: Verdict = True if wanted.place is None else at_place(thing.x, thing.y, wanted.place)
        return _all((kind, color, size, place))

    def _closed(self, kind: str | None) -> bool:
        return self.exact if kind is None else kind in self.complete

    def _said(self, wanted: Wanted) -> bool:
        """Whether a caption names the kind, and the colour right before it where one is wanted."""
        if wanted.kind is None or wanted.size or wanted.place:
            return False
        names = [tuple(word.split()) for word, (kind, _) in self.words.items() if kind == wanted.kind]
        color = wanted.color and same_color(wanted.color)
        return any(
            color is None or (before is not None and same_color(before) == color)
            for caption in self.captions
            for name in names
            for before in _before(caption, name)
        )


def _before(caption: tuple[str, ...], name: tuple[str, ...]) -> Iterator[str | None]:
    """The word before each place where a caption says `name`."""
    for at in range(len(caption) - len(name) + 1):
        if caption[at : at + len(name)] == name:
            yield caption[at - 1] if at else None


def same_color(color: str) -> str:
    """The name under which a colour is kept."""
    return SAME_COLOR.get(color, color)


def at_place(x: float, y: float, place: str) -> Verdict:
    """Whether a centre is at "left", "top right", "middle" ...: sides are halves, the middle is the middle third each way."""
    verdicts: list[Verdict] = []
    for word in place.split():
        if word == "middle":
            low, high = 1 / 3 - EDGE, 2 / 3 + EDGE
            verdicts.append(low <= x <= high and low <= y <= high)
        else:
            value = {"left": x, "right": 1 - x, "top": y, "bottom": 1 - y}[word]
            verdicts.append(None if abs(value - 0.5) < SIDE else value < 0.5)
    return _all(verdicts)


def _equal(known: str | None, wanted: str) -> Verdict:
    return None if known is None else known == wanted


def _all(verdicts: Iterable[Verdict]) -> Verdict:
    given = list(verdicts)
    return False if False in given else None if None in given else True


def _any(verdicts: Iterable[Verdict]) -> Verdict:
    given = list(verdicts)
    return True if True in given else None if None in given else False


def turned(verdict: Verdict, negated: bool) -> Verdict:
    """The verdict on the opposite, where `negated`."""
    return verdict if verdict is None or not negated else not verdict
