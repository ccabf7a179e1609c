"""Chat completions read and written: what is taken, what is refused and about which field, and how tokens are listed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from llava_lab.serving.protocol import Listing, Refused, read_chat

URL = "data:image/png;base64,AAAA"


def shown(text: str = "What is it?", url: Any = URL) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]}


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "messages": [shown()], **fields}).encode()


def test_a_request_is_read_as_it_says() -> None:
    said = [shown("Is it red?"), {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "What is it?"}]
    own = {"method": "rollout", "target": "red", "options": {"residual": 0.5}, "segments": True, "fit": "crop"}
    given = {"temperature": 0.5, "seed": 7, "max_tokens": 9, "logprobs": True, "top_logprobs": 3, "n": 1, "user": "somebody"}
    chat = read_chat(body(messages=said, stream=True, stream_options={"include_usage": True}, llava_lab=own, **given), "tiny")
    assert (chat.pictures, chat.question, chat.history) == ((URL,), "What is it?", (("Is it red?", "Yes."),))
    assert chat.asking == {"max_new_tokens": 9, "temperature": 0.5, "seed": 7, "fit": "crop"}
    assert (chat.listed, chat.stream, chat.usage) == (3, True, True)
    assert (chat.method, chat.target, chat.options["residual"], chat.segments) == ("rollout", "red", 0.5, True)


def test_a_request_without_options_is_greedy_and_lists_nothing() -> None:
    chat = read_chat(body(temperature=None, max_completion_tokens=5), "tiny", seed=3)
    assert chat.asking == {"max_new_tokens": 5, "temperature": 0.0, "seed": 3}
    assert (chat.listed, chat.stream, chat.method) == (None, False, None)


def test_a_question_without_a_picture_is_asked_where_it_says_so() -> None:
    assert (
        read_chat(body(messages=[{"role": "user", "content": "Is it red?"}], llava_lab={"picture": False}), "tiny").pictures == ()
    )


MESSAGES = [
    ([], "1 to 1000 messages"),
    ("What?", "1 to 1000 messages"),
    ([{"role": "user", "content": "What?"}], "no picture came"),
    ([{"role": "user", "content": "<image>\nWhat?"}], "no picture came"),
    ([{"role": "system", "content": "Be kind."}, shown()], "a system text cannot act"),
    ([shown(), shown()], "turn 1 is from 'user'"),
    ([shown(), {"role": "assistant", "content": "A car"}], "not continued"),
    ([shown(), {"role": "assistant", "content": "A car."}, shown()], "first user message"),
    ([shown(url="http://127.0.0.1/car.png")], "fetches nothing and opens no file"),
    ([shown(url="file:///etc/passwd")], "fetches nothing and opens no file"),
    ([shown(url="/etc/passwd")], "fetches nothing and opens no file"),
    ([shown(url={"url": URL})], "data: address"),
    ([shown(url=None)], "data: address"),
    ([{"role": "user", "content": [{"type": "audio"}]}], "type 'audio'"),
    ([{"role": "user", "content": 3}], "no text"),
    (["What?"], "must be a list of"),
]


@pytest.mark.parametrize(("messages", "match"), MESSAGES)
def test_messages_that_cannot_be_asked_are_refused(messages: Any, match: str) -> None:
    with pytest.raises(Refused, match=match) as raised:
        read_chat(body(messages=messages), "tiny")
    assert (raised.value.status, raised.value.param) == (400, "messages")


FIELDS = [
    ({"temperature": -1}, "temperature must be", "temperature"),
    ({"temperature": 2.5}, "from 0 to 2", "temperature"),
    ({"temperature": "warm"}, "temperature must be", "temperature"),
    ({"max_tokens": 0}, "at least 1", "max_tokens"),
    ({"seed": 2**64}, "below 2\\*\\*63", "seed"),
    ({"top_logprobs": 5}, "belongs to logprobs", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "at most 20", "top_logprobs"),
    ({"logprobs": 5}, "true or false", "logprobs"),
    ({"stream": "yes"}, "true or false", "stream"),
    ({"stream_options": {"include_usage": True}}, "belongs to stream", "stream_options"),
    ({"n": 2}, "n cannot act here", "n"),
    ({"n": True}, "n cannot act here", "n"),
    ({"top_p": 0.5}, "top_p cannot act here", "top_p"),
    ({"stop": ["."]}, "stop cannot act here", "stop"),
    ({"response_format": {"type": "json_object"}}, "response_format cannot act", "response_format"),
    ({"continue_final_message": True}, "no field 'continue_final_message'", "continue_final_message"),
    ({"llava_lab": []}, "must be an object with method", "llava_lab"),
    ({"llava_lab": {"map": "rollout"}}, "got 'map'", "llava_lab"),
    ({"llava_lab": {"method": "rolout"}}, "no method 'rolout'", None),
    ({"llava_lab": {"method": "rollout", "options": {"x": 1}}}, "no option 'x'", None),
    ({"llava_lab": {"method": "rise"}}, "do it from outside", None),
    ({"llava_lab": {"target": "red"}}, "target belongs to a method", None),
    ({"llava_lab": {"segments": 1}}, "segments must be true or false", "segments"),
]


@pytest.mark.parametrize(("fields", "match", "param"), FIELDS)
def test_what_cannot_act_is_refused_with_its_field(fields: dict[str, Any], match: str, param: str | None) -> None:
    with pytest.raises(Refused, match=match) as raised:
        read_chat(body(**fields), "tiny")
    assert raised.value.status == 400
    assert param is None or raised.value.param.rstrip(":") == param  # type: ignore[union-attr]


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 200_000, b"[]", b"3"])
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(Refused, match="the body must be"):
        read_chat(data, "tiny")


def test_another_model_is_not_found() -> None:
    with pytest.raises(Refused, match="no model 'gpt-4o'; this server has 'tiny'") as raised:
        read_chat(body(model="gpt-4o"), "tiny")
    assert (raised.value.status, raised.value.code) == (404, "model_not_found")


class Bytes:
    """A tokenizer of single bytes, and an end mark."""

    END = 256

    def decode(self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return bytes(i for i in ids if i != self.END).decode("utf-8", "replace")

    def convert_ids_to_tokens(self, token: int) -> str:
        return "</s>" if token == self.END else f"<{token:02X}>"


def test_the_listed_tokens_spell_the_answer_whatever_they_cut_through() -> None:
    listing, said = Listing(Bytes(), 2), "né"
    for token in said.encode():
        chances = torch.full((257,), -9.0, dtype=torch.float64)
        chances[token], chances[Bytes.END] = -0.25, -1.5
        listing.add(token, chances)
    taken = listing.take()
    assert taken is not None
    entries = taken["content"]
    assert [entry["token"] for entry in entries] == ["n", "", "é"]  # the character's first byte writes nothing yet
    assert bytes(b for entry in entries for b in entry["bytes"]).decode() == said
    assert [(one["token"], one["logprob"]) for one in entries[0]["top_logprobs"]] == [("n", -0.25), ("</s>", -1.5)]
    assert listing.take() == {"content": [], "refusal": None}
    assert Listing(Bytes(), None).take() is None


def test_a_character_that_is_cut_off_is_shown_as_the_answer_shows_it() -> None:
    listing = Listing(Bytes(), 0)
    for token in "né".encode()[:2]:
        listing.add(token, torch.zeros(257, dtype=torch.float64))
    taken = listing.take(last=True)
    assert taken is not None
    assert [entry["token"] for entry in taken["content"]] == ["n", "\ufffd"]
