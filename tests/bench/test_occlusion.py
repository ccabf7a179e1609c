"""The occlusion benchmark: ours and captum's numbers are the same, and the table says what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_lab.bench import harness as bench
from llava_lab.bench import occlusion as bench_occlusion
from llava_lab.errors import OptionError
from llava_lab.models import Lab

TOGETHER = ("captum FeatureAblation of the tokens, the tower run once", bench_occlusion.EXACT)


@pytest.fixture(scope="module")
def facts(tiny_folder: Path) -> dict[str, dict[str, Any]]:
    """Every way, once, in this process."""
    return {way: bench_occlusion.measure_way(str(tiny_folder), way, 16) for way in bench_occlusion.WAYS}


def test_ours_are_captum_s_numbers(facts: dict[str, dict[str, Any]]) -> None:
    tokens, pixels = (np.array(facts[peer]["values"]) for peer in (bench_occlusion.TOKENS, bench_occlusion.PIXELS))
    assert tokens.shape == pixels.shape == (16,)
    assert np.abs(tokens - pixels).max() > 0.01, "two places, two maps"
    for way in TOGETHER:
        np.testing.assert_allclose(facts[way]["values"], tokens, atol=2e-5)  # scores near -30, 2e-6 apart in float32
    for way in ("captum FeatureAblation at the pixels, 16 at once", "ours: occlusion at the pixels"):
        np.testing.assert_allclose(facts[way]["values"], pixels, atol=2e-5)


def test_each_way_is_timed_and_its_memory_is_above_what_stood_before(facts: dict[str, dict[str, Any]]) -> None:
    for way, one in facts.items():
        assert one["seconds"] > 0, way
        assert one["peak_mb"] is None or one["peak_mb"] >= 0, way
    assert 0 < facts[bench_occlusion.EXACT]["peak_flops_fraction"] < 1
    with pytest.raises(OptionError, match="way must be one of plain forward, captum .*, got 'theirs'"):
        bench_occlusion.measure_way("tiny", "theirs", 16)


def test_a_sweep_of_some_patches_is_scaled_to_all(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("llava_lab.bench.occlusion.time.perf_counter", lambda: float(next(clock)))
    way = "ours: occlusion at the pixels"
    some = bench_occlusion.measure_way(str(tiny_folder), way, 4)
    assert len(some["values"]) == 4
    assert some["seconds"] == 4.0  # one tick of the clock for 4 of 16
    assert bench_occlusion.measure_way(str(tiny_folder), "ours: token_knockout", 4)["seconds"] >= 1.0


def test_the_table_has_medians_ratios_errors_and_ranks(facts: dict[str, dict[str, Any]]) -> None:
    times = {name: [number + 1.0, number + 3.0, 100.0] for number, name in enumerate(bench_occlusion.WAYS)}
    measured = {name: [{**facts[name], "threads": 1, "seconds": t, "peak_mb": 7.0} for t in times[name]] for name in times}
    table = bench_occlusion.rows(measured, {"rise": 0.5})
    assert json.loads(json.dumps(table)) == table
    assert set(table) == {"device", "threads", "rows", "floor", "peak_flops_fraction"}
    rows = {row["name"]: row for row in table["rows"]}
    assert table["floor"] == 3.0
    assert [row["ratio_to_floor"] for row in table["rows"]] == [pytest.approx((number + 3) / 3) for number in range(len(rows))]
    assert rows[bench_occlusion.PIXELS]["ratio_to_peer"] == rows[bench_occlusion.TOKENS]["ratio_to_peer"] == 1.0
    assert rows[bench_occlusion.EXACT]["ratio_to_peer"] == pytest.approx(9 / 7)  # seventh way beside the fifth
    assert rows[bench_occlusion.EXACT]["max_error"] < 2e-5
    assert rows["ours: rise"]["max_error"] is None
    assert (rows["ours: rise"]["rank_correlation"], rows["ours: greedy"]["rank_correlation"]) == (0.5, None)
    assert rows[bench_occlusion.FLOOR]["extra_mb"] == 7.0


def test_each_measurement_is_a_process_of_its_own_and_ways_take_turns(
    facts: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def child(body: str, *, model: str, **given: Any) -> dict[str, Any]:
        asked.append(given.get("way", "ranks"))
        assert ("measure_way" if "way" in given else "measure_ranks") in body
        return {**facts[given["way"]], "threads": 1} if "way" in given else {"ranks": {"rise": 0.25}}

    monkeypatch.setattr(bench_occlusion, "_child", child)
    table = bench.run("occlusion", model="tiny", quick=True)
    assert asked == [*[*bench_occlusion.WAYS] * bench.QUICK_REPEATS, "ranks"]
    assert [row["rank_correlation"] for row in table["rows"]].count(0.25) == 1
    asked.clear()
    bench.run("occlusion", model="random-s", quick=True)
    assert "ranks" not in asked, "random weights cannot tell"


def test_ranks_are_compared_with_the_exact_sweep(tiny_random: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_lab.models.load", lambda name: tiny_random)
    monkeypatch.setattr(bench_occlusion, "STAND_INS", {"occlusion": {"at": "projector", "fill": "mean"}, "center": {}})
    ranks = bench_occlusion.measure_ranks("tiny", 2)
    assert ranks["occlusion"] == pytest.approx(1)
    assert abs(ranks["center"]) < 1
