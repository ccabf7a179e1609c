"""Token activation map: equal to its definition in loops, and each of its steps does what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llava_lab.attribution import attribute
from llava_lab.attribution.logits import rank_filter, without_context
from llava_lab.models import Lab
from llava_lab.results import Run
from tests.support.closeness import TERMS, close
from tests.support.logit_cases import states_and_logits
from tests.support.planted import planted_lab, red_picture, scripted_run


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "Yes, the car is blue.")


def _naive_tam(lab: Lab, run: Run, at: int, token: int, correction: str, clip: bool, size: int | None) -> np.ndarray:
    """The definition, loop by loop, from whole logits."""
    logits = states_and_logits(lab, run)[1].double().numpy()
    start, stop = run.segments["image"]

    def cut(values: np.ndarray) -> np.ndarray:
        return np.maximum(values, 0) if clip else values

    own = cut(logits[start:stop, token])
    maps, weights = [], []
    if correction == "context":
        for position in range(*run.segments["question"]):
            if run.token_ids[position] != token:
                maps.append(cut(logits[start:stop, run.token_ids[position]]))
                weights.append(max(logits[position, token], 0))
    if correction in ("context", "answer"):
        for position in range(run.segments["answer"][0], at + 1):
            if run.token_ids[position] != token:
                maps.append(cut(logits[start:stop, run.token_ids[position]]))
                weights.append(max(logits[position - 1, token], 0))
    if sum(weights) > 0:
        common = np.average(maps, axis=0, weights=weights)
        factor = np.linalg.lstsq(common[:, None], own, rcond=None)[0][0]
        own = cut(own - factor * common)
    grid = own.reshape(run.map.rows, run.map.cols)
    return grid if size is None else _naive_filter(grid, size)


def _naive_filter(grid: np.ndarray, size: int) -> np.ndarray:
    found, half = np.zeros_like(grid), size // 2
    rows, cols = grid.shape

    def mirrored(i: int, n: int) -> int:
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i

    for y in range(rows):
        for x in range(cols):
            near = range(-half, half + 1)
            window = sorted(grid[mirrored(y + dy, rows), mirrored(x + dx, cols)] for dy in near for dx in near)
            mean, spread = abs(np.mean(window)), np.std(window)
            if mean == 0:
                continue
            if spread == 0:
                found[y, x] = window[len(window) // 2]
                continue
            ranks = np.arange(len(window)) - len(window) // 2
            weights = np.exp(-(ranks**2) / (2 * (spread / mean) ** 2))
            found[y, x] = np.average(window, weights=weights)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"correction": "answer"},
        {"correction": "none"},
        {"filter": None},
        {"clip": False, "filter": None},
        {"clip": False, "filter": 3},
    ],
    ids=str,
)
def test_tam_equals_its_definition_in_loops(tiny_random: Lab, run: Run, options: dict[str, Any]) -> None:
    rel = attribute(tiny_random, run, method="tam", target=["answer", "blue", ("blue", "red")], **options)
    full = {"correction": "context", "clip": True, "filter": 3, **options}
    how = (full["correction"], full["clip"], full["filter"])
    answer, blue, contrast = rel.targets
    steps = zip(answer.positions, answer.token_ids, strict=True)
    mean = np.mean([_naive_tam(tiny_random, run, at, token, *how) for at, token in steps], 0)
    one = _naive_tam(tiny_random, run, blue.positions[0], blue.token_ids[0], *how)
    other = _naive_tam(tiny_random, run, contrast.positions[0], contrast.against_ids[0], *how)
    close(rel.values, np.stack([mean, one, one - other]), terms=TERMS)
    assert np.abs(rel.values).max((1, 2)).min() > 0.01


def test_tam_takes_away_exactly_what_earlier_maps_explain(tiny_random: Lab, run: Run) -> None:
    rng = np.random.default_rng(0)
    others, weights = rng.random((3, 16)), np.array([1.0, 3.0, -5.0])
    common = 0.25 * others[0] + 0.75 * others[1]
    left, factor = without_context(2 * common, others, weights)
    assert factor == pytest.approx(2)
    np.testing.assert_allclose(left, 0, atol=1e-12)
    own = rng.random(16)
    left, factor = without_context(own, others, weights)
    assert left @ common == pytest.approx(0, abs=1e-12)
    np.testing.assert_array_equal(without_context(own, others, -weights.clip(0))[0], own)
    rel = attribute(tiny_random, run, method="tam", target=["blue", "Yes,"])
    earlier = rel.extras["correction"][0]["earlier"]
    assert all(one["token"] == run.tokens[one["position"]] for one in earlier)
    assert [one["weight"] for one in earlier] == sorted((one["weight"] for one in earlier), reverse=True)
    assert all(one["position"] < run.word("blue").start for one in earlier)
    assert 0 < rel.extras["correction"][0]["removed_share"] < 1


def test_tam_leaves_out_tokens_equal_to_the_explained_one(tiny_random: Lab, run: Run) -> None:
    twice = scripted_run(tiny_random, run.picture, "blue blue blue blue")
    last = twice.target(len(range(*twice.segments["answer"])) - 1)
    rel = attribute(tiny_random, twice, method="tam", target=last, correction="answer")
    same = [one for one in rel.extras["correction"][0]["earlier"] if one["token"] == twice.tokens[last.positions[0] + 1]]
    assert same == []


def test_rank_filter_keeps_calm_windows_and_mends_a_wild_patch() -> None:
    np.testing.assert_allclose(rank_filter(np.full((4, 5), 2.0), 3), 2.0)
    np.testing.assert_array_equal(rank_filter(np.zeros((4, 4)), 3), 0.0)
    wild = np.ones((5, 5))
    wild[2, 2] = 3.0
    assert rank_filter(wild, 3).max() < 1.01
    noise = np.random.default_rng(0).random((6, 7))
    np.testing.assert_allclose(rank_filter(noise, 3), _naive_filter(noise, 3), atol=1e-12)
    np.testing.assert_allclose(rank_filter(noise, 5), _naive_filter(noise, 5), atol=1e-12)
    np.testing.assert_allclose(rank_filter(7 * noise, 3), 7 * rank_filter(noise, 3), atol=1e-12)


def test_an_empty_tam_says_so() -> None:
    planted = planted_lab()
    run = scripted_run(planted, red_picture(96, 96, (12, 60, 36, 84)), "The car is red.")
    rel = attribute(planted, run, method="tam", target="car")
    assert not rel.values.any()
    assert "The map of 'car' is empty" in rel.notes[-1]
