"""The server as its clients meet it: what it answers, whom it does not, and the slow, the broken and the many."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.errors import LabError, OptionError
from llava_lab.models import Lab
from llava_lab.serving import Server
from llava_lab.serving import server as module
from tests.support.serving import QUESTION, ROUGH, data_url, head, huge_png, messages, send, until

FEW = 4
ASKED = {"messages": messages(), "max_tokens": FEW}


# -- answers --------------------------------------------------------------------------------


def test_an_answer_is_the_labs_own(server: Server, tiny_random: Lab) -> None:
    run = tiny_random.ask(ROUGH, QUESTION, max_new_tokens=FEW)
    got = send(server, ASKED)
    start, stop = run.segments["answer"]
    assert got.status == 200
    assert got.data["choices"][0]["message"] == {"role": "assistant", "content": run.answer, "refusal": None}
    assert got.data["usage"] == {"prompt_tokens": start, "completion_tokens": stop - start, "total_tokens": stop}
    assert got.data["system_fingerprint"] == tiny_random.fingerprint
    assert got.data["llava_lab"] == {"notes": list(run.notes)}
    assert got.data["choices"][0]["finish_reason"] == {"eos": "stop"}.get(run.options["stopped"], "length")
    assert got.headers["cache-control"] == "no-store"


def test_log_probabilities_are_those_of_the_run_and_their_list_is_in_order(server: Server, tiny_random: Lab) -> None:
    run = tiny_random.ask(ROUGH, QUESTION, max_new_tokens=FEW)
    listed = send(server, {**ASKED, "logprobs": True, "top_logprobs": 5}).data["choices"][0]["logprobs"]["content"]
    np.testing.assert_allclose([one["logprob"] for one in listed], run.logprobs, atol=1e-6)
    assert "".join(one["token"] for one in listed).strip() == run.answer
    for one in listed:
        values = [other["logprob"] for other in one["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        assert len(values) == 5
        assert one["logprob"] == pytest.approx(values[0])  # greedy


def test_turns_pictures_and_sampling_reach_the_lab(server: Server, tiny_random: Lab) -> None:
    other = np.ascontiguousarray(ROUGH[::-1])
    said = messages()
    said[0]["content"].insert(1, {"type": "image_url", "image_url": {"url": data_url(other)}})
    said += [{"role": "assistant", "content": "A car."}, {"role": "user", "content": "Is it red?"}]
    run = tiny_random.ask(
        [ROUGH, other], "Is it red?", history=[(QUESTION, "A car.")], max_new_tokens=FEW, temperature=1.5, seed=4
    )
    got = send(server, {"messages": said, "max_tokens": FEW, "temperature": 1.5, "seed": 4})
    assert got.data["choices"][0]["message"]["content"] == run.answer
    assert got.data["usage"]["prompt_tokens"] == run.segments["answer"][0]


def test_maps_and_segments_of_the_answer_are_those_made_inside(server: Server, tiny_random: Lab) -> None:
    run = tiny_random.ask(ROUGH, QUESTION, max_new_tokens=FEW)
    inside = ll.attribute(tiny_random, run, method="attention", target="answer", fusion="max")
    own = {"method": "attention", "target": "answer", "options": {"fusion": "max"}, "segments": True}
    found = send(server, {**ASKED, "llava_lab": own}).data["llava_lab"]
    assert found["run"] == json.loads(json.dumps(run.to_dict()))
    assert {**found["maps"], "seconds": 0} == {**inside.to_dict(), "seconds": 0}
    np.testing.assert_array_equal(np.array(found["maps"]["relevance"], np.float32), inside.values)


def test_a_target_that_is_not_in_the_answer_is_the_clients_mistake(server: Server) -> None:
    got = send(server, {**ASKED, "llava_lab": {"method": "attention", "target": "zebra"}})
    assert (got.status, "zebra" in got.error) == (400, True)


@pytest.mark.parametrize("stream", [False, True])
def test_a_picture_that_is_none_is_refused_with_its_status_also_in_a_stream(server: Server, stream: bool) -> None:
    for url in ("data:image/png;base64,AAAA", "data:text/html,<p>", "data:", f"data:image/png;base64,{'!' * 1000}"):
        said = [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]}
        ]
        got = send(server, {"messages": said, "stream": stream})
        assert got.status == 400, got
        assert len(got.error) < 300


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(server: Server) -> None:
    said = messages()
    said[0]["content"][0]["image_url"]["url"] = huge_png(100_000)
    got = send(server, {"messages": said})
    assert got.status == 400
    assert "pixels" in got.error


def test_an_unforeseen_error_is_a_500_that_tells_nothing_and_the_line_goes_on(
    server: Server, tiny_random: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(*args: Any, **options: Any) -> Any:
        raise KeyError("a secret")

    with monkeypatch.context() as patch:
        patch.setattr(tiny_random, "ask", ask)
        got = send(server, ASKED)
    assert (got.status, "secret" in got.error) == (500, False)
    assert "a secret" in caplog.text
    assert send(server, ASKED).status == 200


# -- whom it does not answer ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer \xe9"}, 401),
        ({"Host": "example.org"}, 403),
        ({"Host": "127.0.0.1.example.org"}, 403),
        ({"Origin": "http://example.org"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Content_Type": "text/plain"}, 415),
    ],
)
def test_strangers_are_refused(server: Server, headers: dict[str, Any], status: int) -> None:
    got = send(server, ASKED, **headers)
    assert got.status == status
    assert server.token not in got.body.decode()
    if status != 415:
        assert send(server, path="models", method="GET", **headers).status == status  # nothing is told without a token


def test_its_own_names_and_origin_are_answered(server: Server) -> None:
    host = f"localhost:{server.port}"
    assert send(server, path="models", method="GET", Host=host, Origin=f"http://{host}").status == 200


def test_only_what_is_there_is_there(server: Server) -> None:
    listed = send(server, path="models", method="GET").data["data"]
    assert [one["id"] for one in listed] == [server.model]
    assert "/" not in server.model  # a folder's own name, not where it stands
    assert send(server, path=f"models/{server.model}", method="GET").data == listed[0]
    assert send(server, path="models/gpt-4o", method="GET").status == 404
    assert "no such address" in send(server, ASKED, path="completions").error
    assert send(server, method="GET").status == 405
    assert send(server, ASKED, path="models").status == 405
    assert send(server, {**ASKED, "model": "gpt-4o"}).status == 404


def test_a_server_is_for_a_model_that_is_here_with_a_token_worth_the_name(tiny_random: Lab, server: Server) -> None:
    box = ll.BlackBox("tiny", server.base_url, cache=False)
    with pytest.raises(OptionError, match="is behind one itself"):
        Server(box)  # type: ignore[arg-type]
    for token in ("short", "with a space in the middle", "é" * 20):
        with pytest.raises(OptionError, match="a token has at least 16"):
            Server(tiny_random, token=token)
    with pytest.raises(OptionError, match=f"port {server.port} cannot be used"):
        Server(tiny_random, port=server.port)


# -- too much, too slow, gone ---------------------------------------------------------------


def test_a_body_too_large_is_refused_whether_or_not_it_says_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 1000)
    assert send(server, b" " * 1001).status == 413
    with socket.create_connection(("127.0.0.1", server.port), 20) as line:
        line.sendall(head(server, "Transfer-Encoding: chunked") + b"258\r\n" + b" " * 600 + b"\r\n258\r\n" + b" " * 600 + b"\r\n")
        assert b" 413 " in line.recv(4096).partition(b"\r\n")[0]


def test_who_finds_the_line_full_is_told_so_and_nobody_else_suffers(
    tiny_random: Lab, gate: Any, started: Callable[..., threading.Thread]
) -> None:
    with Server(tiny_random, waiting=1) as server:
        statuses: list[int] = []
        for _ in range(2):
            started(lambda: statuses.append(send(server, ASKED).status))
        until(lambda: server.desk.inside == 2)
        got = send(server, ASKED)
        assert (got.status, got.headers["retry-after"], got.data["error"]["code"]) == (429, "1", "queue_full")
        gate.opened.set()
        until(lambda: len(statuses) == 2)
        assert statuses == [200, 200]
        assert send(server, ASKED).status == 200
        until(lambda: server.desk.inside == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_a_request_and_the_next_is_answered(tiny_random: Lab, gate: Any, stream: bool) -> None:
    with Server(tiny_random, deadline=0.3) as server:
        got = send(server, {**ASKED, "stream": stream})
        assert (got.status, got.data["error"]["code"]) == (504, "deadline")
        gate.opened.set()
        server.deadline = 30
        assert send(server, ASKED).status == 200


def test_a_deadline_in_the_middle_of_a_stream_is_its_last_event(tiny_random: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    own, resume = tiny_random.ask, threading.Event()

    def ask(*args: Any, on_token: Any, **options: Any) -> Any:
        on_token("so far")
        resume.wait(30)
        return own(*args, on_token=on_token, **options)

    monkeypatch.setattr(tiny_random, "ask", ask)
    with Server(tiny_random, deadline=0.5) as server:
        got = send(server, {**ASKED, "stream": True})
        resume.set()
    events = [json.loads(line.removeprefix("data: ")) for line in got.body.decode().split("\n\n") if line]
    assert got.status == 200
    assert events[1]["choices"][0]["delta"] == {"content": "so far"}
    assert events[-1]["error"]["code"] == "deadline"


def test_who_leaves_is_not_answered_on(tiny_random: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is taken out of the line, the first stops at its next token."""
    own, steps, first, left = tiny_random.ask, [], threading.Event(), threading.Event()

    def ask(*args: Any, on_step: Any, **options: Any) -> Any:
        def step(token: int, chances: Any) -> None:
            steps.append(token)
            first.set()
            if len(steps) == 1:
                assert left.wait(60)
            on_step(token, chances)

        return own(*args, on_step=step, **options)

    monkeypatch.setattr(tiny_random, "ask", ask)
    monkeypatch.setattr(tiny_random, "eos_ids", frozenset())
    with Server(tiny_random) as server:
        body = json.dumps({"model": server.model, **ASKED, "max_tokens": 50}).encode()
        lines = [socket.create_connection(("127.0.0.1", server.port), 20) for _ in range(2)]
        for count, line in enumerate(lines, 1):
            line.sendall(head(server, f"Content-Length: {len(body)}") + body)
            until(lambda count=count: server.desk.inside == count)  # type: ignore[misc]
        assert first.wait(20)
        for line in lines:
            line.close()
        until(lambda: server.desk.inside == 0)
        left.set()
        monkeypatch.setattr(tiny_random, "ask", own)
        assert send(server, ASKED).status == 200  # the line has come to its end
    assert len(steps) == 1


