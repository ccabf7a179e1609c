"""A server on 127.0.0.1 that speaks the chat completions protocol and answers as a test says.

`serving` starts it for the length of a block and remembers every request; `closed` gives a `BlackBox` at it as well;
`dripping` never comes to an end.
`says` is an answer with words for tokens, `weighing` a model whose every number is known; `from_lab` answers with a
model of ours and its real log-probabilities.
"""

from __future__ import annotations

import base64
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_lab.models import Lab, load
from llava_lab.remote import BlackBox


@dataclass(frozen=True)
class Asked:
    """One request, as it arrived."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]

    @property
    def picture(self) -> np.ndarray:
        """The picture in the first user turn, uint8 (height, width, 3)."""
        turn = next(one for one in self.body["messages"] if one["role"] == "user")
        address = next(part["image_url"]["url"] for part in turn["content"] if part["type"] == "image_url")
        kind, _, data = address.partition(",")
        assert kind == "data:image/png;base64", kind
        return np.asarray(Image.open(BytesIO(base64.b64decode(data))).convert("RGB"))

    @property
    def question(self) -> str:
        turn = [one for one in self.body["messages"] if one["role"] == "user"][-1]
        return next(part["text"] for part in turn["content"] if part["type"] == "text")


@dataclass(frozen=True)
class Answered:
    """What goes back: a chat completion as JSON, or any bytes."""

    data: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    hang: threading.Event | None = None  # wait for it before answering
    pause: float = 0.0  # seconds after each byte


@dataclass
class Serving:
    """The server's address and what it was asked."""

    base_url: str
    asked: list[Asked]


Answerer = Callable[[Asked], Answered]

QUESTION = "What is it?"
PLAIN = np.full((36, 36, 3), (220, 30, 30), np.uint8)
ROUGH = np.random.default_rng(0).choice(np.array([20, 60, 240], np.uint8), (36, 36, 3))


@contextmanager
def serving(answer: Answerer) -> Iterator[Serving]:
    """A server that answers every POST by `answer`; it is gone when the block ends."""
    asked: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            one = Asked(self.path, dict(self.headers), body)
            asked.append(one)
            reply = answer(one)
            if reply.hang is not None:
                reply.hang.wait(20)
            data = json.dumps(reply.data).encode() if reply.raw is None else reply.raw
            self.send_response(reply.status)
            about = {"Content-Type": "application/json", "Content-Length": str(len(data)), "Connection": "close"}
            for name, value in {**about, **reply.headers}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            for part in [data] if not reply.pause else [data[i : i + 1] for i in range(len(data))]:
                self.wfile.write(part)
                time.sleep(reply.pause)
            self.close_connection = True

        def log_message(self, *args: Any) -> None:
            """Nothing on standard error."""

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *args: Any) -> None:
            """A client that left early is what the tests of time-outs want."""

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield Serving(f"http://127.0.0.1:{server.server_address[1]}/v1", asked)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@contextmanager
def dripping(first: bytes, again: bytes, pause: float) -> Iterator[str]:
    """The address of a server that says `first` and then `again` for ever, whatever HTTP allows."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):  # the other side has left, at last
                self.request.recv(65536)
                self.request.sendall(first)
                while True:
                    self.request.sendall(again)
                    time.sleep(pause)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def says(
    text: str,
    *,
    own: float | Sequence[float] | None = None,
    listed: Mapping[str, float] | None = None,
    finish: str = "stop",
    spaced: bool = False,
) -> Answered:
    """A chat completion. With `own` its words are its tokens with these log-probabilities, beside `listed` everywhere.

    `spaced`: the first has its space too, as when an answer goes on.
    """
    message = {"role": "assistant", "content": text}
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": finish}
    pieces = [word if i == 0 and not spaced else f" {word}" for i, word in enumerate(text.split())]
    if own is not None:
        values = [own] * len(pieces) if isinstance(own, float) else own
        others = [{"token": token, "logprob": value, "bytes": list(token.encode())} for token, value in (listed or {}).items()]
        tokens = [{"token": piece, "logprob": value, "bytes": None} for piece, value in zip(pieces, values, strict=True)]
        choice["logprobs"] = {"content": [{**one, "top_logprobs": [one, *others]} for one in tokens]}
    usage = {"prompt_tokens": 100, "completion_tokens": len(pieces), "total_tokens": 100 + len(pieces)}
    return Answered({"object": "chat.completion", "model": "scripted", "choices": [choice], "usage": usage})


def weighing(weights: np.ndarray, picture: np.ndarray) -> Answerer:
    """Says "a red car"; the log-probability of " red" is -5 and the weight of each cell, as far as `picture` shows there.

    How far is 1 where a pixel is the picture's own and 0 where it is grey, or as far away from its own as grey is.
    """
    whole = picture.astype(float)

    def answer(asked: Asked) -> Answered:
        away = np.abs(asked.picture - whole).sum(-1) / np.abs(128 - whole).sum(-1)
        shown = (1 - away).clip(0, 1)
        rows, cols = weights.shape
        height, width = shown.shape
        share = shown.reshape(rows, height // rows, cols, width // cols).mean((1, 3))
        return says("a red car", own=[-0.1, float(-5 + (weights * share).sum()), -0.2])

    return answer


def open_box(server: Serving, folder: Path, **options: Any) -> BlackBox:
    """A closed model at `server`, with a small grid and a cache of its own."""
    known: dict[str, Any] = {"grid": (3, 3), "cache": folder / "replies", "timeout": 5.0, "retries": 2}
    return load("openai:scripted", base_url=server.base_url, **{**known, **options})


@contextmanager
def closed(answer: Answerer, folder: Path, **options: Any) -> Iterator[tuple[Serving, BlackBox]]:
    """A server and a closed model at it."""
    with serving(answer) as server:
        yield server, open_box(server, folder, **options)


def a_red_car(asked: Asked) -> Answered:
    """The answer of most tests."""
    return says("a red car", own=-0.5)


def from_lab(lab: Lab, *, listed: int = 20) -> Answerer:
    """Answers of `lab`, greedy, with the log-probabilities of its likeliest tokens at every place."""
    lock = threading.Lock()  # one model, many requests

    def answer(asked: Asked) -> Answered:
        with lock, torch.no_grad():
            run = lab.ask(asked.picture, asked.question, max_new_tokens=asked.body["max_tokens"])
            logits = lab.model(**lab.inputs(run)).logits[0].float()
        start, stop = run.segments["answer"]
        ids = run.token_ids[start:stop].tolist()
        values = logits[start - 1 : stop - 1].log_softmax(-1)
        content = [_listed(lab, ids, place, values[place], listed) for place in range(len(ids))]
        finish = "stop" if run.options["stopped"] == "eos" else "length"
        message = {"role": "assistant", "content": run.answer}
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": {"content": content}}
        usage = {"prompt_tokens": start, "completion_tokens": len(ids)}
        return Answered({"choices": [choice], "usage": usage})

    return answer


def _listed(lab: Lab, ids: list[int], place: int, values: torch.Tensor, count: int) -> dict[str, Any]:
    def one(token: int) -> dict[str, Any]:
        before = lab.tokenizer.decode(ids[:place], clean_up_tokenization_spaces=False)
        text = lab.tokenizer.decode([*ids[:place], token], clean_up_tokenization_spaces=False)[len(before) :]
        return {"token": text, "logprob": float(values[token]), "bytes": list(text.encode())}

    likeliest = values.topk(count).indices.tolist()
    return {**one(ids[place]), "top_logprobs": [one(token) for token in likeliest]}
