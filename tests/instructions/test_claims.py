"""Claims are read as a person reads them: literal cases, and every lie of a teacher whose lies are known."""

from __future__ import annotations

import pytest

from llava_lab.instructions import TAUGHT, Box, Context, Facts, RuleTeacher, World, false_sentences, read_claims, read_kinds
from llava_lab.instructions.filters import parse
from llava_lab.worlds.picturebook import Scene, Thing

SCENE = Scene(
    "test",
    0,
    0,
    (
        Thing("car", "red", "small", 0.2, 0.2, 0.2),
        Thing("car", "blue", "large", 0.8, 0.2, 0.3),
        Thing("fish", "red", "large", 0.5, 0.8, 0.3),
    ),
    (0,),
)
PHOTO = Context(
    ("A man rides a brown horse past two dogs.", "A horse and some sheep."),
    (
        Box("person", 0.1, 0.1, 0.3, 0.5),
        Box("horse", 0.1, 0.3, 0.4, 0.9),
        Box("dog", 0.6, 0.7, 0.7, 0.9),
        Box("dog", 0.8, 0.7, 0.9, 0.9),
        Box("sheep", 0.5, 0.1, 0.99, 0.3, crowd=True),
    ),
    complete=("person", "horse", "dog", "cat", "sheep", "car"),
)

CASES = [
    # question, answer, claims as (type, true)
    ("", "There is a small red car.", [("presence", True), ("color", True), ("size", True)]),
    ("", "There is a small blue car.", [("presence", True), ("color", True), ("size", False)]),
    ("", "A large green car.", [("kind", True), ("color", False), ("size", True)]),
    ("", "I see two cars and one fish.", [("presence", True), ("number", True), ("presence", True), ("number", True)]),
    ("", "There are three cars.", [("presence", True), ("number", False)]),
    ("", "There are 2 red things.", [("color", True), ("number", True)]),
    ("", "There are no boats.", [("presence", True)]),
    ("Is there a fish?", "No, there is no fish.", [("presence", False)]),
    ("Is there a fish?", "No.", [("presence", False)]),
    ("Is there a boat?", "No.", [("presence", True)]),
    ("Do you see a red fish?", "Yes.", [("color", True)]),
    ("What color is the fish?", "It is red.", [("color", True)]),
    ("What color is the fish?", "blue", [("color", False)]),
    ("What is the red thing at the bottom?", "It is a fish.", [("kind", True)]),
    ("What is at the top left?", "It is a fish.", [("kind", False)]),
    ("How many cars are there?", "two", [("number", True)]),
    ("Where is the fish?", "It is at the bottom.", [("place", True)]),
    ("Where is the fish?", "The fish is at the top right.", [("kind", True), ("place", False)]),
    ("", "On the left there is a red car.", [("presence", True), ("color", True), ("place", True)]),
    ("", "The fish is below the blue car.", [("kind", True), ("kind", True), ("color", True), ("relation", True)]),
    ("", "The red car is to the right of the blue car.", [("kind", True), ("color", True)] * 2 + [("relation", False)]),
    ("Is the fish above the red car?", "No.", [("relation", True)]),
    ("", "The fish is red and large.", [("kind", True), ("color", True), ("size", True)]),
    ("", "The fish is not red.", [("kind", True), ("color", False)]),
    ("Which is bigger, the red car or the fish?", "The fish is bigger.", [("size", True)]),
    ("Are there more cars than fish?", "No, there are equally many.", [("number", False)]),
    ("Are there more cars than fish?", "Yes.", [("number", True)]),
    ("Do the red car and the fish have the same color?", "Yes, both are red.", [("color", True)]),
    ("Do the red car and the fish have the same color?", "No, they are red and blue.", [("color", False)]),
    ("", "If there were a boat, it would float.", []),
    ("", "The boat might be green.", [("kind", False)]),
    ("", "What a lovely day.", []),
]


@pytest.mark.parametrize(("question", "answer", "expected"), CASES)
def test_claims_of_a_known_scene(question: str, answer: str, expected: list[tuple[str, bool]]) -> None:
    facts = Facts.of(Context(("Two cars and a fish.",), scene=SCENE))
    assert [(claim.type, claim.true) for claim in read_claims(question, answer, facts)] == expected


PHOTO_CASES = [
    ("", "Two dogs are on the right.", [("kind", True), ("number", True), ("place", True)]),
    ("", "There is a cat.", [("presence", False)]),
    ("", "There is a zebra.", []),  # no word of this data set: it claims nothing that could be looked up
    ("", "A man sits on a horse.", [("kind", True), ("kind", True)]),
    ("", "There are two men.", [("presence", True), ("number", False)]),
    ("", "There is one man.", [("presence", True), ("number", None)]),  # a box says person
    ("", "The brown horse is calm.", [("kind", True), ("color", True)]),  # as a caption says
    ("", "The black horse is calm.", [("kind", True), ("color", None)]),
    ("", "There are three sheep.", [("presence", True), ("number", None)]),  # nobody counted them
    ("", "A dog stands left of the horse.", [("kind", True), ("kind", True), ("relation", False)]),
    ("", "The dogs are behind the horse.", [("kind", True), ("kind", True), ("relation", None)]),
]


@pytest.mark.parametrize(("question", "answer", "expected"), PHOTO_CASES)
def test_claims_of_boxes_and_captions(question: str, answer: str, expected: list[tuple[str, bool | None]]) -> None:
    found = [(claim.type, claim.true) for claim in read_claims(question, answer, Facts.of(PHOTO))]
    assert found == expected


def test_a_missing_box_says_nothing_where_boxes_are_not_complete() -> None:
    facts = Facts.of(Context((), (Box("car", 0, 0, 1, 1), Box("tree", 0, 0, 1, 1))))
    claims = read_claims("", "There are no cars. There are two trees.", facts)
    assert [claim.true for claim in claims] == [False, True, None]


def test_false_sentences_stand_as_in_the_answer() -> None:
    facts = Facts.of(Context(("x",), scene=SCENE))
    assert false_sentences("", "There is a fish. I see a green boat!  All is well.", facts) == ["I see a green boat!"]


def test_no_truth_is_called_false_and_every_lie_is_found() -> None:
    """The same questions with a teacher that tells the truth and one that always lies: what differs is a lie."""
    kinds, answers, lies, wrong, missed = read_kinds(TAUGHT), 0, 0, [], []
    for context in World(60, "test"):
        facts = Facts.of(context)
        for kind in kinds.values():
            told = (RuleTeacher(lie).ask(kind, context, seed=1).text for lie in (0.0, 1.0))
            honest, lying = (parse(kind, text, asked="Describe it.") for text in told)
            for (question, answer), (again, other) in zip(honest, lying, strict=True):
                assert question == again
                answers, lies = answers + 1, lies + (answer != other)
                wrong += [(question, answer)] * bool(false_sentences(question, answer, facts))
                missed += [(question, other)] * (answer != other and not false_sentences(question, other, facts))
    assert lies > 0.9 * answers > 300
    assert wrong == []
    assert missed == []


def test_answers_about_another_picture_are_mostly_false() -> None:
    """The check can fail: the truth of one picture, looked up in the next one."""
    kind, contexts = read_kinds(["detail"])["detail"], list(World(20, "test"))
    texts = [RuleTeacher().ask(kind, context, seed=0).text for context in contexts]
    shifted = zip(contexts, [*texts[1:], texts[0]], strict=True)
    assert sum(bool(false_sentences("", text, Facts.of(context))) for context, text in shifted) >= 18
