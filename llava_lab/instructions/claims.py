"""What sentences claim of a picture, and whether it is so.

Every answer is read sentence by sentence. A phrase such as "two small red cars" claims a thing (*kind*, or *presence* where
the sentence says that there is one, or none), a *color*, a *size* and a *number*; "at the top left" a *place*; "left of the
house" a *relation*. Each claim is looked up in `Facts` and is true, false, or cannot be told.

Attributes are checked together with those before them that are true, so that one wrong word is one false claim: in "a small
blue car" where the only car is red and small, the colour is false and the size is true. A sentence is true of a picture where
several things fit if it is true of one of them. "It", "both" and plain "Yes." are read with the question.

What is supposed (if, might, probably ...) claims nothing but the things it calls "the". What the words here cannot read is no
claim; a relation such as "behind" is one that cannot be told.

    read_claims("What color is the car?", "It is blue.", Facts.of(context))  # [Claim("color", "blue car", False, "It is blue.")]

It knows a few dozen words and no grammar. How well that does is measured where every lie is known (`tests/instructions`).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from llava_lab.instructions.facts import COLORS, GENERIC, SIZES, Facts, Verdict, Wanted, same_color, turned, word_set
from llava_lab.stats import NUMBER_WORDS

TYPES = ("kind", "presence", "color", "size", "number", "place", "relation")
NUMBERS = {word: number for number, word in enumerate(NUMBER_WORDS)} | {"no": 0}
DETERMINERS = word_set("a an the this that these those another some several many its their his her every each any both")
DEFINITE = word_set("the this that these those its their his her both")
SUPPOSED = word_set("if would could might may should perhaps probably possibly likely maybe imagine suppose can")
NEGATIONS = word_set("no not without never neither nor isn't aren't don't doesn't cannot can't")
STOPS = word_set(
    """is are was were be has have had do does did and or but with of in on at to from by for near beside behind under over above
    below than that which who while as both neither nor not there here it they this what where how see shows show shown contains
    contain find no without more fewer left right"""
)
BE = word_set("is are was were looks appears")
PLACE = re.compile(
    r"\b(?:at|in|on|to|near|towards?) the (?:very )?"
    r"(?P<v>top|upper|bottom|lower)?[ -]?(?P<h>left|right)?(?P<m>middle|cent(?:er|re))?"
    r"(?: (?:hand )?(?:side|corner|part|half|third|edge))?(?: of the (?:picture|image|photo|scene))?\b(?! of\b)"
)
RELATION = re.compile(
    r"\b(?:to the |on the )?(left|right) of (?!the (?:picture|image|photo|scene)\b)|\b(above|below|under|beneath)\b"
)
UNTOLD = re.compile(r"\b(behind|in front of|next to|beside|between|inside|near|on top of)\b")
SUPERLATIVES = word_set("furthest farthest further closest closer nearest")
LONGEST_PHRASE = 5  # words between a determiner and its noun


@dataclass(frozen=True)
class Claim:
    """One claim of a sentence: its type, what it says in a few words, and whether it is so (None: cannot be told)."""

    type: str
    says: str
    true: Verdict
    sentence: str


@dataclass
class Phrase:
    """A noun with what is said of it."""

    start: int  # words from .. to
    stop: int
    wanted: Wanted
    number: int | None = None
    definite: bool = False
    negated: bool = False
    colors: list[str] = field(default_factory=list)

    @property
    def bare(self) -> Wanted:
        return Wanted(self.wanted.kind, word=self.wanted.word)


def sentences(text: str) -> list[str]:
    """The sentences of a text, as they stand."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]


def read_claims(question: str, answer: str, facts: Facts) -> list[Claim]:
    """Every claim of an answer, in order; `question` is what "it", "both" and "yes" refer to."""
    asked = _Sentence(_declarative(question), facts)
    claims: list[Claim] = []
    for text in sentences(answer):
        claims += _of_sentence(text, asked, facts, question)
    return claims


def false_sentences(question: str, answer: str, facts: Facts) -> list[str]:
    """The sentences with a false claim, as they stand in the answer; what a viewer marks."""
    return list(dict.fromkeys(claim.sentence for claim in read_claims(question, answer, facts) if claim.true is False))


