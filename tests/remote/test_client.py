"""What goes wrong with a server is tried again where that helps, and otherwise said in one line; replies are kept whole."""

from __future__ import annotations

import email.utils
import socket
import threading
import time
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.errors import EndpointError
from llava_lab.remote import client
from llava_lab.remote.client import retry_after
from tests.support.endpoint_server import PLAIN, QUESTION, Answered, Answerer, Asked, a_red_car, closed, open_box, says, serving

FINE = says("a red car", own=-0.5)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


def failed(message: str, **error: Any) -> dict[str, Any]:
    return {"error": {"message": message, **error}}


def in_turn(*replies: Answered) -> Answerer:
    """One reply after the other, the last one for ever."""
    left: Iterator[Answered] = iter(replies)
    last = [replies[-1]]

    def answer(asked: Asked) -> Answered:
        return next(left, last[0])

    return answer


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            Answered(failed("bad key"), 401),
            r"answered 401 \(bad key\): it wants a key, and none was sent; set the variable OPENAI_API_KEY",
        ),
        (Answered(failed("no"), 403), "answered 403"),
        (Answered(failed("no model scripted"), 404), "no such model or address; base_url usually ends in /v1"),
        (Answered({"detail": "image too large"}, 400), r"answered 400 \(image too large\)"),
        (Answered(failed("pay", code="insufficient_quota"), 429), "no credit left"),
        (Answered(failed("slow down"), 429, {"Retry-After": "3600"}), "asks to wait 3600 s, more than 60; try later"),
        (
            Answered(raw=b"<html>log in</html>", headers={"Content-Type": "text/html"}),
            "answered with text/html, expected application/json",
        ),
        (Answered([1]), "JSON list, expected an object"),
        (Answered(failed("model is loading")), "model is loading"),
        (Answered({}), "expected a chat completion"),
        (Answered({"choices": []}), "expected a chat completion"),
        (Answered({"choices": [{"message": {"content": 5}}]}), "expected a chat completion"),
        (Answered({"choices": [{"message": None}]}), "expected a chat completion"),
        (says("", finish="content_filter"), "gave no text.*content_filter"),
        (
            Answered(status=307, headers={"Location": "https://else.example/v2/chat/completions"}),
            "sends on to https://else.example/v2, which is not",
        ),
    ],
)
def test_what_a_second_try_cannot_mend_is_said_at_once(tmp_path: Path, reply: Answered, message: str) -> None:
    with serving(lambda asked: reply) as server:
        with pytest.raises(EndpointError, match=message) as raised:
            open_box(server, tmp_path).ask(PLAIN, QUESTION)
        assert len(server.asked) == 1
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("reply", "message"), [
    (Answered(failed("slow down"), 429), r"answered 429 \(slow down\); tried 3 times"),
    (Answered(failed("oh"), 500), "answered 500"), (Answered(raw=b"<h1>Bad gateway</h1>", status=502), r"502 \(Bad gateway\)"),
    (Answered(raw=b'{"choices": [{"mess'), "damaged JSON of 19 characters; tried 3 times"),
    (Answered(raw=b'{"choices": [', headers={"Content-Length": "500"}), "damaged JSON|broke"),
])  # fmt: skip
def test_what_may_pass_is_tried_again_and_then_said(tmp_path: Path, reply: Answered, message: str) -> None:
    with serving(in_turn(reply, reply, FINE)) as server:
        assert open_box(server, tmp_path).ask(PLAIN, QUESTION).answer == "a red car"
        assert len(server.asked) == 3
    with serving(lambda asked: reply) as server, pytest.raises(EndpointError, match=message):
        open_box(server, tmp_path).ask(PLAIN, QUESTION)
    assert len(server.asked) == 3


def test_the_servers_own_pause_is_kept(tmp_path: Path) -> None:
    wait = Answered(failed("slow down"), 429, {"Retry-After": "0.4"})
    with serving(in_turn(wait, FINE)) as server:
        start = time.monotonic()
        open_box(server, tmp_path).ask(PLAIN, QUESTION)
    assert time.monotonic() - start >= 0.4


@pytest.mark.parametrize(
    ("text", "seconds"), [("7", 7), ("0.5", 0.5), ("", None), ("soon", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)]
)
def test_retry_after_is_read_in_seconds_and_as_a_date(text: str, seconds: float | None) -> None:
    headers = Message()
    headers["Retry-After"] = text
    assert retry_after(headers) == seconds


