"""A closed model is asked in the protocol, explained by what it answers, and refuses what looks inside."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.errors import LabError, TargetError
from tests.support.endpoint_server import Answered, Asked, open_box, says, serving, weighing

PLAIN = np.full((36, 36, 3), (220, 30, 30), np.uint8)
ROUGH = np.random.default_rng(0).choice(np.array([20, 60, 240], np.uint8), (36, 36, 3))
WEIGHTS = np.array([[0.0, 1.0, 0.25], [0.5, 3.0, 0.0], [0.0, 0.0, -0.5]])
QUESTION = "What is it?"


def yes(asked: Asked) -> Answered:
    return says("a red car", own=-0.5)


# -- asking ---------------------------------------------------------------------------------


def test_asks_in_the_protocol_with_the_picture_unharmed(tmp_path: Path, picture: np.ndarray) -> None:
    with serving(yes) as server:
        run = open_box(server, tmp_path, grid=(2, 3)).ask(picture, QUESTION, max_new_tokens=9, seed=4)
    (asked,) = server.asked
    assert asked.path == "/v1/chat/completions"
    assert np.array_equal(asked.picture, picture)
    kinds = [part["type"] for part in asked.body["messages"][0]["content"]]
    assert (kinds, asked.question) == (["image_url", "text"], QUESTION)
    wanted = {"model": "scripted", "max_tokens": 9, "temperature": 0, "seed": 4, "logprobs": True, "top_logprobs": 20}
    assert {name: asked.body[name] for name in wanted} == wanted
    assert run.answer == "a red car"
    assert [run.tokens[i] for i in run.answer_positions] == ["a", " red", " car"]
    assert [(word.text, word.stop - word.start) for word in run.words] == [("a", 1), ("red", 1), ("car", 1)]
    assert run.logprobs.tolist() == [-0.5] * 3
    assert len(run.image_positions) == 6
    assert run.map.seen_box == (0, 0, 60, 40)  # nothing cut off, nothing added
    assert run.map.coverage().min() == pytest.approx(1)
    assert run.map.patch_box(1, 2) == pytest.approx((40, 20, 60, 40))


def test_a_run_is_saved_and_loaded_exactly(tmp_path: Path) -> None:
    with serving(yes) as server:
        run = open_box(server, tmp_path).ask(PLAIN, QUESTION)
    back = ll.Run.load(run.save(tmp_path / "run.npz"))
    assert (back.tokens, back.words, back.map, back.options) == (run.tokens, run.words, run.map, run.options)
    assert np.array_equal(back.token_ids, run.token_ids)


def test_earlier_turns_and_system_text_are_sent_in_their_order(tmp_path: Path) -> None:
    with serving(yes) as server:
        box = open_box(server, tmp_path, system="Be brief.")
        run = box.ask(PLAIN, QUESTION, history=[("Is it old?", "No.")])
        ll.attribute(box, run, method="occlusion", target="red", block=3)
    for asked in server.asked:
        turns = [(one["role"], one["content"] if isinstance(one["content"], str) else one["content"][-1]["text"])
                 for one in asked.body["messages"]]  # fmt: skip
        assert turns == [("system", "Be brief."), ("user", "Is it old?"), ("assistant", "No."), ("user", QUESTION)]


def test_a_large_picture_is_sent_smaller_and_mapped_on_the_original(tmp_path: Path) -> None:
    large = np.zeros((300, 600, 3), np.uint8)
    with serving(yes) as server:
        run = open_box(server, tmp_path, longest=100).ask(large, QUESTION)
    assert server.asked[0].picture.shape == (50, 100, 3)
    assert (run.map.width, run.map.height) == (600, 300)


# -- explaining, by hand ----------------------------------------------------------------------


def test_occlusion_finds_each_cells_weight(tmp_path: Path) -> None:
    with serving(weighing(WEIGHTS, PLAIN)) as server:
        box = open_box(server, tmp_path)
        run = box.ask(PLAIN, QUESTION)
        rel = ll.attribute(box, run, method="occlusion", target=["red", "answer"])
    np.testing.assert_allclose(rel.values, [WEIGHTS, WEIGHTS], atol=1e-6)  # the other words do not change
    assert rel.extras["score"] == pytest.approx([-0.75, -1.05])
    assert any("ours and not its patches" in note for note in rel.notes)


def test_shapley_values_of_a_sum_are_its_parts(tmp_path: Path) -> None:
    with serving(weighing(WEIGHTS, PLAIN)) as server:
        box = open_box(server, tmp_path)
        run = box.ask(PLAIN, QUESTION)
        for method, options in (("shapley", {"orders": 2}), ("kernel_shap", {"samples": 40})):
            rel = ll.attribute(box, run, method=method, target="red", regions=9, shape="grid", **options)
            np.testing.assert_allclose(rel.values[0], WEIGHTS, atol=1e-3)
            assert rel.extras["efficiency_gap"] == pytest.approx([0], abs=1e-3)


def test_rise_finds_the_heaviest_cell(tmp_path: Path) -> None:
    weights = np.zeros((3, 3))
    weights[1, 2] = 4
    with serving(weighing(weights, PLAIN)) as server:
        box = open_box(server, tmp_path)
        rel = ll.attribute(box, box.ask(PLAIN, QUESTION), method="rise", target="red", masks=60, cells=3)
    assert rel.top(1)[0][:2] == (1, 2)
    assert rel.passes["forward"] == 60


def test_faithfulness_tells_the_right_map_from_its_reverse(tmp_path: Path) -> None:
    weights = np.zeros((3, 3))
    weights[1, 1] = 4.9
    with serving(weighing(weights, ROUGH)) as server:
        box = open_box(server, tmp_path)
        run = box.ask(ROUGH, QUESTION)
        rel = ll.attribute(box, run, method="occlusion", target="red")
        scores = [ll.faithfulness(box, run, replace(rel, values=side * rel.values), steps=4, seeds=2) for side in (1, -1)]
    assert scores[0].gain[0] > 0.8
    assert scores[1].gain[0] == pytest.approx(-scores[0].gain[0], abs=1e-5)
    assert "grey" not in scores[0].fills
    assert scores[0].notes[-1] == rel.notes[-1]


@pytest.mark.parametrize("fill", ["grey", "mean", "blur", "noise", "neighbours"])
def test_a_block_is_covered_at_its_own_pixels_and_nowhere_else(tmp_path: Path, picture: np.ndarray, fill: str) -> None:
    with serving(yes) as server:
        box = open_box(server, tmp_path, grid=(2, 3), parallel=1)
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


# -- how answers are scored -----------------------------------------------------------------


def covered(asked: Asked) -> bool:
    return bool((asked.picture == 128).all(-1).any())


def test_an_answer_that_parts_early_gets_the_floor_and_a_note(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Answered:
        return says("one red car", own=-0.5) if covered(asked) else yes(asked)

    with serving(answer) as server:
        box = open_box(server, tmp_path, floor=-7)
        rel = ll.attribute(box, box.ask(PLAIN, QUESTION), method="occlusion", target="red", block=3)
    np.testing.assert_allclose(rel.values, 7 - 0.5)
    assert any("In 1 of 2 looks" in note and "-7" in note for note in rel.notes)
    assert rel.extras["parted"] == 1


def test_a_token_that_is_not_listed_counts_as_much_as_it_could(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Answered:  # p 0.6 and 0.3 are listed, so 0.1 is left
        return says("a blue car", own=math.log(0.6), listed={" green": math.log(0.3)}) if covered(asked) else yes(asked)

    with serving(answer) as server:
        box = open_box(server, tmp_path)
        rel = ll.attribute(box, box.ask(PLAIN, QUESTION), method="occlusion", target="red", block=3)
    np.testing.assert_allclose(rel.values, -0.5 - math.log(0.1), atol=1e-5)
    assert (rel.extras["unlisted"], rel.extras["parted"]) == (1, 0)


def test_a_contrast_is_the_difference_of_two_listed_words(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Answered:
        blue = -1.5 if covered(asked) else -3.0
        return says("a red car", own=-0.5, listed={" blue": blue})

    with serving(answer) as server:
        box = open_box(server, tmp_path)
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

    with serving(answer) as server:
        box = open_box(server, tmp_path, repeats=3)
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


def test_log_probabilities_that_do_not_spell_the_answer_are_not_used(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Answered:
        reply = yes(asked)
        reply.data["choices"][0]["message"]["content"] = "quite another answer"
        return reply

    with serving(answer) as server:
        run = open_box(server, tmp_path).ask(PLAIN, QUESTION)
        assert run.options["scoring"] == "agreement"
        with pytest.raises(LabError, match="gives no log-probabilities"):
            open_box(server, tmp_path, scoring="top").ask(PLAIN, QUESTION)


def test_a_server_that_goes_on_from_a_beginning_is_scored_on_the_runs_own_words(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Answered:
        blind, last = covered(asked), asked.body["messages"][-1]
        if last["role"] == "user":
            return says("one blue cup" if blind else "a red car", own=-0.5)
        assert (asked.body["continue_final_message"], asked.body["max_tokens"]) == (True, 1)
        piece = {"a": " red", "a red": " car"}[last["content"]]
        return says(piece, own=-2.0 if blind and piece == " red" else -0.5, spaced=True)

    with serving(answer) as server:
        box = open_box(server, tmp_path, scoring="prefill")
        run = box.ask(PLAIN, QUESTION)
        wanted = ll.estimate(box, run, target=["red", "car"], block=3)
        rel = ll.attribute(box, run, method="occlusion", target=["red", "car"], block=3)
    assert rel.values[:, 0, 0] == pytest.approx([1.5, 0])
    assert rel.extras["parted"] == 0
    assert wanted.requests == 4 == len(server.asked) - 1


def test_a_server_that_does_not_go_on_is_found_out(tmp_path: Path) -> None:
    with serving(lambda asked: says("a red car", own=[-0.5] * 3)) as server:
        box = open_box(server, tmp_path, scoring="prefill")
        with pytest.raises(LabError, match="does not go on from a beginning, use scoring='top'"):
            ll.attribute(box, box.ask(PLAIN, QUESTION), method="occlusion", target="red", block=3)