def _of_sentence(text: str, asked: _Sentence, facts: Facts, question: str) -> list[Claim]:
    said = _Sentence(text, facts)
    words = said.words
    opening = words[0] if words and words[0] in ("yes", "no") and (len(words) == 1 or words[1] in ",.;:!") else ""
    compared = _compared(said, asked, facts)
    if compared is not None:
        return [Claim(kind, says, verdict, text) for kind, says, verdict in compared]
    claims = list(said.claims(asked))
    if not claims and opening and asked.phrases:  # a bare yes or no: the question is what is claimed
        main = _asked_to_compare(asked, facts)
        if main is None:
            main = [claim for claim in asked.claims(None) if claim.type != "kind"] or list(asked.claims(None))
        claims = [Claim(c.type, c.says, turned(c.true, opening == "no"), text) for c in main[-1:]]
    if not claims and len(words) <= 4:  # "red", "two", "top left"
        claims = list(_short(words, asked, facts, question))
    return [Claim(claim.type, claim.says, claim.true, text) for claim in claims]


class _Sentence:
    """One sentence in lower-case words, its phrases, places and relations."""

    def __init__(self, text: str, facts: Facts) -> None:
        self.text, self.facts = text, facts
        self.words = re.findall(r"[a-z']+|\d+|[,.;:!?]", text.lower().replace("-", " "))
        self.joined = " ".join(self.words)
        self.supposed = bool(SUPPOSED & set(self.words)) and not re.match(r"(?:i|you|we) can see\b", self.joined)
        self.phrases = list(self._phrases())
        self.existential = bool(
            re.search(
                r"\bthere(?:'s| is| are| was| were)\b|\b(?:see|shows?|contains?|has|have|find|visible|picture is)\b", self.joined
            )
        )

    def _phrases(self) -> Iterator[Phrase]:
        at, end = 0, 0
        while at < len(self.words):
            noun = self._noun(at)
            if noun is None:
                at += 1
                continue
            wanted, length = noun
            yield self._around(at, at + length, end, wanted)
            at = end = at + length

    def _noun(self, at: int) -> tuple[Wanted, int] | None:
        """The longest name of a kind that begins here, and how many words it has."""
        for length in (3, 2, 1):
            word = " ".join(self.words[at : at + length])
            if word in self.facts.words:
                if length == 1 and word in COLORS and at + 1 < len(self.words) and self._noun(at + 1):
                    return None  # an orange car
                if length == 1 and word in COLORS and at and self.words[at - 1] in BE:
                    return None  # the car is orange
                return Wanted(self.facts.words[word][0], word=word), length
            if length == 1 and word in GENERIC:
                return Wanted(), length
        return None

    def _around(self, head: int, stop: int, floor: int, wanted: Wanted) -> Phrase:
        """Read back from the noun: colours, a size, other adjectives, a number, a determiner."""
        phrase = Phrase(head, stop, wanted)
        at = head - 1
        while at >= max(floor, head - LONGEST_PHRASE):
            word = self.words[at]
            if word in COLORS:
                phrase.colors.insert(0, same_color(word))
            elif word in SIZES:
                phrase.wanted = phrase.wanted.with_(size=SIZES[word])
            elif word in NUMBERS or word.isdecimal():
                phrase.number = NUMBERS.get(word, int(word) if word.isdecimal() else None)
                phrase.negated = phrase.number == 0
            elif word in DETERMINERS:
                phrase.definite = word in DEFINITE
                phrase.start = at
                break
            elif word == "and" and at and self.words[at - 1] in COLORS and phrase.colors:
                pass
            elif word in STOPS or not word.isalpha():
                break
            phrase.start = at
            at -= 1
        before = self.words[max(0, phrase.start - 3) : phrase.start]
        phrase.definite |= phrase.start > 0 and self.words[phrase.start - 1] in DEFINITE
        if NEGATIONS & set(before) and not (before and before[-1] in ",;"):
            # "No, there is ..." negates nothing, "there is not a ..." does
            last = max(i for i, word in enumerate(before) if word in NEGATIONS)
            phrase.negated |= not {",", ";"} & set(before[last:])
        if phrase.number is not None and stop < len(self.words) and self.words[stop] in ("more", "fewer"):
            phrase.number = None
        if phrase.colors:
            phrase.wanted = phrase.wanted.with_(color=phrase.colors[0])
        return phrase

    # -- claims ----------------------------------------------------------------------------

    def claims(self, asked: _Sentence | None) -> Iterator[Claim]:
        """What the sentence says, with the question's thing for "it"."""
        for phrase in self.phrases:
            if self.supposed and not phrase.definite:
                continue
            yield from self._of_phrase(phrase, asked)
        if self.supposed:
            return
        yield from self._predicates(asked)
        yield from self._relations()
        yield from self._places(asked)

    def _of_phrase(self, phrase: Phrase, asked: _Sentence | None) -> Iterator[Claim]:
        facts, kind = self.facts, "presence" if self.existential or phrase.negated else "kind"
        if phrase.negated:
            yield self._claim("presence", f"no {_name(phrase.wanted)}", turned(facts.exists(phrase.wanted), True))
            return
        is_subject = self._subject(asked)
        if is_subject is not None and self._is_predicate(phrase):  # "It is a car": the thing asked about is one
            if phrase.wanted.kind is not None:
                word = is_subject.with_(kind=phrase.wanted.kind, word=phrase.wanted.word)
                yield self._claim("kind", f"it is {_name(phrase.bare)}", facts.exists(word))
            return
        base = phrase.bare
        if base.kind is not None:
            verdict = facts.exists(base)
            yield self._claim(kind, _name(base), verdict)
            if verdict is False:
                return
        said = [*(("color", color) for color in phrase.colors), ("size", phrase.wanted.size)]
        for name, value in said if phrase.wanted.size else said[:-1]:
            more = base.with_(**{name: value})
            verdict = facts.exists(more)
            yield self._claim(name, _name(more), verdict)
            base = base if verdict is False else more
        phrase.wanted = base.with_(place=phrase.wanted.place)
        if phrase.number:
            yield self._claim("number", f"{phrase.number} {_name(base)}", facts.is_number(base, phrase.number))

    def _subject(self, asked: _Sentence | None) -> Wanted | None:
        """What "it" or "this" at the beginning stands for: the question's thing, with its place."""
        if asked is None or not re.match(r"(?:it|this|that|they|these)(?:'s| is| are| was)\b", self.joined):
            return None
        best = max((phrase.wanted for phrase in asked.phrases), key=_told, default=Wanted())
        places = list(asked.found_places())
        return best.with_(place=places[0][1]) if places else best

    def _is_predicate(self, phrase: Phrase) -> bool:
        """Whether the phrase stands right after "it is"."""
        return phrase.start <= 3 and any(word in BE or word.endswith("'s") for word in self.words[: phrase.start])

    def _predicates(self, asked: _Sentence | None) -> Iterator[Claim]:
        """ "The car is red", "It is small", "The color of the car is red"."""
        subjects = [(phrase.stop, phrase.wanted, phrase.negated) for phrase in self.phrases]
        if (subject := self._subject(asked)) is not None:
            subjects.append((1 - self.words[0].endswith("'s"), subject, False))
        for stop, wanted, negated in subjects:
            at = stop
            if not negated and at < len(self.words) and (self.words[at] in BE or self.words[max(at - 1, 0)].endswith("'s")):
                at += self.words[at] in BE
                turn = at < len(self.words) and self.words[at] == "not"
                at += turn
                while at < len(self.words) and self.words[at] in ("very", "all", "both", "a", "quite", "rather", "also"):
                    at += 1
                for name, value in self._adjectives(at):
                    more = wanted.with_(**{name: value})
                    plain = Wanted(wanted.kind, word=wanted.word, size=wanted.size if name == "color" else None)
                    plain = plain.with_(color=wanted.color if name == "size" else None, place=wanted.place).with_(**{name: value})
                    yield self._claim(name, _name(more), turned(self.facts.exists(plain), turn))

    def _adjectives(self, at: int) -> Iterator[tuple[str, str]]:
        """Colours and sizes from here on, where no noun follows that they belong to."""
        found = []
        while at < len(self.words) and (self.words[at] in COLORS or self.words[at] in SIZES or self.words[at] in ("and", ",")):
            word = self.words[at]
            if word in COLORS:
                found.append(("color", same_color(word)))
            elif word in SIZES:
                found.append(("size", SIZES[word]))
            at += 1
        if at >= len(self.words) or self._noun(at) is None:
            yield from found

    def found_places(self) -> Iterator[tuple[int, str, int]]:
        """(word it begins at, place, word after it) of every place on the picture."""
        for match in PLACE.finditer(self.joined):
            vertical = {"top": "top", "upper": "top", "bottom": "bottom", "lower": "bottom"}.get(match["v"] or "")
            middle = "middle" if match["m"] and not (match["v"] or match["h"]) else None
            parts = [part for part in (vertical, match["h"], middle) if part]
            after = self.joined[match.end() :].strip()
            begin = len(self.joined[: match.start()].split())
            superlative = begin > 0 and self.words[begin - 1] in SUPERLATIVES
            if parts and not superlative and not after.startswith("of "):
                yield begin, " ".join(parts), begin + len(match[0].split())

    def _places(self, asked: _Sentence | None) -> Iterator[Claim]:
        for begin, place, end in self.found_places():
            before = [phrase for phrase in self.phrases if phrase.stop <= begin]
            after = [phrase for phrase in self.phrases if phrase.start >= end]
            between = before and {";"} & set(self.words[before[-1].stop : begin])
            subject = self._subject(asked)
            if before and not between:
                owner: Phrase | None = before[-1]
            elif subject is not None and not before:
                yield self._claim("place", f"{_name(subject)} at the {place}", self.facts.exists(subject.with_(place=place)))
                continue
            else:
                owner = after[0] if after else None
            if owner is None or owner.negated:
                continue
            wanted = owner.wanted.with_(place=place)
            if self.facts.exists(owner.wanted) is False:  # what is not there has no place to be wrong about
                continue
            verdict = self.facts.exists(wanted)
            if verdict and owner.number and owner.number > 1:
                verdict = None if len(self.facts.those(wanted)) < owner.number else True
            yield self._claim("place", f"{_name(owner.wanted)} at the {place}", turned(verdict, self._not_before(begin)))

    def _relations(self) -> Iterator[Claim]:
        for match in RELATION.finditer(self.joined):
            begin = len(self.joined[: match.start()].split())
            end = begin + len(match[0].split())
            first = [phrase for phrase in self.phrases if phrase.stop <= begin]
            second = [phrase for phrase in self.phrases if phrase.start in range(end, end + 2)]
            if first and second and not first[-1].negated:
                relation = f"{match[1]} of" if match[1] else {"under": "below", "beneath": "below"}.get(match[2], match[2])
                says = f"{_name(first[-1].wanted)} {relation} {_name(second[0].wanted)}"
                verdict = self.facts.lies(first[-1].wanted, relation, second[0].wanted)
                yield self._claim("relation", says, turned(verdict, self._not_before(begin)))
        for match in UNTOLD.finditer(self.joined):
            begin = len(self.joined[: match.start()].split())
            first = [phrase for phrase in self.phrases if phrase.stop <= begin]
            second = [phrase for phrase in self.phrases if phrase.start >= begin]
            if first and second:
                yield self._claim("relation", f"{_name(first[-1].wanted)} {match[1]} {_name(second[0].wanted)}", None)

    def _not_before(self, at: int) -> bool:
        return any(word in ("not", "isn't", "aren't") for word in self.words[max(0, at - 2) : at])

    def _claim(self, kind: str, says: str, verdict: Verdict) -> Claim:
        return Claim(kind, says, verdict, self.text)


