"""One address of an OpenAI-compatible server: requests with a budget, retries, and a key that stays unseen.

It sends JSON and gives back JSON. It knows nothing of pictures or answers; `BlackBox` does.

- **Key.** Read from the environment for every request, never kept on an object, and cut out of whatever a server
  sends back. Plain http to another machine carries it only if its variable was named. Redirects are never followed.
- **Budget.** Every request that leaves counts, retries too, for a retry may be charged as well.
- **Retries.** 408, 429, 5xx, time-outs, broken connections and damaged JSON, with doubling pauses or the server's
  own ``Retry-After``. Everything else is the user's to mend and is said at once.

The standard library's client is used: nothing to install, and each of these rules is in sight.

What an OpenAI-compatible server answers, as plain data, and a folder that remembers it.

A reply is read once, here, and nothing of the server's JSON goes further: text, tokens with their
log-probabilities where the server gives them, and what was used. Tokens are compared by their bytes, since a
server gives no numbers for them; `token_id` turns bytes into the number that a `Run` holds.

The folder is keyed by what was asked (`BlackBox` makes the key). It holds neither pictures nor questions, and
never a key to a server.

Source: OpenAI's chat completions (``choices[].message.content``, ``choices[].logprobs.content[].top_logprobs``),
which vLLM, llama.cpp's server and Ollama follow.
"""

from __future__ import annotations

import email.utils
import hashlib
import http.client
import ipaddress
import json
import logging
import math
import os
import random
import re
import ssl
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llava_lab.errors import BudgetError, EndpointError, OptionError

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
TRANSIENT = (408, 409, 429, 500, 502, 503, 504, 529)
LARGEST = 32 * 2**20  # bytes of a reply; an answer has a few thousand
FIRST_PAUSE = 0.5  # seconds, doubled each time
LEAST_SECRET = 8  # characters; what is shorter ("EMPTY", "x") is no secret and may be part of any text
EXAMPLE = "http://127.0.0.1:8000/v1"

# What newer or smaller servers refuse, and what is sent instead of it: nothing, or another name.
INSTEAD = {"max_tokens": "max_completion_tokens", "top_logprobs": None, "logprobs": None, "seed": None, "temperature": None}


@dataclass(frozen=True)
class _Outcome:
    """What became of one request: its JSON, or a message and whether to try again, after how long."""

    data: dict[str, Any] | None = None
    message: str = ""
    again: bool = False
    wait: float | None = None  # seconds, as the server asks
    refused: str = ""  # what a 400 said, for `INSTEAD`


