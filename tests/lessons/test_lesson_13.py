"""Lesson 13 says what is so: where the rankings part, what the tokens beside the car have read of it, what three tokens say.

Other weights or libraries may turn some of these round; then the prose under the figures must change, not this test alone.
"""

from __future__ import annotations

from typing import Any

from tests.support.lessons import Lesson

RED, BLUE = "The car is red.", "The car is blue."


def test_it_runs_and_what_is_stored_is_what_it_shows(lesson: Lesson) -> None:
    lesson.check()


def test_the_car_alone_is_enough_and_its_rim_tells_its_colour_too(found: dict[str, Any]) -> None:
    assert found["answer"] == RED
    assert found["places"] == [RED, RED]
    assert found["without all it touches"] == BLUE


def test_three_tokens_by_a_map_keep_the_answer_better_than_three_by_lot(found: dict[str, Any]) -> None:
    for name in ("attention", "rollout", "token_knockout"):
        change, by_lot, said = found["by map"][name]
        assert said == RED
        assert change > by_lot + 5
    assert found["by map"]["token_knockout"][0] > 0 > found["by map"]["attention"][0]
    assert found["scored"] == ["logodds", 1]


def test_the_curves_part_at_few_tokens(found: dict[str, Any]) -> None:
    accuracy = found["accuracy"]
    assert min(accuracy[name][0] for name in ("attention", "rollout", "visionzip", "truth")) > 0.9
    assert max(accuracy[name][0] for name in ("fastv", "gradient_input", "random")) < 0.8
    assert all(accuracy[name][2] == 1 for name in ("attention", "rollout", "visionzip", "fastv", "truth"))
    assert not any(apart[3] for apart in found["told apart"].values())
    assert found["told apart"]["gradient_input"] == [True, False, False, False]


def test_the_exercise_takes_the_right_answer_and_says_what_is_wrong_with_others(found: dict[str, Any]) -> None:
    right, *wrong = found["rankings"]
    assert right.startswith("Yes")
    assert all(one.startswith("refused: ") for one in wrong)
    assert found["own"] == [3, ["token_knockout", "truth", "random"]]
