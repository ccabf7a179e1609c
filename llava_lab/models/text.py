"""Text: the prompt around a question, its tokens with every part's position, and answer tokens grouped into words.

    build_prompt("What color is the car?", "hf")  # "USER: <image>\\nWhat color is the car? ASSISTANT:"

Prompts. ``llava-1.5`` and ``hf`` differ in the system sentence only, and give different answers, so a run records which one it
had. ``chat`` is for relatives with another language model, whose own template is the right one; the processor writes it. One
``<image>`` stands for all image tokens.

Segments. The tokenizer's character offsets say where the question ends, and the image tokens are found by their id; nothing is
computed from lengths. Segments cover the sequence in order: ``system`` (everything before the picture), ``image``, ``history``
(earlier turns, only when given), ``question``, ``cue`` (what asks for the answer), and ``answer`` once there is one.

Words. Byte-level BPE (``Ġred``) and SentencePiece (``▁red``) mark word starts differently, and both may spread one character over
several tokens. So nothing is read off the pieces: every prefix of the answer is decoded, which tells the characters each token
completed; words are then cut in the decoded text. A word is a run of letters and digits (with inner apostrophes, hyphens,
points), a run of other signs, or one character of a script written without spaces.

Source: haotian-liu/LLaVA @ c121f04 ``llava/conversation.py`` (``conv_vicuna_v1``).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import layout
from llava_lab.results import Span, Word

IMAGE = "<image>"
END_OF_TURN = "</s>"
CUE = "ASSISTANT:"  # the model answers after it; no space follows

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

PROMPTS = MappingProxyType(
    {
        "llava-1.5": "what LLaVA-1.5 was trained and evaluated with: Vicuna v1 turns after its system sentence",
        "hf": "the same turns without the system sentence, as the hub's template for LLaVA-1.5 writes them",
        "chat": "the checkpoint's own chat template",
    }
)

MARKED = "image_marks"  # config.json's entry for words that stand before and after every picture; ours, stock models ignore it

UNFINISHED = "\ufffd"  # what decoding shows for bytes that are not a whole character yet

_SPACELESS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han
_LETTER = rf"[^\W{_SPACELESS}]"
_WORD = re.compile(rf"[{_SPACELESS}]|{_LETTER}+(?:['’.,:-]{_LETTER}+)*|[^\w\s]+")

History = Sequence[tuple[str, str]]


class Decoder(Protocol):
    """All that is asked of a tokenizer to read its words."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it."""

    text: str  # the exact text given to the tokenizer, one <image>
    token_ids: np.ndarray  # int64 (T,), image tokens expanded
    segments: dict[str, Span]  # system, image, (history), question, cue


def build_prompt(question: str, form: str = "llava-1.5", history: History = ()) -> str:
    """The text given to the tokenizer: system, picture, earlier turns, question, and the cue to answer.

    `history` holds earlier (question, answer) pairs about the same picture, oldest first.
    Raises OptionError for an unknown form, an empty question, or text that holds ``<image>`` itself.

    >>> from llava_lab.models import build_prompt
    >>> build_prompt("Is it red?", "hf")
    'USER: <image>\\nIs it red? ASSISTANT:'
    """
    check_form(form)
    if form == "chat":
        raise OptionError("prompt='chat' is written by a checkpoint's own template; ask through a Lab")
    *earlier, (last, _) = turns(question, history)
    questions = [question for question, _ in earlier] + [last]
    parts = [f"USER: {IMAGE}\n{questions[0]} {CUE}"]
    parts += [f" {answer}{END_OF_TURN}USER: {after} {CUE}" for (_, answer), after in zip(earlier, questions[1:], strict=True)]
    return (f"{SYSTEM} " if form == "llava-1.5" else "") + "".join(parts)


def marked(text: str, marks: Sequence[str]) -> str:
    """The prompt with `marks` (before, after) around the picture, where a checkpoint was trained with them."""
    return text.replace(IMAGE, f"{marks[0]}{IMAGE}{marks[1]}") if marks else text


