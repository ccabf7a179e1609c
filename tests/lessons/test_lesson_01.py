"""Lesson 01 says what is so: what rollout counts, what the plain map is not spoilt by, its exercises.

Other weights may turn some of these round; then the prose under the figures must change, not this test alone.
"""

from __future__ import annotations

from typing import Any

from tests.support.lessons import Lesson


def test_it_runs_and_what_is_stored_is_what_it_shows(lesson: Lesson) -> None:
    lesson.check()


def test_what_it_says_it_counts_is_there(found: dict[str, Any]) -> None:
    """What section 6 counts, and section 3's that six layers do not spoil the plain map."""
    assert found["answer"] == "The car is red."
    assert found["questions"] == 12
    assert abs(found["agree"]) < 0.5
    mean = found["mean"]
    share = {name: deciding / (deciding + others) for name, (deciding, others) in mean.items()}
    for name in ("plain rollout", "default rollout", "through vision", "attention"):
        assert sum(mean[name]) > 2.2 * sum(mean["their area"])
        assert share[name] > 2 * share["their area"]
    assert share["plain rollout"] < share["default rollout"] < share["through vision"]
    assert share["through vision"] > 0.8
    assert mean["occlusion"][0] > 4 * mean["occlusion"][1]


def test_the_exercises_accept_what_is_right_and_name_the_mistake(found: dict[str, Any]) -> None:
    right, reversed_, swapped = found["rollout"]
    assert right == "Yes, that is rollout."
    assert "first layer stands on the right" in reversed_
    assert "weight of the identity" in swapped
    right, too_few, too_many = found["depth"]
    assert right.startswith("Yes.")
    assert "not yet half" in too_few
    assert "with one layer less" in too_many
