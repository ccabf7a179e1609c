"""What an OpenAI-compatible server answers, as plain data, and a folder that remembers it.

A reply is read once, here, and nothing of the server's JSON goes further: text, tokens with their
log-probabilities where the server gives them, and what was used. Tokens are compared by their bytes, since a
server gives no numbers for them; `token_id` turns bytes into the number that a `Run` holds.

The folder is keyed by what was asked (`BlackBox` makes the key). It holds neither pictures nor questions, and
never a key to a server.

Source: OpenAI's chat completions (``choices[].message.content``, ``choices[].logprobs.content[].top_logprobs``),
which vLLM, llama.cpp's server and Ollama follow.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_lab.errors import EndpointError

FORMAT = 1  # of the files in the folder
UNLIKELY = -9999.0  # OpenAI's own mark for a token outside its list


@dataclass(frozen=True)
class Token:
    """One token of an answer: its bytes, its natural log-probability, and the likeliest tokens at its place."""

    piece: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class Reply:
    """One answer. `tokens` is None where the server gave no log-probabilities that spell the text."""

    text: str
    tokens: tuple[Token, ...] | None
    stopped: str  # "eos" | "length" | the server's own word
    used: tuple[int, int] | None  # tokens read and written, as the server counts them

    def to_dict(self) -> dict[str, Any]:
        tokens = None if self.tokens is None else [
            [one.piece.hex(), one.logprob, [[piece.hex(), value] for piece, value in one.top]] for one in self.tokens
        ]  # fmt: skip
        return {"format": FORMAT, "text": self.text, "tokens": tokens, "stopped": self.stopped, "used": self.used}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Reply:
        """Raises KeyError, TypeError or ValueError on anything that `to_dict` did not write."""
        if data["format"] != FORMAT:
            raise ValueError(data["format"])
        tokens = data["tokens"] if data["tokens"] is None else tuple(
            Token(bytes.fromhex(piece), float(value), tuple((bytes.fromhex(other), float(its)) for other, its in top))
            for piece, value, top in data["tokens"]
        )  # fmt: skip
        used = None if data["used"] is None else (int(data["used"][0]), int(data["used"][1]))
        return cls(str(data["text"]), tokens, str(data["stopped"]), used)


def token_id(piece: bytes) -> int:
    """A number for a token's bytes, the same everywhere; it is not the server's own."""
    return int.from_bytes(hashlib.sha256(piece).digest()[:8], "big") >> 1


def read_reply(data: Any) -> Reply:
    """A server's JSON as a `Reply`. Raises EndpointError on anything that is not a chat completion."""
    try:
        choice = data["choices"][0]
        message = choice["message"]
        content = message["content"] if message.get("content") is not None else ""
        if isinstance(content, list):  # parts, as some servers answer
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise TypeError(type(content).__name__)
        finish = str(choice.get("finish_reason") or "stop")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise EndpointError(
            "expected a chat completion with choices[0].message.content, got JSON without it "
            f"({type(error).__name__}: {error}); is the address one of an OpenAI-compatible server?"
        ) from None
    return Reply(content.strip(), _tokens(choice, content), {"stop": "eos"}.get(finish, finish), _used(data))


def _tokens(choice: Any, content: str) -> tuple[Token, ...] | None:
    """The answer's tokens if they spell it; end marks that some servers list are dropped, leading space is kept."""
    try:
        listed = (choice.get("logprobs") or {}).get("content") or ()
        tokens = [Token(*_listed(one), tuple(_listed(other) for other in one.get("top_logprobs") or ())) for one in listed]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    while tokens and b"".join(one.piece for one in tokens).decode("utf-8", "replace").strip() != content.strip():
        tokens.pop()
    return tuple(tokens) or None


def _listed(token: Any) -> tuple[bytes, float]:
    """A token's bytes and its log-probability."""
    piece = bytes(token["bytes"]) if token.get("bytes") else str(token["token"]).encode()
    value = float(token["logprob"])
    return piece, value if math.isfinite(value) else UNLIKELY


def _used(data: Any) -> tuple[int, int] | None:
    try:
        return int(data["usage"]["prompt_tokens"]), int(data["usage"]["completion_tokens"])
    except (KeyError, TypeError, ValueError):
        return None


class ReplyCache:
    """Replies by key, in memory and, where a folder is given, on disk."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._known: dict[str, Reply] = {}

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str) -> Reply | None:
        """The reply kept under `key`, or None; a damaged file counts as none."""
        if key not in self._known and self.folder is not None:
            try:
                self._known[key] = Reply.from_dict(json.loads(self._path(key).read_text("utf-8")))
            except (OSError, ValueError, KeyError, TypeError, IndexError):
                return None
        return self._known.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; on disk by way of a temporary name, so that no half file is ever read."""
        self._known[key] = reply
        if self.folder is None:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(reply.to_dict(), file, ensure_ascii=False)
                os.replace(temporary, path)
            finally:
                Path(temporary).unlink(missing_ok=True)
        except OSError as error:
            raise EndpointError(
                f"the reply cannot be kept in {self.folder} ({error.strerror or error}); give cache=FOLDER, or cache=False"
            ) from None

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.json"
