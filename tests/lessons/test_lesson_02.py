"""Lesson 02 says what is so: what was needed, what the choices change, what the picture gives, its exercises.

Other weights may turn some of these round; then the prose under the figures must change, not this test alone.
"""

from __future__ import annotations

from typing import Any

import llava_lab as ll
from tests.support.lessons import Lesson


def test_it_runs_and_what_is_stored_is_what_it_shows(lesson: Lesson) -> None:
    lesson.check()


def test_only_without_the_cup_is_its_colour_lost(found: dict[str, Any]) -> None:
    assert found["answer"] == "The cup is green."
    assert {name for name, answer in found["said"].items() if answer != found["answer"]} == {"the cup"}
    assert found["left"]["the cup"] < -1
    assert min(value for name, value in found["left"].items() if name != "the cup") > -0.01


def test_single_patches_are_dust_until_a_contrast_is_asked_for(found: dict[str, Any]) -> None:
    for name in ("grey, 1 × 1", "blur, 1 × 1"):
        alone, contrast = found["strongest"][name]
        assert alone < 1e-3
        assert contrast > 0.1
    assert found["strongest"]["grey, 3 × 3"][0] > 1
    behind = found["strongest"]["3 × 3 at the vision"][0] / found["strongest"]["grey, 3 × 3"][0]
    assert behind < 0.5 or behind > 2  # far less, or far more


def test_attention_flow_is_bright_at_the_top_whatever_was_asked(found: dict[str, Any]) -> None:
    rows = found["flow by row"]
    assert rows[0] == max(rows)
    assert rows[-1] == min(rows)


def test_words_look_alike_and_only_the_colour_needs_the_picture(found: dict[str, Any]) -> None:
    looked, needed = list(found["looked"].values()), dict(found["needed"])
    assert max(looked) < 2 * min(looked)
    assert needed.pop("green") > 5 * max(needed.values())


def test_part_of_the_logit_took_another_way_than_straight_from_the_picture(found: dict[str, Any]) -> None:
    image, own = found["not only from the picture"]
    assert 0 < image < 0.9 * own


def test_every_method_is_in_the_lesson(found: dict[str, Any]) -> None:
    assert found["methods"] == sorted(ll.METHODS)


def test_the_exercises_accept_what_is_right_and_name_the_mistake(found: dict[str, Any]) -> None:
    right, covered, drop = found["keep"]
    assert right.startswith("Yes")
    assert "keep it, and cover all the rest" in covered
    assert "a log-probability is asked for" in drop
    right, missing, hears = found["deaf"]
    assert right.startswith("Yes")
    assert "still missing" in missing
    assert "attention hears the question" in hears
