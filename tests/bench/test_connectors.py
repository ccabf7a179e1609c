"""The connector benchmark: every way takes the same step, and the table says what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_lab.bench import connectors as bench_connectors
from llava_lab.bench import harness as bench
from llava_lab.bench.connectors import FIRST, FLOOR, HALF, OURS, PEER, SHARED, WAYS
from llava_lab.errors import OptionError

Facts = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def facts(tiny_folder: Path) -> Facts:
    return {way: bench_connectors.measure_way(str(tiny_folder), way) for way in WAYS}


def test_every_way_has_the_frozen_forward_s_gradients(facts: Facts) -> None:
    table = bench_connectors.rows({way: [{**one, "threads": 1}] for way, one in facts.items()})
    assert json.loads(json.dumps(table)) == table
    found = {row["name"]: row for row in table["rows"]}
    assert all(len(kind) >= bench_connectors.SAMPLE and max(map(abs, kind)) > 0 for kind in facts[FLOOR]["gradients"])
    for way in (PEER, SHARED, FIRST, OURS):
        assert found[way]["max_error"] < 1e-5
    assert 1e-5 < found[HALF]["max_error"] < 0.2
    assert found[FLOOR]["ratio_to_floor"] == found[PEER]["ratio_to_peer"] == 1
    assert all(row["tokens_per_second"] > 0 and row["peak_flops_fraction"] > 0 for row in table["rows"])
    assert table["peak_flops_fraction"] == found[OURS]["peak_flops_fraction"]
    with pytest.raises(OptionError, match=r"way must be one of frozen full forward.*, got 'other'"):
        bench_connectors.measure_way("tiny", "other")


def test_error_is_a_share_of_each_connector_s_own_largest_gradient() -> None:
    assert bench_connectors.error_of([[1.0, 2.0], [10.0, 0.0]], [[1.0, 2.5], [10.0, 0.0]]) == pytest.approx(0.2)


def test_only_the_common_mistake_pays_for_the_model_s_gradients(tiny_folder: Path) -> None:
    setting = bench_connectors.prepare(str(tiny_folder))
    for way in (FLOOR, SHARED, FIRST, OURS):
        WAYS[way](setting)
        assert all(p.grad is None for p in setting.lab.model.parameters())
    own = setting.lab.model.model.multi_modal_projector
    setting.lab.model.requires_grad_(True)
    WAYS[PEER](setting)
    assert all(p.grad is not None for p in setting.lab.model.model.language_model.layers.parameters())
    assert setting.lab.model.model.multi_modal_projector is own


def test_attention_is_counted_as_a_triangle(tiny_folder: Path) -> None:
    import torch

    q = torch.randn(1, 2, 64, 8)
    whole = bench_connectors._work(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    half = bench_connectors._work(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert whole == 2 * 2 * 2 * 64 * 64 * 8
    assert half == whole / 2


def test_loss_curves_of_both_precisions_fall_together(tiny_folder: Path) -> None:
    curves = bench_connectors.loss_curves(str(tiny_folder), steps=6)
    assert list(curves) == ["float32", "bfloat16"]
    for one in curves.values():
        assert one[-1] < one[0]
    assert curves["bfloat16"] == pytest.approx(curves["float32"], rel=0.02)
    assert curves["bfloat16"] != curves["float32"]


def test_each_measurement_is_a_process_of_its_own_and_repeats_are_interleaved(
    facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def child(body: str, *, model: str, way: str = "curves") -> dict[str, Any]:
        asked.append(way)
        return {"curves": {"float32": [1.0], "bfloat16": [1.0]}} if way == "curves" else {**facts[way], "threads": 1}

    monkeypatch.setattr(bench_connectors, "_child", child)
    table = bench.run("connectors", model="tiny", quick=True)
    assert asked == [*[way for _ in range(bench.QUICK_REPEATS) for way in WAYS], "curves"]
    assert len(table["rows"]) == len(WAYS)
    assert table["loss_curves"]["bfloat16"] == [1.0]
