"""Closed models are explained by what they answer: by hand, in every way of scoring, and as the shipped model itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.errors import LabError, OptionError, TargetError
from llava_lab.models import Lab
from llava_lab.remote import BlackBox
from llava_lab.worlds import picturebook
from tests.support.closeness import TERMS, close
from tests.support.endpoint_server import (
    PLAIN,
    QUESTION,
    ROUGH,
    Answered,
    Asked,
    a_red_car,
    closed,
    from_lab,
    says,
    serving,
    weighing,
)

WEIGHTS = np.array([[0.0, 1.0, 0.25], [0.5, 3.0, 0.0], [0.0, 0.0, -0.5]])


def test_occlusion_finds_each_cells_weight(tmp_path: Path) -> None:
    with closed(weighing(WEIGHTS, PLAIN), tmp_path) as (_, box):
        run = box.ask(PLAIN, QUESTION)
        rel = ll.attribute(box, run, method="occlusion", target=["red", "answer"])
    np.testing.assert_allclose(rel.values, [WEIGHTS, WEIGHTS], atol=1e-6)  # the other words do not change
    assert rel.extras["score"] == pytest.approx([-0.75, -1.05])
    assert any("ours and not its patches" in note for note in rel.notes)


def test_shapley_values_of_a_sum_are_its_parts(tmp_path: Path) -> None:
    with closed(weighing(WEIGHTS, PLAIN), tmp_path) as (_, box):
        run = box.ask(PLAIN, QUESTION)
        for method, options in (("shapley", {"orders": 2}), ("kernel_shap", {"samples": 40})):
            rel = ll.attribute(box, run, method=method, target="red", regions=9, shape="grid", **options)
            np.testing.assert_allclose(rel.values[0], WEIGHTS, atol=1e-3)
            assert rel.extras["efficiency_gap"] == pytest.approx([0], abs=1e-3)


def test_rise_finds_the_heaviest_cell(tmp_path: Path) -> None:
    weights = np.zeros((3, 3))
    weights[1, 2] = 4
    with closed(weighing(weights, PLAIN), tmp_path) as (_, box):
        rel = ll.attribute(box, box.ask(PLAIN, QUESTION), method="rise", target="red", masks=60, cells=3)
    assert rel.top(1)[0][:2] == (1, 2)
    assert rel.passes["forward"] == 60


def test_faithfulness_tells_the_right_map_from_its_reverse(tmp_path: Path) -> None:
    weights = np.zeros((3, 3))
    weights[1, 1] = 4.9
    with closed(weighing(weights, ROUGH), tmp_path) as (_, box):
        run = box.ask(ROUGH, QUESTION)
        rel = ll.attribute(box, run, method="occlusion", target="red")
        scores = [ll.faithfulness(box, run, replace(rel, values=side * rel.values), steps=4, seeds=2) for side in (1, -1)]
    assert scores[0].gain[0] > 0.8
    assert scores[1].gain[0] == pytest.approx(-scores[0].gain[0], abs=1e-5)
    assert "grey" not in scores[0].fills
    assert scores[0].notes[-1] == rel.notes[-1]


@pytest.mark.parametrize("fill", ["grey", "mean", "blur", "noise", "neighbours"])
def test_a_block_is_covered_at_its_own_pixels_and_nowhere_else(tmp_path: Path, picture: np.ndarray, fill: str) -> None:
    with closed(a_red_car, tmp_path, grid=(2, 3), parallel=1) as (server, box):
        run = box.ask(picture, QUESTION)
        ll.attribute(box, run, method="occlusion", target="red", fill=fill)
    seen = [asked.picture for asked in server.asked[2:]]  # the question, the whole picture, six blocks
    assert len(seen) == 6
    for number, other in enumerate(seen):
        y, x = number // 3 * 20, number % 3 * 20
        changed = (other != picture).any(-1)
        assert changed[y : y + 20, x : x + 20].mean() > 0.9
        changed[y : y + 20, x : x + 20] = False
        assert not changed.any()
    if fill == "grey":
        assert (seen[4][20:40, 20:40] == 128).all()


@pytest.mark.parametrize(("method", "options"), [
    ("occlusion", {}), ("occlusion", {"block": 2, "stride": 1, "fill": "mean"}), ("rise", {"masks": 12}),
    ("shapley", {"orders": 2, "regions": 4}), ("kernel_shap", {"samples": 12, "regions": 4}), ("center", {}),
])  # fmt: skip
def test_an_estimate_is_what_is_sent(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    with closed(weighing(WEIGHTS, PLAIN), tmp_path, price=(2.0, 10.0)) as (server, box):
        run = box.ask(PLAIN, QUESTION)
        wanted = ll.estimate(box, run, method=method, target="red", **options)
        assert len(server.asked) == 1
        ll.attribute(box, run, method=method, target="red", **options)
        assert len(server.asked) == 1 + wanted.requests
    assert wanted.tokens == (100 * wanted.requests, 3 * wanted.requests)
    assert wanted.cost == pytest.approx(wanted.requests * 230e-6)
    assert str(wanted).startswith(f"{wanted.requests} requests to send, 0 known already, 499 left")
    assert box.cost is not None


def test_an_estimate_is_for_closed_models_only() -> None:
    with pytest.raises(OptionError, match="lab must be a loaded model"):
        ll.estimate(object(), object())  # type: ignore[arg-type]


# -- how answers are scored -----------------------------------------------------------------


def covered(asked: Asked) -> bool:
    return bool((asked.picture == 128).all(-1).any())


def test_an_answer_that_parts_early_gets_the_floor_and_a_note(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Answered:
        return says("one red car", own=-0.5) if covered(asked) else a_red_car(asked)

    with closed(answer, tmp_path, floor=-7) as (_, box):
        rel = ll.attribute(box, box.ask(PLAIN, QUESTION), method="occlusion", target="red", block=3)
    np.testing.assert_allclose(rel.values, 7 - 0.5)
    assert any("In 1 of 2 looks" in note and "-7" in note for note in rel.notes)
    assert rel.extras["parted"] == 1


def test_a_token_that_is_not_listed_counts_as_much_as_it_could(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Answered:  # p 0.6 and 0.3 are listed, so 0.1 is left
        return says("a blue car", own=math.log(0.6), listed={" green": math.log(0.3)}) if covered(asked) else a_red_car(asked)

    with closed(answer, tmp_path) as (_, box):
        rel = ll.attribute(box, box.ask(PLAIN, QUESTION), method="occlusion", target="red", block=3)
    np.testing.assert_allclose(rel.values, -0.5 - math.log(0.1), atol=1e-5)
    assert (rel.extras["unlisted"], rel.extras["parted"]) == (1, 0)


def test_a_contrast_is_the_difference_of_two_listed_words(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Answered:
        blue = -1.5 if covered(asked) else -3.0
        return says("a red car", own=-0.5, listed={" blue": blue})

    with closed(answer, tmp_path) as (_, box):
        run = box.ask(PLAIN, QUESTION)
        rel = ll.attribute(box, run, method="occlusion", target=("red", "blue"), block=3)
        with pytest.raises(TargetError, match="two different|two words"):
            ll.attribute(box, run, method="occlusion", target=("red", "red"), block=3)
    assert rel.targets[0].text == "red, not blue"
    np.testing.assert_allclose(rel.values, 1.5, atol=1e-6)


def test_without_log_probabilities_words_are_counted_in_repeated_answers(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Answered:
        blind = covered(asked) and asked.body["seed"] != 1
        return says("The car, the old car, is blue." if blind else "The car is a red car.")

    with closed(answer, tmp_path, repeats=3) as (server, box):
        run = box.ask(PLAIN, QUESTION)
        rel = ll.attribute(box, run, method="occlusion", target=["red", "car", ("red", "blue")], block=3)
    assert np.isnan(run.logprobs).all()
    assert [word.text for word in run.words] == ["The", "car", "is", "a", "red", "car", "."]
    most, one, none = (math.log((k + 0.5) / 4) for k in (3, 1, 0))
    two = math.log(2.5 / 4)
    assert rel.values[:, 0, 0] == pytest.approx([most - one, 0, (most - none) - (one - two)], abs=1e-6)
    assert {asked.body["temperature"] for asked in server.asked[1:]} == {1.0}
    assert sorted(asked.body["seed"] for asked in server.asked[1:4]) == [0, 1, 2]
    assert any("no log-probabilities" in note for note in rel.notes)


def test_a_server_that_goes_on_from_a_beginning_is_scored_on_the_runs_own_words(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Answered:
        blind, last = covered(asked), asked.body["messages"][-1]
        if last["role"] == "user":
            return says("one blue cup" if blind else "a red car", own=-0.5)
        assert (asked.body["continue_final_message"], asked.body["max_tokens"]) == (True, 1)
        piece = {"a": " red", "a red": " car"}[last["content"]]
        return says(piece, own=-2.0 if blind and piece == " red" else -0.5, spaced=True)

    with closed(answer, tmp_path, scoring="prefill") as (server, box):
        run = box.ask(PLAIN, QUESTION)
        wanted = ll.estimate(box, run, target=["red", "car"], block=3)
        rel = ll.attribute(box, run, method="occlusion", target=["red", "car"], block=3)
    assert rel.values[:, 0, 0] == pytest.approx([1.5, 0])
    assert rel.extras["parted"] == 0
    assert wanted.requests == 4 == len(server.asked) - 1


def test_a_server_that_does_not_go_on_is_found_out(tmp_path: Path) -> None:
    with closed(lambda asked: says("a red car", own=[-0.5] * 3), tmp_path, scoring="prefill") as (_, box):
        run = box.ask(PLAIN, QUESTION)
        with pytest.raises(LabError, match="does not go on from a beginning, use scoring='top'"):
            ll.attribute(box, run, method="occlusion", target="red", block=3)


# -- the shipped model behind a server ---------------------------------------------------------

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
    close(theirs.logprobs, mine.logprobs, terms=TERMS)
    assert theirs.map.to_dict() | {"mode": "pad"} == mine.map.to_dict()  # at 96 px they agree on every number


@pytest.mark.long
def test_occlusion_through_the_endpoint_is_occlusion_of_the_model(
    tiny: Lab, box: BlackBox, asked: tuple[np.ndarray, str]
) -> None:
    mine, theirs = tiny.ask(*asked), box.ask(*asked)
    color = mine.words[-2].text
    want = ll.attribute(tiny, mine, method="occlusion", target=color, block=BLOCK, fill="grey", score="logprob")
    found = ll.attribute(box, theirs, method="occlusion", target=color, block=BLOCK, fill="grey")
    print("largest drop", want.values.max(), "largest difference", np.abs(found.values - want.values).max())
    assert want.values.max() > 1  # there is something to find
    np.testing.assert_allclose(found.values, want.values, atol=CLOSE)
    assert found.extras["parted"] == 0
    assert (found.options["score"], found.noise_floor.tolist()) == ("logprob", [0.0])  # a server lists no log-odds
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
