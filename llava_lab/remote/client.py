"""One address of an OpenAI-compatible server: requests with a budget, retries, a deadline, and a key that stays unseen.

- **Key.** Read from the environment for every request and known only to the thread that sends it. That thread gives
  back a `Reply` or a `Failure` and never an exception, whose frames would hold the key; every text in either has had
  the key cut out (`hiding`) after it was put together and before it was shortened. Plain http to another machine
  carries it only if its variable was named. Redirects are never followed.
- **Time.** `timeout` is for the whole request, from the search for the address to the last byte. Who asks waits that
  long and then shuts the connection, whatever is dripped into it; that works where a time limit on each read does not.
  No other thread runs while Python reads plain JSON, so a reply has a limit of values, and objects let others run.
- **Budget.** Every request that leaves counts, retries too, for a retry may be charged as well.
- **Retries.** 408, 429, 5xx, time-outs, broken connections and damaged JSON, with doubling pauses or the server's
  own ``Retry-After``. Everything else is the user's to mend and is said at once.
- **Options.** What a server refuses is left out or made smaller from then on (`OPTIONS`). Which option that is, is read
  from the field that its error names, and else from its words.

    endpoint = Endpoint("http://127.0.0.1:8000/v1", max_requests=10)
    reply = endpoint.ask({"model": "name", "messages": [{"role": "user", "content": "Hello"}]})

Why the standard library and not the official ``openai`` package (tried with 3.57): what it would save is one method
here, `Endpoint._talk`. Its time-out starts anew with every byte, so a server that drips is never left; its errors carry
the request with the key in it; under it httpx writes a reply's headers, and a key echoed in them, to the debug log; and
importing it takes seconds. Counting, pauses, messages and the cutting out of the key would stay as they are.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import ipaddress
import json
import logging
import os
import queue
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from email.message import Message
from itertools import islice
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from llava_lab.checks import number, whole_number
from llava_lab.errors import BudgetError, EndpointError, OptionError, printable
from llava_lab.remote.replies import LARGEST, MOST_CHARACTERS, Hide, Reply, read_json, read_reply, short

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
TRANSIENT = (408, 409, 429, 500, 502, 503, 504, 529)
NOT_TAKEN = (400, 403, 405, 415, 422, 501)  # may be about an option
NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached", "insufficient_credits")
FIRST_PAUSE = 0.5  # seconds, doubled each time
LONGEST_PAUSE = 60.0  # seconds; a server that asks for more is not waited for
LONGEST_WAIT = 86_400  # seconds for one reply
SHORTEST_SECRET = 8  # characters; what is shorter ("EMPTY", "x") is no secret and may be part of any text
THREAD = "llava-lab request"
EXAMPLE = "http://127.0.0.1:8000/v1"
AT_V1 = "base_url usually ends in /v1"

# What newer or smaller servers refuse, how their errors write it, and what is sent instead: nothing, or another name.
OPTIONS = {
    "top_logprobs": (r"top[\s_-]?log[\s_-]?prob", None),
    "logprobs": (r"(?<!top.)(?<!top)log[\s_-]?prob", None),
    "max_tokens": (r"\bmax[\s_-]?tokens\b", "max_completion_tokens"),
    "temperature": (r"\btemperature\b", None),
    "seed": (r"\bseed\b", None),
    "stream": (r"\bstream\b", None),
}
LISTED = ("top_logprobs", "logprobs")
FEWER = (5, 0)  # likeliest tokens at each place that a server may still list where it refuses more
MOST_TOLD = 1000  # texts of an error that are read; one of a real server has a dozen
FIELDS = ("param", "loc", "field", "parameter")  # of an error: where it is
ECHOES = ("input", "body", "request", "ctx")  # of an error: what was sent, which names everything


@dataclass(frozen=True)
class Failure:
    """Why one request gave no answer, and whether another may."""

    message: str
    passing: bool = False  # trying again may help
    wait: float | None = None  # seconds until then, as the server asks
    refused: tuple[str, ...] = ()  # of `OPTIONS`
    fewer: bool = False  # and the number of likeliest tokens may be what is wrong


class _Line:
    """A connection's socket, which another thread may shut: at once, or as soon as there is one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._shut = False

    def opened(self, connected: socket.socket) -> None:
        with self._lock:
            if self._shut:
                raise TimeoutError
            self._socket = connected

    def still(self, value: dict[str, Any]) -> dict[str, Any]:
        """`value`, while somebody waits for it: as a function of Python's it lets other threads run between two objects."""
        if self._shut:
            raise TimeoutError
        return value

    def shut(self) -> None:
        with self._lock, suppress(OSError):
            self._shut = True
            if self._socket:
                self._socket.shutdown(socket.SHUT_RDWR)