def chat_messages(question: str, history: History = ()) -> list[dict]:
    """The same turns as transformers' chat messages, the picture in the first."""
    messages: list[dict] = []
    for text, answer in turns(question, history):
        messages.append({"role": "user", "content": [{"type": "text", "text": text}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages[0]["content"].insert(0, {"type": "image"})
    return messages


def turns(question: str, history: History = ()) -> list[tuple[str, str | None]]:
    """Checked (question, answer) pairs, oldest first; the last has no answer yet."""
    if isinstance(history, str) or any(isinstance(turn, str) or len(turn) != 2 for turn in history):
        raise OptionError("history must be a sequence of (question, answer) pairs, oldest first")
    earlier = [(_checked(text, "an earlier question"), _checked(answer, "an earlier answer")) for text, answer in history]
    return [*earlier, (_checked(question, "the question"), None)]


def check_form(form: str) -> None:
    if form not in PROMPTS:
        raise OptionError(f"prompt must be one of {', '.join(PROMPTS)}, got {form!r}")


def _checked(text: str, what: str) -> str:
    if not isinstance(text, str):
        raise OptionError(f"{what} must be text, got {type(text).__name__}")
    if not text.strip():
        raise OptionError(f"{what} is empty; ask something, for example 'What is in the picture?'")
    for mark in (IMAGE, END_OF_TURN):
        if mark in text:
            raise OptionError(f"{what} holds {mark!r}, which the prompt adds itself; leave it out")
    return text.strip()


def encode(tokenizer: Any, text: str, question: str, *, image_id: int, image_tokens: int, history: bool = False) -> Prompt:
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
    # the first token that begins at or after the question's end, and the first that reaches beyond its beginning
    cue = next((i for i, lo, hi in ends if lo >= first + len(question) and hi > lo), len(ids))
    asked = next((i for i, _, hi in ends if hi > first), cue) if history else stop
    segments = {"system": (0, start), "image": (start, stop)}
    if history:
        segments["history"] = (stop, asked)
    segments |= {"question": (asked, cue), "cue": (cue, len(ids))}
    return Prompt(text, ids, segments)


def decode(tokenizer: Decoder, token_ids: Sequence[int]) -> str:
    """The text of `token_ids`, without special tokens and without tidying of spaces."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def finished(text: str) -> str:
    """`text` without a trailing character whose bytes have not all arrived."""
    return text.rstrip(UNFINISHED)


def token_ends(tokenizer: Decoder, token_ids: Sequence[int]) -> list[int]:
    """For each token, how many characters of the decoded answer are complete once it is there."""
    whole = decode(tokenizer, token_ids)
    # An unfinished character decodes to UNFINISHED, which differs from the whole answer at that place. A byte
    # fallback spoils the finished characters before it too, so what was complete once stays complete.
    shared = (_shared(decode(tokenizer, token_ids[: i + 1]), whole) for i in range(len(token_ids)))
    return list(accumulate(shared, max))


def group_words(tokenizer: Decoder, token_ids: Sequence[int], start: int = 0) -> tuple[Word, ...]:
    """The answer's words in order, each with the tokens [start, stop) that spell it.

    `start` is the answer's first position in the sequence. A token belongs to the word of its first
    visible character; white space and the first bytes of a character belong to the word that follows.
    A word without a token of its own (``red.`` as one token) is joined to the word before it.
    """
    text = decode(tokenizer, token_ids)
    ends = token_ends(tokenizer, token_ids)
    spans = [match.span() for match in _WORD.finditer(text)]
    begins = [0, *ends][:-1]  # where the character a token writes, or begins to write, stands
    stops = [stop for _, stop in spans]
    owned: dict[int, list[int]] = {}
    for i, at in enumerate(begins):
        owned.setdefault(bisect_right(stops, at), []).append(i)  # the first word that ends behind it
    words: list[Word] = []
    for number, (lo, hi) in enumerate(spans):
        tokens = owned.get(number, [])
        if tokens:
            words.append(Word(text[lo:hi], start + tokens[0], start + tokens[-1] + 1))
        elif words:
            last = words[-1]
            gap = text[spans[number - 1][1] : lo]
            words[-1] = Word(last.text + gap + text[lo:hi], last.start, last.stop)
    return tuple(words)


def cut(text: str) -> list[bytes]:
    """A text without tokens, cut before each word: pieces that spell it and can stand in for tokens."""
    begins = [match.start() for match in _WORD.finditer(text)][1:]
    begins = [len(text[:at].rstrip()) for at in begins]  # the space belongs to the word that follows
    edges = [0, *begins, len(text)]
    return [text[lo:hi].encode() for lo, hi in pairwise(edges) if hi > lo]


class Spelt:
    """A `Decoder` that knows its tokens' bytes, for answers that come without a tokenizer."""

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self.pieces = pieces

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return b"".join(self.pieces[token] for token in token_ids).decode("utf-8", "replace")

    def words(self, token_ids: Sequence[int], start: int) -> tuple[Word, ...]:
        return group_words(self, token_ids, start)


def _shared(a: str, b: str) -> int:
    """Length of the common beginning of two strings, found by halves: letter by letter takes the square of a long answer."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


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
