"""The accelerator's benchmark: every line of it on the processor at a small shape, and one line where there is no accelerator."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llava_lab import bench
from llava_lab.bench import capture, connectors, gpu, occlusion, probes, relevancy
from llava_lab.cli import main as cli
from llava_lab.errors import LabError
from llava_lab.models import placement

SMALL = replace(
    gpu.SIZES, image=56, vision_width=64, vision_layers=3, vision_heads=4, vision_mlp=128, hidden=128, heads=4, mlp=256
)
CPU = torch.device("cpu")


def _small(layers: int = 3, repeats: int = 1) -> dict[str, Any]:
    return gpu.measure_on("cpu", layers, repeats, sizes=SMALL, vocabulary=700, peak=64)


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "NEW_TOKENS", 3)
        # collecting a whole test run's garbage before every way would take most of the time
        patch.setattr(gpu, "gc", SimpleNamespace(collect=lambda: 0))
        return _small()


def test_every_group_is_measured_on_whatever_device_is_named(made: dict[str, Any]) -> None:
    assert json.loads(json.dumps(made)) == made
    assert made["device"] == "cpu"
    assert (made["layers"], made["dtype"], made["note"]) == (3, "bfloat16", "3 of 32 layers")
    assert made["floor"] > 0
    assert 0 < made["peak_flops_fraction"] < 2  # of a product too small to tell the peak
    rows = {row["name"]: row for row in made["rows"]}
    assert {name.split(":")[0] for name in rows} == set(gpu.GROUPS)
    assert all(row["seconds"] > 0 for row in rows.values())
    for group, floor in (("capture", capture.FLOOR), ("occlusion", occlusion.FLOOR), ("connectors", connectors.FLOOR)):
        assert rows[f"{group}: {floor}"]["ratio_to_floor"] == 1
    for name in (f"relevancy: {relevancy.WHOLE}", f"relevancy: {relevancy.EXACT}", f"lens: {probes.OURS}"):
        assert rows[name]["ratio_to_floor"] > 0


def test_ours_has_the_peers_numbers(made: dict[str, Any]) -> None:
    """In bfloat16, where one answers by sdpa and the other by eager attention."""
    rows = {row["name"]: row for row in made["rows"]}
    for way in ("ours: attention while answering", "ours: rollout while answering"):
        assert rows[f"capture: {way}"]["max_error"] < 0.02
        assert rows[f"capture: {way}"]["ratio_to_peer"] > 0
    assert rows[f"capture: {capture.DEFAULTS}"]["max_error"] is None
    assert rows[f"connectors: {connectors.OURS}"]["max_error"] < 0.1
    assert rows[f"lens: {probes.OURS}"]["max_error"] < 0.02
    sweep = rows[f"occlusion: {occlusion.EXACT}"]
    assert sweep["note"] == "16 of 16 patches measured"
    assert sweep["ratio_to_peer"] is None  # captum is not measured here


def test_without_an_accelerator_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(placement, "_device", lambda device: (CPU, "cpu: no GPU is here"))
    monkeypatch.setattr(gpu, "child", None)  # no process is started
    assert cli.main(["bench", "gpu"]) == 0
    assert capsys.readouterr().out == gpu.NONE + "\n"
    assert cli.main(["bench", "gpu", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"] == []
    assert printed["note"].startswith("no accelerator")


def _children(fits: Callable[[int], bool], tried: list[int]) -> Callable[..., dict[str, Any]]:
    def child(body: str, *, device: str, layers: int, repeats: int) -> dict[str, Any]:
        assert "measure_on(device, layers, repeats)" in body
        tried.append(layers)
        made = {"fits": fits(layers), "device": device, "seconds": 1.0, "cpu_seconds": 1.0, "peak_mb": 1.0}
        return {**made, "rows": [], "layers": layers}

    return child


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_layers_are_halved_until_they_have_room(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_device", lambda device: (torch.device(kind), "here"))
    tried: list[int] = []
    monkeypatch.setattr(gpu, "child", _children(lambda layers: layers <= 8, tried))
    assert bench.run("gpu", quick=True) == {"device": kind, "rows": [], "layers": 8}
    assert tried == [32, 16, 8]
    monkeypatch.setattr(gpu, "child", _children(lambda layers: False, tried))
    with pytest.raises(LabError, match="room for 4 layers"):
        bench.run("gpu")


def _full(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("expected all tensors to be on the same device")


def test_what_has_no_room_is_said_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gpu.Group(occlusion.COMPARISON, {occlusion.FLOOR: lambda: np.zeros(0), occlusion.EXACT: _full})
    groups = {"lens": _full, "occlusion": lambda lab: plain}
    monkeypatch.setattr(gpu, "GROUPS", groups)
    lens, floor, exact = _small()["rows"]
    assert (lens["name"], lens["note"], lens["seconds"]) == ("lens", gpu.NO_ROOM, None)
    assert floor["ratio_to_floor"] == 1
    assert (exact["note"], exact["seconds"]) == (gpu.NO_ROOM, None)
    monkeypatch.setattr(gpu, "LIMIT", -1.0)
    assert [row["note"] for row in _small()["rows"]][1:] == ["no time was left of -1 seconds"] * 2
    monkeypatch.setattr(gpu, "random_lab", _full)
    assert _small() == {"fits": False, "device": "cpu"}


@pytest.mark.parametrize("where", ["weights", "group", "way"])
def test_an_error_of_our_own_is_not_taken_for_a_lack_of_room(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "weights":
        monkeypatch.setattr(gpu, "random_lab", _broken)
    broken = gpu.Group(occlusion.COMPARISON, {occlusion.FLOOR: _broken})
    monkeypatch.setattr(gpu, "GROUPS", {"occlusion": _broken if where == "group" else lambda lab: broken})
    with pytest.raises(RuntimeError, match="same device"):
        _small()


@pytest.mark.long
def test_a_slow_way_is_called_once_and_a_quick_one_not_timed_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    assert gpu._measured(CPU, lambda: calls.append(1), 3)["seconds"] >= 0
    assert len(calls) == 4
    monkeypatch.setattr(gpu, "SLOW", 0.0)
    gpu._measured(CPU, lambda: calls.append(1), 3)
    assert len(calls) == 5


@pytest.mark.long
def test_a_device_s_own_memory_is_told_where_it_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    telling = SimpleNamespace(
        max_memory_allocated=lambda: 3 * 2**20,
        reset_peak_memory_stats=lambda: asked.append("reset"),
        empty_cache=lambda: asked.append("empty"),
        synchronize=lambda: asked.append("wait"),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: telling)
    assert gpu.device_memory(torch.device("cuda"), reset=True) == 3
    measured = gpu._measured(torch.device("cuda"), lambda: 1, 1)
    assert measured["peak_mb"] == 0
    assert asked == ["reset", "empty", "reset", "wait", "wait"]
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(synchronize=lambda: None))
    assert gpu._measured(torch.device("mps"), lambda: 1, 1)["peak_mb"] is None


def test_a_device_s_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(get_device_name=lambda: "H200"))
    monkeypatch.setattr(gpu, "random_lab", _full)
    assert gpu.measure_on("cuda", 32, 1)["device"] == "cuda (H200)"
