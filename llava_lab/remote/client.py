"""One address of an OpenAI-compatible server: requests with a budget, retries, a key that stays unseen, and the replies.

- **Key.** Read from the environment for every request, never kept on an object, and cut out of whatever a server
  sends back. Plain http to another machine carries it only if its variable was named. Redirects are never followed.
- **Budget.** Every request that leaves counts, retries too, for a retry may be charged as well.
- **Retries.** 408, 429, 5xx, time-outs, broken connections and damaged JSON, with doubling pauses or the server's
  own ``Retry-After``. Everything else is the user's to mend and is said at once.
- **Replies.** Read once, here: text, tokens with their log-probabilities where the server gives them, and what was
  used. Tokens are compared by their bytes, since a server gives no numbers for them; `token_id` turns bytes into the
  number that a `Run` holds. `ReplyCache` remembers replies by what was asked, without pictures, questions or key.

    endpoint = Endpoint("http://127.0.0.1:8000/v1", max_requests=10)
    reply = read_reply(endpoint.post({"model": "name", "messages": [{"role": "user", "content": "Hello"}]}))

Why the standard library and not the official ``openai`` package (tried with 3.57): what it would save is one method
here, `Endpoint._send`. Its time-out starts anew with every byte, so a server that drips is never left; its errors carry
the request with the key in it; under it httpx writes a reply's headers, and a key echoed in them, to the debug log; and
importing it takes seconds. Counting, pauses, messages and the cutting out of the key would stay as they are.

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
from llava_lab.results.save import whole_file

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
TRANSIENT = (408, 409, 429, 500, 502, 503, 504, 529)
LARGEST = 32 * 2**20  # bytes of a reply; an answer has a few thousand
FIRST_PAUSE = 0.5  # seconds, doubled each time
LONGEST_PAUSE = 60.0  # seconds; a server that asks for more is not waited for
SHORTEST_SECRET = 8  # characters; what is shorter ("EMPTY", "x") is no secret and may be part of any text
EXAMPLE = "http://127.0.0.1:8000/v1"

# What newer or smaller servers refuse, and what is sent instead of it: nothing, or another name.
INSTEAD = {"max_tokens": "max_completion_tokens", "top_logprobs": None, "logprobs": None, "seed": None, "temperature": None}


@dataclass(frozen=True)
class Failure:
    """Why one request gave no answer, and whether another may."""

    message: str
    passing: bool = False  # trying again may help
    wait: float | None = None  # seconds until then, as the server asks
    refusal: str = ""  # what a 400 says, which may name one of `INSTEAD`


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other: nothing is sent to where it points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Endpoint:
    """``POST {base_url}/chat/completions``."""

    def __init__(
        self, base_url: str, *, max_requests: int, key_variable: str | None = None, timeout: float = 60.0, retries: int = 4
    ) -> None:
        self.base_url = _checked(base_url)
        self.key_variable = key_variable or KEY_VARIABLE
        self.key_is_named = key_variable is not None
        self.timeout, self.retries = timeout, retries
        self.max_requests = max_requests
        self.requests = 0  # sent so far
        self.left_out: tuple[str, ...] = ()  # of `INSTEAD`, what this server refused
        self._lock = threading.Lock()
        proxies = [urllib.request.ProxyHandler({})] if _is_local(self.base_url) else []
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)

    @property
    def left(self) -> int:
        """Requests that may still be sent."""
        return max(self.max_requests - self.requests, 0)

    def key(self) -> str:
        """The key to send now, or nothing. Raises EndpointError where the named variable holds none, or no possible one."""
        key = os.environ.get(self.key_variable, "").strip()
        if self.key_is_named and not key:
            raise EndpointError(f"the variable {self.key_variable} holds no key; set it before asking")
        if not key.isascii() or not key.isprintable():
            raise EndpointError(f"the variable {self.key_variable} holds characters that no key has; set it again")
        safe = self.base_url.startswith("https://") or _is_local(self.base_url) or self.key_is_named
        return key if safe else ""

    def post(self, body: dict[str, Any], stop: threading.Event | None = None) -> dict[str, Any]:
        """The server's JSON for `body`. `stop`, when set, ends the waiting between retries.

        Raises EndpointError (unreachable, refused, not an answer), BudgetError (no request left).
        """
        stop = stop or threading.Event()
        tries = 0
        while not stop.is_set():
            self._count()
            outcome = self._send(json.dumps(self._as_taken(body)).encode())
            if isinstance(outcome, dict):
                return outcome
            if self._leave_out(body, outcome.refusal):
                tries = 0
                continue
            if not outcome.passing:
                raise EndpointError(outcome.message)
            if outcome.wait is not None and outcome.wait > LONGEST_PAUSE:
                asked = f"it asks to wait {outcome.wait:.0f} s, more than {LONGEST_PAUSE:g}; try later"
                raise EndpointError(f"{outcome.message}; {asked}")
            tries += 1
            if tries > self.retries:
                raise EndpointError(f"{outcome.message}; tried {tries} times")
            pause = FIRST_PAUSE * 2 ** (tries - 1) * random.uniform(0.75, 1.25) if outcome.wait is None else outcome.wait
            logger.info("%s; trying again in %.1f s (%d of %d)", outcome.message, pause, tries, self.retries)
            stop.wait(min(pause, LONGEST_PAUSE))
        raise EndpointError("stopped")

    def _count(self) -> None:
        with self._lock:
            if self.requests >= self.max_requests:
                raise BudgetError(
                    f"all {self.max_requests} requests are spent; every reply is kept, so with a larger max_requests "
                    "the same call goes on where it stopped"
                )
            self.requests += 1

    def _send(self, data: bytes) -> dict[str, Any] | Failure:
        """One request. No exception of the HTTP client leaves here: it could carry the headers."""
        key = self.key()
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "llava-lab"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.base_url}/chat/completions", data, headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            try:
                reply: Any = self._opener.open(request, timeout=self.timeout)
            except urllib.error.HTTPError as error:
                reply = error  # an answer too: it has a status, headers and a body
            with reply:
                status, about, text = reply.status, reply.headers, _read(reply, deadline)
        except (OSError, http.client.HTTPException, EndpointError) as error:
            return self._unreached(error)
        return self._judge(status, about, without(key, text), key)

    def _judge(self, status: int, headers: Message, text: str, key: str) -> dict[str, Any] | Failure:
        if status == 200:
            return self._read_json(headers, text, key)
        reason = without(key, _reason(text))
        where = f"{self.base_url} answered {status}" + (f" ({reason})" if reason else "")
        if 300 <= status < 400:
            to = urlsplit(headers.get("Location") or "")
            host = to.netloc.rpartition("@")[2]
            place = f"{to.scheme}://{host}{to.path}".removesuffix("/chat/completions") if host else "elsewhere"
            sends = f"sends on to {without(key, place)}, which is not followed"
            return Failure(f"{where} and {sends}; if that is right, give it as base_url")
        if status in (401, 403):
            wrong = "does not accept the key in" if key else "wants a key, and none was sent; set the variable"
            return Failure(f"{where}: it {wrong} {self.key_variable}")
        if status == 404:
            return Failure(f"{where}: no such model or address; base_url usually ends in /v1")
        if status == 429 and "insufficient_quota" in text:
            return Failure(f"{where}: the account has no credit left")
        if status in TRANSIENT:
            return Failure(where, passing=True, wait=retry_after(headers))
        return Failure(where, refusal=text if status in (400, 422) else "")

    def _read_json(self, headers: Message, text: str, key: str) -> dict[str, Any] | Failure:
        answered = f"{self.base_url} answered with"
        kind = headers.get_content_type()
        if headers.get("Content-Type") and "json" not in kind:
            return Failure(f"{answered} {kind}, expected application/json; base_url usually ends in /v1")
        try:
            data = json.loads(text)
        except ValueError:
            return Failure(f"{answered} damaged JSON of {len(text)} characters", passing=True)
        if not isinstance(data, dict):
            return Failure(f"{answered} a JSON {type(data).__name__}, expected an object")
        if data.get("error") and not data.get("choices"):
            return Failure(f"{answered} an error ({without(key, _reason(text))})")
        return without(key, data)

    def _unreached(self, error: Exception) -> Failure:
        cause = getattr(error, "reason", error)
        if isinstance(cause, ConnectionRefusedError):
            return Failure(f"nothing listens at {self.base_url}; is the server started, and is the port right?")
        if isinstance(cause, (ssl.SSLError, ssl.CertificateError)):
            return Failure(f"{self.base_url} has no certificate this machine trusts ({type(cause).__name__})")
        if isinstance(cause, TimeoutError):
            return Failure(f"{self.base_url} gave no answer within {self.timeout:g} s", passing=True)
        if isinstance(cause, (ConnectionError, http.client.HTTPException)):
            return Failure(f"the connection to {self.base_url} broke ({type(cause).__name__})", passing=True)
        if isinstance(cause, EndpointError):
            return Failure(str(cause))
        return Failure(f"{self.base_url} cannot be reached ({type(cause).__name__})")

    def _as_taken(self, body: dict[str, Any]) -> dict[str, Any]:
        """`body` without what this server refused, or with it under another name."""
        names = {name: INSTEAD[name] if name in self.left_out else name for name in body}
        return {name: body[old] for old, name in names.items() if name}

    def _leave_out(self, body: dict[str, Any], refusal: str) -> bool:
        """Whether `refusal` names something that can be left out; from now on it is."""
        for name in INSTEAD:
            if name in body and name not in self.left_out and re.search(rf"\b{name}\b", refusal):
                both = ("top_logprobs", "logprobs") if "logprobs" in name else (name,)  # neither goes without the other
                with self._lock:
                    self.left_out = tuple(dict.fromkeys((*self.left_out, *both)))
                logger.info("%s takes no %s; asking without", self.base_url, " and ".join(both))
                return True
        return False


def without(key: str, value: Any) -> Any:
    """Text or JSON without the key, also where it is spelt in bytes, as tokens are."""
    if len(key) < SHORTEST_SECRET:
        return value
    if isinstance(value, str):
        return value.replace(key, "[key]")
    if isinstance(value, dict):
        return {without(key, name): without(key, item) for name, item in value.items()}
    if isinstance(value, list):
        spells_it = all(isinstance(item, int) and 0 <= item < 256 for item in value) and key.encode() in bytes(value)
        return None if spells_it else [without(key, item) for item in value]
    return value


def retry_after(headers: Message) -> float | None:
    """``Retry-After`` in seconds or as a date; None where it is missing or makes no sense."""
    text = (headers.get("Retry-After") or "").strip()
    try:
        if text.replace(".", "", 1).isdigit():
            return float(text)
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None


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
    body = b""
    while part := reply.read1(65536):
        body += part
        if len(body) > LARGEST:
            raise EndpointError(f"a reply of more than {LARGEST:,} bytes is no answer")
        if time.monotonic() > deadline:
            raise TimeoutError
    return body.decode("utf-8", "replace")


def _reason(text: str) -> str:
    """The server's own words in one short line."""
    try:
        reason = json.loads(text)
        for name in ("error", "message", "detail"):
            reason = reason.get(name, reason) if isinstance(reason, dict) else reason
    except ValueError:
        reason = re.sub(r"<[^>]*>", " ", text)
    return " ".join(str(reason or "").split())[:200]


