"""Chat completions as OpenAI defines them, read and written: what a request asks for, and the JSON that answers it.

`read_chat` takes a request's bytes and gives a `Chat`, or raises `Refused` with the status and the field it is about. What
cannot act here is refused rather than left out in silence: a system text (the prompt has its own), sampling other than by
temperature, several answers, tools, a picture anywhere but in the first message, any field that nobody knows. Only ``data:``
addresses are pictures; this server fetches nothing and opens no file.

Two things are not OpenAI's. A request without a picture is refused unless it says so (``"llava_lab": {"picture": false}``), for a
harness that loses its pictures would measure a blind model; temperature is 0 where none is given. And one field more,
``"llava_lab"``, asks for what only a lab has, and stands in the answer too:

    {"model": "tiny", "messages": [...], "llava_lab": {"method": "rollout", "target": "words", "options": {}, "segments": true}}

gives ``maps`` as ``llava-lab explain --json`` prints them and ``run`` as ``llava-lab ask --json`` does; ``notes``, what a reader
must know of the answer, is always there.

Source: OpenAI's API reference, "Create chat completion", with its chunks and ``logprobs.content``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llava_lab.attribution.registry import METHODS
from llava_lab.checks import known, number, shown, whole_number
from llava_lab.errors import LabError, OptionError
from llava_lab.models.text import PICTURE_PARTS, decode, finished, read_messages

if TYPE_CHECKING:
    from torch import Tensor

    from llava_lab.results import Relevance, Run

MOST_LISTED = 20  # likeliest tokens at each place, as at OpenAI
TOKENS = 256  # of an answer, where the request names no limit
MOST_MESSAGES = 1000
FINISH = MappingProxyType({"eos": "stop", "length": "length"})

# What would change the answer elsewhere and cannot here: only the value that changes nothing is taken.
NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "n": (1,),
        "top_p": (1,),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "stop": ([], ""),
        "logit_bias": ({},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
    }
)
IGNORED = frozenset(  # what changes nothing anywhere
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
OWN = ("method", "target", "options", "segments", "picture", "prompt", "fit")


class Refused(LabError):
    """A request that is not answered, with its HTTP status, the field that is wrong, and OpenAI's code for it."""

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Chat:
    """One question, ready for `Lab.ask`; the pictures are still addresses."""

    pictures: tuple[str, ...]
    question: str
    history: tuple[tuple[str, str], ...] = ()
    asking: Mapping[str, Any] = field(default_factory=dict)  # options of `Lab.ask`
    listed: int | None = None  # likeliest tokens at each place; None: no log-probabilities
    stream: bool = False
    usage: bool = False  # in a stream's last chunk
    method: str | None = None  # of the maps that are asked for
    target: Any = "words"
    options: Mapping[str, Any] = field(default_factory=dict)  # of the method
    segments: bool = False  # whether the run's tokens and segments are asked for


# -- a request ------------------------------------------------------------------------------


def read_chat(body: bytes, model: str, *, seed: int = 0) -> Chat:
    """A request's body. Raises Refused; `model` is the only name that is known, `seed` that of requests without one.

    >>> from llava_lab.serving.protocol import read_chat
    >>> read_chat(b'{"model": "tiny", "messages": []}', "tiny")
    Traceback (most recent call last):
    llava_lab.serving.protocol.Refused: messages must be a list of 1 to 1000 messages
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body must be JSON in UTF-8 ({type(error).__name__})") from None
    if not isinstance(data, dict):
        raise Refused(f"the body must be a JSON object, got {type(data).__name__}")
    data = {name: value for name, value in data.items() if value is not None and name not in IGNORED}
    asked = data.pop("model", None)
    if asked != model:
        raise Refused(f"no model {shown(asked)}; this server has {model!r}", 404, param="model", code="model_not_found")
    for name, taken in NEUTRAL.items():
        value = data.pop(name, taken[0])
        if isinstance(value, bool) or value not in taken:
            raise Refused(f"{name} cannot act here; leave it out (or {taken[0]!r}), got {shown(value)}", param=name)
    pictures, question, history = _messages(data.pop("messages", None))
    own = data.pop("llava_lab", {})
    asking = _checked(_asking, data, seed=seed)
    listed = _checked(_listed, data)
    stream = _flag(data, "stream")
    streaming = data.pop("stream_options", {})
    if not isinstance(streaming, dict) or (streaming and not stream):
        raise Refused("stream_options belongs to stream: true and must be an object", param="stream_options")
    if data:
        raise Refused(f"no field {shown(next(iter(data)))} is known here; leave it out", param=str(next(iter(data)))[:80])
    more = _checked(_own, own)
    if not pictures and more.pop("picture"):
        raise Refused(
            "no picture came with the question; send it in the first user message as an image_url with a data: address, or "
            'say that it has none: "llava_lab": {"picture": false}',
            param="messages",
        )
    more.pop("picture", None)
    asking |= more.pop("asking")
    usage = streaming.get("include_usage") is True
    return Chat(pictures, question, history, asking, listed, stream, usage, **more)


def _messages(messages: Any) -> tuple[tuple[str, ...], str, tuple[tuple[str, str], ...]]:
    """The pictures' addresses, the last question, and what was said before it."""
    if not isinstance(messages, list) or not 1 <= len(messages) <= MOST_MESSAGES:
        raise Refused(f"messages must be a list of 1 to {MOST_MESSAGES} messages", param="messages")
    first = messages[0]
    if isinstance(first, dict) and first.get("role") in ("system", "developer"):
        raise Refused(
            "a system text cannot act here, the model's prompt has its own; leave it out, or begin the question with it",
            param="messages",
        )
    try:
        said = read_messages(messages)
    except OptionError as error:
        raise Refused(str(error), param="messages") from None
    if not said[-1].human:
        raise Refused("the last message must be the user's; an answer is not continued here", param="messages")
    pictures = _addresses(first.get("content"))
    if any(_addresses(message.get("content")) for message in messages[1:]):
        raise Refused("pictures belong in the first user message, where the model sees them; send them there", param="messages")
    history = tuple((asked.text, answer.text) for asked, answer in zip(said[:-1:2], said[1::2], strict=True))
    return pictures, said[-1].text, history


