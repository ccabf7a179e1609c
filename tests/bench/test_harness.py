"""The harness: ways take turns in processes of their own, and a table tells medians beside the floor and the peer."""

from __future__ import annotations

import json
import mmap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llava_lab import bench
from llava_lab.bench import harness, start
from llava_lab.bench.harness import SHAPES, Call, Comparison
from llava_lab.errors import LabError, OptionError

LIMIT = 1.3  # first answer over the bare imports
LAB: Any = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def toy(calls: list[str]) -> Comparison:
    """A floor without numbers, a peer, and a way that is near it; what is called is written to `calls`."""

    def way(name: str, values: list[float]) -> Any:
        return lambda what: calls.append(f"{name} {what}") or np.array(values)

    def prepare(model: str, way: str) -> Call:
        return Call(LAB, ("whole",), first=("first",), scale=3.0, facts={"model": model})

    ways = {"floor": way("floor", []), "peer": way("peer", [1.0, 2.0]), "ours": way("ours", [1.0, 2.5])}
    return Comparison("toy", ways, prepare, floor="floor", peer=lambda name: "peer")


def _measured(comparison: Comparison, values: dict[str, list[float]]) -> dict[str, list[dict[str, Any]]]:
    """Way number n took n + 1, n + 3 and 100 seconds and 7 + n MB."""
    facts = {"device": "cpu", "threads": 2, "peak_flops_fraction": 0.5}
    return {
        name: [{**facts, "values": values[name], "seconds": t, "peak_mb": 7.0 + n} for t in (n + 1.0, n + 3.0, 100.0)]
        for n, name in enumerate(comparison.ways)
    }


def test_a_table_has_medians_ratios_memory_and_errors(toy: Comparison) -> None:
    values = {"floor": [], "peer": [1.0, 2.0], "ours": [1.0, 2.5]}
    table = harness.table(toy, _measured(toy, values), prefix="m: ")
    assert json.loads(json.dumps(table)) == table
    assert {key: table[key] for key in table if key != "rows"} == {
        "device": "cpu",
        "threads": 2,
        "floor": 3.0,
        "peak_flops_fraction": None,
    }
    names = ("name", "seconds", "ratio_to_floor", "ratio_to_peer", "extra_mb", "max_error")
    assert [tuple(row[name] for name in names) for row in table["rows"]] == [
        ("m: floor", 3.0, 1.0, 0.75, 0.0, None),
        ("m: peer", 4.0, 4 / 3, 1.0, 1.0, 0.0),
        ("m: ours", 5.0, 5 / 3, 1.25, 2.0, 0.5),
    ]
    other = replace(toy, other_numbers=("ours",), counted=("peer",), over_floor=False)
    table = harness.table(other, _measured(toy, values))
    assert table["peak_flops_fraction"] == 0.5
    assert [row["extra_mb"] for row in table["rows"]] == [7.0, 8.0, 9.0]
    assert table["rows"][2]["max_error"] is None


