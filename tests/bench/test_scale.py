"""The benchmark of the real size, run small: what it writes loads whole, what it computes follows from what it measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import llava_lab as ll
from llava_lab.bench import harness as bench
from llava_lab.bench import scale as bench_scale
from llava_lab.bench.scale import FLOOR
from llava_lab.errors import OptionError

SMALL = replace(
    bench_scale.SIZES, image=56, vision_width=64, vision_layers=3, vision_heads=4, vision_mlp=128, hidden=128, heads=4, mlp=256
)
NAMES = ("attention", "relevancy", "occlusion")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scale")
    written = bench_scale.write_checkpoint(place, layers=4, sizes=SMALL)
    on_disk = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    assert written <= on_disk < written + 100_000  # the weights and a header
    return place


def test_the_real_size_is_llava_15_7b_s() -> None:
    """Counted on the meta device from transformers' own classes; 7,063,427,072 parameters, as the hub's checkpoint has."""
    assert bench_scale.full_size()["parameters"] == 7_063_427_072


def test_the_checkpoint_loads_with_every_weight_drawn(folder: Path) -> None:
    lab = ll.load(folder, dtype="bfloat16")  # refuses missing and unexpected weights
    assert lab.grid == (4, 4)
    state = lab.model.state_dict()
    assert all(float(value.float().std()) > 0 for name, value in state.items() if value.ndim > 1)
    assert {str(value.dtype) for value in state.values() if value.is_floating_point()} == {"torch.bfloat16"}


def test_both_depths_are_measured_and_the_second_is_half_as_deep(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep: list[int] = []
    plain = bench_scale.measure_methods

    def few(lab: Any, repeats: int) -> dict[str, Any]:
        deep.append(len(lab.model.model.language_model.layers))
        return plain(lab, repeats, NAMES)

    monkeypatch.setattr(bench_scale, "measure_methods", few)
    found = bench_scale.measure_depths(str(folder), 1)["depths"]
    assert deep == [4, 2]
    assert found["4"]["relevancy"]["passes"] == {"forward": 2, "backward": 1}
    assert "block" in found["4"]["occlusion"]["note"]  # 4x4 patches have no block of 8: said, and the rest goes on
    assert found["2"]["attention"]["seconds"] > 0


def test_what_grows_with_depth_is_told_from_what_does_not() -> None:
    """By hand: 3 s at 4 layers and 2 s at 2 are 0.5 s a layer and 17 s at 32."""

    def one(seconds: float | None, memory: float | None) -> dict[str, Any]:
        return {"seconds": seconds, "extra_mb": memory, "passes": None, "note": None}

    deep = {FLOOR: one(3.0, 10.0), "rollout": one(6.0, 10.0), "refused": one(None, None)}
    shallow = {FLOOR: one(2.0, 10.0), "rollout": one(4.0, 4.0), "refused": one(None, None)}
    floor, rollout, refused = bench_scale.rows({"4": deep, "2": shallow}, 4)
    assert floor["seconds_per_layer"] == 0.5
    assert rollout["ratio_to_floor"] == 2
    assert rollout["computed_ratio_at_32"] == pytest.approx(34 / 17)
    assert rollout["extra_mb_per_layer"] == 3
    assert rollout["computed_extra_mb_at_32"] == 94
    assert floor["computed_extra_mb_at_32"] == 10
    assert refused["seconds"] is refused["computed_ratio_at_32"] is None


def test_loading_is_weighed_in_a_process_of_its_own(folder: Path) -> None:
    body = "from llava_lab.bench.scale import measure_load\nfacts = measure_load(folder)\n"
    found = bench._child(body, folder=str(folder))
    assert found["load_seconds"] > 0
    assert found["load_peak_mb"] is None or found["load_peak_mb"] > 0


def test_what_it_cannot_measure_is_said() -> None:
    with pytest.raises(OptionError, match="layers must be 2 or more"):
        bench.run("scale", layers=1)
    with pytest.raises(OptionError, match="layers belong to bench scale, not to bench start"):
        bench.run("start", layers=4)
