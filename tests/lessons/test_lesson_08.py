"""Lesson 08 says what is so: smol sees, its maps find the car, its image tokens read in the last state only, it still talks.

Other weights or libraries may turn some of these round; then the prose under the figures must change, not this test alone.
"""

from __future__ import annotations

from typing import Any

from tests.support.lessons import Lesson


def test_it_runs_and_what_is_stored_is_what_it_shows(lesson: Lesson) -> None:
    lesson.check()


def test_it_answers_what_training_asked_and_its_score_is_far_above_the_blind_models(found: dict[str, Any]) -> None:
    assert found["answers"][:3] == ["The car is red.", "There are two fish.", "Yes, the star is above the car."]
    low, _, blind = found["score"]
    assert low > blind
    assert low > 2 * blind


def test_almost_all_of_it_came_from_elsewhere(found: dict[str, Any]) -> None:
    assert found["trained"] < 0.005
    assert found["words"] > 49_000


def test_watching_and_covering_find_the_car_and_random_does_not(found: dict[str, Any]) -> None:
    on, area = found["on the car"], found["on the car"]["by area"]
    assert abs(on["random"] - area) < 0.5 * area
    for name in ("attention", "relevancy", "occlusion"):
        assert on[name] > 2 * area, name


def test_image_tokens_name_things_in_the_last_state_only(found: dict[str, Any]) -> None:
    things, paper, others = (found["named"][group] for group in ("object", "background", "shuffled"))
    assert max(things[:-2]) < 0.05
    assert things[-1] > 0.5
    assert things[-1] > 2 * paper[-1]
    assert things[-1] > 2 * others[-1]


def test_it_still_reads_plain_text(found: dict[str, Any]) -> None:
    assert found["perplexity"]["after"] < 1.1 * found["perplexity"]["before"]


def test_the_exercises_take_the_right_answer_and_say_what_is_wrong_with_others(found: dict[str, Any]) -> None:
    for tried in (found["weights"], found["points"]):
        assert tried[0].startswith("Yes")
        assert all(one.startswith("refused: ") for one in tried[1:])
        assert len(set(tried)) == len(tried)
