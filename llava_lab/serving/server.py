"""The server: a lab's chat completions on 127.0.0.1, for whoever has its token.

    with Server(lab) as server:
        box = ll.load(f"openai:{server.model}", base_url=server.base_url)  # with server.token as its key

What protects it, in the order in which a request meets it: it listens on 127.0.0.1 alone; a request has `HEADERS` seconds for
its head and may be for this machine's own names only (`HOSTS`), so that a page which resolves its own name to this machine gets
nothing; a page of another origin gets nothing; a bearer token, compared in constant time, stands before everything else; then a
place in the line (429 where none is free), at most `LARGEST` bytes, and one deadline for reading, waiting, answering and sending.
Who leaves is no longer answered. `GET /v1/models` and `POST /v1/chat/completions` are all there is; see
`llava_lab.serving.protocol` for what they take and give.

Built on Starlette and uvicorn; what is ours is what they do not have: the time for a request's head, the line, the deadline.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from llava_lab.checks import number, whole_number
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.serving.desk import Desk, Done, Job, Piece
from llava_lab.serving.protocol import Answers, Refused, events, finish, lab_field, read_chat, to_bytes

logger = logging.getLogger(__name__)

HOSTS = ("127.0.0.1", "localhost")
LARGEST = 32 * 2**20  # bytes of a request; a picture of 4,000 x 3,000 pixels as PNG and base64 has about that
WAITING, DEADLINE = 64, 300.0  # requests in the line; seconds
HEADERS = 10.0  # seconds for a request's head
CONNECTIONS = 512
BACKLOG = 256
STOP = 10  # seconds for the answer that is being made when the server is told to stop
SHORTEST_TOKEN = 16  # characters

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Scope = MutableMapping[str, Any]


class Server:
    """One lab behind one address, for the length of a ``with`` block, or until Ctrl-C with `run`.

    >>> from llava_lab.serving import Server
    >>> with Server(lab) as server:
    ...     server.base_url.startswith("http://127.0.0.1:")
    True
    """

    def __init__(
        self,
        lab: Lab,
        *,
        port: int = 0,
        token: str | None = None,
        waiting: int = WAITING,
        deadline: float = DEADLINE,
        seed: int = 0,
    ) -> None:
        """Listens at once. `port` 0 is any free one; `token` None makes one; `waiting`: requests in the line beside the one that
        is being answered; `deadline`: seconds for a request; `seed`: of requests without one. Raises OptionError.
        """
        if not isinstance(lab, Lab):
            raise OptionError(
                f"a server answers with a model that is here, and {getattr(lab, 'name', lab)!r} is behind one itself"
            )
        self.model = Path(lab.name).name if Path(lab.name).is_dir() else lab.name
        self.token = secrets.token_urlsafe(32) if token is None else _checked_token(token)
        self.deadline = number("deadline", deadline, least=0.001)
        self.desk = Desk(lab, places=1 + whole_number("waiting", waiting, least=1))
        self.seed, self.started = seed, int(time.time())
        self._socket = _listening(port)
        self.port = int(self._socket.getsockname()[1])
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        routes = [
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{model:path}", self._one_model, methods=["GET"]),
            Route("/v1/chat/completions", Completions(self)),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _not_found})
        config = uvicorn.Config(
            Guard(app, self.token),
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.CRITICAL,  # who leaves in the middle is no news
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS,
            backlog=BACKLOG,
            timeout_graceful_shutdown=STOP,
        )
        self._uvicorn = _Uvicorn(config, self.desk)
        self._thread = threading.Thread(target=self.run, name="llava-lab server", daemon=True)

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM, or until the block ends: the answer that is being made is finished, the rest refused."""
        self.desk.start()
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            self.desk.stop()
            self._socket.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(2 * STOP)

    def _card(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self.started, "owned_by": "llava-lab"}

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._card()]})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name != self.model:
            return _refusal(Refused(f"no model {name[:80]!r}; this server has {self.model!r}", 404, code="model_not_found"))
        return _json(self._card())


# -- who may ask ----------------------------------------------------------------------------


