"""Lesson 09 says what is so: the cat is named, grey is not, and covering what matters changes the answer.

Other weights or libraries may turn some of these round; then the prose under the figures must change, not this test alone.
"""

from __future__ import annotations

from typing import Any

from tests.support.lessons import Lesson


def test_it_runs_and_what_is_stored_is_what_it_shows(lesson: Lesson) -> None:
    lesson.check()


def test_the_photographs_are_named_and_noise_is_answered_with_less_confidence(found: dict[str, Any]) -> None:
    assert "cat" in found["answer"]
    assert found["patches"] == [12, 12]
    sure = {name: confidence for name, (_, confidence) in found["told"].items()}
    assert min(sure["your picture"], sure["a cup of coffee"]) > max(sure["noise"], sure["grey"])


def test_covering_what_occlusion_marks_takes_the_cat_away_and_random_patches_do_not(found: dict[str, Any]) -> None:
    assert "cat" not in found["asked again"]["occlusion"]
    assert "cat" in found["asked again"]["random"]


def test_the_exercise_takes_the_right_answer_and_says_what_is_wrong_with_others(found: dict[str, Any]) -> None:
    assert found["share"][0].startswith("Yes")
    assert all(one.startswith("refused: ") for one in found["share"][1:])
