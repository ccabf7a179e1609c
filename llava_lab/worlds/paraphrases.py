"""The picture book's own questions in other words: those that small models are trained on, and others that none of them saw.

`retell` puts a question in other words, formal and casual, as people write when nobody gave them a form:

    retell(ask_about(scene, rng, 1)[0], rng)

`WAYS` are twenty ways to ask each type of question that no training of `tiny` saw, to measure how far a model's wording may be
left:

    asked = ask_in(question, 3)  # the same question in its type's fourth other wording, None where that does not fit it

They were written before the folding of `llava_lab.models.scope` was measured, by the authors of that folding, and what failed
then was folded afterwards: they say nothing of wordings that nobody here thought of. About half are trained wordings as people
type them (spelling, contractions, signs, capitals, politeness), the others are sentences of another build. Each keeps the
meaning, so that the answer stays the world's own.
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
                *("what colour is the {a}?", "What's the color of the {a}?"),
                *("Tell me the colour of the {a}.", "{a}: which color?"),
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
                *("what's the {a}?", "What do you call the {a}?"),
                *("Tell me what the {a} is.", "the {a}, what is it supposed to be?"),
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
                *("where's the {a}?", "Whereabouts is the {a}?"),
                *("Tell me where the {a} is.", "I'm looking for the {a}. Where is it?"),
                *("What is the position of the {a}?", "Point me to the {a}.", "where should I look to see the {a}?"),
            ),
        )
    ],
    "count": [
        (
            r"(?:How many (?P<a>.+?) (?:are there|do you see)\?|Count the (?P<b>.+)\.)",
            (
                *("how many {a} can you count?", "What is the number of {a}?"),
                *("Tell me how many {a} there are.", "number of {a}?"),
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
                *("what's {rel} the {b}?", "Name the thing {rel} the {b}."),
                *("Tell me what stands {rel} the {b}.", "{rel} the {b} is what?"),
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


# -- wordings that no training saw ----------------------------------------------------------

# by type, for each form that the world asks it in (the order is that of `paraphrases`)
WAYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "color": (
        (
            *("What colour is the {a}?", "what color is the {a}", "WHAT COLOR IS THE {A}?", "What's the color of the {a}?"),
            *("what colour's the {a}?", "Which colour does the {a} have?", "hey, what color is the {a}?"),
            *("Can you tell me the colour of the {a}, please?", "What color is the {a}??", "please, what colour is the {a}"),
            *("Tell me the color of the {a}.", "What is the {a}'s color?"),
            *("The {a} is what color?", "Name the color of the {a}."),
            *("Of what color is the {a}?", "What color does the {a} have?", "What color would you call the {a}?"),
            *("In what color is the {a}?", "I want to know the color of the {a}.", "Do you know the color of the {a}?"),
        ),
    ),
    "kind": (
        (
            *("what's {spot}?", "what is {spot}", "WHAT IS {SPOT}?", "So, what do you see {spot}?", "Which object is {spot}?"),
            *("Tell me what is {spot}.", "What can you see {spot}?", "{Spot} is what?"),
            *("Name the thing {spot}.", "What is there {spot}?"),
        ),
        (
            *("what's the {a}?", "what is the {a}", "WHAT IS THE {A}?"),
            *("What kind of object is the {a}?", "Please, can you name the {a}?"),
            *("Tell me what the {a} is.", "The {a} is what?", "What sort of thing is the {a}?", "Which thing is the {a}?"),
            *("What do you call the {a}?",),
        ),
    ),
    "size": (
        (
            *("how big is the {a}", "HOW BIG IS THE {A}?", "How big's the {a}?"),
            *("hey, what size is the {a}?", "Is the {a} large or small?"),
            *("Is the {a} big or small?", "What size is the {a}, please?"),
            *("Is the {a} little or large?", "what size is the {a}??"),
            *("please, how big is the {a}?", "Tell me the size of the {a}."),
            *("What is the size of the {a}?", "What is the {a}'s size?"),
            *("How large is the {a}?", "Of what size is the {a}?"),
            *("Say whether the {a} is small or large.", "The {a} is what size?"),
            *("Which size does the {a} have?", "Can you tell me the size of the {a}?", "Do you know how big the {a} is?"),
        ),
    ),
    "place": (
        (
            *("where's the {a}?", "wheres the {a}", "WHERE IS THE {A}?", "where is the {a}", "Where is the {a}, please?"),
            *("hey, where is the {a}?", "In which part of the image is the {a}?", "In which part of the photo is the {a}?"),
            *("Where can I find the {a}, please?", "where can i find the {a}"),
            *("Tell me where the {a} is.", "Where do you see the {a}?"),
            *("What is the place of the {a}?", "In what part of the picture is the {a}?", "Can you tell me where the {a} is?"),
            *("The {a} is where?", "Where in the picture is the {a}?", "Can you find the {a}?", "Where can I see the {a}?"),
            *("At which place is the {a}?",),
        ),
    ),
    "count": (
        (
            *("how many {a} are there", "HOW MANY {A} ARE THERE?", "how many {a} do you see"),
            *("Count the {a}", "count the {a}, please"),
            *("Please count the {a}.", "How many {a} do you spot?", "hey, how many {a} are there?", "How many {a} are there??"),
            *("So how many {a} do you see?", "How many {a} can you see?", "How many {a} can you find?", "Can you count the {a}?"),
            *("How many {a} are in the picture?", "How many {a} does the picture have?", "What is the number of {a}?"),
            *("Tell me how many {a} there are.", "There are how many {a}?"),
            *("Do you see {a}, and how many?", "How many are the {a}?"),
        ),
    ),
    "existence": (
        (
            *("is there {a}", "IS THERE {A}?", "Do you spot {a}?", "do you see {a}", "Can you find {a} in the image?"),
            *("Can you find {a} in the photo?", "hey, is there {a}?", "Is there {a}, please?", "can you find {a} in the picture"),
            *("So do you see {a}?", "Is there {a} in the picture?", "Can you see {a}?"),
            *("Can you find {a}?", "Do you see {a} in the picture?"),
            *("Does the picture have {a}?", "Tell me whether there is {a}.", "There is {a}?", "Is {a} in the picture?"),
            *("Is {a} there?", "Do you find {a}?"),
        ),
    ),
    "relation": (
        (
            *("what's {rel} the {b}?", "what is {rel} the {b}", "WHAT IS {REL} THE {B}?", "Which object is {rel} the {b}?"),
            *("hey, what is {rel} the {b}?", "Tell me what is {rel} the {b}.", "What do you see {rel} the {b}?"),
            *("What can you see {rel} the {b}?", "Name the thing {rel} the {b}.", "What kind of thing is {rel} the {b}?"),
        ),
        (
            *("is the {a} {rel} the {b}", "IS THE {A} {REL} THE {B}?"),
            *("can you see the {a} {rel} the {b}", "So, is the {a} {rel} the {b}?"),
            *("Is the {a} {rel} the {b}, please?", "Do you see the {a} {rel} the {b}?", "The {a} is {rel} the {b}?"),
            *(
                "Would you say the {a} is {rel} the {b}?",
                "Can you find the {a} {rel} the {b}?",
                "Tell me whether the {a} is {rel} the {b}.",
            ),
        ),
    ),
    "comparison": (
        (
            *(
                "which is bigger, the {a} or the {b}",
                "WHICH IS BIGGER, THE {A} OR THE {B}?",
                "What's larger, the {a} or the {b}?",
            ),
            *(
                "hey, which is bigger, the {a} or the {b}?",
                "Which is larger, the {a} or the {b}?",
                "The {a} or the {b}, which is bigger?",
            ),
            *("Is the {a} or the {b} bigger?",),
        ),
        (
            *("do the {a} and the {b} have the same colour", "Are the {a} and the {b} the same colour?"),
            *("DO THE {A} AND THE {B} HAVE THE SAME COLOR?", "are the {a} and the {b} the same color, please"),
            *(
                "Is the {a} the same color as the {b}?",
                "Do the {a} and the {b} have one color?",
                "Have the {a} and the {b} the same color?",
            ),
        ),
        (
            *("are there more {a} than {b}", "do you see more {a} than {b}", "Do you spot more {a} than {b}?"),
            *("Can you see more {a} than {b}?", "Does the picture have more {a} than {b}?", "More {a} than {b}?"),
        ),
    ),
}


def ask_in(question: Question, way: int) -> str | None:
    """`question` in the `way`-th other wording of its type, from 0; None where that way belongs to another form of the type."""
    form, parts = parts_of(question)
    forms = WAYS[question.type]
    first = sum(map(len, forms[:form]))
    if not first <= way < first + len(forms[form]):
        return None
    loud = {name.upper(): value.upper() for name, value in parts.items()}
    proud = {name.capitalize(): value.capitalize() for name, value in parts.items()}
    return forms[form][way - first].format(**{**proud, **loud, **parts})
