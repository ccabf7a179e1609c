"""Prompts are LLaVA's to the letter, every part of the sequence is found where it is, and answer tokens are grouped into words
the same way for both kinds of tokenizer."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import Lab, layout
from llava_lab.models.text import PROMPTS, SYSTEM, build_prompt, chat_messages, decode, encode, group_words, pieces, token_ends
from tests.support.checkpoints import byte_tokenizer, sentencepiece_tokenizer
from tests.support.planted import scripted_run

TURN = [("What color is the car?", "It is red.")]
TOKENIZERS = {"byte-level": byte_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}
ANSWERS = [
    ("The car is red.", ["The", "car", "is", "red", "."]),
    ("Yes, there is a red car, a red boat.", ["Yes", ",", "there", "is", "a", "red", "car", ",", "a", "red", "boat", "."]),
    ("It's a well-known café: 3.5 m!", ["It's", "a", "well-known", "café", ":", "3.5", "m", "!"]),
    ("naïve Ωmega 🦊🦊 ok", ["naïve", "Ωmega", "🦊🦊", "ok"]),
    ("赤い車。 red", ["赤", "い", "車", "。", "red"]),
    ("the cafe\u0301 is blue", ["the", "cafe\u0301", "is", "blue"]),  # accents written apart
    ("हिन्दी में लाल", ["हिन्दी", "में", "लाल"]),
    ("क्\u200dष है", ["क्\u200dष", "है"]),
    ("สีแดง red", ["สีแดง", "red"]),
    ("كِتَاب red", ["كِتَاب", "red"]),
    ("שָׁלוֹם, red", ["שָׁלוֹם", ",", "red"]),
    ("o\u0308's", ["o\u0308's"]),
    ("a ❤\ufe0f b", ["a", "❤\ufe0f", "b"]),
    ("\u0301 red", ["\u0301", "red"]),
    ("👩\u200d👩 ok", ["👩\u200d👩", "ok"]),
    ("two\nlines  here", ["two", "lines", "here"]),
    ("...", ["..."]),
    ("x", ["x"]),
    ("", []),
]


def test_the_llava_prompt_is_vicuna_v1_to_the_letter() -> None:
    assert build_prompt("Why?") == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. USER: <image>\nWhy? ASSISTANT:"
    )
    assert build_prompt("Why?", history=TURN) == (
        f"{SYSTEM} USER: <image>\nWhat color is the car? ASSISTANT: It is red.</s>USER: Why? ASSISTANT:"
    )


def test_the_hf_prompt_has_no_system_sentence() -> None:
    assert build_prompt("Why?", "hf") == "USER: <image>\nWhy? ASSISTANT:"
    assert build_prompt("Why?", "hf", pictures=0) == "USER: Why? ASSISTANT:"
    assert build_prompt("Why?", "hf", pictures=2) == "USER: <image>\n<image>\nWhy? ASSISTANT:"
    assert build_prompt("Why?", "hf", TURN) + " Because." == (
        "USER: <image>\nWhat color is the car? ASSISTANT: It is red.</s>USER: Why? ASSISTANT: Because."
    )


def test_white_space_around_a_question_is_dropped() -> None:
    assert build_prompt("  Why?\n") == build_prompt("Why?")


@pytest.mark.parametrize(
    ("question", "form", "history", "words"),
    [
        ("Why?", "vicuna", (), ("llava-1.5, hf, chat", "vicuna")),
        ("", "hf", (), ("empty",)),
        (" \n", "hf", (), ("empty",)),
        (3, "hf", (), ("must be text, got 3",)),
        ("\ud800", "hf", (), ("must be text",)),
        ("a <image> b", "hf", (), ("<image>",)),
        ("a</s>", "hf", (), ("</s>",)),
        ("Why?", "hf", [("a", "")], ("an earlier answer is empty; leave that turn out",)),
        ("Why?", "hf", [("", "a")], ("an earlier question is empty; ask something",)),
        ("Why?", "hf", [{"question": "a", "answer": "b"}], ("expected from or role with value or content, got", "'question'")),
        ("Why?", "hf", ["ab"], ("pairs",)),
        ("Why?", "hf", "ab", ("pairs",)),
        ("Why?", "chat", (), ("template",)),
    ],
)
def test_unusable_questions_are_refused_in_one_line(question: Any, form: str, history: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(OptionError) as error:
        build_prompt(question, form, history)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_chat_messages_hold_the_picture_once() -> None:
    messages = chat_messages("Why?", TURN)
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [part["type"] for message in messages for part in message["content"]] == ["image", "text", "text", "text"]


@pytest.mark.parametrize("form", ["llava-1.5", "hf"])
@pytest.mark.parametrize(
    "question",
    ["What color is the car?", "café ASSISTANT: naïve 🦊", "?", "USER: and\nlines", "A", "S", "NT:", ":", "ASSISTANT:", "USER"],
)
@pytest.mark.parametrize("history", [(), TURN])
def test_segments_cover_the_prompt_and_hold_their_own_text(tokenizer: Any, form: str, question: str, history: Any) -> None:
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    text = build_prompt(question, form, history)
    found = encode(tokenizer, text, question, image_id=image_id, image_tokens=9, history=bool(history))
    spans = list(found.segments.values())
    assert spans[0][0] == 0
    assert spans[-1][1] == len(found.token_ids)
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert list(found.segments) == ["system", "image", *(["history"] if history else []), "question", "cue"]
    said = {name: tokenizer.decode(found.token_ids[slice(*span)]).strip() for name, span in found.segments.items()}
    assert (found.token_ids[slice(*found.segments["image"])] == image_id).all()
    assert said["question"] == question
    assert said["cue"] == "ASSISTANT:"
    assert said["system"].endswith("USER:")
    assert not history or said["history"].endswith("USER:")


@pytest.mark.parametrize("form", ["llava-1.5", "hf", "chat"])
@pytest.mark.parametrize("question", ["A", "assistant", "ASSISTANT:", "S", "T:", "What?"])
def test_a_question_that_also_stands_in_the_cue_is_found_and_replaced(
    tiny_random: Lab, picture: np.ndarray, form: str, question: str
) -> None:
    run = scripted_run(tiny_random, picture, "It is red.", question=question, prompt=form)
    said = {name: tiny_random.tokenizer.decode(run.token_ids[slice(*span)]).strip() for name, span in run.segments.items()}
    assert said["question"] == question
    assert said["cue"] == "ASSISTANT:"
    other = tiny_random.asked_instead(run, "Why?")
    assert other.text == tiny_random.sequence("Why?", prompt=form, picture=picture).text
    assert other.segments == tiny_random.sequence("Why?", prompt=form, picture=picture).segments


def test_a_token_over_the_question_s_end_belongs_to_the_question() -> None:
    class Straddling:
        """Characters as tokens, but one token spans the question's last sign and the space after it."""

        bos_token = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[Any]]:
            image, end = text.index("<image>"), text.index("? ")
            spans = [(i, i + 1) for i in range(image)] + [(image, image + 7)] + [(i, i + 1) for i in range(image + 7, end)]
            spans += [(end, end + 2)] + [(i, i + 1) for i in range(end + 2, len(text))]
            return {"input_ids": [3 if span == (image, image + 7) else 9 for span in spans], "offset_mapping": spans}

    found = encode(Straddling(), build_prompt("Why?", "hf"), "Why?", image_id=3, image_tokens=4)
    start, stop = found.segments["question"]
    assert stop - start == len("\nWhy") + 1
    assert found.segments["cue"] == (stop, stop + len("ASSISTANT:"))


