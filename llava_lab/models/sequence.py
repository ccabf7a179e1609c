"""From a prompt's text to token ids with every part's position found.

The tokenizer's character offsets say where the question ends, and the image tokens are found by
their id; nothing is computed from lengths. Segments cover the sequence in order:
``system`` (everything before the picture), ``image``, ``history`` (earlier turns, only when given),
``question``, ``cue`` (what asks for the answer), and ``answer`` once there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import layout
from llava_lab.models.prompts import END_OF_TURN, IMAGE
from llava_lab.models.words import UNFINISHED
from llava_lab.results import Span


@dataclass(frozen=True)
class Sequence:
    """A prompt as the model reads it."""

    text: str  # the exact text given to the tokenizer, one <image>
    token_ids: np.ndarray  # int64 (T,), image tokens expanded
    segments: dict[str, Span]  # system, image, (history), question, cue


def encode(tokenizer: Any, text: str, question: str, *, image_id: int, image_tokens: int, history: bool = False) -> Sequence:
    """Tokenize `text`, expand its one image token, and find the segments; `question` is the last turn's."""
    if text.count(IMAGE) != 1:
        raise CheckpointError(f"the prompt must hold {IMAGE} once, its template wrote it {text.count(IMAGE)} times: {text!r}")
    first = text.rfind(question)
    assert first >= 0, (question, text)
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    coded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not has_bos)
    short = np.array(coded["input_ids"], np.int64)
    ids = layout.expand_image(short, image_id, image_tokens)
    start, stop = layout.image_span(ids, image_id, image_tokens)
    extra = len(ids) - len(short)  # how far expansion moved everything after the image
    ends = [(i + extra, lo, hi) for i, (lo, hi) in enumerate(coded["offset_mapping"]) if i + extra >= stop]
    cue = _first(ends, first + len(question), len(ids))
    asked = _first_reaching(ends, first, cue) if history else stop
    segments = {"system": (0, start), "image": (start, stop)}
    if history:
        segments["history"] = (stop, asked)
    segments |= {"question": (asked, cue), "cue": (cue, len(ids))}
    return Sequence(text, ids, segments)


def refuse_special_text(tokenizer: Any, *texts: str) -> None:
    """Raise OptionError when a user's text would be read as a special token instead of as text."""
    for text in texts:
        for mark in (*tokenizer.all_special_tokens, IMAGE, END_OF_TURN):
            if mark in text:
                raise OptionError(f"the text {text[:60]!r} holds {mark!r}, a special token of this model; leave it out")


def pieces(tokenizer: Any, token_ids: np.ndarray) -> tuple[str, ...]:
    """A readable text for every token, spaces kept; a part of a character shows as the tokenizer's own piece."""
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]  # decoders strip the first token's space
    before = len(_decode(tokenizer, anchor))
    shown: dict[int, str] = {}
    for token in {int(i) for i in token_ids}:
        name = tokenizer.convert_ids_to_tokens(token)
        text = _decode(tokenizer, [*anchor, token])[before:]
        shown[token] = text if text and UNFINISHED not in text else name or f"<{token}>"
    return tuple(shown[int(i)] for i in token_ids)


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _first(ends: list[tuple[int, int, int]], char: int, default: int) -> int:
    """Position of the first token that begins at or after `char`."""
    return next((i for i, lo, hi in ends if lo >= char and hi > lo), default)


def _first_reaching(ends: list[tuple[int, int, int]], char: int, default: int) -> int:
    """Position of the first token that reaches beyond `char`."""
    return next((i for i, lo, hi in ends if hi > char), default)