class Endpoint:
    """``POST {base_url}/chat/completions``."""

    def __init__(
        self, base_url: str, *, max_requests: int, key_variable: str | None = None, timeout: float = 60.0, retries: int = 4
    ) -> None:
        """What is no address, no number of requests or no time to wait is refused here (OptionError), for whoever asks."""
        self.base_url = _checked(base_url)
        self.key_variable = key_variable or KEY_VARIABLE
        self.key_is_named = key_variable is not None
        self.timeout, self.retries = number("timeout", timeout), whole_number("retries", retries)
        if not 0 < self.timeout <= LONGEST_WAIT:
            raise OptionError(f"timeout must be seconds above 0 and at most {LONGEST_WAIT:,}, got {timeout!r}")
        self.max_requests = whole_number("max_requests", max_requests, least=1)
        self.requests = 0  # sent so far
        self.left_out: tuple[str, ...] = ()  # of `OPTIONS`, what this server refused
        self.most_listed: int | None = None  # likeliest tokens at each place, where it refused more
        self._lock = threading.Lock()

    @property
    def left(self) -> int:
        """Requests that may still be sent."""
        return max(self.max_requests - self.requests, 0)

    def key(self) -> str:
        """The key to send now, or nothing. Raises EndpointError where the named variable holds none, or no possible one."""
        # what is raised has frames, and no frame here holds the key
        if fault := self._fault_of_key():
            raise EndpointError(f"the variable {self.key_variable} {fault}")
        safe = self.base_url.startswith("https://") or _is_local(self.base_url) or self.key_is_named
        return os.environ.get(self.key_variable, "").strip() if safe else ""

    def _fault_of_key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if self.key_is_named and not key:
            return "holds no key; set it before asking"
        return "" if key.isascii() and key.isprintable() else "holds characters that no key has; set it again"

    def ask(self, body: dict[str, Any], stop: threading.Event | None = None) -> Reply:
        """The server's answer to `body`. `stop`, when set, ends the waiting between retries.

        Raises EndpointError (unreachable, refused, not an answer), BudgetError (no request left).
        """
        stop = stop or threading.Event()
        tries = 0
        while not stop.is_set():
            self.key()
            self._count()
            sent = self._as_taken(body)
            outcome = self._send(json.dumps(sent).encode())
            if isinstance(outcome, Reply):
                return outcome
            if self._leave_out(sent, outcome):
                tries = 0
                continue
            if not outcome.passing:
                raise EndpointError(outcome.message)
            if outcome.wait is not None and outcome.wait > LONGEST_PAUSE:
                asked = f"it asks to wait {outcome.wait:.6g} s, more than {LONGEST_PAUSE:g}; try later"
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

    def _send(self, data: bytes) -> Reply | Failure:
        """One request on a thread of its own, left when its time is up."""
        line = _Line()
        outcomes: queue.SimpleQueue[Reply | Failure] = queue.SimpleQueue()
        threading.Thread(target=lambda: outcomes.put(self._exchange(data, line)), name=THREAD, daemon=True).start()
        try:
            return outcomes.get(timeout=self.timeout)
        except queue.Empty:
            line.shut()
            return self._unreached(TimeoutError())

    def _exchange(self, data: bytes, line: _Line) -> Reply | Failure:
        """Ask, and read what comes. No exception leaves here, for its frames hold the key."""
        hide: Hide = str
        try:
            key = self.key()
            hide = hiding(key)
            status, headers, text = self._talk(key, data, line)
            outcome = self._judge(status, headers, text, read_json(text, line.still), key, hide)
        except Exception as error:  # of the client, the connection, or a reply that nobody thought of
            outcome = self._unreached(error)
        return replace(outcome, message=printable(hide(outcome.message))) if isinstance(outcome, Failure) else outcome

    def _talk(self, key: str, data: bytes, line: _Line) -> tuple[int, Message, str]:
        """Status, headers and body, whatever they are."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "llava-lab"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        url = urlsplit(f"{self.base_url}/chat/completions")
        connection, place, further = _connection(url, self.timeout)
        with closing(connection):
            connection.connect()
            line.opened(connection.sock)
            connection.request("POST", place, data, headers | further)
            reply = connection.getresponse()
            body = bytearray()
            while part := reply.read1(65536):
                body += part
                if len(body) > LARGEST:
                    raise EndpointError(f"a reply of more than {LARGEST:,} bytes is no answer")
            return reply.status, reply.headers, body.decode("utf-8-sig", "replace")

    def _judge(self, status: int, headers: Message, text: str, data: Any, key: str, hide: Hide) -> Reply | Failure:
        answered = f"{self.base_url} answered"
        if 200 <= status < 300:
            if text.lstrip().startswith("data:") or headers.get_content_type() == "text/event-stream":
                return Failure(f"{answered} in pieces although stream: false was sent; it streams in any case, tell it not to")
            if headers.get("Content-Type") and "json" not in headers.get_content_type():
                return Failure(f"{answered} with {headers.get_content_type()}, expected application/json; {AT_V1}")
            if data is None:
                return Failure(f"{answered} with damaged JSON of {len(text)} characters", passing=True)
            if not isinstance(data, dict):
                return Failure(f"{answered} with a JSON {type(data).__name__}, expected an object")
            error = _error_of(data)
            if not error:
                return read_reply(data, hide)
            code = error.get("code") if isinstance(error, dict) else None
            # sent after the work had begun, when the status had gone out
            status = code if isinstance(code, int) and 400 <= code < 600 else 200
        said = text if data is None else data
        reason, told = short(_reason(said), hide), list(islice(_told(said), MOST_TOLD))
        where = f"{answered} {status}" + (f" ({reason})" if reason else "")
        if status == 200:
            return Failure(f"{answered} with an error ({reason})")
        if 300 <= status < 400:
            sends = f"sends on to {_place(headers)}, which is not followed"
            return Failure(f"{where} and {sends}; if that is right, give it as base_url")
        if refused := _named(told) if status in NOT_TAKEN else ():
            # "at most 5" is about the number, "not supported" about the thing
            numbered = any(re.search(r"(?<![\w.-])\d+(?![\w.-])", words) for name, words in told if name not in FIELDS)
            return Failure(where, refused=refused, fewer="top_logprobs" in refused or numbered)
        if status == 401 or (status == 403 and not key):
            wrong = "does not accept the key in" if key else "wants a key, and none was sent; set the variable"
            return Failure(f"{where}: it {wrong} {self.key_variable}")
        if status == 403:
            return Failure(f"{where}: it does not allow this to the key in {self.key_variable}")
        if status == 402 or (status == 429 and any(code in words for _, words in told for code in NO_CREDIT)):
            return Failure(f"{where}: the account has no credit left")
        if status == 404:
            return Failure(f"{where}: no such model or address; {AT_V1}")
        passing = status in TRANSIENT
        return Failure(where, passing, retry_after(headers) if passing else None)

    def _unreached(self, error: Exception) -> Failure:
        if isinstance(error, ConnectionRefusedError):
            return Failure(f"nothing listens at {self.base_url}; is the server started, and is the port right?")
        if isinstance(error, (ssl.SSLError, ssl.CertificateError)):
            return Failure(f"{self.base_url} has no certificate this machine trusts ({type(error).__name__})")
        if isinstance(error, TimeoutError):
            return Failure(f"{self.base_url} gave no answer within {self.timeout:g} s", passing=True)
        if isinstance(error, (ConnectionError, http.client.HTTPException)):
            return Failure(f"the connection to {self.base_url} broke ({type(error).__name__})", passing=True)
        if isinstance(error, EndpointError):
            return Failure(str(error))
        if isinstance(error, OSError):
            return Failure(f"{self.base_url} cannot be reached ({type(error).__name__})")
        return Failure(f"{self.base_url} answered with what cannot be read ({type(error).__name__})")

    def _as_taken(self, body: dict[str, Any]) -> dict[str, Any]:
        """`body` without what this server refused, or with less of it, or with it under another name."""
        body = {"stream": False, **body}
        if self.most_listed is not None and "top_logprobs" in body:
            body["top_logprobs"] = min(body["top_logprobs"], self.most_listed)
            if body["top_logprobs"] == 0:
                del body["top_logprobs"]
        names = {name: OPTIONS[name][1] if name in self.left_out else name for name in body}
        return {name: body[old] for old, name in names.items() if name}

    def _leave_out(self, sent: dict[str, Any], failure: Failure) -> bool:
        """Whether of what was sent something can be left out or made smaller; from now on it is."""
        names = [name for name in failure.refused if name in sent]
        with self._lock:
            for name in names:
                listed = sent.get("top_logprobs", 0) if name in LISTED else 0
                if listed and failure.fewer:
                    fewer = next(number for number in FEWER if number < listed)
                    # another thread may have learnt more meanwhile
                    self.most_listed = fewer if self.most_listed is None else min(self.most_listed, fewer)
                    logger.info("%s lists no %d likeliest tokens; asking for %d", self.base_url, listed, self.most_listed)
                else:
                    both = LISTED if name in LISTED else (name,)  # neither goes without the other
                    self.left_out = tuple(dict.fromkeys((*self.left_out, *both)))
                    logger.info("%s takes no %s; asking without", self.base_url, " and ".join(both))
                return True
        return False


def hiding(key: str) -> Hide:
    """A function that cuts `key` out of a text, in whatever spelling a header, an address, HTML or JSON may hold it.

    Upper or lower case; with JSON's, percent and HTML escapes; with blanks, backslashes or what is not shown between its
    letters. Half of it, as a server may leave where it cuts a text, is cut out too. One pass, whatever the text: while a
    search runs no other thread does, and nobody could leave a server that slows it down.
    """
    # its own backslashes are passed over like those that JSON writes before a letter
    codes = [(re.escape(letter), ord(letter)) for letter in key if letter != "\\"]
    if len(key) < SHORTEST_SECRET or not codes:
        return str
    letters = [rf"(?:{own}|u00{n:02x}|x{n:02x}|%(?:25)*{n:02x}|&#(?:0*{n}|x0*{n:x});)" for own, n in codes]
    half = (len(letters) + 1) // 2
    parts = [letters] if half < SHORTEST_SECRET else [letters, [*letters[:half], r"[\w.~+/=%&#;\\-]*"], letters[-half:]]
    # possessive: what stands between two letters is passed once and never tried again in parts
    between = r"[^!-\[\]-~]*+"
    pattern = re.compile("|".join(between.join(part) for part in parts), re.IGNORECASE | re.ASCII)
    return lambda text: pattern.sub("[key]", text)


def retry_after(headers: Message) -> float | None:
    """``Retry-After`` in seconds or as a date; None where it is missing or makes no sense."""
    text = (headers.get("Retry-After") or "").strip()
    try:
        if text.replace(".", "", 1).isdigit():
            return float(text)
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return None


def _checked(base_url: str) -> str:
    if not isinstance(base_url, str) or not base_url.strip():
        raise OptionError(f"a model behind a server needs base_url, the address that pictures are sent to, such as {EXAMPLE!r}")
    base_url = base_url.strip()
    try:
        parts = urlsplit(base_url)
        host = (parts.hostname or "").encode("idna")  # what cannot be looked up has no such form
        fine = parts.scheme in ("http", "https") and bool(host) and parts.port != 0
        fine = fine and parts.path.isascii() and not re.search(r"[^!-~]", host.decode())
    except ValueError:
        fine, parts = False, urlsplit("")
    if "@" in base_url or parts.query or parts.fragment:  # not repeated: it may hold a secret
        raise OptionError("base_url must hold no user, password, query or fragment; a key is read from the environment")
    if not fine or re.search(r"[\s\x00-\x1f\x7f]", base_url):
        raise OptionError(f"base_url must be an address such as {EXAMPLE!r}, got {base_url[:100]!r}")
    return base_url.rstrip("/").removesuffix("/chat/completions")


def _is_local(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, and any name may point anywhere
        return False


def _connection(url: SplitResult, timeout: float) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """A connection to `url`, or to the environment's proxy for it; what to ask it for, and further headers."""
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    port = url.port or kind.default_port
    direct = _is_local(url.geturl()) or proxy_bypass(url.netloc)
    proxy = "" if direct else getproxies().get(url.scheme, "")
    if not proxy:
        return kind(url.hostname or "", port, timeout=timeout), url.path, {}
    through = urlsplit(proxy if "://" in proxy else f"//{proxy}")
    connection = kind(through.hostname or "", through.port or kind.default_port, timeout=timeout)
    login = f"{unquote(through.username or '')}:{unquote(through.password or '')}".encode()
    further = {"Proxy-Authorization": f"Basic {base64.b64encode(login).decode()}"} if through.username else {}
    if url.scheme == "http":
        return connection, url.geturl(), further
    connection.set_tunnel(url.hostname or "", port, further)
    return connection, url.path, {}


