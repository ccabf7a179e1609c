"""Lesson 00 says what is so: the car, the explorer that asks again, what the strongest patches were needed for, its exercises.

Other weights may turn some of these round; then the prose under the figures must change, not this test alone.
"""

from __future__ import annotations

from typing import Any

from tests.support.lessons import Lesson


def test_it_runs_and_what_is_stored_is_what_it_shows(lesson: Lesson) -> None:
    lesson.check()


def test_it_is_right_about_the_car_and_its_explorer_asks_again(found: dict[str, Any]) -> None:
    assert found["answer"] == "The car is red."
    assert found["relevance"] == ["rollout", "red", [12, 12]]
    assert found["widths"] == [192, 256]
    assert found["asked again"] != "The car is red."


def test_what_it_says_it_sees_is_there(found: dict[str, Any]) -> None:
    stayed = {name for name, answer in found["without the strongest"].items() if answer == "The car is red."}
    assert stayed == {"random"}  # section 6: what the others chose was needed
    assert found["wide"] == ["Yes, there is a red car.", "No, there is no red car."]  # section 7


def test_the_exercises_accept_what_is_right_and_name_the_mistake(found: dict[str, Any]) -> None:
    right, swapped = found["middle"]
    assert not str(right).startswith("refused")
    assert "(column, row)" in swapped
    right, too_few, too_many = found["cover"]
    assert not str(right).startswith("refused")
    assert "still 'The car is red.'" in too_few
    assert "cover more than the car" in too_many