# -- what comes back ------------------------------------------------------------------------

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
        """Plain data for a JSON file, bytes as hexadecimal text."""
        tokens = self.tokens and [
            [token.piece.hex(), token.logprob, [[piece.hex(), logprob] for piece, logprob in token.top]] for token in self.tokens
        ]
        return {"format": FORMAT, "text": self.text, "tokens": tokens, "stopped": self.stopped, "used": self.used}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Reply:
        """Raises KeyError, TypeError or ValueError on anything that `to_dict` did not write."""
        if data["format"] != FORMAT:
            raise ValueError(data["format"])
        tokens = data["tokens"] and tuple(
            Token(bytes.fromhex(piece), float(logprob), tuple((bytes.fromhex(other), float(value)) for other, value in top))
            for piece, logprob, top in data["tokens"]
        )
        used = data["used"] and (int(data["used"][0]), int(data["used"][1]))
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
    try:
        used = int(data["usage"]["prompt_tokens"]), int(data["usage"]["completion_tokens"])
    except (KeyError, TypeError, ValueError):
        used = None
    return Reply(content.strip(), _read_tokens(choice, content), {"stop": "eos"}.get(finish, finish), used)


def _read_tokens(choice: Any, content: str) -> tuple[Token, ...] | None:
    """The answer's tokens if they spell it; end marks that some servers list are dropped, leading space is kept."""
    try:
        listed = (choice.get("logprobs") or {}).get("content") or ()
        tokens = [Token(*_piece(entry), tuple(map(_piece, entry.get("top_logprobs") or ()))) for entry in listed]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    while tokens and b"".join(token.piece for token in tokens).decode("utf-8", "replace").strip() != content.strip():
        tokens.pop()
    return tuple(tokens) or None


def _piece(token: Any) -> tuple[bytes, float]:
    """A token's bytes and its log-probability."""
    piece = bytes(token["bytes"]) if token.get("bytes") else str(token["token"]).encode()
    logprob = float(token["logprob"])
    return piece, logprob if math.isfinite(logprob) else UNLIKELY


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
                self._replies[key] = Reply.from_dict(json.loads(self._path(key).read_text("utf-8")))
            except (OSError, ValueError, KeyError, TypeError, IndexError):
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