def test_a_head_that_never_ends_is_closed(tiny_random: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEADERS", 0.3)
    with Server(tiny_random) as server, socket.create_connection(("127.0.0.1", server.port), 20) as line:
        line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.")
        with suppress(ConnectionResetError):
            assert line.recv(100) == b""


def test_a_body_that_drips_meets_the_deadline_and_holds_nobody_up(tiny_random: Lab) -> None:
    with Server(tiny_random, deadline=0.5) as server, socket.create_connection(("127.0.0.1", server.port), 20) as line:
        line.sendall(head(server, "Content-Length: 1000") + b"{")
        until(lambda: server.desk.inside == 1)
        assert send(server, path="models", method="GET").status == 200
        assert b" 504 " in line.recv(4096).partition(b"\r\n")[0]
        until(lambda: server.desk.inside == 0)


@pytest.mark.parametrize("noise", [b"\x00\xff\n\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"])
def test_what_is_no_http_does_no_harm(server: Server, noise: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 20) as line:
        line.sendall(noise)
    assert send(server, ASKED).status == 200


def test_a_stop_finishes_the_answer_that_is_made_and_refuses_the_rest(
    tiny_random: Lab, gate: Any, started: Callable[..., threading.Thread]
) -> None:
    statuses: list[int] = []
    with Server(tiny_random) as server:
        started(lambda: statuses.append(send(server, ASKED).status))
        assert gate.asked.wait(20)
        started(lambda: statuses.append(send(server, ASKED).status))
        until(lambda: server.desk.inside == 2)
        started(lambda: (until(lambda: statuses == [503]), gate.opened.set()))
    assert statuses == [503, 200]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port), 5).close()


