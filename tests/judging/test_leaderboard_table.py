"""The leaderboard's table: means, paired differences and intervals by hand, from records written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llava_lab.judging.leaderboard import MEASURES, tabulate
from llava_lab.stats import wilson


def _record(kind: str, gain: float, pointing: float | None, chance: float = 0.1, **more: Any) -> dict[str, Any]:
    method = {"gain": gain, "deletion": 0.2, "insertion": 0.2 + gain, "better": 1.0, "pointing": pointing, "seconds": 0.5}
    control = {"gain": 0.0, "deletion": 0.5, "insertion": 0.5, "pointing": chance}
    methods = {"good": method, "poor": {"gain": -gain}}
    known = {
        "asked": 2,
        "wrong": 1,
        "blind": 0,
        "type": kind,
        "control": control,
        "methods": methods,
        "refused": {},
        "spearman": [[1, -0.5], [-0.5, 1]],
    }
    return {**known, **more}


def test_means_and_paired_differences_by_hand() -> None:
    records = [
        _record("color", 0.2, 1.0, 0.1),
        _record("color", 0.6, 0.0, 0.3),
        _record("count", 1.0, None),
        {"asked": 4, "wrong": 3, "blind": 1},
    ]
    board = tabulate(records, ("good", "poor"), {"model": "m"})
    assert board.types == ("all", "color", "count")
    assert board.measures == MEASURES
    cell = board.at("good", "gain")
    assert cell["mean"] == pytest.approx(0.6)
    assert cell["n"] == 3
    assert cell["interval"][0] < 0.6 < cell["interval"][1]
    assert board.at("poor", "gain")["mean"] == pytest.approx(-0.6)
    assert board.at("good", "pointing")["mean"] == 0.5
    assert board.at("good", "pointing")["against"] == pytest.approx((0.9 - 0.3) / 2)
    assert board.at("good", "pointing", "count")["n"] == 0
    assert np.isnan(board.at("good", "pointing", "count")["mean"])
    assert board.at("good", "deletion", "color")["against"] == pytest.approx(-0.3)
    assert np.isnan(board.at("good", "gain", "count")["interval"]).all()  # one picture has no interval
    assert board.at("good", "gain", "count")["mean"] == 1
    assert np.isnan(board.at("good", "seconds")["against"])
    np.testing.assert_allclose(board.spearman, [[1, -0.5], [-0.5, 1]])
    assert board.about == {"model": "m", "pictures": 4, "explained": 3, "asked": 10, "wrong": 6, "blind": 1}
    assert board.order("gain") == ("good", "poor")


def test_intervals_shrink_with_pictures_and_all_right_is_not_a_point() -> None:
    rng = np.random.default_rng(0)
    few, many = ([_record("color", value, 1.0) for value in rng.normal(0.3, 0.2, n)] for n in (20, 500))
    boards = [tabulate(records, ("good", "poor"), {}) for records in (few, many)]
    widths = [np.diff(board.at("good", "gain")["interval"])[0] for board in boards]
    assert 3 < widths[0] / widths[1] < 8  # the square root of 25 is 5
    assert widths[1] == pytest.approx(2 * 1.96 * 0.2 / np.sqrt(500), rel=0.15)
    np.testing.assert_allclose(boards[0].at("good", "pointing")["interval"], wilson(20, 20))
    np.testing.assert_allclose(boards[0].at("good", "better")["interval"], wilson(20, 20))
    np.testing.assert_allclose(boards[0].at("good", "pointing")["against_interval"], np.array(wilson(20, 20)) - 0.1)


def test_missing_eight_times_is_not_being_worse_than_random() -> None:
    board = tabulate([_record("color", 0.1, 0.0, chance=0.05) for _ in range(8)], ("good", "poor"), {})
    low, high = board.at("good", "pointing")["against_interval"]
    assert low < 0 < high


def test_a_method_refused_on_some_pictures_is_counted_where_it_was_not() -> None:
    second = _record("color", 0.4, 1.0, methods={"good": {"gain": 0.4}}, refused={"poor": "why"}, spearman=[[1.0]])
    board = tabulate([_record("color", 0.2, 1.0), second], ("good", "poor"), {})
    assert board.at("poor", "gain")["n"] == 1
    assert board.refused == {"poor": "why"}
    np.testing.assert_allclose(board.spearman, [[1, -0.5], [-0.5, 1]])
