"""From a teacher's text to turns, and what is thrown away, each with its reason.

`parse` reads the layout; what does not follow it is rejected as *format*. `judge` looks at each turn:

- *leak*: it speaks of captions, boxes, coordinates, of what it was given, or of being a model;
- *gives-away*: a reasoning question that already names most of what its answer has to find out;
- *length*: an answer shorter or longer than the kind allows;
- *hedge*: an answer that says it cannot tell;
- *repeat*: a question asked twice about one picture.

A turn with a fault is left out, and a row without turns is rejected with the reasons of its turns. Two reasons need all rows
at once and belong to `llava_lab.instructions.generate`: *duplicate* (the same words about another picture) and *balance* (too
many answers of yes, or of no). *silent* is a teacher that gave nothing, *false* a row that fails the truth check where such
rows are not wanted.

    turns = parse(kind, "Question:\\nWhat is it?\\n===\\nAnswer:\\nA car.\\n===\\n", asked="")
    kept, faults = judge(kind, turns, context)

LLaVA's authors describe no filter for their 158K rows (arXiv 2304.08485); these are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llava_lab.errors import DataError
from llava_lab.instructions.context import Context, Kind
from llava_lab.instructions.facts import word_set

REASONS = ("silent", "format", "leak", "gives-away", "length", "hedge", "repeat", "false", "duplicate", "balance")
GIVES_AWAY = 0.6  # share of what the answer takes from the picture that the question may not name
FEWEST = 3  # words taken from the picture, below which nothing can be given away
MOST_TURNS = 40

Turn = tuple[str, str]  # question, answer

LEAKS = re.compile(
    r"\b(?:captions?|bounding box(?:es)?|coordinates?|annotations?)\b|\[ ?[01]?\.\d|\b[01]\.\d{2,}\s*,"
    r"|\b(?:given|provided|above) (?:information|sentences?|descriptions?|lists?|texts?|data|contexts?)\b"
    r"|\b(?:according to|based on) the (?:sentences?|descriptions?|lists?|texts?|information)\b"
    r"|\bas an? (?:ai|language model|assistant)\b"
    r"|\bi (?:cannot|can't|am unable to) (?:see|view) (?:the )?(?:image|picture|photo)",
    re.IGNORECASE,
)
HEDGES = re.compile(
    r"\b(?:it|this|that) is (?:unclear|unknown|uncertain|impossible|hard|difficult)\b"
    r"|\b(?:it|this|that) is not (?:clear|possible|known|specified|mentioned|stated)\b"
    r"|\b(?:cannot|can't|could not) be (?:determined|told|seen|said|known)\b|\bnot (?:mentioned|specified|stated)\b"
    r"|\bno (?:information|way to (?:know|tell))\b|\bI (?:do not|don't|cannot|can't) (?:know|tell|say)\b",
    re.IGNORECASE,
)
MARKS = re.compile(r"<image>|</?s>|<\|[^|<>]*\|>|\[/?INST\]")  # what would be read as structure in training
SEPARATOR = re.compile(r"^\s*={3,}\s*$", re.MULTILINE)
_EMPTY = word_set(
    """a an the this that these those is are was were be been being has have had do does did will would can could may might must
    should shall of in on at to from by for with and or but not no as it its they them their there here he she his her what
    which who whom whose why how when where if then than so such also both each other some any all very more most one two
    picture image photo scene thing things"""
)


def parse(kind: Kind, text: str, *, asked: str) -> list[Turn]:
    """The turns of a teacher's text; `asked` is the question of a kind whose answers come alone.

    Raises DataError that says how the text leaves the layout.
    """
    text = text.strip()
    if MARKS.search(text):
        raise DataError(f"it holds {MARKS.findall(text)[0]!r}, a mark of prompts")
    if kind.form in ("answer", "caption"):
        if re.search(r"^(?:Question|Answer):", text, re.MULTILINE) or SEPARATOR.search(text):
            raise DataError("it holds blocks of questions and answers, expected an answer alone")
        if not text:
            raise DataError("the answer is empty")
        return [(asked, " ".join(text.split()) if kind.form == "caption" else text)]
    blocks = [block.strip() for block in SEPARATOR.split(text)]
    blocks = [block for block in blocks if block]
    wanted = [("Question:", "Answer:")[number % 2] for number in range(len(blocks))]
    for block, label in zip(blocks, wanted, strict=True):
        if not block.startswith(label) or not block.removeprefix(label).strip():
            raise DataError(f"expected a block that begins with {label!r}, got {block[:40]!r}")
        if len(re.findall(r"^(?:Question|Answer):", block, re.MULTILINE)) > 1:
            raise DataError("a line of three equal signs is missing between two blocks")
    if not blocks or len(blocks) % 2:
        raise DataError(f"expected questions and answers in turn, got {len(blocks)} blocks")
    said = [block.removeprefix(label).strip() for block, label in zip(blocks, wanted, strict=True)]
    turns = list(zip(said[::2], said[1::2], strict=True))
    if len(turns) > (1 if kind.form == "turn" else MOST_TURNS):
        raise DataError(
            f"expected {'one question' if kind.form == 'turn' else f'at most {MOST_TURNS} questions'}, got {len(turns)}"
        )
    return turns


def judge(kind: Kind, turns: Sequence[Turn], context: Context) -> tuple[list[Turn], list[tuple[str, Turn]]]:
    """The turns that pass, and those that do not with their reasons."""
    kept: list[Turn] = []
    faults: list[tuple[str, Turn]] = []
    for turn in turns:
        reason = _fault(kind, turn, context) or ("repeat" if any(plain(turn[0]) == plain(q) for q, _ in kept) else None)
        if reason is None:
            kept.append(turn)
        else:
            faults.append((reason, turn))
    return kept, faults


def _fault(kind: Kind, turn: Turn, context: Context) -> str | None:
    question, answer = turn
    if kind.form == "caption":  # a person wrote it
        return None if kind.words[0] <= len(answer.split()) <= kind.words[1] else "length"
    if LEAKS.search(answer) or (kind.form != "answer" and LEAKS.search(question)):
        return "leak"
    if not kind.words[0] <= len(answer.split()) <= kind.words[1]:
        return "length"
    if HEDGES.search(answer):
        return "hedge"
    if kind.form == "turn" and gives_away(question, answer, context) > GIVES_AWAY:
        return "gives-away"
    return None


def gives_away(question: str, answer: str, context: Context) -> float:
    """The share of the content words that an answer takes from the picture and that its question already names, 0 to 1."""
    known = content_words(context.text(boxes=False)) | {word for box in context.boxes for word in content_words(box.name)}
    found = content_words(answer) & known
    return len(found & content_words(question)) / len(found) if len(found) >= FEWEST else 0.0


def content_words(text: str) -> frozenset[str]:
    """Words that name or describe, in lower case and without a plural's s."""
    words = re.findall(r"[a-z]+", text.lower())
    return frozenset(word.removesuffix("s") if len(word) > 3 else word for word in words if word not in _EMPTY and len(word) > 1)


def plain(text: str) -> str:
    """A text by its words alone, to be compared with others."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def yes_or_no(answer: str) -> str | None:
    """ "yes" or "no" where an answer begins with it."""
    match = re.match(r"\s*(yes|no)\b[^\w]", f"{answer} ", re.IGNORECASE)
    return match[1].lower() if match and not answer.lower().startswith("no one") else None
