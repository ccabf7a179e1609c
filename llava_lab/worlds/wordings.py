"""Twenty ways to ask each type of question that no training of `tiny` saw, to measure how far a model's wording may be left.

    asked = ask_in(question, 3)  # the same question in its type's fourth other wording, None where that does not fit it

Written before the folding of `llava_lab.models.scope` was measured, by the authors of that folding: people will find others.
About half are trained wordings as people type them (spelling, contractions, signs, capitals, politeness), the others are
sentences of another build. Each keeps the meaning, so that the answer stays the world's own.
"""

from __future__ import annotations

from llava_lab.worlds.paraphrases import parts_of
from llava_lab.worlds.questions import Question

# by type, for each form that the world asks it in (the order is that of `paraphrases`)
WAYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "color": (
        (
            *("What colour is the {a}?", "what color is the {a}", "WHAT COLOR IS THE {A}?", "What's the color of the {a}?"),
            *("what colour's the {a}?", "Which colour does the {a} have?", "hey, what color is the {a}?"),
            *("Can you tell me the colour of the {a}, please?", "What color is the {a}??", "please, what colour is the {a}"),
            *(
                "Tell me the color of the {a}.",
                "What is the {a}'s color?",
                "The {a} is what color?",
                "Name the color of the {a}.",
            ),
            *("Of what color is the {a}?", "What color does the {a} have?", "What color would you call the {a}?"),
            *("In what color is the {a}?", "I want to know the color of the {a}.", "Do you know the color of the {a}?"),
        ),
    ),
    "kind": (
        (
            *("what's {spot}?", "what is {spot}", "WHAT IS {SPOT}?", "So, what do you see {spot}?", "Which object is {spot}?"),
            *(
                "Tell me what is {spot}.",
                "What can you see {spot}?",
                "{Spot} is what?",
                "Name the thing {spot}.",
                "What is there {spot}?",
            ),
        ),
        (
            *(
                "what's the {a}?",
                "what is the {a}",
                "WHAT IS THE {A}?",
                "What kind of object is the {a}?",
                "Please, can you name the {a}?",
            ),
            *("Tell me what the {a} is.", "The {a} is what?", "What sort of thing is the {a}?", "Which thing is the {a}?"),
            *("What do you call the {a}?",),
        ),
    ),
    "size": (
        (
            *(
                "how big is the {a}",
                "HOW BIG IS THE {A}?",
                "How big's the {a}?",
                "hey, what size is the {a}?",
                "Is the {a} large or small?",
            ),
            *(
                "Is the {a} big or small?",
                "What size is the {a}, please?",
                "Is the {a} little or large?",
                "what size is the {a}??",
            ),
            *(
                "please, how big is the {a}?",
                "Tell me the size of the {a}.",
                "What is the size of the {a}?",
                "What is the {a}'s size?",
            ),
            *(
                "How large is the {a}?",
                "Of what size is the {a}?",
                "Say whether the {a} is small or large.",
                "The {a} is what size?",
            ),
            *("Which size does the {a} have?", "Can you tell me the size of the {a}?", "Do you know how big the {a} is?"),
        ),
    ),
    "place": (
        (
            *("where's the {a}?", "wheres the {a}", "WHERE IS THE {A}?", "where is the {a}", "Where is the {a}, please?"),
            *("hey, where is the {a}?", "In which part of the image is the {a}?", "In which part of the photo is the {a}?"),
            *(
                "Where can I find the {a}, please?",
                "where can i find the {a}",
                "Tell me where the {a} is.",
                "Where do you see the {a}?",
            ),
            *("What is the place of the {a}?", "In what part of the picture is the {a}?", "Can you tell me where the {a} is?"),
            *("The {a} is where?", "Where in the picture is the {a}?", "Can you find the {a}?", "Where can I see the {a}?"),
            *("At which place is the {a}?",),
        ),
    ),
    "count": (
        (
            *(
                "how many {a} are there",
                "HOW MANY {A} ARE THERE?",
                "how many {a} do you see",
                "Count the {a}",
                "count the {a}, please",
            ),
            *("Please count the {a}.", "How many {a} do you spot?", "hey, how many {a} are there?", "How many {a} are there??"),
            *("So how many {a} do you see?", "How many {a} can you see?", "How many {a} can you find?", "Can you count the {a}?"),
            *("How many {a} are in the picture?", "How many {a} does the picture have?", "What is the number of {a}?"),
            *(
                "Tell me how many {a} there are.",
                "There are how many {a}?",
                "Do you see {a}, and how many?",
                "How many are the {a}?",
            ),
        ),
    ),
    "existence": (
        (
            *("is there {a}", "IS THERE {A}?", "Do you spot {a}?", "do you see {a}", "Can you find {a} in the image?"),
            *("Can you find {a} in the photo?", "hey, is there {a}?", "Is there {a}, please?", "can you find {a} in the picture"),
            *(
                "So do you see {a}?",
                "Is there {a} in the picture?",
                "Can you see {a}?",
                "Can you find {a}?",
                "Do you see {a} in the picture?",
            ),
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
            *(
                "is the {a} {rel} the {b}",
                "IS THE {A} {REL} THE {B}?",
                "can you see the {a} {rel} the {b}",
                "So, is the {a} {rel} the {b}?",
            ),
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
