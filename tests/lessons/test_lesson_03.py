"""Lesson 03 says what is so: its curves, its sanity checks, its four kinds of disagreement, its table, its exercises.

Other weights may turn some of these round; then the prose under the figures must change, not this test alone.
"""

from __future__ import annotations

from typing import Any

from tests.support.lessons import Lesson


def test_it_runs_and_what_is_stored_is_what_it_shows(lesson: Lesson) -> None:
    lesson.check()


def test_rollout_and_edges_fall_before_every_random_ranking(found: dict[str, Any]) -> None:
    """Section 2: so does a map that never met the model."""
    assert found["answer"] == "The car is red."
    assert len(found["under by chance"]) == 8
    for name in ("rollout", "edges"):
        assert found["under"][name] < min(found["under by chance"])


def test_with_care_rollout_still_beats_random_and_marks_the_thing_that_is_needed(found: dict[str, Any]) -> None:
    needed, marked, car = found["needed and marked"]
    assert found["beats random"]
    assert needed == marked == car


def test_edges_survive_the_model_and_rollout_hardly_cares_about_the_question(found: dict[str, Any]) -> None:
    """Section 5."""
    assert found["sanity"]["edges"] == {"model": "unchanged", "question": "unchanged"}
    assert found["sanity"]["rollout"] == {"model": "changed", "question": "unchanged"}
    assert found["sanity"]["relevancy"]["model"] == "changed"
    assert found["after another question"]["relevancy"] < found["after another question"]["rollout"] - 0.1


def test_random_numbers_are_grey(found: dict[str, Any]) -> None:
    assert "random" in found["greyed"]


def test_a_few_pictures_hold_all_four_kinds_of_disagreement(found: dict[str, Any]) -> None:
    """Section 7: each kind has its panel, the two good maps do differ, and no map of the *No* could be judged."""
    assert min(found["at odds"]) >= 1
    assert found["least alike"] < 0.3
    assert found["panels"] == 6
    answer, untold = found["absent"][0]
    assert answer.startswith("No,")
    assert untold


def test_the_table_speaks_of_the_weights_that_are_loaded(found: dict[str, Any]) -> None:
    of_these_weights, methods = found["board"]
    assert of_these_weights
    assert {"rollout", "edges", "random"} <= set(methods)


def test_the_exercises_accept_what_is_right_and_name_the_mistake(found: dict[str, Any]) -> None:
    right, sign, mean, wrong = found["gain"]
    assert right == "Yes, that is the gain."
    assert "the sign" in sign
    assert "mean over steps" in mean
    assert "expected" in wrong
    right, blind, notices = found["sees"]
    assert right.startswith("Yes: vision")
    assert "does not look at the model at all" in blind
    assert "does notice" in notices