def test_each_measurement_is_a_process_of_its_own_and_ways_take_turns(toy: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def child(body: str, *, model: str, way: str) -> dict[str, Any]:
        assert "from llava_lab.bench.toy import COMPARISON" in body
        asked.append((model, way))
        return {"seconds": 1.0}

    monkeypatch.setattr(harness, "child", child)
    assert {name: len(runs) for name, runs in harness.side_by_side(toy, "m", 2).items()} == {"floor": 2, "peer": 2, "ours": 2}
    assert asked == [("m", "floor"), ("m", "peer"), ("m", "ours")] * 2


@pytest.mark.long
def test_a_way_is_called_once_to_get_ready_and_once_by_the_clock(
    toy: Comparison, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def memory(*, reset: bool = False) -> float:
        calls.append("reset" if reset else "peak")
        return 5.0 if reset else 4.0

    monkeypatch.setattr(harness, "memory", memory)
    monkeypatch.setattr(harness.time, "perf_counter", iter([1.0, 2.0]).__next__)
    facts = harness.measure_way(toy, "m", "ours")
    assert calls == ["ours first", "reset", "ours whole", "peak"]
    assert facts == {
        "seconds": 3.0,
        "peak_mb": 0.0,
        "values": [1.0, 2.5],
        "device": "cpu",
        "peak_flops_fraction": None,
        "model": "m",
    }
    calls.clear()
    monkeypatch.undo()
    counted = replace(toy, first_call_counts=True, counted=("ours",))
    assert harness.measure_way(counted, "m", "ours")["peak_flops_fraction"] == 0, "no product was made"
    assert calls == ["ours first", "ours whole", "ours whole"]
    with pytest.raises(OptionError, match="way must be one of 'floor', 'peer', 'ours', got 'theirs'"):
        harness.measure_way(toy, "m", "theirs")


def test_a_process_gives_its_facts_or_its_last_line() -> None:
    facts = harness.child("facts = {'twice': 2 * number}\n", number=21)
    assert facts["twice"] == 42
    assert facts["seconds"] >= 0
    with pytest.raises(LabError, match="failed: ValueError: why"):
        harness.child("print('noise')\nraise ValueError('why')\n")


def test_the_peak_is_seen_after_it_has_passed() -> None:
    before = harness.memory(reset=True)
    if before is None:  # only Linux says, and then no row has a memory either
        assert not Path("/proc/self/clear_refs").exists()
        return
    with mmap.mmap(-1, 64_000_000) as fresh:  # an array may be given pages the process holds already
        fresh[::4096] = bytes([1]) * len(fresh[::4096])  # one byte makes its page ours
    after = harness.memory()
    assert after is not None
    assert after - before == pytest.approx(61, abs=20)  # MB


def test_products_are_counted_and_causal_attention_as_a_triangle() -> None:
    square, q = torch.randn(8, 8), torch.randn(1, 2, 64, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert harness.flops(lambda: square @ square) == 2 * 8**3
    assert harness.flops(lambda: attend(q, q, q)) == 0
    whole = harness.flops(lambda: attend(q, q, q), attention=True)
    assert whole == 2 * 2 * 2 * 64 * 64 * 8
    assert harness.flops(lambda: attend(q, q, q, is_causal=True), attention=True) == whole / 2


def test_the_random_shapes_have_llava_s_token_geometry() -> None:
    assert {name: shape.grid**2 for name, shape in SHAPES.items()} == {"random-s": 576, "random-m": 576, "random-s-2916": 2916}
    lab = harness.bench_lab("random-s")
    assert lab.grid == (24, 24)
    assert lab.model.config.text_config.hidden_size == 512
    assert not lab.eos_ids


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(OptionError, match="one of start, .*got 'stop'"):
        bench.run("stop")
    with pytest.raises(OptionError, match="layers must be 2 or more"):
        bench.run("scale", layers=1)
    with pytest.raises(OptionError, match="layers belong to bench scale, not to bench start"):
        bench.run("start", layers=4)


def test_start_tells_medians_and_no_error_between_different_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {start.FLOOR: iter([2.0, 4.0, 30.0]), start.OURS: iter([5.0, 6.0, 7.0]), start.PEER: iter([8.0, 8.0, 8.0])}
    facts = {"answer": "a", "logprobs": [-1.0], "prompt": "p", "folder": "f", "device": "cpu", "threads": 1, "peak_mb": 1}
    monkeypatch.setattr(start, "child", lambda body, **_: {"seconds": next(times[body]), **facts})
    floor, ours, peer = bench.run("start", quick=True)["rows"]
    assert (floor["seconds"], ours["seconds"], ours["ratio_to_floor"], ours["ratio_to_peer"]) == (4.0, 6.0, 1.5, 0.75)
    assert (ours["max_error"], peer["ratio_to_peer"]) == (0.0, 1.0)
    assert start.answer_difference(facts, {"answer": "a", "logprobs": [-1.5]}) == 0.5
    assert start.answer_difference(facts, {"answer": "b", "logprobs": [-1.0]}) is None


@pytest.mark.long
def test_the_first_answer_is_the_peer_s_and_costs_at_most_the_limit_over_the_bare_imports(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processor time, which other work on the machine hardly moves; the benchmark itself reports the wall clock."""
    processes: list[dict[str, Any]] = []
    child = start.child

    def listening(body: str, **values: Any) -> dict[str, Any]:
        processes.append(child(body, **values))
        return processes[-1]

    monkeypatch.setattr(start, "child", listening)
    result = start.measure(str(tiny_folder), repeats=1)
    assert json.loads(json.dumps(result)) == result
    floor, ours, peer = (process["cpu_seconds"] for process in processes)
    print(f"first answer: {ours:.2f} s, {ours / floor:.2f} x the imports; transformers' way {peer / floor:.2f} x")
    assert ours / floor < LIMIT
    assert result["rows"][1]["max_error"] < 1e-5
