"""Rollout as arithmetic: by hand, against the published table of its collapse, and its sinks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava_lab.attribution.rollout import Flow, UniformFlow, column_pull, find_sinks, remove_columns, whole_rows


def uniform_attention(size: int) -> Tensor:
    return whole_rows(torch.ones(size, size).tril())


def naive_rollout(matrices: list[Tensor], residuals: list[Tensor]) -> Tensor:
    """The definition, in float64: A~_L ... A~_1."""
    total = torch.eye(len(matrices[0]), dtype=torch.float64)
    for attention, residual in zip(matrices, residuals, strict=True):
        keep = torch.diag(residual.double().expand(len(attention)))
        total = ((torch.eye(len(attention), dtype=torch.float64) - keep) @ attention.double() + keep) @ total
    return total


def test_two_layers_by_hand() -> None:
    flow = Flow(2, causal=True)
    for rows in ([[1, 0], [0.5, 0.5]], [[1, 0], [0.25, 0.75]]):
        flow.step(torch.tensor(rows, dtype=torch.float32), 0.5)
    assert flow.total.tolist() == [[1, 0], [0.34375, 0.65625]]


# weight on attention, layers, mass on position 0, on system text, on the image, top image row / bottom row
COLLAPSE = [
    (0.5, 32, 0.976, 0.023, 0.000, 1.6e5),
    (0.8, 32, 1.000, 0.000, 0.000, None),
    (1.0, 32, 1.000, 0.000, 0.000, None),
    (0.2, 32, 0.393, 0.466, 0.141, 165),
    (0.1, 32, 0.093, 0.378, 0.493, 17.9),
    (0.05, 32, 0.020, 0.173, 0.609, 5.0),
    (0.02, 32, 0.003, 0.052, 0.416, 2.05),
    (0.5, 4, 0.021, None, 0.684, 8.6),
    (0.5, 8, 0.135, None, 0.370, 69),
    (0.5, 16, 0.576, None, 0.043, 1.6e3),
]


@pytest.mark.parametrize(("weight", "layers", "first", "system", "image", "ratio"), COLLAPSE)
def test_uniform_attention_collapses_as_tabled(
    weight: float, layers: int, first: float, system: float | None, image: float, ratio: float | None
) -> None:
    size, start, stop = 620, 35, 611  # LLaVA-1.5's 576 image tokens after a system sentence
    attention, flow, null = uniform_attention(size), Flow(size, causal=True), UniformFlow(size, causal=True)
    for _ in range(layers):
        flow.step(attention, 1 - weight)
        null.step(1 - weight)
    torch.testing.assert_close(null.total, flow.total, atol=1e-5, rtol=0)
    row = flow.total[-1]
    assert row[0] == pytest.approx(first, abs=6e-4)
    assert row[start:stop].sum() == pytest.approx(image, abs=6e-4)
    if system is not None:
        assert row[1:start].sum() == pytest.approx(system, abs=6e-4)
    if ratio is not None:
        rows = row[start:stop].reshape(24, 24).mean(1)
        assert rows[0] / rows[-1] == pytest.approx(ratio, rel=0.04)  # tabled to two figures


@pytest.mark.parametrize("causal", [True, False])
def test_flow_equals_the_definition_and_keeps_rows_whole(causal: bool) -> None:
    size, generator = 150, torch.Generator().manual_seed(0)  # not a multiple of the block
    matrices = [torch.rand(size, size, generator=generator) ** 4 for _ in range(3)]
    matrices = [whole_rows(m.tril() if causal else m) for m in matrices]
    residuals = [torch.rand(size, generator=generator) for _ in range(3)]
    flow = Flow(size, causal=causal)
    for attention, residual in zip(matrices, residuals, strict=True):
        flow.step(attention, residual)
    torch.testing.assert_close(flow.total, naive_rollout(matrices, residuals).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(flow.total.sum(1), torch.ones(size), atol=1e-5, rtol=0)
    assert not causal or flow.total.triu(1).abs().max() == 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("removed", [(), (0, 1, 7)])
def test_uniform_flow_is_flow_over_uniform_matrices(causal: bool, removed: tuple[int, ...]) -> None:
    size = 30
    attention = remove_columns(uniform_attention(size) if causal else torch.full((size, size), 1 / size), removed)
    residual = torch.linspace(0.1, 0.9, size)
    flow, uniform = Flow(size, causal=causal), UniformFlow(size, causal=causal, removed=removed)
    for _ in range(4):
        flow.step(attention, residual)
        uniform.step(residual)
    torch.testing.assert_close(uniform.total, flow.total, atol=1e-6, rtol=0)
    torch.testing.assert_close(uniform.total.sum(1), torch.ones(size), atol=1e-6, rtol=0)


def test_a_planted_sink_is_found_and_nothing_in_uniform_attention() -> None:
    size = 100
    uniform = uniform_attention(size)
    torch.testing.assert_close(column_pull(uniform), torch.ones(size))
    assert find_sinks(column_pull(uniform)) == ()
    sunk = uniform.clone()
    for sink in (0, 40):
        sunk[sink + 1 :, sink] += 0.5
    sunk = whole_rows(sunk)
    assert find_sinks(column_pull(sunk)) == (0, 40)
    left = remove_columns(sunk, (0, 40))
    torch.testing.assert_close(left.sum(1), torch.ones(size))
    assert left[1:, 0].max() == 0
    assert left[0, 0] == 1, "a row with nothing left attends to itself"


def test_too_few_observers_make_no_sink() -> None:
    attention = uniform_attention(60)
    attention[56:, 55] = 50.0
    assert find_sinks(column_pull(whole_rows(attention))) == ()
