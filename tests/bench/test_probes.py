"""The lens benchmark: ours and the obvious way give the same numbers, and the table says what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_lab.bench import harness as bench
from llava_lab.bench import probes as bench_probes
from llava_lab.errors import OptionError


@pytest.fixture(scope="module")
def facts(tiny_folder: Path) -> dict[str, dict[str, Any]]:
    return {way: bench_probes.measure_way(str(tiny_folder), way) for way in bench_probes.WAYS}


def test_ours_are_the_obvious_way_s_numbers(facts: dict[str, dict[str, Any]]) -> None:
    measured = {way: [{**one, "threads": 1}] for way, one in facts.items()}
    table = bench_probes.rows("tiny", measured)
    assert json.loads(json.dumps(table)) == table
    found = {row["name"]: row for row in table["rows"]}
    assert found[f"tiny: {bench_probes.OURS}"]["max_error"] < 1e-5
    assert found[f"tiny: {bench_probes.PEER}"]["ratio_to_peer"] == 1
    assert found[f"tiny: {bench_probes.FLOOR}"]["ratio_to_floor"] == 1
    with pytest.raises(OptionError, match=r"way must be one of plain forward, .*, got 'other'"):
        bench_probes.measure_way("tiny", "other")


def test_each_measurement_is_a_process_of_its_own_and_the_wide_shape_is_measured_too(
    facts: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def child(body: str, *, model: str, way: str) -> dict[str, Any]:
        assert "measure_way(model, way)" in body
        asked.append((model, way))
        return {**facts[way], "threads": 1}

    monkeypatch.setattr(bench_probes, "_child", child)
    table = bench.run("probes", model="tiny", quick=True)
    models = ("tiny", bench_probes.WIDE)
    assert asked == [(model, way) for model in models for _ in range(bench.QUICK_REPEATS) for way in bench_probes.WAYS]
    assert len(table["rows"]) == 6