class Guard:
    """Refuses what is not for this machine, comes from another origin's page, or has no token; all else passes to `app`."""

    def __init__(self, app: Any, token: str) -> None:
        self.app, self._wanted = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        fault = self._fault(Headers(scope=scope))
        if fault is None:
            await self.app(scope, receive, send)
        else:
            await _refusal(fault)(scope, receive, send)

    def _fault(self, headers: Headers) -> Refused | None:
        host = headers.get("host", "")
        if host.rpartition(":")[0] not in HOSTS and host not in HOSTS:
            return Refused(f"this server answers to {' and '.join(HOSTS)} alone", 403, code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return Refused("pages of another origin are not answered", 403, code="wrong_origin")
        if not secrets.compare_digest(headers.get("authorization", "").encode(), self._wanted):
            return Refused("wrong or missing token; send it as Authorization: Bearer TOKEN", 401, code="invalid_api_key")
        return None


class _Protocol(H11Protocol):
    """A connection that is closed where no request's head has come in `HEADERS` seconds: uvicorn would wait for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(HEADERS, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None:
            self.transport.abort()


class _Uvicorn(uvicorn.Server):
    """Ends in order on the first signal and at once on the second, and leaves by returning."""

    def __init__(self, config: uvicorn.Config, desk: Desk) -> None:
        super().__init__(config)
        self._desk = desk

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit, self.should_exit = self.should_exit, True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._desk.stop()
        await super().shutdown(sockets)


# -- chat completions -----------------------------------------------------------------------


class Completions:
    """``POST /v1/chat/completions``, one request from its first byte to its last."""

    def __init__(self, server: Server) -> None:
        self.server, self.desk = server, server.desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            with self.desk.place():
                async with asyncio.timeout(self.server.deadline):
                    await self._answer(Request(scope, receive), receive, sending)
        except TimeoutError:
            fault = Refused(f"no answer within {self.server.deadline:g} s, the deadline of a request", 504, code="deadline")
        except Refused as error:
            fault = error
        except ClientDisconnect:
            return
        else:
            return
        # once an answer has begun, its end says what went wrong
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(HEADERS):
                if begun:
                    await send({"type": "http.response.body", "body": events([fault.to_dict()])})
                else:
                    await _refusal(fault)(scope, receive, send)

    async def _answer(self, request: Request, receive: Receive, send: Send) -> None:
        if request.method != "POST":
            raise Refused(f"expected POST, got {request.method}", 405)
        chat = await asyncio.to_thread(read_chat, await _body(request), self.server.model, seed=self.server.seed)
        about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time())}
        answers = Answers(self.server.model, about | {"system_fingerprint": self.desk.lab.fingerprint})
        job = self.desk.submit(chat, asyncio.get_running_loop())
        gone = asyncio.create_task(_gone(receive, job))
        try:
            await (_streamed if chat.stream else _whole)(job, answers, send)
        finally:
            gone.cancel()
            self.desk.leave(job)


async def _whole(job: Job, answers: Answers, send: Send) -> None:
    event = await job.events.get()
    if isinstance(event, Refused):
        raise event
    if event is None:
        raise ClientDisconnect
    assert isinstance(event, Done), "a whole answer comes in no pieces"
    more = lab_field(event.run, event.maps, segments=job.chat.segments)
    data = await asyncio.to_thread(to_bytes, answers.whole(event.run, event.logprobs, more))
    await _begin(send, "application/json", len(data))
    await send({"type": "http.response.body", "body": data})


async def _streamed(job: Job, answers: Answers, send: Send) -> None:
    """As server-sent events; what fails before the first token is refused with its status."""
    begun = False

    async def push(*chunks: Any) -> None:
        nonlocal begun
        if not begun:
            begun = True
            await _begin(send, "text/event-stream; charset=utf-8")
            chunks = (answers.chunk({"role": "assistant", "content": ""}), *chunks)
        await send({"type": "http.response.body", "body": events(chunks), "more_body": True})

    while not isinstance(event := await job.events.get(), Done):
        if isinstance(event, Refused):
            raise event
        if event is None:
            raise ClientDisconnect
        assert isinstance(event, Piece)
        await push(answers.chunk({"content": event.text}, event.logprobs))
    left = event.logprobs if event.logprobs and event.logprobs["content"] else None
    more = lab_field(event.run, event.maps, segments=job.chat.segments)
    await push(answers.chunk({}, left, reason=finish(event.run), llava_lab=more))
    await push(*([answers.used(event.run)] if job.chat.usage else []), "[DONE]")
    await send({"type": "http.response.body", "body": b""})


async def _gone(receive: Receive, job: Job) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.tell(None)


async def _body(request: Request) -> bytes:
    """The request's body. Raises Refused for what is not JSON, or too large, before it is read where its head says so."""
    if "json" not in request.headers.get("content-type", ""):
        raise Refused("expected Content-Type: application/json", 415)
    too_large = Refused(f"a request may have {LARGEST:,} bytes; send a smaller picture", 413, code="too_large")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > LARGEST:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST:
            raise too_large
    return bytes(body)


# -- replies --------------------------------------------------------------------------------

SAFE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


async def _begin(send: Send, kind: str, length: int | None = None) -> None:
    headers = SAFE | {"Content-Type": kind} | ({} if length is None else {"Content-Length": str(length)})
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": pairs})


def _json(data: Any, status: int = 200, **headers: str) -> Response:
    return Response(to_bytes(data), status, {**SAFE, **headers}, "application/json")


def _refusal(fault: Refused) -> Response:
    more = {401: {"WWW-Authenticate": "Bearer"}, 405: {"Allow": "POST"}, 429: {"Retry-After": "1"}}.get(fault.status, {})
    return _json(fault.to_dict(), fault.status, **more)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = "no such address; there are /v1/models and /v1/chat/completions" if error.status_code == 404 else error.detail
    return _json(Refused(what, error.status_code).to_dict(), error.status_code, **dict(error.headers or {}))


# -- what a server needs before it is one ---------------------------------------------------


def _checked_token(token: str) -> str:
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise OptionError(f"a token has at least {SHORTEST_TOKEN} printable characters without spaces; this one has not")
    return token


def _listening(port: int) -> socket.socket:
    """A socket on 127.0.0.1. Raises OptionError where the port cannot be had."""
    found = socket.socket()
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(("127.0.0.1", whole_number("port", port)))
        found.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"port {port} cannot be used ({reason}); give another, or none for any free one") from None
    return found
