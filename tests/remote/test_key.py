"""The key goes to the address it is for, in one header, and nowhere else."""

from __future__ import annotations

import json
import logging
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.errors import EndpointError, OptionError
from llava_lab.instructions import ServerTeacher
from llava_lab.remote import open_judge
from llava_lab.remote.client import Endpoint, hiding
from tests.support.endpoint_server import PLAIN, QUESTION, Answered, Asked, closed, open_box, says, serving

KEY = "sk-very-secret-0123456789"
OURS = str(Path(ll.__file__).parent)


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


ESCAPED = "".join(f"\\u{ord(letter):04x}" for letter in KEY)
PERCENT = "".join(f"%{ord(letter):02X}" for letter in KEY)
HTML = "".join(f"&#{ord(letter)};" for letter in KEY)
FRAGMENTS = (KEY[8:], KEY[:16], ESCAPED[6 * 8 :], KEY[8:].upper())  # no half of it either


def seen(error: BaseException) -> str:
    """What the frames of ours that an error passed hold, as a debugger or a notebook may show it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename.startswith(OURS)]
    assert len(frames) >= 2
    return " ".join(held(frame.f_locals, 4) for frame in frames)


def silent(**message: Any) -> Answered:
    return Answered({"choices": [{"message": {"role": "assistant", "content": None, **message}, "finish_reason": "stop"}]})


@pytest.mark.parametrize("reply", [
    Answered({"error": {"message": f"Incorrect API key provided: {KEY}"}}, 401), Answered(raw=f"no {KEY}".encode(), status=500),
    Answered(raw=f"<p>{KEY}</p>".encode(), headers={"Content-Type": "text/html"}), Answered(raw=f'{{"x": "{KEY}'.encode()),
    Answered({"error": KEY}, 400), Answered({"choices": [{"message": {"content": {"key": KEY}}}]}),
    Answered(status=302, headers={"Location": f"http://127.0.0.1/?k={KEY}"}),
    Answered(status=302, headers={"Location": f"http://{KEY}.example/{PERCENT}"}), Answered({KEY: KEY}, 400),
    Answered({}, headers={"Content-Type": f"text/{KEY}"}), Answered({}, headers={"Content-Type": f"text/{KEY.upper()}"}),
    Answered(raw=f'{{"error": "{ESCAPED}'.encode(), status=400), Answered(raw=f'"{"x" * 190}{ESCAPED}'.encode(), status=400),
    Answered({"error": "x" * 190 + KEY}, 500), Answered({"error": {"message": json.dumps({"raw": ESCAPED})}}, 400),
    Answered(raw=f"<b>{HTML}</b>".encode(), status=502), Answered({"detail": [{"loc": ["body", KEY], "msg": KEY}]}, 422),
    Answered({"error": {"message": "no", "metadata": {"raw": KEY}, "code": KEY}}, 400), Answered({"error": KEY, "choices": []}),
    Answered({"error": {"message": f"{KEY[:9]}\n{KEY[9:]}"}}, 400), Answered({"error": f"{KEY[:9]}\u200b{KEY[9:]}"}, 403),
    silent(refusal=f"no {KEY}"), silent(refusal="x" * 190 + KEY), silent(refusal=[KEY]), silent(reasoning_content=KEY),
    Answered({"choices": [{"message": {"content": ""}, "finish_reason": KEY}]}), Answered({"choices": [{KEY: KEY}]}),
    Answered({"choices": [{"message": {"content": ""}, "finish_reason": "x" * 190 + KEY}]}), Answered({"choices": KEY}),
    Answered({"choices": [{"message": {"content": [KEY, {"text": 5}]}}]}), Answered(raw=KEY.encode() + b"[" * 100_000),
    Answered({"error": {"message": KEY}, "choices": [{"error": {"message": KEY, "code": 502}}]}),
    Answered({}, 429, {"Retry-After": KEY}), Answered(raw=f"oh {KEY[:16]}".encode(), status=500),
    Answered({"error": KEY[8:]}, 400), Answered(raw=f'{{"error": "{ESCAPED[: 6 * 16 + 3]}'.encode(), status=400),
])  # fmt: skip
def test_a_refused_key_is_in_no_message_no_traceback_and_no_frame(
    tmp_path: Path, reply: Answered, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), serving(lambda asked: reply) as server:
        with pytest.raises(EndpointError) as raised:
            open_box(server, tmp_path, retries=0).ask(PLAIN, QUESTION)
        assert len(server.asked) == 1
    told = f"{raised.value} {raised.value.__context__!r} {raised.value.__cause__!r} {caplog.text}" + seen(raised.value)
    assert [fragment for fragment in FRAGMENTS if fragment in told] == []


@pytest.mark.parametrize("content", [
    [KEY], [KEY[:9], KEY[9:]], [{"text": letter} for letter in KEY], [{"text": KEY[:9]}, {"text": "\n" + KEY[9:]}],
    f"{KEY[:9]}\u200b{KEY[9:]}", PERCENT, ESCAPED, KEY.upper(), f"<think>{KEY}</think> red",
])  # fmt: skip
def test_a_key_in_pieces_is_in_no_answer_and_no_file(tmp_path: Path, content: Any) -> None:
    listed = [{"token": letter, "logprob": -0.5, "top_logprobs": [{"token": KEY, "logprob": -1.0}]} for letter in KEY]
    choice = {"message": {"role": "assistant", "content": content}, "logprobs": {"content": listed}, "finish_reason": KEY}
    with closed(lambda asked: Answered({"choices": [choice]}), tmp_path) as (_, box):
        run = box.ask(PLAIN, QUESTION)
        run.save(tmp_path / "run.npz")
    assert "[key]" in run.answer
    assert run.options["scoring"] == "agreement", "tokens that spell the key were kept"
    for file in (path for path in tmp_path.rglob("*.*") if path.is_file()):
        stored = np.load(file)["header"].tobytes() if file.suffix == ".npz" else file.read_bytes()
        assert [fragment for fragment in FRAGMENTS if fragment.encode() in stored] == []


@pytest.mark.parametrize("part", [
    "\\", "s\\", "s \\", " ", "s ", "%25", "s%25", "&#0", "\\u00", "s\u200b", "sk-very-secret-", KEY[:12] + "\\" * 40, "a",
])  # fmt: skip
def test_no_text_slows_the_search_for_the_key_down(part: str) -> None:
    """While a pattern is searched no other thread runs, so no deadline would hold: 8,000 backslashes once took minutes."""
    hide, text = hiding(KEY), (part * 8000)[:8000]
    start = time.process_time()
    hidden = hide(text)
    assert time.process_time() - start < 3
    assert hide(f"{text}{KEY}").endswith("[key]")
    assert (hidden == text) == (KEY[:13] not in text)


@pytest.mark.parametrize(
    "key", ["sk-ab\\cd\\\\ef0123", "\\\\server\\secret", "%41%42-secret", "u0073u0074-x41", "&#65;secret", "ssssssssss"]
)
@pytest.mark.parametrize("spelt", [str, json.dumps, lambda key: json.dumps(json.dumps(key)), lambda key: " ".join(key)])
def test_a_key_of_strange_letters_is_found_too(key: str, spelt: Any) -> None:
    assert "[key]" in hiding(key)(f"no {spelt(key)}!")
    assert hiding("\\" * 9)("a text") == "a text"


def test_a_proxy_is_used_where_the_environment_names_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda asked: says("yes")) as server:
        monkeypatch.setenv("http_proxy", server.base_url.replace("http://", "http://me:p%40ss@"))
        box = ll.load("openai:m", base_url="http://model.example:81/v1", cache=tmp_path, retries=0, timeout=5.0)
        assert box.ask(PLAIN, QUESTION).answer == "yes"
        assert open_box(server, tmp_path).ask(PLAIN, QUESTION).answer == "yes"  # what is here is asked directly
    through, direct = server.asked
    assert (through.path, through.headers["Host"]) == ("http://model.example:81/v1/chat/completions", "model.example:81")
    assert through.headers["Proxy-Authorization"] == "Basic bWU6cEBzcw=="  # me:p@ss
    assert "Authorization" not in through.headers, "plain http to another machine"
    assert (direct.path, "Proxy-Authorization" in direct.headers) == ("/v1/chat/completions", False)


@pytest.mark.parametrize("base_url", [
    "http://[half/v1", "http://a b/v1", "http://host:0/v1", "http://host:99999/v1", "http://host:x/v1", "http://.../v1", "ftp://host",
    "http:///v1", "http://\x00host/v1", "http://ho\nst/v1", "http://host/\u00e9", "http://" + "a" * 70 + ".org/v1", "http://u@host",
    "//host/v1", "http://ho%00st/v1\r\nX: y", b"http://host/v1", 5, "http://\ud800/v1",
])  # fmt: skip
def test_an_odd_address_is_refused_before_anything_is_sent(base_url: Any) -> None:
    with pytest.raises(OptionError) as raised:
        Endpoint(base_url, max_requests=1)
    assert "\n" not in str(raised.value)


NOT_TAKEN = [
    *(("timeout", value) for value in (float("nan"), float("inf"), -1, 0, 1e300, 86_401, "5", True)),
    *(("retries", value) for value in (-1, 1.5, "2")),
    *(("max_requests", value) for value in (0, -1, "5", 2**70)),
]


@pytest.mark.parametrize(("option", "value"), NOT_TAKEN)
def test_whoever_opens_a_server_is_told_of_an_option_that_is_none(option: str, value: Any) -> None:
    at = "http://127.0.0.1:1/v1"
    for opening in (
        lambda **options: ll.load("openai:m", base_url=at, cache=False, **options),
        lambda **options: open_judge("m", at, cache=False, **options),
        lambda **options: ServerTeacher("m", at, **{"max_requests": 1, **options}),
    ):
        with pytest.raises(OptionError, match=f"^{option} must be"):
            opening(**{option: value})
    box = ll.load("openai:m", base_url=at, cache=False)
    with pytest.raises(OptionError, match="max_requests must be"):
        box.max_requests = 0


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
        assert "lines-of" not in seen(raised.value)
        monkeypatch.delenv("OPENAI_API_KEY")
        open_box(server, tmp_path).ask(PLAIN, "Without a key?")
        assert "Authorization" not in server.asked[-1].headers
