"""The shipped model behind a server is explained as it is when it is loaded: the same answer, numbers and maps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.models import Lab
from llava_lab.remote import BlackBox
from llava_lab.worlds import picturebook
from tests.support.endpoint_server import from_lab, serving

# The endpoint gets 8-bit pixels, so its grey is 128 where the model's own is 127.5, and the server's log-probabilities
# come from one pass over its own answer in place of a batch: the picture differs by 0.002 of its range under a block.
CLOSE = 0.05  # of a log-probability; the drops compared here go up to several
BLOCK = 4


@pytest.fixture(scope="module")
def tiny() -> Lab:
    return ll.load("tiny")


@pytest.fixture(scope="module")
def asked() -> tuple[np.ndarray, str]:
    """A drawn picture at the model's own 96 px, so that no resize comes between, and a question about a colour."""
    drawn = picturebook.scene("test", 5)
    question = picturebook.ask_about(drawn, np.random.default_rng(0), 1, ("color",))[0]
    return np.asarray(drawn.picture().resize((96, 96))), question.text


@pytest.fixture(scope="module")
def box(tiny: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlackBox]:
    with serving(from_lab(tiny)) as server:
        folder = tmp_path_factory.mktemp("replies")
        yield ll.load("openai:tiny", base_url=server.base_url, cache=folder, grid=(12, 12), floor=-60.0, parallel=2)


def test_the_answer_its_words_and_their_log_probabilities_are_the_models(
    tiny: Lab, box: BlackBox, asked: tuple[np.ndarray, str]
) -> None:
    mine, theirs = tiny.ask(*asked), box.ask(*asked)
    assert theirs.answer == mine.answer
    assert [word.text for word in theirs.words] == [word.text for word in mine.words]
    np.testing.assert_allclose(theirs.logprobs, mine.logprobs, atol=1e-5)
    assert theirs.map.to_dict() | {"mode": "pad"} == mine.map.to_dict()  # at 96 px they agree on every number


def test_occlusion_through_the_endpoint_is_occlusion_of_the_model(
    tiny: Lab, box: BlackBox, asked: tuple[np.ndarray, str]
) -> None:
    mine, theirs = tiny.ask(*asked), box.ask(*asked)
    color = mine.words[-2].text
    want = ll.attribute(tiny, mine, method="occlusion", target=color, block=BLOCK, fill="grey")
    found = ll.attribute(box, theirs, method="occlusion", target=color, block=BLOCK, fill="grey")
    print("largest drop", want.values.max(), "largest difference", np.abs(found.values - want.values).max())
    assert want.values.max() > 1  # there is something to find
    np.testing.assert_allclose(found.values, want.values, atol=CLOSE)
    assert found.extras["parted"] == 0
    assert found.top(1)[0][:2] == want.top(1)[0][:2]


def test_a_run_of_the_endpoint_is_not_one_of_the_model(tiny: Lab, box: BlackBox, asked: tuple[np.ndarray, str]) -> None:
    with pytest.raises(ll.LabError, match="ask again"):
        ll.attribute(tiny, box.ask(*asked))


def test_what_was_found_is_drawn_like_any_other(box: BlackBox, asked: tuple[np.ndarray, str], tmp_path: Path) -> None:
    from llava_lab.plots import maps as plots

    run = box.ask(*asked)
    rel = ll.attribute(box, run, method="center")
    axes = plots.overlay(run, ll.Relevance.load(rel.save(tmp_path / "map.npz")))
    axes.figure.canvas.draw()  # all of it, or it raises
    assert axes.images