def _compared(said: _Sentence, asked: _Sentence, facts: Facts) -> list[tuple[str, str, Verdict]] | None:
    """Answers that compare the question's two things; None where the sentence does not."""
    words, pair = said.joined, [phrase.wanted for phrase in asked.phrases]
    if len(pair) != 2 or said.supposed:
        return None
    one, two = pair
    if re.search(r"\b(equally many|as many)\b", words):
        return [("number", f"as many {_name(one)} as {_name(two)}", _counts(facts, one, two, operator.eq))]
    if re.search(r"\bmore\b", words) and len(said.phrases) == 1:
        most = said.phrases[0].wanted
        other = two if most.kind == one.kind else one
        return [("number", f"more {_name(most)} than {_name(other)}", _counts(facts, most, other, operator.gt))]
    if re.search(r"\bsame size\b", words):
        sizes = _attribute(facts, one, "size"), _attribute(facts, two, "size")
        return [("size", f"{_name(one)} and {_name(two)} of one size", None if None in sizes else sizes[0] == sizes[1])]
    if (match := re.search(r"\b(bigger|larger|smaller)\b", words)) and len(said.phrases) == 1 and said.phrases[0].wanted in pair:
        named = said.phrases[0].wanted
        sizes = _attribute(facts, named, "size"), _attribute(facts, two if named == one else one, "size")
        wished = ("small", "large") if match[1] == "smaller" else ("large", "small")
        return [("size", f"{_name(named)} is {match[1]}", None if None in sizes else sizes == wished)]
    colors = [same_color(word) for word in said.words if word in COLORS]
    if re.search(r"\bboth\b", words) and len(colors) == 1 and not said.phrases:
        return [("color", f"both {colors[0]}", _both(facts, one, two, colors[0], colors[0]))]
    if re.search(r"\bthey\b", words) and len(colors) == 2 and not said.phrases:
        return [("color", f"{colors[0]} and {colors[1]}", _both(facts, one, two, *colors))]
    return None


