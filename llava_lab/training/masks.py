"""From turns of a conversation to token ids, labels and the turn each token belongs to.

Labels come from character offsets of the rendered prompt, never from counting tokens: the
length arithmetic of the original code silently drops samples when a tokenizer disagrees
(haotian-liu/LLaVA issues 661, 779, 1166). Here a token that straddles an answer's edge raises.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from llava_lab.errors import DataError
from llava_lab.models.prompts import SYSTEM

IGNORE = -100  # LLaVA's own value, and torch's default ignore_index
EOS = "</s>"


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens, with one ``<image>`` id where the picture goes."""

    ids: np.ndarray  # int64 (T,)
    labels: np.ndarray  # int64 (T,), IGNORE where nothing is learned
    turn: np.ndarray  # int64 (T,), 0 for what all turns share, then 1, 2, ...

    @property
    def supervised(self) -> float:
        return float((self.labels != IGNORE).mean())


def render(
    turns: list[tuple[str, str]], *, system: bool, picture: str | None = "<image>", apart: bool = False
) -> tuple[str, list[tuple[int, int]], list[int]]:
    """Prompt text, the character span of each answer with its end mark, and where each turn starts.

    LLaVA-1.5's ``vicuna_v1`` form, or transformers' without the system sentence. `picture` None is a
    conversation about no picture. With `apart`
    the turns are separate first questions that share the picture: none says ``USER:`` again.
    """
    text = f"{SYSTEM} " if system else ""
    spans, starts = [], []
    for i, (asked, answered) in enumerate(turns):
        if i == 0:
            text += "USER: " if picture is None else f"USER: {picture}\n"
        starts.append(len(text))
        if i > 0 and not apart:
            text += "USER: "
        text += f"{asked} ASSISTANT:"
        spans.append((len(text), len(text) + 1 + len(answered) + len(EOS)))
        text += f" {answered}{EOS}"
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
            raise DataError(f"cannot mask the answer {text[start:stop]!r}: token {piece!r} straddles its edge")
        labels[inside] = ids[inside]
    # a turn's first token may begin with the space before it, so compare token ends
    turn = np.searchsorted(np.array(starts), end - 1, side="right")
    turn[0] = 0  # the beginning-of-sequence token has an empty span
    return Encoded(ids, labels, turn)
