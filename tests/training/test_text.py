"""From turns to ids and labels: what is learned, where turns begin, and labels one place before what they predict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llava_lab.errors import DataError, OptionError
from llava_lab.training.rows import Source
from llava_lab.training.smol.batches import Chat, texts_batch
from llava_lab.training.text import FORMATS, IGNORE, encode, next_labels, read_turns, render, stacked
from llava_lab.training.tiny.batches import apart, facts, joined, plain
from llava_lab.training.tiny.model import build_tokenizer
from llava_lab.training.trainer import Collate
from llava_lab.worlds.picturebook import conversation, scene
from tests.support.training_rows import turn


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(700, samples=300)


def test_stacked_rows_are_padded_and_their_labels_stand_one_place_before() -> None:
    rows = [
        (np.array([5, 6, 7]), np.array([IGNORE, 6, 7])),
        (np.array([8]), np.array([8])),
        (np.array([], int), np.array([], int)),
    ]
    ids, labels = stacked(rows[:2], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert labels.tolist() == [[6, 7, IGNORE], [IGNORE, IGNORE, IGNORE]]
    assert next_labels(np.array([1, 2, 3])).tolist() == [2, 3, IGNORE]


def _shifted(ids: torch.Tensor, labels: torch.Tensor) -> None:
    """Every label is the id of the next position; so a loss that reads labels unmoved, or moved twice, is found."""
    rows = zip(ids.reshape(-1, ids.shape[-1]), labels.reshape(-1, ids.shape[-1]), strict=True)
    for row, wanted in rows:
        learned = (wanted != IGNORE).nonzero().flatten()
        assert len(learned)
        assert torch.equal(row[learned + 1], wanted[learned])


Batch = Callable[[Any], tuple[torch.Tensor, torch.Tensor]]
TURNS = [("What color is the car?", "The car is red."), ("Is there a tree?", "No, there is no tree.")]


def _collated(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    encoded = encode(tokenizer, TURNS, system=True, picture=None)
    batch = Collate(0, (1,))([{"ids": encoded.ids, "labels": encoded.labels, "picture": None}])
    labels = torch.full(batch["input_ids"].shape, IGNORE)
    labels[:, batch["logits_to_keep"]] = batch["shift_labels"]
    return batch["input_ids"], labels


def _parts(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.ids, batch.labels


FORMS: dict[str, Batch] = {
    "apart": lambda tokenizer: _parts(apart(tokenizer, [TURNS, TURNS[::-1]], system=True)),
    "plain": lambda tokenizer: _parts(plain(tokenizer, [["A red car.", "A car."]], 3)),
    "facts": lambda tokenizer: _parts(facts(tokenizer, [[(" The color of the car is", " red.")]], 3)),
    "joined": lambda tokenizer: _parts(joined(tokenizer, [encode(tokenizer, TURNS, system=False)])),
    "smol": lambda tokenizer: _parts(Chat(tokenizer, 4).batch([[TURNS]], np.zeros((1, 8, 8, 3), np.uint8))),
    "smol texts": lambda tokenizer: _parts(texts_batch([[9, 30, 12, 55, 7, 2]])),
    "LLaVA's rows": _collated,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_batch_predicts_the_token_after(tokenizer: PreTrainedTokenizerFast, form: str) -> None:
    _shifted(*FORMS[form](tokenizer))


def test_only_answers_and_their_end_marks_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    for i in range(25):
        turns = conversation(scene("train", i), np.random.default_rng(i), 4)
        for apart_ in (False, True):
            encoded = encode(tokenizer, turns, system=bool(i % 2), apart=apart_)
            learned = tokenizer.decode(encoded.ids[encoded.labels != IGNORE])
            assert learned == "".join(f" {answer}</s>" for _, answer in turns)


def test_turn_numbers_split_prefix_from_questions(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [("What color is the car?", "The car is red."), ("Is there a tree?", "No, there is no tree.")]
    encoded = encode(tokenizer, turns, system=True, apart=True)
    assert tokenizer.decode(encoded.ids[encoded.turn == 0]).endswith("USER: <image>\n")
    for i, (asked, answered) in enumerate(turns, 1):
        assert tokenizer.decode(encoded.ids[encoded.turn == i]) == f"{asked} ASSISTANT: {answered}</s>"


def test_joined_form_is_the_prompt_that_asking_uses(tokenizer: PreTrainedTokenizerFast) -> None:
    from llava_lab.models.text import build_prompt

    turns = [("One?", "Yes."), ("Two?", "No.")]
    text, _, _ = render(turns, system=True)
    assert text == build_prompt("Two?", "llava-1.5", [("One?", "Yes.")]) + " No.</s>"
    assert render(turns[:1], system=False)[0] == build_prompt("One?", "hf") + " Yes.</s>"


def test_a_token_that_straddles_an_answer_raises(tokenizer: PreTrainedTokenizerFast) -> None:
    class Greedy:
        """A tokenizer whose second token reaches from the cue into the answer."""

        def __call__(self, text: str, **_: object) -> dict:
            cut = text.index("ASSISTANT:") + 12
            return {"input_ids": [1, 2, 3], "offset_mapping": [(0, cut - 6), (cut - 6, cut), (cut, len(text))]}

        def convert_ids_to_tokens(self, token: int) -> str:
            return f"piece{token}"

    with pytest.raises(DataError, match="straddles"):
        encode(Greedy(), [("Q?", "Answer.")], system=False)  # type: ignore[arg-type]


def test_plain_form_learns_the_whole_caption_and_the_newline(tokenizer: PreTrainedTokenizerFast) -> None:
    image_id = int(tokenizer.convert_tokens_to_ids("<image>"))
    batch = plain(tokenizer, [["A small red car."]], image_id)
    learned = batch.labels[0, 0][batch.labels[0, 0] != IGNORE]
    assert tokenizer.decode(learned) == "A small red car.\n"
    assert batch.prefix.tolist() == [tokenizer.bos_token_id, image_id]


def test_response_format_follows_the_first_question_once() -> None:
    row = {"conversations": turn("What?", "red") + turn("And?", "blue")}
    turns, _ = read_turns(row, stage="instruct", suffix="word")
    assert turns == [(f"What?\n{FORMATS['word']}", "red"), ("And?", "blue")]
    said = {"conversations": turn(f"What?\n{FORMATS['word']}", "red")}
    assert read_turns(said, stage="instruct", suffix="word")[0][0][0].count(FORMATS["word"]) == 1
    with pytest.raises(OptionError, match="suffix must be one of none, word"):
        Source("x.json", suffix="words")