class _StayHere(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other: nothing is sent to where it points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Endpoint:
    """``POST {base_url}/chat/completions``."""

    def __init__(
        self,
        base_url: str,
        *,
        max_requests: int,
        key_variable: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        longest_wait: float = 60.0,
    ) -> None:
        self.base_url = _checked(base_url)
        self.key_variable = key_variable or KEY_VARIABLE
        self.named = key_variable is not None
        self.timeout, self.retries, self.longest_wait = timeout, retries, longest_wait
        self.max_requests = max_requests
        self.requests = 0  # sent so far
        self.left_out: tuple[str, ...] = ()  # of `INSTEAD`, what this server refused
        self._lock = threading.Lock()
        local = _is_local(self.base_url)
        proxies = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(_StayHere, *proxies)

    @property
    def left(self) -> int:
        """Requests that may still be sent."""
        return max(self.max_requests - self.requests, 0)

    def post(self, body: dict[str, Any], stop: threading.Event | None = None) -> dict[str, Any]:
        """The server's JSON for `body`. `stop`, when set, ends the waiting between retries.

        Raises EndpointError (unreachable, refused, not an answer), BudgetError (no request left).
        """
        stop = stop or threading.Event()
        for _ in range(len(INSTEAD) + 1):
            outcome = self._patiently(json.dumps(self._as_taken(body)).encode(), stop)
            if outcome.data is not None:
                return outcome.data
            if not self._leave_out(body, outcome.refused):
                raise EndpointError(outcome.message)
        raise EndpointError(f"{self.base_url} refused every form of the request")

    def _patiently(self, data: bytes, stop: threading.Event) -> _Outcome:
        for attempt in range(self.retries + 1):
            if stop.is_set():
                return _Outcome(message="stopped")
            self._count()
            outcome = self._send(data)
            if not outcome.again:
                return outcome
            wait = outcome.wait if outcome.wait is not None else FIRST_PAUSE * 2**attempt * random.uniform(0.75, 1.25)
            if outcome.wait is not None and wait > self.longest_wait:
                return _Outcome(
                    message=f"{outcome.message}; it asks to wait {wait:.0f} s, more than {self.longest_wait:g}; try later"
                )
            if attempt < self.retries:
                logger.info("%s; trying again in %.1f s (%d of %d)", outcome.message, wait, attempt + 1, self.retries)
                stop.wait(min(wait, self.longest_wait))
        return _Outcome(message=f"{outcome.message}; tried {self.retries + 1} times")

    def _count(self) -> None:
        with self._lock:
            if self.requests >= self.max_requests:
                raise BudgetError(
                    f"all {self.max_requests} requests are spent; every reply is kept, so with a larger max_requests "
                    "the same call goes on where it stopped"
                )
            self.requests += 1

    def _send(self, data: bytes) -> _Outcome:
        """One request. No exception of the HTTP client leaves here: it could carry the headers."""
        key = self._key()
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "llava-lab"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.base_url}/chat/completions", data, headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            try:
                with self._opener.open(request, timeout=self.timeout) as reply:
                    status, about, text = reply.status, reply.headers, _read(reply, deadline)
            except urllib.error.HTTPError as error:
                with error:
                    status, about, text = error.code, error.headers, _read(error, deadline)
        except (OSError, http.client.HTTPException, EndpointError) as error:
            return self._unreached(error)
        return self._judge(status, about, _without(text, key), key)

    def _judge(self, status: int, headers: Message, text: str, key: str) -> _Outcome:
        if status == 200:
            return self._read_json(headers, text, key)
        said = _without(_reason(text), key)
        where = f"{self.base_url} answered {status}" + (f" ({said})" if said else "")
        if 300 <= status < 400:
            to = urlsplit(headers.get("Location") or "")
            host = to.netloc.rpartition("@")[2]
            place = f"{to.scheme}://{host}{to.path}".removesuffix("/chat/completions") if host else "elsewhere"
            place = _without(place, key)
            return _Outcome(
                message=f"{where} and sends on to {place}, which is not followed; if that is right, give it as base_url"
            )
        if status in (401, 403):
            sent = "does not accept the key in" if key else "wants a key, and none was sent; set the variable"
            return _Outcome(message=f"{where}: it {sent} {self.key_variable}")
        if status == 404:
            return _Outcome(message=f"{where}: no such model or address; base_url usually ends in /v1")
        if status == 429 and "insufficient_quota" in text:
            return _Outcome(message=f"{where}: the account has no credit left")
        if status in TRANSIENT:
            return _Outcome(message=where, again=True, wait=_retry_after(headers))
        return _Outcome(message=where, refused=text if status in (400, 422) else "")

    def _read_json(self, headers: Message, text: str, key: str) -> _Outcome:
        kind = headers.get_content_type()
        if headers.get("Content-Type") and "json" not in kind:
            return _Outcome(
                message=f"{self.base_url} answered with {kind}, expected application/json; base_url usually ends in /v1"
            )
        try:
            data = json.loads(text)
        except ValueError:
            return _Outcome(message=f"{self.base_url} answered with damaged JSON of {len(text)} characters", again=True)
        if not isinstance(data, dict):
            return _Outcome(message=f"{self.base_url} answered with a JSON {type(data).__name__}, expected an object")
        if data.get("error") and not data.get("choices"):
            return _Outcome(message=f"{self.base_url} answered with an error ({_reason(text)})")
        return _Outcome(data=_scrubbed(data, key))

    def _unreached(self, error: Exception) -> _Outcome:
        cause = getattr(error, "reason", error)
        if isinstance(cause, ConnectionRefusedError):
            return _Outcome(message=f"nothing listens at {self.base_url}; is the server started, and is the port right?")
        if isinstance(cause, (ssl.SSLError, ssl.CertificateError)):
            return _Outcome(message=f"{self.base_url} has no certificate this machine trusts ({type(cause).__name__})")
        if isinstance(cause, TimeoutError):
            return _Outcome(message=f"{self.base_url} gave no answer within {self.timeout:g} s", again=True)
        if isinstance(cause, (ConnectionError, http.client.HTTPException)):
            return _Outcome(message=f"the connection to {self.base_url} broke ({type(cause).__name__})", again=True)
        if isinstance(cause, EndpointError):
            return _Outcome(message=str(cause))
        return _Outcome(message=f"{self.base_url} cannot be reached ({type(cause).__name__})")

    def _key(self) -> str:
        """The key to send now, or nothing."""
        key = os.environ.get(self.key_variable, "").strip()
        if self.named and not key:
            raise EndpointError(f"the variable {self.key_variable} holds no key; set it before asking")
        if not key.isascii() or not key.isprintable():
            raise EndpointError(f"the variable {self.key_variable} holds characters that no key has; set it again")
        safe = self.base_url.startswith("https://") or _is_local(self.base_url) or self.named
        return key if safe else ""

    def _as_taken(self, body: dict[str, Any]) -> dict[str, Any]:
        """`body` without what this server refused."""
        kept = {name: value for name, value in body.items() if name not in self.left_out}
        renamed = {INSTEAD[name]: body[name] for name in self.left_out if name in body and INSTEAD[name]}
        return kept | {str(name): value for name, value in renamed.items()}

    def _leave_out(self, body: dict[str, Any], said: str) -> bool:
        """Whether a refusal names something that can be left out; from now on it is."""
        for name in INSTEAD:
            if name in body and name not in self.left_out and re.search(rf"\b{name}\b", said):
                both = ("top_logprobs", "logprobs") if "logprobs" in name else (name,)  # neither goes without the other
                with self._lock:
                    self.left_out = tuple(dict.fromkeys((*self.left_out, *both)))
                logger.info("%s takes no %s; asking without", self.base_url, " and ".join(both))
                return True
        return False


