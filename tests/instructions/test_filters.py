"""Layout and filters on literal texts, one reason each; the files of the kinds hold what LLaVA's had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava_lab.errors import DataError, OptionError
from llava_lab.instructions import KINDS, TAUGHT, Box, Context, read_kinds
from llava_lab.instructions.context import FOLDER
from llava_lab.instructions.filters import gives_away, judge, parse, yes_or_no

CONTEXT = Context(("A brown dog catches a yellow frisbee in a park.",), (Box("dog", 0, 0, 1, 1),))
TURNS = read_kinds(KINDS)["conversation"]
REASON = read_kinds(KINDS)["reasoning"]
DETAIL = read_kinds(KINDS)["detail"]


def block(*turns: tuple[str, str]) -> str:
    return "".join(f"Question:\n{question}\n===\nAnswer:\n{answer}\n===\n" for question, answer in turns)


def test_the_layout_is_read() -> None:
    pairs = [("What is it?", "A dog.\nIt runs."), ("Where?", "In a park.")]
    assert parse(TURNS, block(*pairs), asked="") == pairs
    assert parse(TURNS, block(*pairs).rstrip("=\n"), asked="") == pairs  # the last line is often missing
    assert parse(DETAIL, "A dog runs.", asked="Describe it.") == [("Describe it.", "A dog runs.")]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("A dog.", "expected a block that begins with 'Question:'"),
        (block(("Q?", "A.")).replace("Answer:", "Reply:"), "'Answer:'"),
        ("Question:\nQ?\n===\n", "in turn, got 1 blocks"),
        ("Question:\nQ?\nAnswer:\nA.\n===\nAnswer:\nB.\n===\n", "is missing between"),
        (block(("<image> Q?", "A.")), "a mark of prompts"),
        (block(("Q?", "A.</s>")), "a mark of prompts"),
        ("", "in turn, got 0 blocks"),
    ],
)
def test_other_layouts_are_refused(text: str, why: str) -> None:
    with pytest.raises(DataError, match=why):
        parse(TURNS, text, asked="")


def test_a_reasoning_text_holds_one_question_and_a_description_none() -> None:
    with pytest.raises(DataError, match="expected one question, got 2"):
        parse(REASON, block(("a?", "b"), ("c?", "d")), asked="")
    with pytest.raises(DataError, match="expected an answer alone"):
        parse(DETAIL, block(("a?", "b")), asked="x")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("The caption says that a dog runs.", "leak"),
        ("The bounding box is large.", "leak"),
        ("The dog is at [0.1, 0.2, 0.3, 0.4].", "leak"),
        ("As an AI language model I see a dog.", "leak"),
        ("Based on the descriptions, it is a dog.", "leak"),
        ("It is not clear what the dog wants.", "hedge"),
        ("That cannot be determined.", "hedge"),
        ("dog " * 201, "length"),
        ("A cardboard box lies in front of the dog, which is described by no one.", None),
    ],
)
def test_faults_of_an_answer(answer: str, reason: str | None) -> None:
    kept, faults = judge(TURNS, [("What is it?", answer)], CONTEXT)
    assert [name for name, _ in faults] == ([reason] if reason else [])
    assert len(kept) == (reason is None)


def test_a_repeated_question_is_left_out_and_the_rest_stays() -> None:
    turns = [("What is it?", "A dog."), ("what is it", "A brown dog."), ("Where is it?", "In a park.")]
    kept, faults = judge(TURNS, turns, CONTEXT)
    assert kept == [turns[0], turns[2]]
    assert faults == [("repeat", turns[1])]


def test_a_question_that_names_what_the_answer_finds_gives_it_away() -> None:
    answer = "The brown dog has jumped for the yellow frisbee, as dogs in a park do when they play."
    assert gives_away("Why does the brown dog catch a yellow frisbee in the park?", answer, CONTEXT) > 0.6
    assert gives_away("What might the owner have to keep in mind here?", answer, CONTEXT) == 0
    assert judge(REASON, [("Why does a brown dog catch a yellow frisbee in a park?", answer)], CONTEXT)[1][0][0] == "gives-away"


@pytest.mark.parametrize(
    ("answer", "word"), [("Yes, it is.", "yes"), ("No.", "no"), ("no", "no"), ("No one is there.", None), ("Now.", None)]
)
def test_yes_and_no(answer: str, word: str | None) -> None:
    assert yes_or_no(answer) == word


def test_the_kinds_hold_what_llava_s_had() -> None:
    kinds = read_kinds(KINDS)
    assert [len(kinds[name].shots) for name in TAUGHT] == [2, 3, 3]
    assert (len(kinds["detail"].questions), len(kinds["brief"].questions)) == (16, 11)
    assert [kinds[name].boxes for name in TAUGHT] == [False, True, True]
    assert len({kind.hash for kind in kinds.values()}) == 4


def test_the_examples_pass_their_own_filters() -> None:
    for kind in read_kinds(TAUGHT).values():
        for context, answer in kind.shots:
            kept, faults = judge(kind, parse(kind, answer, asked="Describe it."), context)
            assert kept
            assert faults == []


def test_messages_are_system_examples_and_the_context() -> None:
    messages = TURNS.messages(CONTEXT)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert messages[-1]["content"] == CONTEXT.captions[0]
    assert "dog: [0.000" in DETAIL.messages(CONTEXT)[-1]["content"]


def test_an_edited_kind_has_another_hash_and_a_broken_one_is_named(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "kinds")
    (tmp_path / "kinds" / "detail" / "system.txt").write_text("Describe it.")
    assert read_kinds(["detail"], tmp_path / "kinds")["detail"].hash != DETAIL.hash
    (tmp_path / "kinds" / "detail" / "kind.json").write_text(json.dumps({"boxes": True, "form": "answer", "words": [9, 3]}))
    with pytest.raises(DataError, match=r"words must be \[fewest, most\]"):
        read_kinds(["detail"], tmp_path / "kinds")
    with pytest.raises(OptionError, match="no kind 'details'; the kinds are brief, conversation, detail, reasoning"):
        read_kinds(["details"])
