"""The relevancy benchmark: the peers' way re-stated gives the peers' maps, and the table says what was measured."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_lab.bench import harness as bench
from llava_lab.bench import relevancy as bench_relevancy
from llava_lab.bench.harness import SHAPES, bench_lab
from llava_lab.errors import OptionError

NEW = 3


@pytest.fixture(scope="module")
def facts(tiny_folder: Path) -> dict[str, dict[str, Any]]:
    """Every way, once, in this process."""
    return {way: bench_relevancy.measure_way(str(tiny_folder), way, NEW) for way in bench_relevancy.WAYS}


def test_ours_are_the_peers_maps_to_the_last_digits(facts: dict[str, dict[str, Any]]) -> None:
    theirs = np.array(facts[bench_relevancy.PEER]["maps"])
    assert theirs.shape == (NEW, 16)
    assert theirs.max() > 1e-3
    for way in ("ours: one map per token, its maps", "lvlm-interpret's way, weights frozen"):
        np.testing.assert_allclose(facts[way]["maps"], theirs, atol=1e-5)
    assert np.array(facts["ours: one map per token, exact"]["maps"]).shape == (NEW, 16)
    assert np.array(facts[bench_relevancy.WHOLE]["maps"]).shape == (1, 16)


def test_each_way_is_timed_and_its_memory_is_above_what_stood_before(facts: dict[str, dict[str, Any]]) -> None:
    for way, one in facts.items():
        assert one["seconds"] > 0, way
        assert one["peak_mb"] is None or one["peak_mb"] >= 0, way
    assert 0 < facts[bench_relevancy.WHOLE]["peak_flops_fraction"] < 1
    assert facts[bench_relevancy.FLOOR]["peak_flops_fraction"] is None
    with pytest.raises(OptionError, match="way must be one of plain answer, ours: .*, got 'theirs'"):
        bench_relevancy.measure_way("tiny", "theirs", NEW)


def test_the_peak_is_seen_after_it_has_passed() -> None:
    before = bench_relevancy._memory(reset=True)
    if before is None:  # only Linux says, and then no row has a memory either
        assert not Path("/proc/self/clear_refs").exists()
        return
    with mmap.mmap(-1, 64_000_000) as fresh:  # an array may be given pages the process holds already
        fresh[::4096] = bytes([1]) * len(fresh[::4096])  # one byte makes its page ours
    after = bench_relevancy._memory()
    assert after is not None
    assert after - before == pytest.approx(61, abs=20)  # MB


def test_the_table_has_medians_ratios_and_errors(facts: dict[str, dict[str, Any]]) -> None:
    times = {name: [number + 1.0, number + 3.0, 100.0] for number, name in enumerate(bench_relevancy.WAYS)}
    measured = {
        name: [{**facts[name], "threads": 1, "seconds": t, "peak_mb": 7.0 + number} for t in times[name]]
        for number, name in enumerate(times)
    }
    table = bench_relevancy.rows(measured)
    assert json.loads(json.dumps(table)) == table
    assert set(table) == {"device", "threads", "rows", "floor", "peak_flops_fraction"}
    rows = {row["name"]: row for row in table["rows"]}
    assert table["floor"] == 3.0
    assert [rows[name]["ratio_to_floor"] for name in rows] == [pytest.approx((number + 3) / 3) for number in range(len(rows))]
    assert rows[bench_relevancy.PEER]["ratio_to_peer"] == 1.0
    assert rows["ours: one map per token, its maps"]["max_error"] < 1e-5
    assert rows["ours: one map per token, exact"]["max_error"] is None
    assert rows[bench_relevancy.WHOLE]["extra_mb"] == 1.0


def test_each_measurement_is_a_process_of_its_own_and_ways_take_turns(
    facts: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def child(body: str, *, model: str, way: str, new: int) -> dict[str, Any]:
        assert "measure_way(model, way, new)" in body
        asked.append(way)
        return {**facts[way], "threads": 1}

    monkeypatch.setattr(bench_relevancy, "_child", child)
    bench.run("relevancy", model="tiny", quick=True)
    assert asked == [*bench_relevancy.WAYS] * bench.QUICK_REPEATS


def test_the_random_shapes_have_llava_s_token_geometry() -> None:
    assert {name: shape.grid**2 for name, shape in SHAPES.items()} == {"random-s": 576, "random-m": 576, "random-s-2916": 2916}
    lab = bench_lab("random-s")
    assert lab.grid == (24, 24)
    assert lab.model.config.text_config.hidden_size == 512
    assert not lab.eos_ids