def _asked_to_compare(asked: _Sentence, facts: Facts) -> list[Claim] | None:
    """What a yes says to a question that compares two things; None where the question does not compare."""
    if not re.search(r"\b(more|fewer|same|bigger|larger|smaller)\b", asked.joined):
        return None
    if len(asked.phrases) != 2:
        return []
    one, two = (phrase.wanted for phrase in asked.phrases)
    if re.search(r"\bmore\b", asked.joined):
        return [Claim("number", f"more {_name(one)} than {_name(two)}", _counts(facts, one, two, operator.gt), "")]
    if re.search(r"\bsame colou?r\b", asked.joined):
        colors = _attribute(facts, one, "color"), _attribute(facts, two, "color")
        return [Claim("color", f"{_name(one)} like {_name(two)}", None if None in colors else colors[0] == colors[1], "")]
    return []


def _both(facts: Facts, one: Wanted, two: Wanted, first: str, second: str) -> Verdict:
    verdicts = facts.exists(one.with_(color=first)), facts.exists(two.with_(color=second))
    return False if False in verdicts else None if None in verdicts else True


def _counts(facts: Facts, one: Wanted, two: Wanted, test: Callable[[int, int], bool]) -> Verdict:
    (least, most), (fewest, many) = facts.count(one), facts.count(two)
    return bool(test(least, fewest)) if least == most and fewest == many else None


