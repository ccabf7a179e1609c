"""The start benchmark measures what it says, in the promised format, and the promise holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_lab.bench import harness as bench
from llava_lab.errors import LabError, OptionError

LIMIT = 1.3  # first answer over the bare imports


@pytest.fixture(scope="module")
def measured(tiny_folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result of one real measurement, and what its processes said: floor, ours, peer."""
    said: list[dict[str, Any]] = []
    child = bench._child

    def listening(body: str, **values: Any) -> dict[str, Any]:
        said.append(child(body, **values))
        return said[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_child", listening)
        return bench.measure_start(str(tiny_folder), repeats=1), said


@pytest.fixture(scope="module")
def result(measured: tuple[dict[str, Any], list[dict[str, Any]]]) -> dict[str, Any]:
    return measured[0]


def test_the_result_has_the_promised_keys_and_is_json(result: dict[str, Any]) -> None:
    assert set(result) == {"device", "threads", "rows", "floor", "peak_flops_fraction"}
    keys = {"name", "seconds", "ratio_to_floor", "ratio_to_peer", "extra_mb", "max_error"}
    assert all(set(row) == keys for row in result["rows"])
    assert json.loads(json.dumps(result)) == result


def test_the_first_answer_costs_at_most_the_limit_over_the_bare_imports(
    measured: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    """In processor time, which other work on the machine hardly moves; the benchmark itself reports the wall clock."""
    floor, ours, peer = (process["cpu_seconds"] for process in measured[1])
    print(
        f"first answer: {ours:.2f} s of processor time, {ours / floor:.2f} x the imports; transformers' way {peer / floor:.2f} x"
    )
    assert ours / floor < LIMIT


def test_the_answer_is_the_peer_s_to_the_last_digits(result: dict[str, Any]) -> None:
    floor, ours, _ = result["rows"]
    assert floor["ratio_to_floor"] == 1
    assert ours["max_error"] < 1e-5
    assert ours["seconds"] > 0


def test_ratios_are_of_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {bench._FLOOR: iter([2.0, 4.0, 30.0]), bench._OURS: iter([5.0, 6.0, 7.0]), bench._PEER: iter([8.0, 8.0, 8.0])}
    facts = {
        "answer": "a",
        "logprobs": [-1.0],
        "prompt": "p",
        "folder": "f",
        "device": "cpu",
        "threads": 1,
        "peak_mb": 1,
        "cpu_seconds": 1,
    }
    monkeypatch.setattr(bench, "_child", lambda body, **_: {"seconds": next(times[body]), **facts})
    floor, ours, peer = bench.run("start", quick=True)["rows"]
    assert (floor["seconds"], ours["seconds"], ours["ratio_to_floor"], ours["ratio_to_peer"]) == (4.0, 6.0, 1.5, 0.75)
    assert (ours["max_error"], peer["ratio_to_peer"]) == (0.0, 1.0)


def test_different_answers_have_no_error_to_report() -> None:
    mine, theirs = {"answer": "a", "logprobs": [-1.0]}, {"answer": "b", "logprobs": [-1.0]}
    assert bench._max_difference(mine, theirs) is None
    assert bench._max_difference(mine, {"answer": "a", "logprobs": [-1.5]}) == 0.5


def test_unknown_names_list_the_known(result: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="one of start, .*got 'stop'"):
        bench.run("stop")


def test_a_failing_process_gives_its_last_line() -> None:
    with pytest.raises(LabError, match="failed: ValueError: why"):
        bench._child("print('noise')\nraise ValueError('why')\n")
