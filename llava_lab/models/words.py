"""Answer tokens grouped into the words they spell, whatever the tokenizer.

Byte-level BPE (``Ġred``) and SentencePiece (``▁red``) mark word starts differently, and both may
spread one character over several tokens. So nothing is read off the pieces: every prefix of the
answer is decoded, which tells the characters each token completed; words are then cut in the
decoded text. A word is a run of letters and digits (with inner apostrophes, hyphens, points), a run
of other signs, or one character of a script written without spaces.

It needs a tokenizer's ``decode`` and nothing else of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Protocol

from llava_lab.results import Word

UNFINISHED = "\ufffd"  # what decoding shows for bytes that are not a whole character yet

_SPACELESS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han
_LETTER = rf"[^\W{_SPACELESS}]"
_WORD = re.compile(rf"[{_SPACELESS}]|{_LETTER}+(?:['’.,:-]{_LETTER}+)*|[^\w\s]+")


class Decoder(Protocol):
    """The one thing asked of a tokenizer here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


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
    owners = [next((number for number, (_, stop) in enumerate(spans) if stop > at), None) for at in begins]
    words: list[Word] = []
    for number, (lo, hi) in enumerate(spans):
        tokens = [i for i, owner in enumerate(owners) if owner == number]
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
        return b"".join(self.pieces[one] for one in token_ids).decode("utf-8", "replace")

    def words(self, token_ids: Sequence[int], start: int) -> tuple[Word, ...]:
        return group_words(self, token_ids, start)


def _shared(a: str, b: str) -> int:
    """Length of the common beginning of two strings."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
