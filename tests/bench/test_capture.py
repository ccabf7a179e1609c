"""The capture benchmark: our maps are the peers' to the last digits, and the table says what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_lab.bench import capture as bench_capture
from llava_lab.bench import harness as bench
from llava_lab.bench.capture import DEFAULTS, FLOOR, KEPT, ROLLED, STOCK, WAYS
from llava_lab.errors import OptionError

NEW = 4


@pytest.fixture(scope="module")
def facts(tiny_folder: Path) -> dict[str, dict[str, Any]]:
    """Every way, once, in this process."""
    return {way: bench_capture.measure_way(str(tiny_folder), way, NEW) for way in WAYS}


def test_ours_are_the_peers_maps_to_the_last_digits(facts: dict[str, dict[str, Any]]) -> None:
    for peer, word in ((KEPT, "attention"), (ROLLED, "rollout")):
        theirs = np.array(facts[peer]["maps"])
        assert theirs.shape == (NEW, 16)
        assert theirs.max() > 1e-3
        own = [way for way in WAYS if way.startswith("ours") and word in way and way != DEFAULTS]
        assert len(own) == 2
        for way in own:
            np.testing.assert_allclose(facts[way]["maps"], theirs, atol=1e-5)


def test_each_way_is_timed(facts: dict[str, dict[str, Any]]) -> None:
    assert all(one["seconds"] > 0 for one in facts.values())
    assert 0 < facts[FLOOR]["peak_flops_fraction"] < 1
    with pytest.raises(OptionError, match="way must be one of plain answer, sdpa, stock generate, .*, got 'theirs'"):
        bench_capture.measure_way("tiny", "theirs", NEW)


def test_the_table_has_medians_ratios_memory_and_errors(facts: dict[str, dict[str, Any]]) -> None:
    measured = {
        name: [{**facts[name], "threads": 1, "seconds": t, "peak_mb": 8.0 + number} for t in (number + 1.0, number + 3.0, 100.0)]
        for number, name in enumerate(WAYS)
    }
    table = bench_capture.rows(measured)
    assert json.loads(json.dumps(table)) == table
    assert set(table) == {"device", "threads", "rows", "floor", "peak_flops_fraction"}
    rows = {row["name"]: row for row in table["rows"]}
    assert table["floor"] == 3.0
    assert [row["ratio_to_floor"] for row in table["rows"]] == [pytest.approx((n + 3) / 3) for n in range(len(rows))]
    assert rows[KEPT]["ratio_to_peer"] == rows[ROLLED]["ratio_to_peer"] == 1.0
    assert rows["ours: attention while answering"]["ratio_to_peer"] == pytest.approx(6 / 5)
    assert rows["ours: rollout while answering"]["max_error"] < 1e-5
    assert [rows[name]["max_error"] for name in (FLOOR, STOCK, DEFAULTS)] == [None] * 3
    assert rows[KEPT]["extra_mb"] == 2.0
    assert rows[KEPT]["memory_ratio"] == 1.25


def test_each_measurement_is_a_process_of_its_own_and_ways_take_turns(
    facts: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def child(body: str, *, model: str, way: str, new: int) -> dict[str, Any]:
        assert "measure_way(model, way, new)" in body
        asked.append(way)
        return {**facts[way], "threads": 1}

    monkeypatch.setattr(bench_capture, "_child", child)
    bench.run("capture", model="tiny", quick=True)
    assert asked == [*WAYS] * bench.QUICK_REPEATS
