"""Lesson 10 says what is so: lies are found, truth is not called false, a lie is one claim of several, its exercise.

Other rules of the teacher may turn some of these round; then the prose must change, not this test alone.
"""

from __future__ import annotations

from typing import Any

from tests.support.lessons import Lesson


def test_it_runs_and_what_is_stored_is_what_it_shows(lesson: Lesson) -> None:
    lesson.check()


def test_the_lies_on_the_page_are_found(found: dict[str, Any]) -> None:
    assert found["boxes"] == 3
    assert found["lies"]["conversation"][-1] == ["The tree is brown."]
    assert len(found["lies"]["detail"][0]) == 3
    assert found["lies"]["reasoning"] == [[]]


def test_truth_is_not_called_false_and_a_lie_is_one_claim_of_several(found: dict[str, Any]) -> None:
    assert found["false"]["honest"] == 0
    assert 0.07 < found["false"]["lying 0.3"] < 0.15
    (honest, lying), (true, passing) = found["rows"], found["passing"]
    assert true == honest
    assert 0.4 < passing / lying < 0.6


def test_the_model_does_not_repeat_the_lie(found: dict[str, Any]) -> None:
    assert found["asked"][-1][1] == "The tree is red."


def test_the_exercise_takes_the_right_answer_and_says_what_is_wrong_with_others(found: dict[str, Any]) -> None:
    right, *wrong = found["exercise 1"]
    assert right.startswith("Yes")
    for text, expected in zip(wrong, ("add up", "all of them", "none of them"), strict=True):
        assert text.startswith("refused: ")
        assert expected in text
