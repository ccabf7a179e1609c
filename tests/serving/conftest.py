"""A server around a small random model, and a model that answers when it is let."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from llava_lab.models import Lab
from llava_lab.serving import Server


@pytest.fixture(scope="module")
def server(tiny_random: Lab) -> Iterator[Server]:
    with Server(tiny_random) as running:
        yield running


@dataclass(frozen=True)
class Gate:
    """A model that answers when it is let: `asked` is set when it begins, `opened` lets it go on."""

    asked: threading.Event
    opened: threading.Event


@pytest.fixture
def gate(tiny_random: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found, own = Gate(threading.Event(), threading.Event()), tiny_random.ask

    def ask(*args: Any, **options: Any) -> Any:
        found.asked.set()
        assert found.opened.wait(60)
        return own(*args, **options)

    monkeypatch.setattr(tiny_random, "ask", ask)
    yield found
    found.opened.set()


@pytest.fixture
def started() -> Iterator[Callable[..., threading.Thread]]:
    """Threads that are joined when the test ends."""
    threads: list[threading.Thread] = []

    def start(work: Callable[[], Any]) -> threading.Thread:
        threads.append(threading.Thread(target=work, daemon=True))
        threads[-1].start()
        return threads[-1]

    yield start
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
