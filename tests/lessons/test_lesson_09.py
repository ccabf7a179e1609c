"""Lesson 09 says what is so: the cat is named, noise and grey get names too, and no fifth of the picture is needed.

Other weights or libraries may turn some of these round; then the prose under the figures must change, not this test alone.
"""

from __future__ import annotations

from typing import Any

from tests.support.lessons import Lesson


def test_it_runs_and_what_is_stored_is_what_it_shows(lesson: Lesson) -> None:
    lesson.check()


def test_the_cat_is_named_and_noise_and_grey_get_names_too(found: dict[str, Any]) -> None:
    assert "cat" in found["answer"]
    assert found["patches"] == [12, 12]
    sure = {name: confidence for name, (_, confidence) in found["told"].items()}
    assert sure["your picture"] > max(sure[name] for name in sure if name != "your picture")
    assert sure["grey"] > sure["noise"] > sure["a drawing"]
    assert 0.4 < sure["grey"] < 0.6
    assert abs(sure["a cup of coffee"] - sure["grey"]) < 0.1
    assert "coffee" in found["told"]["a cup of coffee"][0]
    assert "missile" in found["told"]["a rocket"][0]
    assert all(said.endswith(".") for said, _ in found["told"].values())


def test_no_fifth_of_the_picture_was_needed_for_the_name(found: dict[str, Any]) -> None:
    assert list(found["asked again"]) == ["attention", "gradcam", "occlusion", "random"]
    assert all("cat" in said for said in found["asked again"].values())


def test_the_exercise_takes_the_right_answer_and_says_what_is_wrong_with_others(found: dict[str, Any]) -> None:
    assert found["share"][0].startswith("Yes")
    assert all(one.startswith("refused: ") for one in found["share"][1:])
