"""What may be said of trained connectors: each number against one worked out by hand or by scipy's own test."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_rel

from llava_lab import stats
from llava_lab.errors import DataError


def test_mcnemar_is_the_exact_binomial() -> None:
    assert stats.mcnemar(0, 0) == 1
    assert stats.mcnemar(5, 0) == pytest.approx(2 / 2**5)
    assert stats.mcnemar(3, 1) == pytest.approx(2 * (1 + 4) / 2**4)
    assert stats.mcnemar(7, 2) == stats.mcnemar(2, 7)
    with pytest.raises(DataError, match="0 or more, got -1 and 2"):
        stats.mcnemar(-1, 2)


def test_the_seeds_t_is_scipy_s_paired_t() -> None:
    one, two = np.array([0.80, 0.83, 0.79, 0.85, 0.81]), np.array([0.82, 0.86, 0.80, 0.85, 0.84])
    p, (low, high) = stats.paired_t(two - one)
    assert p == pytest.approx(ttest_rel(two, one).pvalue)
    expected = ttest_1samp(two - one, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert stats.paired_t(np.zeros(5)) == (1.0, (0.0, 0.0))
    assert stats.paired_t(np.full(5, 0.25)) == (2 / 2**5, (0.25, 0.25))  # equal differences: no more than their signs say


def test_holm_raises_the_smallest_most_and_keeps_the_order() -> None:
    """By hand: 0.01 x 3, then 0.02 x 2, then 0.04 raised to what stands before it."""
    assert stats.holm(np.array([0.04, 0.01, 0.02])) == pytest.approx([0.04, 0.03, 0.04])
    assert stats.holm(np.array([0.9, 0.8])).max() == 1


def test_more_noise_wants_more_seeds_and_a_larger_effect_fewer() -> None:
    """(1.960 + 0.842)^2 x 1 + 1.960^2 / 2 = 9.77 at an effect of one standard deviation."""
    assert stats.seeds_needed(0.01, 0.01) == 10
    assert stats.seeds_needed(0.02, 0.01) < 10 < stats.seeds_needed(0.01, 0.02)
    assert stats.seeds_needed(0.0, 0.01) == math.inf
    assert stats.detectable(0.01, 5) == pytest.approx((2.776 + 0.941) * 0.01 / math.sqrt(5), rel=1e-3)


def test_pictures_are_resampled_whole() -> None:
    """Ten questions that always agree within their picture are no more evidence than one."""
    rng = np.random.default_rng(0)
    single = (rng.random(60) < 0.5).astype(float)
    (one,), _ = stats.resampled(single[None], np.arange(60))
    (ten,), _ = stats.resampled(np.repeat(single, 10)[None], np.repeat(np.arange(60), 10))
    assert ten == pytest.approx(one, abs=0.02)
    assert one[1] - one[0] == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(60), rel=0.15)


def _answers(shares: list[list[float]], questions: int = 400) -> np.ndarray:
    """right (A, S, Q): each arm's and seed's share of right answers, the rest spread over the pictures."""
    rng = np.random.default_rng(1)
    return np.array([[rng.permutation(questions) < share * questions for share in arm] for arm in shares])


def _verdict(right: np.ndarray) -> tuple[int, float]:
    questions = right.shape[2]
    asked = stats.Questions(np.zeros(questions, int), np.ones(questions, int), np.arange(questions), 1, 2)
    found = stats.table(right, [(0, 1)], np.array([0]), asked)
    return int(found["verdict"][0, 0, 0]), float(found["effect"][0, 0, 0])


def test_a_steady_large_difference_is_better_and_the_other_way_round_worse() -> None:
    right = _answers([[0.60, 0.61, 0.59, 0.60, 0.60], [0.80, 0.81, 0.80, 0.79, 0.80]])
    assert _verdict(right) == (1, pytest.approx(0.2, abs=0.005))
    assert _verdict(right[::-1]) == (-1, pytest.approx(-0.2, abs=0.005))


def test_a_difference_that_seeds_make_by_themselves_is_no_verdict() -> None:
    """One lucky seed of five: pictures alone would call it better, McNemar too."""
    right = _answers([[0.60, 0.60, 0.60, 0.60, 0.60], [0.60, 0.60, 0.61, 0.60, 0.95]], 2000)
    asked = stats.Questions(np.zeros(2000, int), np.ones(2000, int), np.arange(2000), 1, 2)
    found = stats.table(right, [(0, 1)], np.array([0]), asked)
    assert found["picture_interval"][0, 0, 0, 0] > 0
    assert found["mcnemar_p"][0, 0, 0] < 0.001
    assert found["verdict"][0, 0, 0] == 0


def test_a_difference_on_a_few_pictures_is_no_verdict() -> None:
    """Every seed agrees, and all of it comes from one picture of twenty."""
    right = np.zeros((2, 7, 20), bool)
    right[:, :, ::2] = True
    right[1, :, 1] = True
    asked = stats.Questions(np.zeros(20, int), np.ones(20, int), np.arange(20), 1, 2)
    found = stats.table(right, [(0, 1)], np.array([0]), asked)
    assert found["p_adjusted"][0, 0, 0] < 0.05
    assert found["picture_interval"][0, 0, 0, 0] == 0
    assert found["verdict"][0, 0, 0] == 0


def test_answers_gained_and_lost_are_counted_over_all_seeds() -> None:
    right = np.zeros((2, 2, 4), bool)
    right[0, :, 0] = True
    right[1, 0, :3] = True
    found = stats.compare(right, [(0, 1)], np.arange(4))
    assert (found["gained"][0], found["lost"][0]) == (2, 1)
    assert found["effect"][0] == pytest.approx(1 / 8)
