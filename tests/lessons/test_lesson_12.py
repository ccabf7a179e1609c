"""Lesson 12 says what is so: no sinks, a head by hand, an estimate that follows, a circuit of few edges, directions, exercises.

Other weights may turn some of these round; then the prose under the figures must change, not this test alone.
"""

from __future__ import annotations

from typing import Any

from tests.support.lessons import Lesson


def test_it_runs_and_what_is_stored_is_what_it_shows(lesson: Lesson) -> None:
    lesson.check()


def test_the_twins_are_told_apart(found: dict[str, Any]) -> None:
    assert found["answers"][0] != found["answers"][1]


def test_patches_are_attended_and_none_is_a_sink(found: dict[str, Any]) -> None:
    assert found["sinks"] == 0
    assert found["attended"] > 0
    assert found["longest"] < 3


def test_a_head_by_hand_is_the_library_s(found: dict[str, Any]) -> None:
    by_hand, measured, whole = found["head"]
    assert abs(by_hand - measured) < 0.01
    assert 0 < by_hand < whole


def test_the_estimate_follows_the_measurement_for_a_fraction_of_its_price(found: dict[str, Any]) -> None:
    assert found["agreement"]["heads: pearson"] > 0.95
    assert found["estimate"][:2] == [2, 1]
    assert found["estimate"][2] > 50


def test_one_edge_in_fifty_carries_the_colour_and_random_ones_nothing(found: dict[str, Any]) -> None:
    assert found["edges"] == 6628
    assert found["kept"]["0.02"] > 0.8
    assert found["kept"]["0.01"] < 0.8
    assert abs(found["random"]["0.2"]) < 0.2
    cpr, random_cpr, cmd, random_cmd = found["areas"]
    assert cpr > 0.9 > random_cpr
    assert cmd < 0.1 < random_cmd


def test_the_best_edges_are_values_and_outputs(found: dict[str, Any]) -> None:
    assert not [name for name in found["best"] if "query" in name or "key" in name]
    assert any("tokens ->" in name and name.endswith("image") for name in found["best"])
    assert any("-> output" in name for name in found["best"])
    assert found["one by one"] > 0.8


def test_a_few_directions_carry_the_colour_first_at_the_thing_and_late_at_the_last_token(found: dict[str, Any]) -> None:
    assert found["by hand"] == [4, 6, 3]
    early, late, first, behind = found["exchanged"]
    for one in (early, behind):
        assert one["iia"]["whole"] > one["iia"]["found"] > 0.4
        assert max(one["iia"][name] for name in ("random", "shuffled", "untrained")) < 0.25
        assert one["alone"]["found"] > 0.6 > 0.2 > one["alone"]["whole"]
    assert late["iia"]["whole"] < 0.5
    assert first["iia"]["whole"] == 0


def test_the_exercises_accept_what_is_right_and_name_the_mistake(found: dict[str, Any]) -> None:
    right, larger, less, none = found["share"]
    assert right == "Yes."
    assert "not the smallest" in larger
    assert "keeps" in less
    assert "not one of the shares" in none
    right, late, whole = found["cmd"]
    assert right.startswith("Yes")
    assert "begin at (0, 0)" in late
    assert "CPR" in whole
