"""What a server answered: read once from its JSON, whichever dialect it speaks, and kept by what was asked.

`read_reply` takes text, tokens with their log-probabilities where the server gives them, and what was used; it tells
an answer from a refusal, from thoughts without one, and from a reply that was cut off before its first word. Tokens
are compared by their bytes, since a server gives no numbers for them; `token_id` turns bytes into the number that a
`Run` holds. `ReplyCache` remembers replies, without pictures, questions or key.

Whatever a server sends is held against the same limits as a file of the cache: see `Reply` and `Token`.

    reply = read_reply(json.loads(body))

Source: OpenAI's chat completions (``choices[].message.content``, ``choices[].logprobs.content[].top_logprobs``), and
where others differ: ``reasoning_content`` (llama.cpp, LM Studio), ``reasoning`` (vLLM, Ollama, OpenRouter), end marks
among the tokens (vLLM), a choice with an ``error`` (OpenRouter).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_lab.errors import EndpointError
from llava_lab.results.save import whole_file

FORMAT = 1  # of the files in the folder
LARGEST = 16 * 2**20  # bytes of a reply or of its file; an answer has a few thousand
MOST_CHARACTERS = 100_000
MOST_VALUES = 1_000_000  # of its JSON, counted by commas: 4,096 tokens with the twenty likeliest and their bytes have 700,000
MOST_TOKENS = 4096  # and words; an answer about a picture has a few hundred
MOST_TOP = 64  # likeliest tokens read at one place
MOST_PIECE = 1000  # bytes of a token; the longest of real tokenizers are runs of a hundred blanks
MOST_END_MARKS = 8  # tokens after the text, as "</s>"
MOST_USED = 10**9  # tokens that a count may claim
LONGEST_REASON = 200  # characters of a server's own words in a message of ours
UNLIKELY = -9999.0  # OpenAI's own mark for a token outside its list
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
STOPPED = dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "end_turn"), "eos") | {"max_tokens": "length"}

Hide = Callable[[str], str]  # a text without the key


@dataclass(frozen=True)
class Token:
    """One token of an answer: its bytes, its natural log-probability, and the likeliest tokens at its place."""

    piece: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()

    def __post_init__(self) -> None:
        if not math.isfinite(self.logprob) or not all(math.isfinite(value) for _, value in self.top):
            raise ValueError("a log-probability that is not finite")


@dataclass(frozen=True)
class Reply:
    """One answer. `tokens` is None where the server gave no log-probabilities that spell the text.

    Raises EndpointError for more than an answer can hold, ValueError for what could not be kept or read.
    """

    text: str
    tokens: tuple[Token, ...] | None
    stopped: str  # "eos" | "length" | the server's own word
    used: tuple[int, int] | None  # tokens read and written, as the server counts them
    silence: str = ""  # why there is no text, where the reply says it

    def __post_init__(self) -> None:
        _check_length(self.text)
        (self.text + self.stopped + self.silence).encode()
        if self.tokens and not _spell(self.tokens, self.text):
            raise ValueError("tokens that do not spell the text")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file, bytes as hexadecimal text."""
        tokens = self.tokens and [
            [token.piece.hex(), token.logprob, [[piece.hex(), logprob] for piece, logprob in token.top]] for token in self.tokens
        ]
        data = {"format": FORMAT, "text": self.text, "tokens": tokens, "stopped": self.stopped, "used": self.used}
        return data | ({"silence": self.silence} if self.silence else {})

    @classmethod
    def from_dict(cls, data: Any) -> Reply:
        """Raises some exception on anything that `to_dict` did not write."""
        text, stopped, silence = data["text"], data["stopped"], data.get("silence", "")
        if data["format"] != FORMAT or not all(isinstance(value, str) for value in (text, stopped, silence)):
            raise ValueError("not a reply of this format")
        tokens = data["tokens"] and tuple(
            Token(bytes.fromhex(piece), float(logprob), tuple((bytes.fromhex(other), float(value)) for other, value in top))
            for piece, logprob, top in data["tokens"]
        )
        return cls(text, tokens or None, stopped, data["used"] and _used(*data["used"]), silence)


def token_id(piece: bytes) -> int:
    """A number for a token's bytes, the same everywhere; it is not the server's own."""
    return int.from_bytes(hashlib.sha256(piece).digest()[:8], "big") >> 1


# -- a server's JSON ------------------------------------------------------------------------


def read_json(text: str, each: Callable[[dict[str, Any]], Any]) -> Any:
    """A server's JSON, each of its objects through `each`, which may stop it; None for what is none.

    Raises EndpointError for more values than an answer can have, before any is read.
    """
    if (count := text.count(",")) > MOST_VALUES:
        raise EndpointError(f"got a reply of {count:,} values, expected at most {MOST_VALUES:,}; ask for a shorter answer")
    try:
        return json.loads(text, object_hook=each)
    except (ValueError, RecursionError):
        return None