def test_retry_after_may_be_a_date_to_come() -> None:
    headers = Message()
    headers["Retry-After"] = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert retry_after(headers) == pytest.approx(100, abs=5)  # dates have whole seconds; the rest is a slow machine's


def test_a_server_that_hangs_is_left_after_the_time_allowed(tmp_path: Path) -> None:
    done = threading.Event()
    with serving(lambda asked: Answered({}, hang=done)) as server:
        with pytest.raises(EndpointError, match=r"no answer within 0.2 s; tried 2 times"):
            open_box(server, tmp_path, timeout=0.2, retries=1).ask(PLAIN, QUESTION)
        done.set()
    assert len(server.asked) == 2


def test_a_port_where_nothing_listens_is_said_at_once(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    box = ll.load("openai:gone", base_url=f"http://127.0.0.1:{port}/v1", cache=tmp_path)
    with pytest.raises(EndpointError, match=f"nothing listens at http://127.0.0.1:{port}/v1"):
        box.ask(PLAIN, QUESTION)
    assert box.endpoint.requests == 1


@pytest.mark.parametrize("name", ["max_tokens", "temperature", "seed"])
def test_an_option_the_server_refuses_is_left_out_from_then_on(tmp_path: Path, name: str) -> None:
    def answer(asked: Asked) -> Answered:
        if name in asked.body:
            return Answered(failed(f"Unsupported parameter: '{name}' is not supported with this model."), 400)
        return FINE

    with closed(answer, tmp_path) as (server, box):
        box.ask(PLAIN, QUESTION)
        box.ask(PLAIN, "And now?")
    assert [name in asked.body for asked in server.asked] == [True, False, False]
    assert all(asked.body.get("max_completion_tokens") == 64 for asked in server.asked[1:]) == (name == "max_tokens")


def test_a_server_that_refuses_log_probabilities_is_asked_without(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Answered:
        if "logprobs" in asked.body:
            return Answered(failed("You are not allowed to request logprobs from this model"), 400)
        return says("a red car")

    with serving(answer) as server:
        run = open_box(server, tmp_path).ask(PLAIN, QUESTION)
    assert run.options["scoring"] == "agreement"
    assert "top_logprobs" not in server.asked[1].body


def test_a_server_that_drips_is_left_after_the_time_allowed(tmp_path: Path) -> None:
    """A time-out that starts anew with every byte would wait for ever."""
    drip = Answered(raw=b" " * 40, pause=0.05)
    with closed(lambda asked: drip, tmp_path, timeout=0.3, retries=0) as (_, box):
        start = time.monotonic()
        with pytest.raises(EndpointError, match="no answer within 0.3 s"):
            box.ask(PLAIN, QUESTION)
        assert time.monotonic() - start < 1.5


def test_replies_are_kept_for_the_next_process_but_not_for_another_question(tmp_path: Path) -> None:
    with closed(a_red_car, tmp_path) as (server, box):
        first = ll.attribute(box, box.ask(PLAIN, QUESTION), method="occlusion")
        sent = len(server.asked)
        again = open_box(server, tmp_path, max_requests=1)
        second = ll.attribute(again, again.ask(PLAIN, QUESTION), method="occlusion")
        assert (len(server.asked), again.endpoint.requests) == (sent, 0)
        again.ask(PLAIN, "And now?")
        changed = PLAIN.copy()
        changed[0, 0, 0] -= 1
        open_box(server, tmp_path).ask(changed, QUESTION)
        open_box(server, tmp_path, cache=False).ask(PLAIN, QUESTION)
    assert np.array_equal(first.values, second.values)
    assert len(server.asked) == sent + 3


def test_damaged_files_are_asked_for_again_and_no_half_file_is_left(tmp_path: Path) -> None:
    with serving(a_red_car) as server:
        open_box(server, tmp_path).ask(PLAIN, QUESTION)
        (file,) = (tmp_path / "replies").rglob("*.*")
        whole = file.read_text("utf-8")
        file.write_text(whole[:20], "utf-8")
        assert open_box(server, tmp_path).ask(PLAIN, QUESTION).answer == "a red car"
    assert len(server.asked) == 2
    assert [one.read_text("utf-8") for one in (tmp_path / "replies").rglob("*.*")] == [whole]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "replies").write_text("a file", "utf-8")
    with serving(lambda asked: says("yes")) as server, pytest.raises(EndpointError, match="give cache=FOLDER, or cache=False"):
        open_box(server, tmp_path).ask(PLAIN, QUESTION)