def _addresses(content: Any) -> tuple[str, ...]:
    parts = content if isinstance(content, list) else []
    found = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in PICTURE_PARTS:
            continue
        place = part.get("image_url")
        address = place.get("url") if isinstance(place, dict) else place
        if not isinstance(address, str) or address[:5].lower() != "data:":
            told = f"{address[:60]!r}" if isinstance(address, str) else shown(address)
            raise Refused(
                f"a picture is sent as image_url with a data: address (data:image/png;base64,...), got {told}; this server "
                "fetches nothing and opens no file",
                param="messages",
            )
        found.append(address)
    return tuple(found)


def _checked(read: Any, *given: Any, **more: Any) -> Any:
    """`read(...)` with the errors of our checks as refusals, about the option that they begin with."""
    try:
        return read(*given, **more)
    except Refused:
        raise
    except OptionError as error:
        raise Refused(str(error), param=str(error).split(maxsplit=1)[0]) from None


def _asking(data: dict[str, Any], *, seed: int) -> dict[str, Any]:
    limits = [data.pop(name) for name in ("max_completion_tokens", "max_tokens") if name in data]
    temperature = number("temperature", data.pop("temperature", 0.0))
    if temperature > 2:
        raise OptionError(f"temperature must be from 0 to 2, got {temperature:g}")
    given = whole_number("seed", data.pop("seed", seed))
    limit = whole_number("max_tokens", limits[0] if limits else TOKENS, least=1)
    return {"max_new_tokens": limit, "temperature": temperature, "seed": given}


def _listed(data: dict[str, Any]) -> int | None:
    wanted = _flag(data, "logprobs")
    count = whole_number("top_logprobs", data.pop("top_logprobs", 0))
    if count > MOST_LISTED:
        raise OptionError(f"top_logprobs must be at most {MOST_LISTED}, got {count}")
    if count and not wanted:
        raise OptionError("top_logprobs belongs to logprobs: true; send both")
    return count if wanted else None


def _flag(data: dict[str, Any], name: str) -> bool:
    value = data.pop(name, False)
    if not isinstance(value, bool):
        raise Refused(f"{name} must be true or false, got {shown(value)}", param=name)
    return value


def _own(own: Any) -> dict[str, Any]:
    """The field ``llava_lab``."""
    if not isinstance(own, dict) or (unknown := [name for name in own if name not in OWN]):
        what = shown(unknown[0]) if isinstance(own, dict) else type(own).__name__
        raise OptionError(f"llava_lab must be an object with {', '.join(OWN)}; got {what}")
    own = {name: value for name, value in own.items() if value is not None}
    method, options = own.get("method"), own.get("options", {})
    if method is None and (extra := [name for name in ("target", "options") if name in own]):
        raise OptionError(f"llava_lab: {extra[0]} belongs to a method; name one")
    if not isinstance(options, dict):
        raise OptionError(f"llava_lab: options must be an object, got {shown(options)}")
    if method is not None:
        card = METHODS[known("method", method, METHODS)]
        if card.reach == "pixels" and not card.control:
            raise OptionError(
                f"llava_lab: method {method!r} asks about altered pictures, as many times as it likes; do it from outside, with "
                f"ll.attribute(ll.load('openai:NAME', base_url=...), run, method={method!r})"
            )
        options = card.with_defaults(options)
    flags = {name: _flag({name: own.get(name, default)}, name) for name, default in (("segments", False), ("picture", True))}
    asking = {name: own[name] for name in ("prompt", "fit") if name in own}
    target = own.get("target", "words")
    return {"method": method, "target": target, "options": options, "asking": asking, **flags}


