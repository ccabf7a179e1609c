"""Lesson 06 says what is so: the line that suffices and the MLP that is none, the swap, the verdicts, the small run.

Other weights, or another shipped comparison, may turn some of these round; then the prose must change, not this test alone.
"""

from __future__ import annotations

from typing import Any

from tests.support.lessons import Lesson


def test_it_runs_and_what_is_stored_is_what_it_shows(lesson: Lesson) -> None:
    lesson.check()


def test_on_photographs_the_bend_names_and_neither_line_nor_size_does(found: dict[str, Any]) -> None:
    naming = {name: round(100 * kinds["naming"]) for name, kinds in found["photos"].items()}
    assert naming == {"mlp2x_gelu": 37, "bottleneck": 34, "closed_form": 12, "linear": 6, "linear2x": 0}
    told = found["photos told apart"]
    assert told.pop("bottleneck") == "not distinguishable"
    assert set(told.values()) == {"better"}
    (edge,) = found["photos at the edge"]
    assert edge.startswith("linear (samples")
    assert all(0.4 < kinds["presence"] < 0.6 for kinds in found["photos"].values()), "near what guessing gives"
    assert all(0.4 < kinds["collage: presence"] < 0.6 for kinds in found["photos"].values())
    assert all(kinds["collage: place"] < 0.1 for kinds in found["photos"].values())


def test_a_line_of_rank_32_keeps_every_answer_and_the_controls_do_not(found: dict[str, Any]) -> None:
    flipped = found["flipped"]
    assert found["r2"][0] > 0.9
    assert flipped["linear"] == flipped["rank 32"] == flipped["shuffle"] == 0
    assert flipped["rank 8"] > flipped["rank 16"] > 0
    assert min(flipped["mean"], flipped["random"]) > 0.5


def test_and_yet_the_connector_is_no_line(found: dict[str, Any]) -> None:
    cosine, random, bent, straight = found["local"]
    assert cosine < 0.6
    assert abs(random) < 0.05
    assert bent > 0.4
    assert straight < 0.05


def test_the_car_loses_its_colour_below_rank_16(found: dict[str, Any]) -> None:
    ranks = found["by rank"]
    assert ranks["8"] != "The car is red."
    assert {ranks[rank] for rank in ("16", "32", "64", "128", "192")} == {"The car is red."}


def test_a_foreign_connector_works_less_well_and_is_warned_of(found: dict[str, Any]) -> None:
    own, foreign, warning = found["foreign"]
    assert warning == "ForeignConnector"
    assert 0.5 < foreign < own


def test_no_pair_has_a_verdict_though_mcnemar_is_sure_of_one(found: dict[str, Any]) -> None:
    assert set(found["verdicts"]) == {"not distinguishable"}
    (effect, low, high, mcnemar), (other, _, _, _) = found["effect"]
    assert effect < other < 0, "numerically behind in both"
    assert low < high < 0, "its interval leaves out 0 by a little"
    assert mcnemar < 1e-4
    assert found["first"] == ["linear2x", "linear2x"]


def test_the_small_run_claims_nothing(found: dict[str, Any]) -> None:
    verdict, seeds, notes = found["small"]
    assert (verdict, seeds) == ("not distinguishable", 2)
    assert any("fewer than 5" in note for note in notes)
    assert any("the start is a whole LLaVA" in note for note in notes)


def test_the_exercises_accept_what_is_right_and_name_the_mistake(found: dict[str, Any]) -> None:
    right, without, four = found["size"]
    assert right.startswith("Yes: 4,198,400")
    assert "a bias too" in without
    assert "from 4096 to 4096" in four
    right, population, single = found["width"]
    assert right.startswith("Yes: +0.36")
    assert "divided by n - 1" in population
    assert "the spread of one seed" in single
