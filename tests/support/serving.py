"""Requests to a server of ours as bytes on a socket, for what no client would send."""

from __future__ import annotations

import base64
import http.client
import json
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from llava_lab.serving import Server

ROUGH = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
QUESTION = "What is it?"


def data_url(picture: np.ndarray) -> str:
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def messages(picture: np.ndarray = ROUGH, question: str = QUESTION) -> list[dict[str, Any]]:
    return [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": data_url(picture)}}, {"type": "text", "text": question}],
        }
    ]


@dataclass(frozen=True)
class Got:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def data(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.data["error"]["message"])


def send(
    server: Server, body: Any = None, *, path: str = "chat/completions", method: str = "POST", timeout: float = 60, **headers: str
) -> Got:
    """One request, with the right token and head unless `headers` say otherwise ("" leaves one out)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
    given = {"Authorization": f"Bearer {server.token}", "Content-Type": "application/json"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if isinstance(body, (bytes, type(None))) else json.dumps({"model": server.model, **body}).encode()
    try:
        connection.request(method, f"/v1/{path}", data, {name: value for name, value in given.items() if value})
        reply = connection.getresponse()
        return Got(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
    finally:
        connection.close()


def head(server: Server, length: str) -> bytes:
    """The head of a request by hand; `length` is the line that says how long the body is."""
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {server.token}"]
    return "\r\n".join([*lines, "Content-Type: application/json", length, "", ""]).encode()


def huge_png(side: int) -> str:
    """The address of a PNG of a few bytes that claims `side` x `side` pixels."""

    def part(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", size) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def until(happened: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
