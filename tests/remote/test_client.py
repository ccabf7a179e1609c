"""What goes wrong with a server is tried again where that helps, and otherwise said in one line; replies are kept whole."""

from __future__ import annotations

import email.utils
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.errors import EndpointError
from llava_lab.remote import client
from llava_lab.remote.client import retry_after
from llava_lab.remote.replies import read_json
from tests.support.endpoint_server import (
    PLAIN,
    QUESTION,
    Answered,
    Answerer,
    Asked,
    a_red_car,
    closed,
    dripping,
    open_box,
    says,
    serving,
)
from tests.support.families import family

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


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


@family(("first", "again", "pause"), [
    (b"", b"H", 0.02), (b"HTTP/1.1 200 ", b"O", 0.02), (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x", 0.02), (OK, b"X: y\r\n", 0.02),
    (OK + b"\r\n", b" ", 0.02), (OK + b"Content-Length: 9999\r\n\r\n", b" ", 0.02), (CHUNKED, b"1\r\n \r\n", 0.02),
    (CHUNKED, b"0", 0.02), (CHUNKED + b"FFFF\r\n", b" ", 0.02), (CHUNKED + b"2\r\n{}\r\n0\r\n", b"X: y\r\n", 0.0),
    (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.0), (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02),
    (b"HTTP/1.1 100 Continue\r\n", b"X: y\r\n", 0.0), (b"HTTP/1.1 500 Oh\r\n\r\n", b"x", 0.02),
], quick=4)  # fmt: skip
def test_a_server_that_drips_is_left_after_the_time_allowed(tmp_path: Path, first: bytes, again: bytes, pause: float) -> None:
    """A time-out that starts anew with every byte would wait for ever."""
    with dripping(first, again, pause) as address:
        box = ll.load("openai:drip", base_url=address, cache=tmp_path, timeout=0.4, retries=0)
        start = time.monotonic()
        with pytest.raises(EndpointError, match=r"no answer within 0.4 s|broke"):
            box.ask(PLAIN, QUESTION)
        assert time.monotonic() - start < 4
        while any(thread.name == client.THREAD for thread in threading.enumerate()):
            assert time.monotonic() - start < 8, "the request goes on behind our back"
            time.sleep(0.01)


MANY = json.dumps({"choices": [{"message": {"content": "a"}}] * 300_000})


def test_a_reply_of_many_objects_is_left_when_nobody_waits_any_more() -> None:
    """While Python reads plain JSON no other thread runs, and 300,000 choices outlasted every deadline."""
    line, objects = client._Line(), []

    def each(value: dict[str, Any]) -> Any:
        objects.append(value)
        if len(objects) == 10:
            line.shut()
        return line.still(value)

    with pytest.raises(TimeoutError):
        read_json(MANY, each)
    assert len(objects) == 10


def test_a_reply_of_300_000_choices_is_read_or_left_in_time(tmp_path: Path) -> None:
    with serving(lambda asked: Answered(raw=MANY.encode())) as server:
        box, start = open_box(server, tmp_path, timeout=0.2, retries=0), time.monotonic()
        with suppress(EndpointError):
            box.ask(PLAIN, QUESTION)
        assert time.monotonic() - start < 4
        while any(thread.name == client.THREAD for thread in threading.enumerate()):
            assert time.monotonic() - start < 8, "it is read behind our back"
            time.sleep(0.01)


@pytest.mark.parametrize("value", ["0", "[]", '""', "null", "{}", "[[]]"])
def test_a_reply_of_more_values_than_an_answer_has_is_refused_unread(value: str) -> None:
    def never(given: Any) -> Any:
        raise AssertionError

    with pytest.raises(EndpointError, match=r"^got a reply of 1,000,001 values, expected at most 1,000,000; ask for a shorter"):
        read_json(f"[{','.join([value] * 1_000_002)}]", never)


def completed(content: Any, *, tokens: Any = None, **more: Any) -> Answered:
    """A chat completion of strange parts, as the text of its JSON."""
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop", "logprobs": {"content": tokens}}
    return Answered(raw=json.dumps({"choices": [choice], **more}).encode(), headers={"Content-Type": "application/json"})


def token(text: Any, logprob: Any = -0.5, **more: Any) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, **more}


DEEP = b"[" * 100_000


@pytest.mark.parametrize("reply", [
    Answered(raw=DEEP), Answered(raw=b'{"choices": ' + DEEP), Answered(raw=DEEP, status=400), Answered(raw=b"9" * 5000),
    Answered(raw=b'{"error": ' + b'{"error":' * 900 + b"1" + b"}" * 901, status=400), Answered(raw=b"\xff\xfe{\x00}\x00"),
    Answered(status=302, headers={"Location": "http://[half"}), Answered(status=307, headers={"Location": "//:99999999/\u00ff"}),
    Answered({}, 429, {"Retry-After": "9" * 400}), Answered({}, 503, {"Retry-After": "Wed, 21 Oct 99999 07:28:00 GMT"}),
    Answered({}, 999), Answered({}, headers={"Content-Length": "-5"}), Answered({}, headers={"Content-Type": "\u00ff/;;=json"}),
    Answered({}, headers={"Transfer-Encoding": "chunked", "Content-Length": ""}), Answered({"choices": {"0": 1}}),
    Answered({"choices": [[]]}), Answered({"choices": ["a"]}), Answered({"choices": [{"message": "a"}]}),
    Answered({"choices": 5}), completed(["a", {"text": 5}]), completed([["a"]]), completed({"text": "a"}), completed(True),
    completed([{"text": "a"}, 7]),
    Answered({"error": {"code": 10**30, "message": {"a": [None]}}}), Answered({"error": [[]], "choices": []}), completed("  "),
    completed("a" * 5_000_000), completed("a " * 20_000), Answered(raw=b" " * (17 * 2**20)), completed([{"text": "ab "}] * 9000),
])  # fmt: skip
def test_a_strange_reply_is_one_line(tmp_path: Path, reply: Answered) -> None:
    with serving(lambda asked: reply) as server, pytest.raises(EndpointError) as raised:
        open_box(server, tmp_path, retries=0).ask(PLAIN, QUESTION)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    assert "cannot be read" not in str(raised.value), "met by the last guard, not by its rule"


