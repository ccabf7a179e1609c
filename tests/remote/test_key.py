"""The key goes to the address it is for, in one header, and nowhere else."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.errors import EndpointError
from llava_lab.remote.client import Endpoint
from tests.support.endpoint_server import PLAIN, QUESTION, Answered, Asked, closed, open_box, says, serving

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def echoing(asked: Asked) -> Answered:
    """Answers, with the key it was sent in every place it can reach."""
    reply = says(f"a red {KEY}", own=-0.5, listed={KEY: -1.0})
    reply.data["id"] = reply.data["system_fingerprint"] = KEY
    return Answered(reply.data, headers={"X-Echo": KEY, "Set-Cookie": f"key={KEY}"})


def held(value: Any, depth: int = 6) -> str:
    """Everything an object holds, as text."""
    if depth == 0 or isinstance(value, (str, bytes, int, float, np.ndarray, type(None))):
        return repr(value)
    if isinstance(value, dict):
        return " ".join(f"{held(key, depth - 1)} {held(one, depth - 1)}" for key, one in value.items())
    if isinstance(value, (list, tuple, set)):
        return " ".join(held(one, depth - 1) for one in value)
    return repr(value) + (held(vars(value), depth - 1) if hasattr(value, "__dict__") else "")


def test_a_working_key_is_seen_by_the_server_and_by_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG), closed(echoing, tmp_path) as (server, box):
        run = box.ask(PLAIN, QUESTION)
        rel = ll.attribute(box, run, method="occlusion", target="red", block=3)
    assert {asked.headers["Authorization"] for asked in server.asked} == {f"Bearer {KEY}"}
    run.save(tmp_path / "run.npz")
    rel.save(tmp_path / "map.npz")
    out = capfd.readouterr()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 5  # a run, a map and three replies
    texts = [repr(box), held(box), held(run), held(rel), caplog.text, out.out, out.err]
    for file in files:
        arrays = np.load(file) if file.suffix == ".npz" else {}
        texts += [file.name, file.read_text("latin-1"), *(arrays[name].tobytes().decode("latin-1") for name in arrays)]
    for text in texts:
        assert KEY not in text
        assert KEY.encode().hex() not in text
    assert "a red [key]" in run.answer


@pytest.mark.parametrize("reply", [
    Answered({"error": {"message": f"Incorrect API key provided: {KEY}"}}, 401), Answered(raw=f"no {KEY}".encode(), status=500),
    Answered(raw=f"<p>{KEY}</p>".encode(), headers={"Content-Type": "text/html"}), Answered(raw=f'{{"x": "{KEY}'.encode()),
    Answered({"error": KEY}, 400), Answered({"choices": [{"message": {"content": {"key": KEY}}}]}),
    Answered(status=302, headers={"Location": f"http://127.0.0.1/?k={KEY}"}),
])  # fmt: skip
def test_a_refused_key_is_in_no_message_and_no_traceback(
    tmp_path: Path, reply: Answered, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), serving(lambda asked: reply) as server:
        with pytest.raises(EndpointError) as raised:
            open_box(server, tmp_path, retries=0).ask(PLAIN, QUESTION)
        assert len(server.asked) == 1
    told = "".join(traceback.TracebackException.from_exception(raised.value).format(chain=True))
    assert KEY not in told + str(raised.value) + repr(raised.value.__context__) + caplog.text


def test_no_redirect_carries_the_key_anywhere(tmp_path: Path) -> None:
    with serving(lambda asked: says("a thief")) as other:
        for status in (301, 302, 303, 307, 308):
            to = {"Location": f"{other.base_url}/chat/completions"}
            reply = Answered({}, status, to)
            refused = pytest.raises(EndpointError, match=f"{status} and sends on to {other.base_url}, which is not followed")
            with serving(lambda asked, reply=reply: reply) as server, refused:  # type: ignore[misc]
                open_box(server, tmp_path).ask(PLAIN, QUESTION)
        assert other.asked == []


@pytest.mark.parametrize(("base_url", "variable", "sent"), [
    ("https://example.org/v1", None, True), ("http://127.0.0.1:8000/v1", None, True),
    ("http://localhost/v1", None, True), ("http://[::1]:80/v1", None, True),
    ("http://example.org/v1", None, False), ("http://127.example.org/v1", None, False),
    ("http://example.org/v1", "OPENAI_API_KEY", True),
])  # fmt: skip
def test_plain_http_to_another_machine_carries_only_a_key_that_was_named(base_url: str, variable: str | None, sent: bool) -> None:
    assert Endpoint(base_url, max_requests=1, key_variable=variable).key() == (KEY if sent else "")


def test_a_key_is_read_from_the_variable_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closed(lambda asked: says("yes"), tmp_path, key_variable="OTHER_KEY") as (server, box):
        with pytest.raises(EndpointError, match="OTHER_KEY holds no key"):
            box.ask(PLAIN, QUESTION)
        monkeypatch.setenv("OTHER_KEY", "other-secret\n")
        box.ask(PLAIN, QUESTION)
        assert [asked.headers["Authorization"] for asked in server.asked] == ["Bearer other-secret"]
        monkeypatch.setenv("OTHER_KEY", "two\nlines-of-secret")
        with pytest.raises(EndpointError, match="characters that no key has") as raised:
            box.ask(PLAIN, "Again?")
        assert "lines-of" not in str(raised.value)
        monkeypatch.delenv("OPENAI_API_KEY")
        open_box(server, tmp_path).ask(PLAIN, "Without a key?")
        assert "Authorization" not in server.asked[-1].headers
