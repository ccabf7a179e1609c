"""One row of LLaVA's data: its turns checked, its text tokenised, its answers labelled.

Stage 1 (``align``) uses LLaVA's ``plain`` form: picture, caption, newline; the request is thrown away and
the loss falls on the caption and its newline. Stage 2 (``instruct``) uses ``vicuna_v1`` with the loss on
answers and their end marks. The picture stands before the first question, wherever the row wrote it.

Source: haotian-liu/LLaVA @ c121f04 ``llava/train/train.py`` (preprocess_multimodal, preprocess_plain,
preprocess_v1); the response formats are LLaVA-1.5's, arXiv 2310.03744, Table 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from llava_lab.errors import DataError
from llava_lab.models.prompts import END_OF_TURN, IMAGE
from llava_lab.training.masks import IGNORE, encode
from llava_lab.worlds.wording import SHORT

STAGES = ("align", "instruct")
HUMAN, MODEL = ("human", "user"), ("gpt", "assistant")

# What LLaVA-1.5 appends to a conversation's first question, by kind of answer.
FORMATS: Mapping[str, str] = MappingProxyType(
    {
        "none": "",
        "word": SHORT,
        "letter": "Answer with the option's letter from the given choices directly.",
        "caption": "Provide a one-sentence caption for the provided image.",
        "region": "Provide a short description for this region.",
        "box": "Provide the bounding box coordinate of the region this sentence describes.",
    }
)

Turns = list[tuple[str, str]]


def read_turns(row: Any, *, stage: str, suffix: str = "none") -> tuple[Turns, str | None]:
    """A row's (question, answer) turns and its picture's name, None for text alone.

    Raises DataError that says what of the row is not LLaVA's format; the caller adds file and row number.
    """
    if not isinstance(row, dict):
        raise DataError(f"expected an object with 'conversations', got {type(row).__name__}")
    said = row.get("conversations")
    if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
        raise DataError("'conversations' must be a list of {'from': ..., 'value': ...}")
    if said and said[0].get("from") not in HUMAN:
        said = said[1:]  # LLaVA skips a first turn that is not the human's
    for number, turn in enumerate(said):
        expected = (HUMAN, MODEL)[number % 2]
        if turn.get("from") not in expected:
            raise DataError(f"turn {number} is from {turn.get('from')!r}, expected {expected[0]!r}: human and gpt must alternate")
        if not isinstance(turn.get("value"), str):
            raise DataError(f"turn {number} has no text in 'value'")
    if not said or len(said) % 2:
        raise DataError(f"the conversation has {len(said)} turns; expected question and answer in turn, ending with an answer")
    picture = _picture(row, [turn["value"] for turn in said], stage)
    values = [turn["value"].replace(IMAGE, "").strip() for turn in said]
    if any(END_OF_TURN in value for value in values):
        raise DataError(f"the text holds {END_OF_TURN!r}, which ends an answer; take it out")
    turns = list(zip(values[::2], values[1::2], strict=True))
    if not all(answer for _, answer in turns):
        raise DataError("an answer is empty")
    request = FORMATS[suffix]
    if request and request not in turns[0][0]:
        turns[0] = (f"{turns[0][0]}\n{request}", turns[0][1])
    return turns, picture


def _picture(row: dict[str, Any], values: list[str], stage: str) -> str | None:
    picture, asked = row.get("image"), [IMAGE in value for value in values]
    if picture is None:
        if any(asked):
            raise DataError(f"the text has {IMAGE} but the row names no 'image'")
        if stage == "align":
            raise DataError("stage align trains on pictures with captions; this row has no 'image'")
        return None
    if not isinstance(picture, str) or not picture:
        raise DataError(f"'image' must be the path of one picture, got {picture!r}")
    if any(asked[1::2]) or not any(asked):
        raise DataError(f"a row with a picture has {IMAGE} in a question (and in no answer)")
    return picture


def count_words(turns: Turns) -> int:
    """LLaVA's measure of length for grouping: words of all turns, image tokens not counted."""
    return sum(len(text.split()) for turn in turns for text in turn)


def tokens_at_most(turns: Turns, *, stage: str, fixed: int) -> int:
    """A number of tokens the row cannot exceed: no token is shorter than a byte."""
    texts = [turns[0][1]] if stage == "align" else [text for turn in turns for text in turn]
    return fixed + sum(len(text.encode()) + 40 for text in texts)  # 40: USER, ASSISTANT, end marks, their spaces


def tokenise(
    tokenizer: Any, turns: Turns, *, picture: bool, stage: str, image_id: int, image_tokens: int, system: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids with the picture's tokens expanded, and labels; both int64 (T,), IGNORE where nothing is learned."""
    if stage == "align":
        ids, labels = _plain(tokenizer, turns[0][1])
    else:
        coded = encode(tokenizer, turns, system=system, picture=IMAGE if picture else None)
        ids, labels = coded.ids, coded.labels
    where = np.flatnonzero(ids == image_id)
    if len(where) != int(picture):
        raise DataError(f"the text has {len(where)} image tokens, expected {int(picture)}")
    if picture:
        at = int(where[0])
        ids = np.concatenate([ids[:at], np.full(image_tokens, image_id, np.int64), ids[at + 1 :]])
        labels = np.concatenate([labels[:at], np.full(image_tokens, IGNORE, np.int64), labels[at + 1 :]])
    return ids, labels


def _plain(tokenizer: Any, caption: str) -> tuple[np.ndarray, np.ndarray]:
    coded = tokenizer(f"{IMAGE}{caption}\n", return_offsets_mapping=True)
    ids = np.array(coded["input_ids"], np.int64)
    begin, end = np.array(coded["offset_mapping"], np.int64).reshape(-1, 2).T
    return ids, np.where((begin >= len(IMAGE)) & (end > begin), ids, IGNORE)
