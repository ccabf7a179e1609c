"""The words of a small model: common variants of a question folded into the wording it was trained on, and what is left over.

    fold("whats the colour of the big car")  # "What is the color of the large car?"

Spelling, contractions, capitals, signs at the end, words of politeness, and single words that mean the same here are folded; the
order of a sentence is not touched. Only models with few words have their questions folded, and a run says how it was read
(`Run.notes`); `Run.question` is what the model was given. A question in the training's own words stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

# what stands before an apostrophe and s, or is written without it
_IS = r"\b(what|where|which|who|how|there|that|it|here|color|thing|one)'s\b|\b(what|where|how|there|that)s\b"
_NOT = r"\b(is|are|do|does|did|was|were|has|have|could|would|should)n'?t\b"
# other spellings, and what means the same in the picture book
_MEANS = {
    "gray": "grey",
    "i am": "i'm",
    "i would": "i'd",
    "can not": "can't cannot",
    "middle": "centre center central",
    "picture": "image photo photograph drawing pic scene illustration painting sketch",
    "thing": "object item shape figure",
    "things": "objects items shapes figures",
    "small": "little tiny",
    "large": "huge giant",
    "above": "over atop",
    "below": "under underneath beneath",
    "see": "spot notice",
    "car": "automobile auto",
    "boat": "sailboat ship",
    "cup": "mug teacup",
    "purple": "violet lilac",
    "mushroom": "toadstool",
    "umbrella": "parasol",
}
_SAME = {word: meant for meant, words in _MEANS.items() for word in words.split()}
_PHRASES = (
    (r"\bto the (left|right) of\b", r"\1 of"),
    (r"\bon the (left|right)(?: hand)? side\b(?! of)", r"on the \1"),
    (r"(?<!how )\bbig\b(?! or\b)", "large"),
    (r"\bbig or (?:small|large)\b", "small or large"),
    (r"\blarge or small\b", "small or large"),
    (r"\bi\b", "I"),
    (r"\ban (picture|thing|car)\b", r"a \1"),
)
_BEFORE = re.compile(r"^(?:hey|hi|hello|please|pls|ok|okay|so|well|um|excuse me)\b[,!.]?\s+")
_AFTER = re.compile(r"[,\s]+(?:please|pls|thanks|thank you)$")
_SIGNS = str.maketrans({"’": "'", "‘": "'", "´": "'", "`": "'", "“": '"', "”": '"', "\u00a0": " "})
_ASKING = re.compile(r"(what|which|where|who|when|why|how|is|are|was|were|do|does|did|has|have|can|could|would|should|will)\b")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


def fold(question: str) -> str:
    """The question in the spelling and with the words that the picture book has; what stands on further lines is kept.

    >>> from llava_lab.models.scope import fold
    >>> fold("hey, what colour's that big car"), fold("Is the star red?")
    ('What color is that large car?', 'Is the star red?')
    """
    line, *rest = question.strip().split("\n", 1)
    text = " ".join(line.translate(_SIGNS).lower().split())
    while (bare := _BEFORE.sub("", text)) != text:
        text = bare
    body = text.rstrip(" .?!…,;")
    mark = text[len(body) :]
    while (bare := _AFTER.sub("", body)) != body:
        body = bare
    body = re.sub(_IS, lambda match: f"{match[1] or match[2]} is", re.sub(r"\bcolour", "color", body))
    body = re.sub(_NOT, r"\1 not", body)
    body = _WORD.sub(lambda match: _SAME.get(match[0], match[0]), body)
    for pattern, instead in _PHRASES:
        body = re.sub(pattern, instead, body)
    if not body:
        return question.strip()
    asks = _ASKING.match(body) is not None
    end = "?" if "?" in mark else "." if mark and not asks else "?" if asks else "."
    return "\n".join([body[0].upper() + body[1:] + end, *rest])


def rules() -> dict[str, Any]:
    """What `fold` does as patterns and tables, for a page that folds without Python.

    >>> from llava_lab.models.scope.words import rules
    >>> rules()["same"]["tiny"]
    'small'
    """
    return {
        "is": _IS,
        "not": _NOT,
        "same": _SAME,
        "phrases": _PHRASES,
        "before": _BEFORE.pattern,
        "after": _AFTER.pattern,
        "signs": {chr(sign): instead for sign, instead in _SIGNS.items()},
        "asking": _ASKING.pattern,
    }


def words_of(text: str) -> list[str]:
    """The different words of a text in small letters, in order; numbers too.

    >>> from llava_lab.models.scope import words_of
    >>> words_of("Is there a red star, or 2?")
    ['is', 'there', 'a', 'red', 'star', 'or', '2']
    """
    return list(dict.fromkeys(_WORD.findall(text.lower())))


def unknown(question: str, known: Collection[str]) -> list[str]:
    """The words of a question that are not among the `known`."""
    return [word for word in words_of(question) if word not in known]


def reworded(asked: str, read: str) -> bool:
    """Whether folding changed a word, not only capitals and signs."""
    return words_of(asked) != words_of(read)
