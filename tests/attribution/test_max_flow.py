"""Attention flow: the maximum it says it is, by minimum cuts and by a naive solver, and never less than rollout."""

from __future__ import annotations

from collections import deque
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llava_lab.attribution import attribute, max_flow
from llava_lab.attribution.max_flow import UNIT, capacities, edges
from llava_lab.attribution.rollout import whole_rows
from llava_lab.capture import Full, fuse_heads, undisturbed, watch_attention
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.results import Run
from tests.support.matrices import naive_rollout
from tests.support.planted import scripted_run

Pipes = dict[tuple[Any, Any], Fraction]


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.")


def _layers(count: int, size: int, seed: int = 0) -> Tensor:
    """Random causal attention with half residual, the first layer first."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.rand(count, size, size, generator=generator) ** 3
    return torch.stack([0.5 * whole_rows(one.tril()) + 0.5 * torch.eye(size) for one in random])


def _network(units: np.ndarray) -> Pipes:
    """The layered graph of all positions, as the paper draws it: node (0, i) is an input, (L, i) an output."""
    return {
        ((layer + 1, i), (layer, j)): Fraction(int(one[i, j]))
        for layer, one in enumerate(units)
        for i in range(len(one))
        for j in range(len(one))
        if one[i, j]
    }


def _minimum_cut(pipes: Pipes, source: Any, sink: Any) -> Fraction:
    """Over every way to part the nodes in two: feasible for a dozen nodes."""
    between = sorted({node for ends in pipes for node in ends} - {source, sink})
    best = sum(pipes.values(), Fraction(0))
    for sides in product((False, True), repeat=len(between)):
        above = {source} | {node for node, up in zip(between, sides, strict=True) if up}
        best = min(best, sum((c for (a, b), c in pipes.items() if a in above and b not in above), Fraction(0)))
    return best


def _naive_flow(pipes: Pipes, source: Any, sink: Any) -> Fraction:
    """Edmonds and Karp: shortest path after shortest path, until none is left."""
    left: dict[Any, dict[Any, Fraction]] = {}
    for (a, b), c in pipes.items():
        left.setdefault(a, {})[b] = c
        left.setdefault(b, {}).setdefault(a, Fraction(0))
    total = Fraction(0)
    while True:
        came, queue = {source: None}, deque([source])
        while queue and sink not in came:
            node = queue.popleft()
            for after, room in left.get(node, {}).items():
                if room > 0 and after not in came:
                    came[after] = node
                    queue.append(after)
        if sink not in came:
            return total
        path, node = [], sink
        while came[node] is not None:
            path.append((came[node], node))
            node = came[node]
        push = min(left[a][b] for a, b in path)
        for a, b in path:
            left[a][b] -= push
            left[b][a] += push
        total += push


@pytest.mark.parametrize("count", [1, 2, 3])
def test_equals_the_smallest_of_all_cuts(count: int) -> None:
    units = capacities(_layers(count, 3, seed=count).numpy())
    pipes = _network(units)
    for source in range(3):
        for sink in range(3):
            want = _minimum_cut(pipes, (count, source), (0, sink)) if sink <= source else 0
            assert max_flow.max_flow(units, source, sink) == float(want) * UNIT


def test_two_layers_by_hand() -> None:
    first = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]])
    second = np.array([[1, 0, 0], [0.75, 0.25, 0], [0.125, 0.375, 0.5]])
    units = capacities(np.stack([first, second]))
    # from position 2 to input 0: through 0 at most min(.125, 1), through 1 min(.375, .5), through 2 min(.5, .25)
    assert max_flow.max_flow(units, 2, 0) == 0.125 + 0.375 + 0.25
    assert max_flow.max_flow(units, 2, 2) == 0.5
    assert max_flow.max_flow(units, 0, 2) == 0


@pytest.mark.parametrize(("count", "size"), [(1, 8), (2, 9), (4, 12), (6, 7)])
def test_equals_a_naive_solver_on_the_whole_graph(count: int, size: int) -> None:
    units = capacities(_layers(count, size, seed=size).numpy())
    pipes = _network(units)
    for sink in range(size):
        want = _naive_flow(pipes, (count, size - 1), (0, sink))
        assert max_flow.max_flow(units, size - 1, sink) == float(want) * UNIT


def test_no_flow_is_below_its_rollout_or_above_what_the_ends_let_through() -> None:
    matrices = _layers(5, 20)
    units = capacities(matrices.numpy())
    total = naive_rollout(list(matrices), [torch.tensor(0.0)] * 5).numpy()
    rounding = edges(5, 20) * UNIT
    for source in (4, 19):
        for sink in range(source + 1):
            flow = max_flow.max_flow(units, source, sink)
            assert total[source, sink] - rounding <= flow <= 1 + rounding
            assert flow <= float(matrices[0][: source + 1, sink].sum()) + rounding


def test_edges_are_counted_as_they_are_laid(monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy.sparse

    laid: list[int] = []

    class Counted(scipy.sparse.csr_array):
        def eliminate_zeros(self) -> None:
            laid.append(self.nnz)

    for count, size in ((2, 5), (3, 5), (6, 9)):
        units = capacities(_layers(count, size).numpy())
        with monkeypatch.context() as patch:
            patch.setattr(scipy.sparse, "csr_array", Counted)
            max_flow.max_flow(units, size - 1, 0)
        assert laid.pop() == edges(count, size)


@pytest.mark.parametrize("options", [{}, {"layers": (1, 3)}, {"layers": (2, 3)}, {"fusion": "max"}, {"fusion": "min"}], ids=str)
def test_the_map_is_the_mean_flow_of_kept_matrices(tiny_random: Lab, run: Run, options: dict[str, Any]) -> None:
    with undisturbed(tiny_random.model), watch_attention(language_layers(tiny_random.model), Full()) as full:
        tiny_random.model(**tiny_random.inputs(run))
    start, stop = options.get("layers", (0, 3))
    fused = [fuse_heads(full.attention[i], options.get("fusion", "mean"))[0] for i in range(start, stop)]
    units = capacities(torch.stack([0.5 * whole_rows(one) + 0.5 * torch.eye(len(one)) for one in fused]).numpy())
    rel = attribute(tiny_random, run, method="attention_flow", target=["blue", "is"], **options)
    image = run.image_positions
    for target, values in zip(rel.targets, rel.values, strict=True):
        want = [np.mean([max_flow.max_flow(units, at, int(sink)) for at in target.positions]) for sink in image]
        np.testing.assert_allclose(values.ravel(), want, atol=1e-6)
    assert rel.passes["forward"] == 1
    assert 0 <= rel.extras["rounding"] < 1e-5
    assert any("do not sum to 1" in note for note in rel.notes)


def test_too_large_a_graph_is_refused_before_anything_runs(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(max_flow, "LIMIT", 10_000)
    monkeypatch.setattr(tiny_random.model, "forward", lambda **_: pytest.fail("a forward ran"))
    with pytest.raises(OptionError) as error:
        attribute(tiny_random, run, method="attention_flow")
    text = str(error.value)
    assert "\n" not in text
    assert "16 patches to" in text
    assert "through 3 layers" in text
    assert "the limit is 10,000; explain one word, give fewer layers=(start, stop), or use method='rollout'" in text


def test_llava_15_at_its_true_size_is_over_the_limit() -> None:
    with pytest.raises(OptionError, match="576 patches to 1 positions through 32 layers"):
        max_flow.refuse_too_large(32, [640], range(35, 611))


def test_ctrl_c_gives_the_patches_that_were_reached(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attribute(tiny_random, run, method="attention_flow", target="blue")
    solve, calls = max_flow.max_flow, []

    def tired(units: np.ndarray, source: int, sink: int) -> float:
        calls.append(sink)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return solve(units, source, sink)

    monkeypatch.setattr(max_flow, "max_flow", tired)
    positions = len(whole.targets[0].positions)
    stop = 5 * positions
    rel = attribute(tiny_random, run, method="attention_flow", target="blue")
    np.testing.assert_array_equal(rel.values.ravel()[:5], whole.values.ravel()[:5])
    assert rel.values.ravel()[5:].max() == 0
    assert any("Interrupted after 5 of 16 patches" in note for note in rel.notes)
    calls.clear()
    stop = 0
    with pytest.raises(KeyboardInterrupt):
        attribute(tiny_random, run, method="attention_flow", target="blue")