def read_reply(data: Any, hide: Hide = str) -> Reply:
    """A server's JSON as a `Reply`, each text through `hide`. Raises EndpointError on what is not a chat completion."""
    try:
        choice = data["choices"][0]
        message = choice["message"]
        content = _content(message.get("content"))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise EndpointError(
            "expected a chat completion with choices[0].message.content, got JSON without it "
            f"({type(error).__name__}: {error}); is the address one of an OpenAI-compatible server?"
        ) from None
    finish = short(choice.get("finish_reason") or "stop", hide).lower()
    stopped = STOPPED.get(finish, finish)
    bare = content.strip()
    _check_length(bare)
    # only thoughts: closed with nothing after them, or never closed
    thoughts = bare.endswith("</think>") or (bare.startswith("<think>") and "</think>" not in bare)
    text = "" if thoughts else hide(bare)
    tokens = _read_tokens(choice, text, hide)
    silence = "" if text else _silence(message, thoughts, stopped, hide)
    try:
        used = _used(data["usage"]["prompt_tokens"], data["usage"]["completion_tokens"])
    except (KeyError, TypeError, ValueError):
        used = None
    return Reply(text, tokens or None, stopped, used, silence)


def short(value: Any, hide: Hide) -> str:
    """A server's own words in one short line. The key is hidden before the cut, which could leave half of it."""
    text = " ".join(_whole(str(value)).split())
    return hide(text)[:LONGEST_REASON] if len(text) < MOST_CHARACTERS else ""


def _content(content: Any) -> str:
    """The answer's text, also from parts, as some servers send it."""
    if isinstance(content, list):
        content = "".join(part.get("text") or "" if isinstance(part, dict) else part for part in content)
    return _whole(content or "")


def _check_length(text: str) -> None:
    if len(text) > MOST_CHARACTERS or len(text.split()) > MOST_TOKENS:
        most = f"{MOST_CHARACTERS:,} and {MOST_TOKENS:,} words"
        raise EndpointError(f"got an answer of {len(text):,} characters, expected at most {most}; ask for a shorter one")


def _silence(message: Any, thoughts: bool, stopped: str, hide: Hide) -> str:
    """Why a reply has no text, and what to do."""
    if refusal := message.get("refusal"):
        return f"it refused ({short(refusal, hide)}); ask otherwise"
    cut = stopped == "length"
    if thoughts or any(message.get(name) for name in THOUGHTS):
        when = "the tokens ran out while it was thinking" if cut else "it gave thoughts and no answer"
        return f"{when}; ask for more tokens, or turn its thinking off"
    if cut:
        return "it was cut off before its first word; ask for more tokens"
    if message.get("tool_calls"):
        return "it called a tool instead; ask otherwise"
    return ""


def _read_tokens(choice: Any, text: str, hide: Hide) -> tuple[Token, ...] | None:
    """The answer's tokens if they spell it; end marks that some servers list are dropped, leading space is kept."""
    try:
        listed = (choice.get("logprobs") or {}).get("content") or []
        if len(listed) > MOST_TOKENS:
            return None
        tops = [(token.get("top_logprobs") or ())[:MOST_TOP] for token in listed]
        tokens = [
            Token(*_piece(one, hide), tuple(_piece(other, hide) for other in top)) for one, top in zip(listed, tops, strict=True)
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    for _ in range(MOST_END_MARKS + 1):
        if _spell(tokens, text):
            return tuple(tokens)
        del tokens[-1:]
    return None


def _spell(tokens: Sequence[Token], text: str) -> bool:
    return b"".join(token.piece for token in tokens).decode("utf-8", "replace").strip() == text.strip()


def _piece(token: Any, hide: Hide) -> tuple[bytes, float]:
    """A token's bytes and its log-probability."""
    numbers = token.get("bytes")
    # as a list, for `bytes` of one number would be that many zeros
    piece = bytes(list(numbers)) if numbers else _whole(token["token"]).encode()
    if len(piece) > MOST_PIECE:
        raise ValueError("more than a token")
    logprob = float(token["logprob"])
    shown = hide(piece.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
    return shown, logprob if math.isfinite(logprob) else UNLIKELY


def _whole(text: str) -> str:
    """`text` with halves of surrogate pairs joined, or marked where the other half is missing."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _used(read: Any, written: Any) -> tuple[int, int]:
    """Raises ValueError on what is no count."""
    if not all(isinstance(count, (int, float)) and 0 <= count <= MOST_USED for count in (read, written)):
        raise ValueError("a count of tokens that is none")
    return int(read), int(written)


# -- kept -----------------------------------------------------------------------------------


class ReplyCache:
    """Replies by key, in memory and, where a folder is given, on disk."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._replies: dict[str, Reply] = {}

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str) -> Reply | None:
        """The reply kept under `key`, or None; a damaged file counts as none."""
        if key not in self._replies and self.folder is not None:
            try:
                path = self._path(key)
                if not path.is_file() or path.stat().st_size > LARGEST:
                    return None
                self._replies[key] = Reply.from_dict(json.loads(path.read_text("utf-8")))
            except Exception:  # whatever is wrong with a file that anyone may have changed, its question is asked again
                return None
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply. Raises EndpointError where the folder cannot be written."""
        self._replies[key] = reply
        if self.folder is None:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with whole_file(path) as temporary:
                temporary.write_text(json.dumps(reply.to_dict(), ensure_ascii=False), "utf-8")
        except OSError as error:
            raise EndpointError(
                f"the reply cannot be kept in {self.folder} ({error.strerror or error}); give cache=FOLDER, or cache=False"
            ) from None

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.json"
