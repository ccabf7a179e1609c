"""From turns of a conversation to token ids and labels: the one text encoder of all training.

Labels come from character offsets of the rendered prompt, never from counting tokens: the length arithmetic of the
original code silently drops samples when a tokenizer disagrees (haotian-liu/LLaVA issues 661, 779, 1166). Here a token
that straddles an answer's edge raises. `stacked` pads rows to a batch and moves the labels one place, so that
``labels[t]`` is what position t must predict; nothing else in training shifts labels.

Stage 1 (``align``) uses LLaVA's ``plain`` form: picture, caption, newline; the request is thrown away and the loss
falls on the caption and its newline. Stage 2 (``instruct``) uses ``vicuna_v1`` with the loss on answers and their end
marks. The picture stands before the first question, wherever the row wrote it.

    turns, picture = read_turns({"image": "1.png", "conversations": [...]}, stage="instruct")
    ids, labels = tokenise(lab.tokenizer, turns, picture=True, stage="instruct", image_id=lab.image_id, image_tokens=144)

Source: haotian-liu/LLaVA @ c121f04 ``llava/train/train.py`` (preprocess_multimodal, preprocess_plain,
preprocess_v1); the response formats are LLaVA-1.5's, arXiv 2310.03744, Table 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llava_lab.checks import shown
from llava_lab.errors import DataError
from llava_lab.models.text import END_OF_TURN, IMAGE, SYSTEM, read_row
from llava_lab.worlds.questions import SHORT

IGNORE = -100  # LLaVA's own value, and torch's default ignore_index
EOS = "</s>"
STAGES = ("align", "instruct")
MOST_TEXT = 1 << 20  # characters of a row's turns, some fifty times the longest context

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


# -- turns to tokens -----------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens, with one ``<image>`` id where the picture goes."""

    ids: np.ndarray  # int64 (T,)
    labels: np.ndarray  # int64 (T,), IGNORE where nothing is learned
    turn: np.ndarray  # int64 (T,), 0 for what all turns share, then 1, 2, ...


def render(
    turns: list[tuple[str, str]], *, system: bool, picture: str | None = "<image>", apart: bool = False
) -> tuple[str, list[tuple[int, int]], list[int]]:
    """Prompt text, the character span of each answer with its end mark, and where each turn starts.

    LLaVA-1.5's ``vicuna_v1`` form, or transformers' without the system sentence. `picture` None is a conversation
    about no picture. With `apart` the turns are separate first questions that share the picture: none says ``USER:`` again.
    """
    text = f"{SYSTEM} " if system else ""
    spans, starts = [], []
    for i, (question, answer) in enumerate(turns):
        if i == 0:
            text += "USER: " if picture is None else f"USER: {picture}\n"
        starts.append(len(text))
        if i > 0 and not apart:
            text += "USER: "
        text += f"{question} ASSISTANT:"
        spans.append((len(text), len(text) + 1 + len(answer) + len(EOS)))
        text += f" {answer}{EOS}"
    return text, spans, starts


def encode(
    tokenizer: PreTrainedTokenizerFast,
    turns: list[tuple[str, str]],
    *,
    system: bool,
    picture: str | None = "<image>",
    apart: bool = False,
) -> Encoded:
    """Tokens and labels of one conversation; the loss falls on answers and their end marks only.

    Raises DataError when there is nothing to learn or a token straddles an answer's edge.
    """
    text, spans, starts = render(turns, system=system, picture=picture, apart=apart)
    encoding = tokenizer(text, return_offsets_mapping=True)
    ids = np.array(encoding["input_ids"], np.int64)
    offsets = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)
    begin, end = offsets[:, 0], offsets[:, 1]
    labels = np.full(len(ids), IGNORE, np.int64)
    for start, stop in spans:
        inside = (begin >= start) & (end <= stop) & (end > begin)
        straddles = ((begin < start) & (end > start)) | ((begin < stop) & (end > stop))
        if straddles.any() or not inside.any():
            piece = tokenizer.convert_ids_to_tokens(int(ids[np.argmax(straddles)]))
            raise DataError(f"cannot mask the answer {shown(text[start:stop])}: token {piece!r} straddles its edge")
        labels[inside] = ids[inside]
    # a turn's first token may begin with the space before it, so compare token ends
    turn = np.searchsorted(np.array(starts), end - 1, side="right")
    turn[0] = 0  # the beginning-of-sequence token has an empty span
    return Encoded(ids, labels, turn)


def next_labels(labels: np.ndarray) -> np.ndarray:
    """What each position must predict, (T,): the label of the token after it, IGNORE at the end."""
    return np.append(labels[1:], IGNORE)


def stacked(rows: Sequence[tuple[np.ndarray, np.ndarray]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of (ids, labels), each (T,), padded at the end: ids and `next_labels` of all, both int64 (N, longest)."""
    longest = max(len(ids) for ids, _ in rows)
    tokens = torch.full((len(rows), longest), pad)
    nexts = torch.full((len(rows), longest), IGNORE)
    for number, (ids, labels) in enumerate(rows):
        tokens[number, : len(ids)] = torch.from_numpy(ids)
        nexts[number, : len(ids)] = torch.from_numpy(next_labels(labels))
    return tokens, nexts


# -- rows of LLaVA's data ------------------------------------------------------------------


def read_turns(row: Any, *, stage: str, suffix: str = "none") -> tuple[Turns, str | None]:
    """A row's (question, answer) turns and its picture's name, None for text alone.

    Raises DataError that says what of the row is not LLaVA's format; the caller adds file and row number.
    """
    messages, picture = read_row(row)
    if picture is None and stage == "align":
        raise DataError("stage align trains on pictures with captions; this row has no 'image'")
    values = [message.text for message in messages]
    if (length := sum(map(len, values))) > MOST_TEXT:
        raise DataError(f"its text has {length:,} characters, at most {MOST_TEXT:,} are read; shorten it")
    if any(END_OF_TURN in value for value in values):
        raise DataError(f"the text holds {END_OF_TURN!r}, which ends an answer; take it out")
    turns = list(zip(values[::2], values[1::2], strict=True))
    if not all(answer for _, answer in turns):
        raise DataError("an answer is empty")
    request = FORMATS[suffix]
    if request and request not in turns[0][0]:
        turns[0] = (f"{turns[0][0]}\n{request}", turns[0][1])
    return turns, picture


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
        coding = tokenizer(f"{IMAGE}{turns[0][1]}\n", return_offsets_mapping=True)
        ids = np.array(coding["input_ids"], np.int64)
        begin, end = np.array(coding["offset_mapping"], np.int64).reshape(-1, 2).T
        labels = np.where((begin >= len(IMAGE)) & (end > begin), ids, IGNORE)
    else:
        encoded = encode(tokenizer, turns, system=system, picture=IMAGE if picture else None)
        ids, labels = encoded.ids, encoded.labels
    where = np.flatnonzero(ids == image_id)
    if len(where) != int(picture):
        raise DataError(f"the text has {len(where)} image tokens, expected {int(picture)}")
    if picture:
        at = int(where[0])
        ids = np.concatenate([ids[:at], np.full(image_tokens, image_id, np.int64), ids[at + 1 :]])
        labels = np.concatenate([labels[:at], np.full(image_tokens, IGNORE, np.int64), labels[at + 1 :]])
    return ids, labels