# -- what an error says ---------------------------------------------------------------------


def _error_of(data: dict[str, Any]) -> Any:
    """The error in a reply of status 200, or in its only choice."""
    choices = data.get("choices")
    if not choices:
        return data.get("error")
    return choices[0].get("error") if isinstance(choices, list) and isinstance(choices[0], dict) else None


def _reason(said: Any) -> Any:
    """The server's own words, from its JSON or its page."""
    if isinstance(said, str):
        return re.sub(r"<[^<>]*>", " ", said)
    said = (isinstance(said, dict) and _error_of(said)) or said
    for name in ("error", "message", "detail"):
        said = said.get(name, said) if isinstance(said, dict) else said
    return said or ""


def _told(said: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in an error, with the name it stands under; not what the error repeats of the request."""
    if isinstance(said, dict):
        for inner, value in said.items():
            if inner not in ECHOES:
                yield from _told(value, inner)
    elif isinstance(said, list):
        for value in said:
            yield from _told(value, name)
    elif isinstance(said, str):
        yield name, re.split("['\"]input['\"]", said[:MOST_CHARACTERS])[0]  # errors that are written into a text


def _named(told: list[tuple[str, str]]) -> tuple[str, ...]:
    """The options an error is about: what its fields name, or else its words."""
    for texts in ([text for name, text in told if name in FIELDS], [text for _, text in told]):
        named = [name for name, (pattern, _) in OPTIONS.items() if any(re.search(pattern, text, re.I) for text in texts)]
        if named:
            return tuple(named)
    return ()


def _place(headers: Message) -> str:
    """Where a redirect points, as a base_url, without user or query."""
    try:
        to = urlsplit(headers.get("Location") or "")
    except ValueError:
        return "elsewhere"
    host = to.netloc.rpartition("@")[2]
    return f"{to.scheme}://{host}{to.path}".removesuffix("/chat/completions") if host else "elsewhere"
