"""The benchmarks, each run once on a tiny model: our numbers are the peers', and the rows are the promised ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import llava_lab as ll
from llava_lab import bench
from llava_lab.bench import capture, connectors, harness, occlusion, probes, relevancy, scale, serve
from llava_lab.models import Lab
from llava_lab.models.layout import connector_of
from tests.support.closeness import TERMS, close
from tests.support.families import family

NEW = 4
COMPARED = ("capture", "relevancy", "occlusion", "probes", "serve", "connectors")
COLUMNS = ["name", "seconds", "ratio_to_floor", "ratio_to_peer", "extra_mb", "max_error"]
MORE = {
    "capture": ["memory_ratio"],
    "occlusion": ["rank_correlation"],
    "serve": ["requests_per_second"],
    "connectors": ["tokens_per_second", "peak_flops_fraction"],
}


class Facts(dict[str, dict[str, dict[str, Any]]]):
    """By benchmark and way, each benchmark measured when it is first asked for."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model

    def __missing__(self, name: str) -> dict[str, dict[str, Any]]:
        comparison = import_module(f"llava_lab.bench.{name}").COMPARISON
        self[name] = {way: harness.measure_way(comparison, self.model, way) for way in comparison.ways}
        return self[name]


@pytest.fixture(scope="module")
def facts(tiny_folder: Path) -> Iterator[Facts]:
    """What every way of every benchmark reports, measured once in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "NEW_TOKENS", NEW)
        patch.setattr(relevancy, "NEW_TOKENS", NEW)
        patch.setattr(serve, "NEW_TOKENS", NEW)
        patch.setattr(serve, "REQUESTS", 3)
        few = {method: {**options, **occlusion.WARM.get(method, {})} for method, options in occlusion.STAND_INS.items()}
        patch.setattr(occlusion, "STAND_INS", few)
        # collecting a whole test run's garbage before every way would take most of the time
        patch.setattr(harness, "gc", SimpleNamespace(collect=lambda: 0))
        yield Facts(str(tiny_folder))


@family("name", COMPARED, quick=("capture", "relevancy", "occlusion"))
def test_a_benchmark_prints_a_row_for_each_way(facts: Facts, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = facts[name]

    def child(body: str, *, way: str = "", **values: Any) -> dict[str, Any]:
        other = {"ranks": {"rise": 0.25}, "curves": {"float32": [1.0], "bfloat16": [1.0]}}
        return {**measured[way], "threads": 1} if way else other

    monkeypatch.setattr(harness, "child", child)
    monkeypatch.setattr(occlusion, "child", child)
    monkeypatch.setattr(connectors, "child", child)
    result = bench.run(name, model="tiny", quick=True)
    assert json.loads(json.dumps(result)) == result
    rest = {"loss_curves"} if name == "connectors" else set()
    assert set(result) == {"device", "threads", "rows", "floor", "peak_flops_fraction"} | rest
    assert all(list(row) == COLUMNS + MORE.get(name, []) for row in result["rows"])
    models = ("tiny: ", f"{probes.WIDE}: ") if name == "probes" else ("",)
    assert [row["name"] for row in result["rows"]] == [model + way for model in models for way in measured]
    assert all(row["seconds"] > 0 and row["ratio_to_floor"] > 0 for row in result["rows"])
    if name == "occlusion":
        assert [row["rank_correlation"] for row in result["rows"]].count(0.25) == 1
        result = bench.run(name, model="random-s", quick=True)
        assert not any(row["rank_correlation"] for row in result["rows"]), "random weights cannot tell"


@pytest.mark.long
def test_a_served_answer_is_the_bare_one_for_every_client(facts: Facts) -> None:
    values = {way: np.array(one["values"]) for way, one in facts["serve"].items()}
    assert values[serve.FLOOR].shape == (3, NEW)
    for way in serve.WAYS:
        np.testing.assert_allclose(values[way], values[serve.FLOOR], atol=1e-6)


def test_capture_gives_the_peers_maps(facts: Facts) -> None:
    values = {way: np.array(one["values"]) for way, one in facts["capture"].items()}
    for peer, word in ((capture.KEPT, "attention"), (capture.ROLLED, "rollout")):
        assert values[peer].shape == (NEW, 16)
        assert values[peer].max() > 1e-3
        ours = [way for way in values if way.startswith("ours") and word in way and way != capture.DEFAULTS]
        assert len(ours) == 2
        for way in ours:
            close(values[way], values[peer], terms=TERMS)
    assert 0 < facts["capture"][capture.FLOOR]["peak_flops_fraction"] < 1


def test_relevancy_gives_the_peers_maps(facts: Facts) -> None:
    values = {way: np.array(one["values"]) for way, one in facts["relevancy"].items()}
    assert values[relevancy.PEER].shape == values[relevancy.EXACT].shape == (NEW, 16)
    assert values[relevancy.PEER].max() > 1e-3
    for way in ("ours: one map per token, its maps", "lvlm-interpret's way, weights frozen"):
        close(values[way], values[relevancy.PEER], terms=TERMS)
    assert values[relevancy.WHOLE].shape == (1, 16)
    assert 0 < facts["relevancy"][relevancy.WHOLE]["peak_flops_fraction"] < 1


def test_occlusion_gives_captum_s_numbers(facts: Facts) -> None:
    values = {way: np.array(one["values"]) for way, one in facts["occlusion"].items()}
    tokens, pixels = values[occlusion.TOKENS], values[occlusion.PIXELS]
    assert tokens.shape == pixels.shape == (16,)
    assert np.abs(tokens - pixels).max() > 0.01, "two places, two maps"
    for way in ("captum FeatureAblation of the tokens, the tower run once", occlusion.EXACT):
        close(values[way], tokens, of=30, terms=TERMS)  # scores near -30
    for way in ("captum FeatureAblation at the pixels, 16 at once", "ours: occlusion at the pixels"):
        close(values[way], pixels, of=30, terms=TERMS)
    assert 0 < facts["occlusion"][occlusion.EXACT]["peak_flops_fraction"] < 1
    half = values[occlusion.HALF]
    assert 1e-5 < np.abs(half - tokens).max() < 2, "products in 16 bits, and no others"
    assert not torch.is_autocast_enabled("cpu")


def test_a_sweep_of_some_patches_is_scaled_to_all(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occlusion, "PATCHES", 4)
    some = occlusion.prepare(str(tiny_folder), "ours: occlusion at the pixels")
    assert some.arguments[2].tolist() == [0, 5, 10, 15]
    assert some.scale == 4
    assert occlusion.prepare(str(tiny_folder), "ours: token_knockout").scale == 1


def test_stand_ins_are_ranked_by_the_exact_sweep(tiny_random: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_lab.models.load", lambda name: tiny_random)
    monkeypatch.setattr(occlusion, "STAND_INS", {"occlusion": {"at": "projector", "fill": "mean"}, "center": {}})
    ranks = occlusion.measure_ranks("tiny", 2)
    assert ranks["occlusion"] == pytest.approx(1)
    assert 0 < ranks[occlusion.HALF.removeprefix("ours: ")] < 1
    assert abs(ranks["center"]) < 1


def test_the_lens_gives_the_obvious_way_s_numbers(facts: Facts) -> None:
    ours, peer = (np.array(facts["probes"][way]["values"]) for way in (probes.OURS, probes.PEER))
    assert ours.shape == (4, 16)
    close(ours, peer, terms=TERMS)


@pytest.mark.long
def test_every_way_to_train_has_the_frozen_forward_s_gradients(facts: Facts) -> None:
    table = connectors.result({way: [{**one, "threads": 1}] for way, one in facts["connectors"].items()})
    errors = {row["name"]: row["max_error"] for row in table["rows"]}
    gradients = facts["connectors"][connectors.FLOOR]["values"]
    assert all(len(kind) >= connectors.SAMPLE and max(map(abs, kind)) > 0 for kind in gradients)
    assert errors[connectors.FLOOR] == 0
    for way in (connectors.PEER, connectors.SHARED, connectors.FIRST, connectors.OURS):
        assert errors[way] < 1e-5
    assert 1e-5 < errors[connectors.HALF] < 0.2
    assert all(row["tokens_per_second"] > 0 and row["peak_flops_fraction"] > 0 for row in table["rows"])
    assert connectors.share_of_largest([[1.0, 2.0], [10.0, 0.0]], [[1.0, 2.5], [10.0, 0.0]]) == pytest.approx(0.2)


def test_only_the_common_mistake_pays_for_the_model_s_gradients(tiny_folder: Path) -> None:
    setting = connectors.new_setting(str(tiny_folder))
    ways, model = connectors.COMPARISON.ways, setting.lab.model
    own = connector_of(model)
    for way in (connectors.FLOOR, connectors.SHARED, connectors.FIRST, connectors.OURS):
        ways[way](setting)
        assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(True)
    ways[connectors.PEER](setting)
    assert all(parameter.grad is not None for parameter in model.model.language_model.layers.parameters())
    assert connector_of(model) is own


def test_loss_curves_of_both_precisions_fall_together(tiny_folder: Path) -> None:
    curves = connectors.loss_curves(str(tiny_folder), steps=6)
    assert list(curves) == ["float32", "bfloat16"]
    assert all(losses[-1] < losses[0] for losses in curves.values())
    assert curves["bfloat16"] == pytest.approx(curves["float32"], rel=0.02)
    assert curves["bfloat16"] != curves["float32"]


SMALL = replace(
    scale.SIZES, image=56, vision_width=64, vision_layers=3, vision_heads=4, vision_mlp=128, hidden=128, heads=4, mlp=256
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scale")
    written = scale.write_checkpoint(place, layers=4, sizes=SMALL)
    on_disk = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    assert written <= on_disk < written + 100_000  # the weights and a header
    return place


def test_the_real_size_is_llava_15_7b_s() -> None:
    """Counted on the meta device from transformers' own classes; 7,063,427,072 parameters, as the hub's checkpoint has."""
    assert scale.full_size()["parameters"] == 7_063_427_072


def test_the_checkpoint_loads_with_every_weight_drawn(folder: Path) -> None:
    lab = ll.load(folder, dtype="bfloat16")  # refuses missing and unexpected weights
    assert lab.grid == (4, 4)
    state = lab.model.state_dict()
    assert all(float(value.float().std()) > 0 for value in state.values() if value.ndim > 1)
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.bfloat16}
    loaded = scale.measure_load(str(folder))
    assert loaded["load_seconds"] > 0
    assert loaded["load_peak_mb"] is None or loaded["load_peak_mb"] >= 0


def test_both_depths_are_measured_and_the_second_is_half_as_deep(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depths: list[int] = []
    whole = scale.measure_methods

    def few(lab: Any, repeats: int) -> dict[str, Any]:
        depths.append(len(lab.model.model.language_model.layers))
        return whole(lab, repeats, ("attention", "relevancy", "occlusion"))

    monkeypatch.setattr(scale, "measure_methods", few)
    measured = scale.measure_depths(str(folder), 1)["depths"]
    assert depths == [4, 2]
    assert measured["4"]["relevancy"]["passes"] == {"forward": 2, "backward": 1}
    assert "block" in measured["4"]["occlusion"]["note"]  # 4x4 patches have no block of 8: said, and the rest goes on
    assert measured["2"]["attention"]["seconds"] > 0


def test_what_grows_with_depth_is_told_from_what_does_not() -> None:
    """By hand: 3 s at 4 layers and 2 s at 2 are 0.5 s a layer and 17 s at 32."""

    def one(seconds: float | None, memory: float | None) -> dict[str, Any]:
        return {"seconds": seconds, "extra_mb": memory, "passes": None, "note": None}

    deep = {scale.FLOOR: one(3.0, 10.0), "rollout": one(6.0, 10.0), "refused": one(None, None)}
    shallow = {scale.FLOOR: one(2.0, 10.0), "rollout": one(4.0, 4.0), "refused": one(None, None)}
    floor, rollout, refused = scale.rows({"4": deep, "2": shallow}, 4)
    assert floor["seconds_per_layer"] == 0.5
    assert rollout["ratio_to_floor"] == 2
    assert rollout["computed_ratio_at_32"] == pytest.approx(34 / 17)
    assert rollout["extra_mb_per_layer"] == 3
    assert rollout["computed_extra_mb_at_32"] == 94
    assert floor["computed_extra_mb_at_32"] == 10
    assert refused["seconds"] is refused["computed_ratio_at_32"] is None