INFINITE, HALF = 1e999, "\ud83d"


@pytest.mark.parametrize(("reply", "answer", "listed"), [
    (completed("a red", usage={"prompt_tokens": INFINITE, "completion_tokens": 2}), "a red", False),
    (completed("a red", usage={"prompt_tokens": -1, "completion_tokens": {}}), "a red", False),
    (completed("a red", usage=[]), "a red", False), (completed("a red", usage={"prompt_tokens": 10**400}), "a red", False),
    (completed(HALF + " red"), "\ufffd red", False), (completed([HALF, "\ude00"]), "\U0001f600", False),
    (completed("a", tokens=[token("a", bytes=[300])]), "a", False), (completed("a", tokens=[token("a", bytes=[-1])]), "a", False),
    (completed("a", tokens=[token("a", bytes=10**10)]), "a", False), (completed("a", tokens=[token("a", bytes="a")]), "a", False),
    (completed("a", tokens=[token("a", 10**400)]), "a", False), (completed("a", tokens=[token("a", None)]), "a", False),
    (completed("a", tokens=[token("a", INFINITE)]), "a", True), (completed("a", tokens=[token("a", -INFINITE)]), "a", True),
    (completed("a", tokens=[token(HALF), token("a")]), "a", False), (completed("a", tokens=[token(["a"])]), "a", False),
    (completed("a", tokens={"a": 1}), "a", False), (completed("a", tokens=[token("a", top_logprobs={"a": 1})]), "a", False),
    (completed("a", tokens=[token("a", top_logprobs=[token("b")] * 10_000)]), "a", True),
    (completed("a", tokens=[token("b")] * 20_000), "a", False),
    (completed("a", tokens=[token("a"), *[token("")] * 20_000]), "a", False),
    (completed("a", tokens=[token("a"), token("</s>"), token("")]), "a", True),
    (completed("a" * 1500, tokens=[token("a" * 1500)]), "a" * 1500, False),  # no token is that long
])  # fmt: skip
def test_strange_numbers_beside_an_answer_do_not_spoil_it(tmp_path: Path, reply: Answered, answer: str, listed: bool) -> None:
    with serving(lambda asked: reply) as server:
        run = open_box(server, tmp_path, retries=0).ask(PLAIN, QUESTION)
        assert ll.Run.load(run.save(tmp_path / "run.npz")).answer == run.answer == answer
        assert open_box(server, tmp_path).ask(PLAIN, QUESTION).answer == answer
    assert len(server.asked) == 1
    assert (run.options["scoring"] == "top", bool(np.isfinite(run.logprobs).all())) == (listed, listed)


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


@pytest.mark.parametrize("damage", [
    lambda text: text[:20], lambda text: "", lambda text: "[]", lambda text: "null", lambda text: "5", lambda text: "[" * 100_000,
    lambda text: text.replace("-0.5", "1e999"), lambda text: text.replace("-0.5", "NaN"),
    lambda text: text.replace("-0.5", '"a"'),
    lambda text: text.replace("[100, 3]", "[1e999, 3]"), lambda text: text.replace("[100, 3]", "[1]"),
    lambda text: text.replace('"a red car"', '"\\ud800"'), lambda text: text.replace('"a red car"', "{}"),
    lambda text: text.replace('"a red car"', '"a blue car"'), lambda text: text.replace('"eos"', "[]"),
    lambda text: text.replace('"tokens": [', '"tokens": [1, '), lambda text: text + " " * 17 * 2**20,
    lambda text: text.replace('"format": 1', '"format": 2'), lambda text: text.replace("61", "6x"),
])  # fmt: skip
def test_damaged_files_are_asked_for_again_and_no_half_file_is_left(tmp_path: Path, damage: Callable[[str], str]) -> None:
    with serving(a_red_car) as server:
        open_box(server, tmp_path).ask(PLAIN, QUESTION)
        (file,) = (tmp_path / "replies").rglob("*.*")
        whole = file.read_text("utf-8")
        assert damage(whole) != whole
        file.write_text(damage(whole), "utf-8")
        assert open_box(server, tmp_path).ask(PLAIN, QUESTION).answer == "a red car"
    assert len(server.asked) == 2
    assert [one.read_text("utf-8") for one in (tmp_path / "replies").rglob("*.*")] == [whole]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "replies").write_text("a file", "utf-8")
    with serving(lambda asked: says("yes")) as server, pytest.raises(EndpointError, match="give cache=FOLDER, or cache=False"):
        open_box(server, tmp_path).ask(PLAIN, QUESTION)
