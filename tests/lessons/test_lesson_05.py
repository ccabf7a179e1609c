"""Lesson 05 says what is so: its trap, its fills and cuts, its push, its positive control, three findings, its exercises.

Other weights may turn some of these round; then the prose under the figures must change, not this test alone.
"""

from __future__ import annotations

from typing import Any

from tests.support.lessons import Lesson


def test_it_runs_and_what_is_stored_is_what_it_shows(lesson: Lesson) -> None:
    lesson.check()


def test_only_the_car_s_tokens_change_the_answer(found: dict[str, Any]) -> None:
    """Section 1: without them it names another colour, with them alone it still says red."""
    assert found["answer"] == "The car is red."
    for fill in ("zero", "mean"):
        assert found["said"]["the car"][fill] == "The car is blue."
        for name in ("a fish", "paper", "all but the car"):
            assert found["said"][name][fill] == found["answer"]


def test_the_false_mask_cuts_nothing_and_the_true_one_all(found: dict[str, Any]) -> None:
    (unchanged, still_read), (changed, gone) = found["trap"]
    assert unchanged == 0
    assert still_read > 0.1
    assert changed > 1
    assert gone == 0


def test_every_fill_but_shuffle_takes_the_colour_away_and_random_patches_do_not(found: dict[str, Any]) -> None:
    for name, (change, worst, answer) in found["fills"].items():
        assert (change < -3) == (name != "shuffle")
        assert (answer == found["answer"]) == (name == "shuffle")
        assert worst > -0.5


def test_the_question_need_not_read_the_car_and_the_answer_must(found: dict[str, Any]) -> None:
    question, last, whole = (found["cuts"][name] for name in ("car → question", "car → last", "image → last"))
    assert abs(question[0]) < 0.1
    assert last[0] < -3
    assert whole[2] != found["answer"]
    assert question[1] == last[1] == whole[1] == 0


def test_red_goes_from_the_picture_to_where_it_is_said(found: dict[str, Any]) -> None:
    """Section 4: the two cross between layers 2 and 3, and the question brings back next to nothing."""
    image, last, question = (found["brought back"][name] for name in ("image", "last", "question"))
    assert image[0] > 0.9
    assert image[-1] < 0.1
    assert last[0] < 0.1
    assert last[-1] > 0.9
    assert image[2] > last[2]
    assert image[3] < last[3]
    assert max(map(abs, question)) < 0.1


def test_the_push_works_and_ruins_other_answers(found: dict[str, Any]) -> None:
    half, full, erased = (found["pushed"][name] for name in ("steer 0.5", "steer 1.0", "erase"))
    assert full[2] == "The car is blue."
    assert full[0] < full[1]
    assert full[3][2] == "No, there is no car."
    assert half[2] == found["answer"]
    assert half[3] != found["before"]
    assert erased[3] == found["before"]
    assert erased[0] < erased[1], "the random erasures did even less"
    assert abs(erased[0]) < 0.01


def test_what_surely_decides_is_found(found: dict[str, Any]) -> None:
    deciding, random = found["rates"]
    assert deciding[0] > random[1]


def test_what_the_answer_needs_sits_at_the_deciding_patches(found: dict[str, Any]) -> None:
    """Section 6, the first finding: it agrees, and a buffer makes no difference that can be told."""
    assert found["asked"] >= 12
    two = found["two"]
    assert two["deciding"][2] < two["all the others"][1]
    assert two["and a buffer"][2] < two["all the others"][1]
    assert two["deciding"][2] > two["and a buffer"][1]
    assert round(two["all the others"][0], 2) == 0.94, "the closing table says 94%"


def test_the_flow_is_in_two_stages_with_an_early_one_that_is_new(found: dict[str, Any]) -> None:
    first, second, direct = (found["four"][name] for name in ("image -> question", "question -> last", "image -> last"))
    assert min(first[2:4]) == min(first)
    assert min(first) < -0.2
    assert first[-1] > -0.05
    assert min(direct) > -0.2
    assert second[4] == min(second[2:])
    assert max(second[:2]) < second[4]


def test_deep_layers_do_not_need_the_picture_and_half_of_it_is_never_needed(found: dict[str, Any]) -> None:
    assert min(found["ratio"]) > 0.5, "an image token gets no tiny fraction of attention in any layer"
    half, whole = found["dropped"]["half, at random"], found["dropped"]["all"]
    assert whole[0] < 0.2
    assert min(whole[4:]) > 0.9
    assert half[0] > 0.9


def test_the_exercises_accept_what_is_right_and_name_the_mistake(found: dict[str, Any]) -> None:
    right, early, late = found["layer"]
    assert right.startswith("Yes: after")
    assert "has not left the tokens yet" in early
    assert "not the least" in late
    right, logarithm, difference, wrong = found["relative"]
    assert right.startswith("Yes: three quarters")
    assert "change of the logarithm" in logarithm
    assert "divided by p" in difference
    assert "probability before" in wrong