def _checked(base_url: str) -> str:
    if not isinstance(base_url, str) or not base_url.strip():
        raise OptionError(f"a model behind a server needs base_url, the address that pictures are sent to, such as {EXAMPLE!r}")
    try:
        parts = urlsplit(base_url.strip())
        fine, _ = parts.scheme in ("http", "https") and bool(parts.hostname), parts.port
    except ValueError:
        fine, parts = False, urlsplit("")
    if parts.username or parts.password or parts.query or parts.fragment:  # not repeated: it may hold a secret
        raise OptionError("base_url must hold no user, password, query or fragment; a key is read from the environment")
    if not fine:
        raise OptionError(f"base_url must be an address such as {EXAMPLE!r}, got {base_url!r}")
    return base_url.strip().rstrip("/").removesuffix("/chat/completions")


def _is_local(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, and any name may point anywhere
        return False


def _read(reply: Any, deadline: float) -> str:
    """The body, within the time allowed in all: a server that drips must not hold us for ever."""
    parts: list[bytes] = []
    size = 0
    while part := reply.read1(65536):
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            raise EndpointError(f"a reply of more than {LARGEST:,} bytes is no answer")
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(parts).decode("utf-8", "replace")


def _without(text: str, key: str) -> str:
    return text.replace(key, "[key]") if len(key) >= LEAST_SECRET else text


def _scrubbed(value: Any, key: str) -> Any:
    """JSON without the key, also where it is spelt in bytes, as tokens are."""
    if len(key) < LEAST_SECRET:
        return value
    if isinstance(value, str):
        return _without(value, key)
    if isinstance(value, dict):
        return {_without(name, key): _scrubbed(one, key) for name, one in value.items()}
    if isinstance(value, list):
        spelt = all(isinstance(one, int) and 0 <= one < 256 for one in value) and key.encode() in bytes(value)
        return None if spelt else [_scrubbed(one, key) for one in value]
    return value


def _reason(text: str) -> str:
    """The server's own words in one short line."""
    try:
        said = json.loads(text)
        for name in ("error", "message", "detail"):
            said = said.get(name, said) if isinstance(said, dict) else said
    except ValueError:
        said = re.sub(r"<[^>]*>", " ", text)
    return " ".join(str(said or "").split())[:200]


def _retry_after(headers: Message) -> float | None:
    """``Retry-After`` in seconds or as a date; None where it is missing or makes no sense."""
    text = (headers.get("Retry-After") or "").strip()
    if not text:
        return None
    try:
        return max(float(text), 0.0) if text.replace(".", "", 1).isdigit() else max(
            email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0
        )  # fmt: skip
    except (ValueError, TypeError):
        return None


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