@pytest.mark.parametrize("form", ["llava-1.5", "hf", "chat"])
def test_the_sequence_equals_the_processor_s_own(tiny_random: Lab, picture: np.ndarray, form: str) -> None:
    found = tiny_random.sequence("What color is the car?", prompt=form)
    theirs = tiny_random.processor(text=found.text, images=picture, return_tensors="np")
    assert np.array_equal(found.token_ids, theirs["input_ids"][0])


def test_every_form_in_the_table_can_be_asked(tiny_random: Lab, picture: np.ndarray) -> None:
    for form in PROMPTS:
        assert tiny_random.ask(picture, "Why?", prompt=form, max_new_tokens=1).options["prompt"] == form


def test_the_chat_form_takes_history(tiny_random: Lab) -> None:
    found = tiny_random.sequence("Why?", prompt="chat", history=TURN)
    assert list(found.segments) == ["system", "image", "history", "question", "cue"]
    assert found.text == "USER: <image>\nWhat color is the car? ASSISTANT: It is red.</s>USER: Why? ASSISTANT:"


USER, ASSISTANT = {"role": "user", "content": "Is it red?"}, {"role": "assistant", "content": "Yes."}
PART, MARK = {"type": "text", "text": "Is it red?"}, {"type": "image_url", "image_url": {"url": "a.jpg"}}
HISTORIES: dict[str, Any] = {
    "pairs": [("Is it red?", "Yes.")],
    "pairs as JSON has them": [["Is it red?", "Yes."]],
    "pairs in a tuple": (("Is it red?", "Yes."),),
    "an array of pairs": np.array([["Is it red?", "Yes."]]),
    "role and content": [USER, ASSISTANT],
    "role and content, with more beside": [{**USER, "metadata": None}, {**ASSISTANT, "id": 3}],
    "from and value": [{"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "Yes."}],
    "content first": [{"content": "Is it red?", "role": "user"}, {"content": "Yes.", "role": "assistant"}],
    "parts": [{"role": "user", "content": [PART]}, {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}],
    "parts with the picture": [{"role": "user", "content": [MARK, PART]}, ASSISTANT],
    "parts with the picture last": [{"role": "user", "content": [PART, {"type": "image"}]}, ASSISTANT],
    "a mark in the text": [{"from": "human", "value": "<image>\nIs it red?"}, {"from": "gpt", "value": "Yes."}],
    "under messages": {"messages": [USER, ASSISTANT]},
    "a row": {"id": "1", "conversations": [{"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "Yes."}]},
    "text of numpy's": [(np.str_("Is it red?"), np.str_("Yes."))],
    "an array of messages": np.array([USER, ASSISTANT], object),
    "a row of a deque": deque([("Is it red?", "Yes.")]),
    "one part alone": [{"role": "user", "content": PART}, ASSISTANT],
    "parts that are text": [{"role": "user", "content": ["Is it red?"]}, ASSISTANT],
    "from and content": [{"from": "user", "content": "Is it red?"}, {"from": "assistant", "content": "Yes."}],
}
NO_HISTORIES: dict[str, Any] = {
    "a text": "Is it red?",
    "one pair alone": ("Is it red?", "Yes."),
    "two texts of two letters": ["ab", "cd"],
    "a number": 5,
    "numbers": [1, 2],
    "three in a row": [("a", "b", "c")],
    "a pair of numbers": [(1, 2)],
    "a pair of messages": [(USER, ASSISTANT)],
    "only a question": [USER],
    "an answer first": [ASSISTANT, USER],
    "two questions": [USER, USER],
    "a system": [{"role": "system", "content": "Be brief."}, USER, ASSISTANT],
    "a tool": [{"role": "tool", "content": "x"}, ASSISTANT],
    "no role": [{"content": "a"}, {"content": "b"}],
    "no content": [{"role": "user"}, {"role": "assistant"}],
    "sound": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}, ASSISTANT],
    "two pictures": [{"role": "user", "content": [MARK, PART]}, ASSISTANT, {"role": "user", "content": [MARK, PART]}, ASSISTANT],
    "messages and pairs": [USER, ("a", "b")],
    "half a character": [("\ud800", "b")],
    "an empty answer": [("a", " ")],
    "an array for a role": [{"role": np.array([1, 2]), "content": "a"}, ASSISTANT],
    "a list for a role": [{"role": ["user"], "content": "a"}, ASSISTANT],
    "an array for a type": [{"role": "user", "content": [{"type": np.array([1, 2]), "text": "a"}]}, ASSISTANT],
    "a list for a type": [{"role": "user", "content": [{"type": ["text"], "text": "a"}]}, ASSISTANT],
    "a call of a tool": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
    "a refusal": [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}],
    "messages in a list of lists": [[USER, ASSISTANT]],
    "columns": {"question": ["a"], "answer": ["b"]},
    "an iterator": iter([USER, ASSISTANT]),
    "a pair of bytes": [(b"a", b"b")],
    "an object": object(),
    "an unknown object": {"a": 1},
}


@pytest.mark.parametrize("form", HISTORIES)
def test_a_history_is_read_by_what_it_means(form: str) -> None:
    assert build_prompt("Why?", "hf", HISTORIES[form]) == build_prompt("Why?", "hf", [("Is it red?", "Yes.")])


@pytest.mark.parametrize("form", NO_HISTORIES)
def test_what_is_no_history_is_refused_in_one_line(form: str) -> None:
    with pytest.raises(OptionError) as error:
        build_prompt("Why?", "hf", NO_HISTORIES[form])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("none", [(), [], None, {"messages": []}, np.zeros((0, 2))])
def test_no_history_is_none_in_any_form(none: Any) -> None:
    assert build_prompt("Why?", "hf", none) == build_prompt("Why?", "hf")


def test_a_template_without_one_image_is_refused(tiny_random: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_random.processor, "chat_template", "{{ messages[0]['content'][1]['text'] }}")
    with pytest.raises(CheckpointError, match="once"):
        tiny_random.sequence("Why?", prompt="chat")
    monkeypatch.setattr(tiny_random.processor, "chat_template", None)
    with pytest.raises(OptionError, match="chat template"):
        tiny_random.sequence("Why?", prompt="chat")


def test_one_image_id_and_an_expanded_prompt_come_to_the_same() -> None:
    one, many = np.array([5, 3, 6]), np.array([5, 3, 3, 3, 3, 6])
    assert layout.expand_image(one, 3, 4).tolist() == many.tolist()
    assert layout.expand_image(many, 3, 4).tolist() == many.tolist()
    assert layout.image_spans(many, 3, 4) == [(1, 5)]
    two = layout.expand_image(np.array([5, 3, 6, 3]), 3, 2, pictures=2)
    assert (two.tolist(), layout.image_spans(two, 3, 2, 2)) == ([5, 3, 3, 6, 3, 3], [(1, 3), (4, 6)])


@pytest.mark.parametrize(
    ("ids", "words"),
    [([5, 6], "found 0"), ([3, 3, 6], "found 2"), ([3, 3, 5, 3, 3], "one block"), ([3, 3, 3, 3, 3], "found 5")],
)
def test_image_tokens_that_do_not_add_up_are_refused(ids: list[int], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        layout.expand_image(np.array(ids), 3, 4)


@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]


def tokens_of(tokenizer: Any, answer: str) -> list[int]:
    """An answer's tokens as a model gives them: after other text, with the space before it."""
    cue = tokenizer.encode("ASSISTANT:", add_special_tokens=False)
    both = tokenizer.encode(f"ASSISTANT: {answer}", add_special_tokens=False)
    assert both[: len(cue)] == cue
    return both[len(cue) :] if answer else []


@pytest.mark.parametrize(("answer", "words"), ANSWERS)
def test_words_are_those_a_person_reads_in_order_and_with_their_own_tokens(tokenizer: Any, answer: str, words: list[str]) -> None:
    ids = tokens_of(tokenizer, answer)
    grouped = group_words(tokenizer, ids, start=100)
    assert [word.text for word in grouped] == words
    assert [decode(tokenizer, ids[word.start - 100 : word.stop - 100]).strip() for word in grouped] == words
    assert all(word.start < word.stop for word in grouped)
    assert all(a.stop <= b.start for a, b in pairwise(grouped))
    assert not grouped or grouped[0].start == 100


def test_duplicate_words_stay_apart(tokenizer: Any) -> None:
    reds = [word for word in group_words(tokenizer, tokens_of(tokenizer, "a red car, a red boat")) if word.text == "red"]
    assert len(reds) == 2
    assert reds[0].stop <= reds[1].start


def test_a_character_over_several_tokens_is_complete_at_its_last(tokenizer: Any) -> None:
    ids = tokens_of(tokenizer, "🦊")
    assert len(ids) >= 4
    ends = token_ends(tokenizer, ids)
    text = decode(tokenizer, ids)
    assert ends[-1] == len(text)
    assert ends[-2] < len(text)
    (fox,) = group_words(tokenizer, ids)
    assert (fox.text, fox.stop) == ("🦊", len(ids))


def test_bytes_that_never_become_a_character_lose_no_token() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokens_of(tokenizer, "ok 🦊")
    cut = [*ids[:-1], *tokens_of(tokenizer, "no")]  # the fox lacks its last byte, and more follows
    grouped = group_words(tokenizer, cut)
    assert [word.text for word in grouped][0::2] == ["ok", "no"]
    assert grouped[1].text.strip("\ufffd") == ""
    assert [i for word in grouped for i in range(word.start, word.stop)] == list(range(len(cut)))


def test_a_token_of_two_words_makes_them_one() -> None:
    class TwoWords:
        table = ("of the", " red", " car.")

        def decode(self, token_ids: Any, **_: Any) -> str:
            return "".join(self.table[i] for i in token_ids)

    assert [(w.text, w.start, w.stop) for w in group_words(TwoWords(), [0, 1, 2])] == [
        ("of the", 0, 1),
        ("red", 1, 2),
        ("car.", 2, 3),
    ]


def test_pieces_keep_their_spaces_and_name_part_characters(tokenizer: Any) -> None:
    ids = np.array(tokenizer.encode("a é the", add_special_tokens=False))
    shown = pieces(tokenizer, ids)
    assert " the" in shown
    assert not any("\ufffd" in piece or "Ġ" in piece or "▁" in piece for piece in shown)
    assert pieces(tokenizer, np.array([tokenizer.eos_token_id])) == ("</s>",)
    assert pieces(tokenizer, np.array([len(tokenizer) + 5])) == (f"<{len(tokenizer) + 5}>",)