@pytest.mark.long
def test_of_64_clients_at_once_each_gets_its_own_answer(tiny_random: Lab) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (32, 32, 3), dtype=np.uint8) for _ in range(64)]
    asked = [
        {"messages": messages(picture), "max_tokens": 3, "temperature": 2.0, "seed": i} for i, picture in enumerate(pictures)
    ]
    want = [tiny_random.ask(picture, QUESTION, max_new_tokens=3, temperature=2.0, seed=i) for i, picture in enumerate(pictures)]
    assert len({run.answer for run in want}) > 32  # they can be told apart
    barrier = threading.Barrier(64)
    with Server(tiny_random, waiting=63) as server, ThreadPoolExecutor(64) as pool:

        def ask(body: dict[str, Any]) -> Any:
            barrier.wait(60)
            return send(server, body)

        found = list(pool.map(ask, asked))
    assert [got.status for got in found] == [200] * 64
    assert [got.data["choices"][0]["message"]["content"] for got in found] == [run.answer for run in want]


def test_a_lab_error_that_is_not_the_clients_is_a_500(server: Server, tiny_random: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*args: Any, **options: Any) -> Any:
        raise LabError("the memory is not enough")

    monkeypatch.setattr(tiny_random, "ask", ask)
    got = send(server, ASKED)
    assert (got.status, got.error, got.data["error"]["type"]) == (500, "the memory is not enough", "server_error")
