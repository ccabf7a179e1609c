"""Answer tokens are grouped into words the same way for both kinds of tokenizer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from llava_lab.models.text import decode, group_words, pieces, token_ends
from tests.support.checkpoints import byte_tokenizer, sentencepiece_tokenizer

TOKENIZERS = {"byte-level": byte_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}

ANSWERS = [
    ("The car is red.", ["The", "car", "is", "red", "."]),
    ("Yes, there is a red car, a red boat.", ["Yes", ",", "there", "is", "a", "red", "car", ",", "a", "red", "boat", "."]),
    ("It's a well-known café: 3.5 m!", ["It's", "a", "well-known", "café", ":", "3.5", "m", "!"]),
    ("naïve Ωmega 🦊🦊 ok", ["naïve", "Ωmega", "🦊🦊", "ok"]),
    ("赤い車。 red", ["赤", "い", "車", "。", "red"]),
    ("two\nlines  here", ["two", "lines", "here"]),
    ("...", ["..."]),
    ("x", ["x"]),
    ("", []),
]


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
def test_words_are_those_a_person_reads(tokenizer: Any, answer: str, words: list[str]) -> None:
    assert [word.text for word in group_words(tokenizer, tokens_of(tokenizer, answer))] == words


@pytest.mark.parametrize(("answer", "words"), ANSWERS)
def test_each_word_s_tokens_decode_to_it(tokenizer: Any, answer: str, words: list[str]) -> None:
    ids = tokens_of(tokenizer, answer)
    for word in group_words(tokenizer, ids):
        assert decode(tokenizer, ids[word.start : word.stop]).strip() == word.text


@pytest.mark.parametrize(("answer", "words"), ANSWERS)
def test_words_are_in_order_and_share_no_token(tokenizer: Any, answer: str, words: list[str]) -> None:
    grouped = group_words(tokenizer, tokens_of(tokenizer, answer), start=100)
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
