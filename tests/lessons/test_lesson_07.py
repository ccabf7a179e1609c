"""Lesson 07 says what is so: what trains and what moved, what each stage brought, the blind control, its exercises.

Other weights or libraries may turn some of these round; then the prose under the figures must change, not this test alone.
"""

from __future__ import annotations

from typing import Any

from tests import execute
from tests.support.lessons import Lesson

KINDS = ("kind", "color", "size")  # what a caption says


def test_it_runs_and_what_is_stored_is_what_it_shows(lesson: Lesson) -> None:
    lesson.check()


def test_what_the_recipe_freezes_keeps_its_bits_and_the_rest_moves(found: dict[str, Any]) -> None:
    """Sections 2 and 6: the table is measured, and every parameter of the model is in one of its parts."""
    assert found["moved"] == found["trains"]
    assert found["trains"]["vision_tower"] == [False, False]
    assert found["trains"]["multi_modal_projector"] == [True, True]
    assert found["trains"]["language_model"] == [False, True]
    assert found["parameters"] == 0


def test_before_training_it_answers_fluently_and_wrongly(found: dict[str, Any]) -> None:
    color, place, _ = (answer for answer, _ in found["answers"]["before"])
    assert color.startswith("The car is ")
    assert color != "The car is red."
    assert place.startswith("The car is ")


def test_after_stage_1_the_colour_is_right_and_the_place_is_wrong(found: dict[str, Any]) -> None:
    (color, _), (place, _), _ = found["answers"]["stage 1"]
    assert color == "The car is red."
    assert place.startswith("The car is ")
    assert place != "The car is at the bottom."


def test_stage_1_teaches_what_captions_say_and_no_places(found: dict[str, Any]) -> None:
    before, after = found["types"]["before"], found["types"]["stage 1"]
    for kind in KINDS:
        assert after[kind][0] > 0.6
    for kind in ("kind", "color"):
        assert after[kind][1] > before[kind][2], "the intervals are apart"
    assert after["place"][2] < 0.5
    assert after["place"][1] <= before["place"][2]


def test_stage_2_teaches_places_and_keeps_the_rest(found: dict[str, Any]) -> None:
    before, after = found["types"]["stage 1"], found["types"]["stage 2"]
    assert after["place"][0] > before["place"][0] + 0.1
    right = ("The car is red.", "The car is at the bottom.", "There are two fish.")  # all three where the lesson was stored
    assert sum(answer == wanted for (answer, _), wanted in zip(found["answers"]["stage 2"], right, strict=True)) >= 2
    assert found["all"]["stage 2"][1] > found["all"]["stage 1"][2], "over all questions the intervals are apart"
    for kind in KINDS:
        assert after[kind][2] >= before[kind][1]
    assert found["all"]["stage 1"][1] > found["all"]["before"][2]


def test_a_blind_model_is_far_behind(found: dict[str, Any]) -> None:
    assert found["blind"]["all"][2] < found["all"]["stage 2"][1]


def test_the_losses_fall_from_guessing_in_stage_1_and_are_small_all_along_in_stage_2(found: dict[str, Any]) -> None:
    first, second, guessing = found["losses"]
    assert 0.6 * guessing < first[0] < 1.2 * guessing
    assert sum(first[-9:]) / 9 < 0.1 * guessing
    assert max(second) < 0.2 * guessing
    assert found["ended"] == ["finished", "finished", "finished"]


def test_it_writes_into_a_temporary_folder_only(found: dict[str, Any]) -> None:
    assert found["inside"]
    assert not (execute.LESSONS / "runs").exists()


def test_the_exercises_accept_what_is_right_and_name_the_mistake(found: dict[str, Any]) -> None:
    right, without, inputs, two = found["count"]
    assert right.startswith("Yes: 49,408")
    assert "one bias for each output" in without
    assert "belongs to the outputs" in inputs
    assert "two layers" in two
    right, minus, every, total, own = found["loss"]
    assert right.startswith("Yes")
    assert "minus the log-probability" in minus
    assert "questions are not to be learnt" in every
    assert "that is the sum" in total
    assert "the token after it" in own
