"""The picture book's own questions in other words, formal and casual, as people write when nobody gave them a form.

retell(ask_about(scene, rng, 1)[0], rng)
"""

from __future__ import annotations

import re

import numpy as np

from llava_lab.worlds.questions import Question, at

Pair = tuple[str, str]  # question and answer

# one of the world's questions, the parts of it that are kept, and other ways to ask it
_FORMS: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "color": [
        (
            r"(?:What color is|Which color does|Can you tell me the color of) the (?P<a>.+?)(?: have)?\?",
            (
                *(
                    "what colour is the {a}?",
                    "What's the color of the {a}?",
                    "Tell me the colour of the {a}.",
                    "{a}: which color?",
                ),
                *("I'd like to know what color the {a} is.", "So what color would you say the {a} is?", "the {a} is what color?"),
                *("In which colour is the {a} painted?", "hey, what color's that {a}", "Name the color of the {a}, please."),
            ),
        )
    ],
    "kind": [
        (
            r"(?:What is|What do you see|Which thing is) (?P<spot>(?:at|in|on) the .+)\?",
            ("what's {spot}?", "Look {spot}. What is there?", "Tell me what you find {spot}.", "Name the object {spot}."),
        ),
        (
            r"(?:What is|What kind of thing is|Can you name) the (?P<a>.+)\?",
            (
                *(
                    "what's the {a}?",
                    "What do you call the {a}?",
                    "Tell me what the {a} is.",
                    "the {a}, what is it supposed to be?",
                ),
                *("What object is the {a}?", "I see a {a}. What is it?", "Could you identify the {a}?"),
            ),
        ),
    ],
    "size": [
        (
            r"(?:How big is the (?P<a>.+)|Is the (?P<b>.+) small or large|What size is the (?P<c>.+))\?",
            (
                *("how large is the {a}?", "Is the {a} big or small?", "would you call the {a} big?", "the {a}: big or little?"),
                *("Tell me the size of the {a}.", "Can you say whether the {a} is small or large?"),
            ),
        )
    ],
    "place": [
        (
            r"(?:Where is|Where can I find|In which part of the picture is) the (?P<a>.+)\?",
            (
                *(
                    "where's the {a}?",
                    "Whereabouts is the {a}?",
                    "Tell me where the {a} is.",
                    "I'm looking for the {a}. Where is it?",
                ),
                *("What is the position of the {a}?", "Point me to the {a}.", "where should I look to see the {a}?"),
            ),
        )
    ],
    "count": [
        (
            r"(?:How many (?P<a>.+?) (?:are there|do you see)\?|Count the (?P<b>.+)\.)",
            (
                *(
                    "how many {a} can you count?",
                    "What is the number of {a}?",
                    "Tell me how many {a} there are.",
                    "number of {a}?",
                ),
                *("How many {a} are in this image?", "Could you count the {a} for me?", "how many {a} does the picture have?"),
            ),
        )
    ],
    "existence": [
        (
            r"(?:Is there|Do you see|Can you find) (?P<a>an? .+?)(?: in the picture)?\?",
            (
                *("Does the picture show {a}?", "is {a} in there?", "Does the image contain {a}?", "Did anyone draw {a}?"),
                *("I'm looking for {a}. Is one here?", "can you spot {a}?", "Is {a} somewhere in this picture?", "see {a}?"),
            ),
        )
    ],
    "relation": [
        (
            r"(?:What is|Which thing is) (?P<rel>left of|right of|above|below) the (?P<b>.+)\?",
            (
                "what's {rel} the {b}?",
                "Name the thing {rel} the {b}.",
                "Tell me what stands {rel} the {b}.",
                "{rel} the {b} is what?",
            ),
        ),
        (
            r"(?:Is|Can you see) the (?P<a>.+?) (?P<rel>left of|right of|above|below) the (?P<b>.+)\?",
            (
                *("Would you say the {a} is {rel} the {b}?", "the {a} is {rel} the {b}, right?", "is the {a} {rel} the {b}"),
                *("Is it true that the {a} is {rel} the {b}?", "I think the {a} is {rel} the {b}. Am I right?"),
            ),
        ),
    ],
    "comparison": [
        (
            r"(?:Which is bigger|What is larger), the (?P<a>.+) or the (?P<b>.+)\?",
            (
                "Between the {a} and the {b}, which one is bigger?",
                "which one's larger, the {a} or the {b}?",
                "Compare the sizes of the {a} and the {b}.",
            ),
        ),
        (
            r"(?:Do|Are) the (?P<a>.+) and the (?P<b>.+?) (?:have )?the same color\?",
            (
                "Do the {a} and the {b} match in color?",
                "is the {a} the same colour as the {b}?",
                "Have the {a} and the {b} got the same color?",
            ),
        ),
        (
            r"(?:Are there|Do you see) more (?P<a>.+) than (?P<b>.+)\?",
            ("Does the picture have more {a} than {b}?", "more {a} than {b}?", "Would you say there are more {a} than {b} here?"),
        ),
    ],
}
_COMPILED = {kind: [(re.compile(pattern), forms) for pattern, forms in rows] for kind, rows in _FORMS.items()}


def pick(rng: np.random.Generator, options: tuple | list) -> str:
    return options[int(rng.integers(len(options)))]


def parts_of(question: Question) -> tuple[int, dict[str, str]]:
    """Which form of its type a question of the world has, from 0, and the parts of it that any wording keeps.

    Raises KeyError for a question the world does not ask.
    """
    for number, (pattern, _) in enumerate(_COMPILED[question.type]):
        if match := pattern.fullmatch(question.text):
            parts = {name: value for name, value in match.groupdict().items() if value}
            if question.type in ("size", "count"):
                parts = {"a": next(iter(parts.values()))}
            return number, parts
    raise KeyError(question.text)


def retell(question: Question, rng: np.random.Generator) -> Pair:
    """The same question and answer in other words. Raises KeyError for a question the world does not ask."""
    number, parts = parts_of(question)
    asked = pick(rng, _COMPILED[question.type][number][1]).format(**parts)
    asked = asked[0].upper() + asked[1:] if rng.random() < 0.4 else asked
    return asked, _loosely(question, rng)


def _loosely(question: Question, rng: np.random.Generator) -> str:
    """The whole sentence mostly, else a shorter one."""
    if rng.random() < 0.7:
        return question.answer
    if question.type in ("color", "size"):
        return f"It is {question.short}."
    if question.type == "place":
        return f"It is {at(question.short)}."
    return question.answer
