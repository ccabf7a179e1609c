"""The shipped model behind our server, asked by the official client, and explained from outside by our own black box."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

import llava_lab as ll
from llava_lab.models import Lab
from llava_lab.remote import BlackBox
from llava_lab.serving import Server
from llava_lab.worlds import picturebook
from tests.support.serving import messages

# The box sends 8-bit pixels: its grey is 128 where the model's own is 127.5, 0.002 of the range under a block.
CLOSE = 0.05  # of a log-probability; the drops compared here go up to several
BLOCK = 4


@pytest.fixture(scope="module")
def tiny() -> Lab:
    return ll.load("tiny")


@pytest.fixture(scope="module")
def server(tiny: Lab) -> Iterator[Server]:
    with Server(tiny) as running:
        yield running


@pytest.fixture(scope="module")
def asked() -> tuple[np.ndarray, str]:
    """A drawn picture at the model's own 96 px, so that no resize comes between, and a question about a colour."""
    drawn = picturebook.scene("test", 5)
    question = picturebook.ask_about(drawn, np.random.default_rng(0), 1, ("color",))[0]
    return np.asarray(drawn.picture().resize((96, 96))), question.text


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key=server.token, max_retries=0) as made:
        yield made


def test_the_official_client_is_answered(client: openai.OpenAI, tiny: Lab, asked: tuple[np.ndarray, str]) -> None:
    run = tiny.ask(*asked)
    assert [one.id for one in client.models.list()] == ["tiny"]
    own = {"llava_lab": {"method": "rollout", "segments": True}}
    said = messages(*asked)
    done = client.chat.completions.create(model="tiny", messages=said, logprobs=True, top_logprobs=2, extra_body=own)  # type: ignore[arg-type]
    choice = done.choices[0]
    assert (choice.message.content, choice.finish_reason) == (run.answer, "stop")
    assert choice.logprobs is not None
    np.testing.assert_allclose([one.logprob for one in choice.logprobs.content or ()], run.logprobs, atol=1e-6)
    more = done.llava_lab  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.array(more["maps"]["relevance"], np.float32), ll.attribute(tiny, run, target="words").values)
    assert more["run"]["segments"]["answer"] == list(run.segments["answer"])


def test_the_official_client_reads_the_stream(client: openai.OpenAI, tiny: Lab, asked: tuple[np.ndarray, str]) -> None:
    run = tiny.ask(*asked)
    options = {"logprobs": True, "top_logprobs": 3, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="tiny", messages=messages(*asked), stream=True, **options))  # type: ignore[call-overload]
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == run.answer
    listed = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    np.testing.assert_allclose([one.logprob for one in listed], run.logprobs, atol=1e-6)
    assert len(choices) > len(run.words)  # it came in pieces
    assert [choice.finish_reason for choice in choices][-2:] == [None, "stop"]
    assert chunks[-1].usage.total_tokens == len(run.token_ids)
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_official_client_reads_refusals(server: Server, client: openai.OpenAI, asked: tuple[np.ndarray, str]) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.chat.completions.create(model="gpt-4o", messages=messages(*asked))  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="no picture came") as raised:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "What?"}])
    assert raised.value.param == "messages"
    with pytest.raises(openai.AuthenticationError, match="wrong or missing token"):
        openai.OpenAI(base_url=server.base_url, api_key="another", max_retries=0).models.list()


@pytest.fixture
def box(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> BlackBox:
    monkeypatch.setitem(os.environ, "OPENAI_API_KEY", server.token)
    return ll.load("openai:tiny", base_url=server.base_url, cache=tmp_path, grid=(12, 12), floor=-60.0, parallel=4)


def test_our_black_box_explains_our_server_as_the_model_is_explained_inside(
    tiny: Lab, box: BlackBox, asked: tuple[np.ndarray, str]
) -> None:
    mine, theirs = tiny.ask(*asked), box.ask(*asked)
    assert theirs.answer == mine.answer
    np.testing.assert_allclose(theirs.logprobs, mine.logprobs, atol=1e-6)
    color = mine.words[-2].text
    options: dict[str, Any] = {"method": "occlusion", "target": color, "block": BLOCK, "fill": "grey"}
    want, found = ll.attribute(tiny, mine, score="logprob", **options), ll.attribute(box, theirs, **options)
    print("largest drop", want.values.max(), "largest difference", np.abs(found.values - want.values).max())
    assert want.values.max() > 1  # there is something to find
    np.testing.assert_allclose(found.values, want.values, atol=CLOSE)
    assert found.extras["parted"] == 0
    assert found.top(1)[0][:2] == want.top(1)[0][:2]


def test_the_same_pixels_inside_and_outside_give_the_same_number(tiny: Lab, box: BlackBox, asked: tuple[np.ndarray, str]) -> None:
    """The box's own altered picture, asked about inside: what is left between the two is nothing."""
    picture, question = asked
    run, covered = box.ask(picture, question), picture.copy()
    covered[32:64, 32:64] = 128
    there, here = box.ask(covered, question), tiny.ask(covered, question)
    assert there.answer == here.answer
    np.testing.assert_array_equal(there.logprobs, here.logprobs)
    assert not np.allclose(there.logprobs, run.logprobs, rtol=0.1, atol=0)  # covering changed something