# -- an answer ------------------------------------------------------------------------------


class Listing:
    """The tokens of an answer as it grows, each with its `count` likeliest, as OpenAI lists them.

    A token's text is what it adds: where it only begins a character it adds nothing, and the one that ends it has it all, so
    that the texts of all tokens spell the answer.
    """

    def __init__(self, tokenizer: Any, count: int | None) -> None:
        self.tokenizer, self.count = tokenizer, count
        self._ids: list[int] = []
        self._done = ""  # the text of whole characters so far
        self._entries: list[dict[str, Any]] = []

    def add(self, token: int, chances: Tensor) -> None:
        """A new token, and the log-probabilities (V,) at its place."""
        if self.count is None:
            return
        top = chances.topk(min(self.count, len(chances)))
        others = [
            self._entry(self._text(other), value)
            for value, other in zip(*map(list, (top.values.tolist(), top.indices.tolist())), strict=True)
        ]
        text = finished(decode(self.tokenizer, [*self._ids, token]))
        piece = text[len(self._done) :] if text.startswith(self._done) else ""
        self._entries.append({**self._entry(piece, float(chances[token])), "top_logprobs": others})
        self._ids.append(token)
        self._done += piece

    def take(self, *, last: bool = False) -> dict[str, Any] | None:
        """What was added since it was last taken, as the field ``logprobs``; None where none are asked for.

        With the `last` of them, bytes that never became a character are shown as they decode, as the answer shows them.
        """
        if self.count is None:
            return None
        entries, self._entries = self._entries, []
        if last and entries and (rest := decode(self.tokenizer, self._ids)[len(self._done) :]):
            entries[-1] |= self._entry(entries[-1]["token"] + rest, entries[-1]["logprob"])
            self._done += rest
        return {"content": entries, "refusal": None}

    def _text(self, token: int) -> str:
        added = decode(self.tokenizer, [*self._ids, token])[len(self._done) :]
        return added or str(self.tokenizer.convert_ids_to_tokens(token))  # an end mark shows its name

    @staticmethod
    def _entry(text: str, value: float) -> dict[str, Any]:
        return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "replace"))}


@dataclass(frozen=True)
class Answers:
    """The JSON of one answer, whole or in chunks; `about` is what all of it carries."""

    model: str
    about: Mapping[str, Any]  # id, created, system_fingerprint

    def whole(self, run: Run, logprobs: Any, more: dict[str, Any]) -> dict[str, Any]:
        """A chat completion."""
        message = {"role": "assistant", "content": run.answer, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish(run)}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(run), "llava_lab": more}

    def chunk(self, delta: dict[str, Any], logprobs: Any = None, *, reason: str | None = None, **more: Any) -> dict[str, Any]:
        """A piece of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **more}

    def used(self, run: Run) -> dict[str, Any]:
        """The last chunk of a stream that was asked for its usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(run)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"object": kind, "model": self.model, **self.about}


def finish(run: Run) -> str:
    """Why the answer ended, in OpenAI's words."""
    return FINISH[run.options["stopped"]]


def usage(run: Run) -> dict[str, int]:
    """Tokens read, the picture's among them, and written."""
    start, stop = run.segments["answer"]
    return {"prompt_tokens": start, "completion_tokens": stop - start, "total_tokens": stop}


def lab_field(run: Run, maps: Relevance | None, *, segments: bool) -> dict[str, Any]:
    """The field ``llava_lab`` of an answer."""
    found: dict[str, Any] = {"notes": list(run.notes)}
    if segments:
        found["run"] = run.to_dict()
    if maps is not None:
        found["maps"] = maps.to_dict()
    return found


def to_bytes(data: Any) -> bytes:
    """JSON of finite numbers."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def events(data: Sequence[Any]) -> bytes:
    """Chunks as server-sent events."""
    return b"".join(b"data: " + (one.encode() if isinstance(one, str) else to_bytes(one)) + b"\n\n" for one in data)
