"""Requests a second of `llava-lab serve`, beside the same questions asked of the model without a server.

The floor is `Lab.ask` in a loop. The server answers one question at a time, so many clients cannot be faster than it; what is
measured is how much of the model's own pace is left with JSON, PNG, the line and its threads around it, and whether a client
is lost on the way: the numbers compared are the log-probabilities of every answer. Clients are threads of the same process,
their requests written beforehand, so that they take a part of the machine too.
"""

from __future__ import annotations

import atexit
import http.client
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.bench.harness import QUESTION, Call, Comparison, bench_lab, side_by_side, table

if TYPE_CHECKING:
    from llava_lab.bench.harness import Measured
    from llava_lab.models import Lab
    from llava_lab.serving import Server

REQUESTS = 64
NEW_TOKENS = 16
SIDE = 96  # of the square test pictures, pixels
FLOOR = "without a server"

Values = list[list[float]]  # log-probabilities of each answer, by question


def measure(model: str, repeats: int) -> dict[str, Any]:
    """The rows of ``llava-lab bench serve``, each with its requests a second."""
    return result(side_by_side(COMPARISON, model, repeats))


def result(measured: Measured) -> dict[str, Any]:
    """The table, "requests_per_second" added."""
    made = table(COMPARISON, measured)
    for row in made["rows"]:
        row["requests_per_second"] = REQUESTS / row["seconds"]
    return made


def prepare(model: str, way: str) -> Call:
    """A server runs until the process ends: its start and its stop are not what is measured."""
    from llava_lab.serving import Server

    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(REQUESTS)]
    lab = bench_lab(model)
    if way == FLOOR:
        return Call(lab, (lab, pictures), first=(lab, pictures[:2]))
    server = Server(lab, waiting=REQUESTS).__enter__()
    atexit.register(server.__exit__)
    bodies = [_body(server.model, picture) for picture in pictures]
    return Call(lab, (server, bodies), first=(server, bodies[:2]))


def bare(lab: Lab, pictures: list[np.ndarray]) -> Values:
    """One question after the other."""
    return [lab.ask(picture, QUESTION, max_new_tokens=NEW_TOKENS).logprobs.tolist() for picture in pictures]


def served(clients: int, server: Server, bodies: list[bytes]) -> Values:
    """The same through a server, `clients` at a time."""
    headers = {"Authorization": f"Bearer {server.token}", "Content-Type": "application/json"}
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(partial(_ask, server.port, headers), bodies))


def _body(model: str, picture: np.ndarray) -> bytes:
    from PIL import Image

    from llava_lab.results.table import png_address

    address = {"url": png_address(Image.fromarray(picture))}
    content = [{"type": "image_url", "image_url": address}, {"type": "text", "text": QUESTION}]
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": NEW_TOKENS, "logprobs": True}
    return json.dumps({"model": model, **asked}).encode()


def _ask(port: int, headers: dict[str, str], body: bytes) -> list[float]:
    """Raises KeyError where the answer is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = json.loads(connection.getresponse().read())
        return [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]
    finally:
        connection.close()


WAYS: Mapping[str, Callable[..., Values]] = MappingProxyType(
    {FLOOR: bare, **{f"served, {count} clients at once": partial(served, count) for count in (1, 8, 64)}}
)
COMPARISON = Comparison(name="serve", ways=WAYS, prepare=prepare, floor=FLOOR, peer=lambda way: FLOOR)