def _attribute(facts: Facts, wanted: Wanted, name: str) -> str | None:
    """The attribute of the only thing that fits; None where there are more, or it is unknown."""
    found = facts.those(wanted)
    return getattr(found[0], name) if len(found) == 1 else None


def _short(words: list[str], asked: _Sentence, facts: Facts, question: str) -> Iterator[Claim]:
    """An answer of a word or two, read with its question."""
    best = max((phrase.wanted for phrase in asked.phrases), key=_told, default=None)
    if best is None:
        return
    bare, low = [word for word in words if word.isalnum()], question.lower()
    if len(bare) == 1 and bare[0] in COLORS and "colo" in low:
        yield Claim("color", f"{bare[0]} {_name(best)}", facts.exists(best.with_(color=same_color(bare[0]))), "")
    elif len(bare) == 1 and bare[0] in SIZES:
        yield Claim("size", f"{bare[0]} {_name(best)}", facts.exists(best.with_(size=SIZES[bare[0]])), "")
    elif len(bare) == 1 and (bare[0] in NUMBERS or bare[0].isdecimal()) and re.search(r"how many|count|number", low):
        number = NUMBERS[bare[0]] if bare[0] in NUMBERS else int(bare[0])
        yield Claim("number", f"{number} {_name(best)}", facts.is_number(best, number), "")
    elif bare and set(bare) <= {"top", "bottom", "left", "right", "middle"} and re.search("where|which part", low):
        yield Claim("place", f"{_name(best)} at the {' '.join(bare)}", facts.exists(best.with_(place=" ".join(bare))), "")


_EXISTS = re.compile(
    r"^(?:is|are) there\b|^(?:do|can|could) you (?:see|find|spot)\b|^does the (?:picture|image|photo) (?:show|contain|have)\b"
)
_AUXILIARY = re.compile(r"^(?:can you see |is |are |was |were )")


def _declarative(question: str) -> str:
    """A yes-or-no question as the statement it asks about; others as they stand."""
    low = " ".join(question.lower().split()).rstrip("?")
    if re.search(r"\b(left of|right of|above|below)\b", low) and (match := _AUXILIARY.match(low)):
        return low[match.end() :] + "."
    if match := _EXISTS.match(low):
        return f"there is {low[match.end() :].strip()}."
    return low + "."


def _told(wanted: Wanted) -> int:
    return sum(value is not None for value in (wanted.kind, wanted.color, wanted.size))


def _name(wanted: Wanted) -> str:
    """ "small red car"."""
    place = f" at the {wanted.place}" if wanted.place else ""
    return " ".join(filter(None, (wanted.size, wanted.color, wanted.word or wanted.kind or "thing"))) + place
