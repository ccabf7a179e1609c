"""Lesson 11 says what is so: what is made up under grain, what is denied, which patches a made-up word hangs on, its exercises.

Other weights may turn some of these round; then the prose under the figures must change, not this test alone.
"""

from __future__ import annotations

from typing import Any

from tests.support.lessons import Lesson


def test_it_runs_and_what_is_stored_is_what_it_shows(lesson: Lesson) -> None:
    lesson.check()


def test_under_grain_it_says_more_and_is_less_sure(found: dict[str, Any]) -> None:
    assert found["vain"] == {"0": [], "80": [], "120": ["heart", "mushroom"], "160": ["cup"]}
    sure = found["sure"]
    assert sure["0"] > 0.9
    assert sure["120"] < 0.3
    assert "Unlike the pictures" in found["notes"]


def test_it_denies_what_it_named(found: dict[str, Any]) -> None:
    assert [found["said"][kind].split(",")[0] for kind in ("house", "mushroom", "heart")] == ["Yes", "No", "No"]


def test_the_three_samplings_are_alike_where_nothing_goes_with_anything(found: dict[str, Any]) -> None:
    assert len(set(found["f1"])) == 1
    assert found["blind"]["F1 random"] == 0
    assert found["blind"]["CHAIRi kinds"] > 70
    assert found["commonest"] < 2 * found["rarest"]


def test_the_word_hangs_on_what_hiding_found_and_another_comes_in_its_place(found: dict[str, Any]) -> None:
    change, lowest, answer = found["cuts"]["token_knockout"]
    assert change < lowest - 3
    assert "heart" not in answer
    assert "cup" in answer
    change, lowest, answer = found["cuts"]["attention"]
    assert change < lowest
    assert "heart" in answer


def test_a_contrast_by_hand(found: dict[str, Any]) -> None:
    assert found["contrast"] == {"more noise": "mushroom", "another picture": "cup"}


def test_only_the_direction_toward_clear_beats_its_control(found: dict[str, Any]) -> None:
    rows = {(row["change"], row["measure"]): row for row in found["against"]}
    clear, less = rows["steering: toward clear", "CHAIRi things"], rows["contrast: noised picture", "CHAIRi things"]
    assert clear["interval"][1] < 0
    assert all(each < -10 for each in clear["each"])
    assert rows["steering: toward clear", "recall things"]["interval"][1] > 0
    assert less["interval"][0] < 0 < less["interval"][1]
    assert rows["knockout: late layers", "CHAIRi things"]["interval"][0] > 0
    assert rows["steering: toward no", "F1"]["interval"][1] < -30
    assert 30 < found["as it is"]["CHAIRi kinds"] < 45


def test_the_exercises_take_the_right_answer_and_say_what_is_wrong_with_others(found: dict[str, Any]) -> None:
    right, *wrong = found["exercise 1"]
    assert right.startswith("Yes")
    for text, expected in zip(wrong, ("add up first", "CHAIRs", "is there"), strict=True):
        assert text.startswith("refused: ")
        assert expected in text
    right, half, none = found["exercise 2"]
    assert right.startswith("Yes")
    assert "half of the questions" in none
    assert "yes answers" in half
