"""Rankings, intervals over pictures and verdicts: each number against one worked out by hand or by scipy's own test."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as distributions

from llava_lab import stats
from llava_lab.errors import DataError, OptionError

# -- rankings -------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 1000])
def test_ranks_correlation_and_auc_equal_scipy(levels: int) -> None:
    rng = np.random.default_rng(levels)
    one, two = rng.integers(0, levels, (2, 60)).astype(float)
    inside = rng.random(60) < 0.3
    assert stats.spearman(one, two) == pytest.approx(distributions.spearmanr(one, two).statistic)
    wins = distributions.mannwhitneyu(one[inside], one[~inside]).statistic
    assert stats.roc_auc(one, inside) == pytest.approx(wins / (inside.sum() * (~inside).sum()))


def test_flat_and_empty_have_no_number() -> None:
    ones, values = np.ones(4), np.arange(4.0)
    assert np.isnan(stats.spearman(ones, values))
    assert np.isnan(stats.roc_auc(values, np.zeros(4, bool)))
    assert np.isnan(stats.roc_auc(values, np.ones(4, bool)))
    assert np.isnan(stats.iou(values, np.zeros(4, bool)))


def test_overlap_counts_ties_by_their_chance() -> None:
    one, two = np.array([4.0, 3, 2, 1]), np.array([4.0, 1, 3, 2])
    assert stats.top_overlap(one, two, 2) == 0.5
    assert stats.top_overlap(one, one, 2) == 1
    assert stats.top_overlap(np.ones(4), one, 2) == 0.5  # two of four broken at random
    assert stats.top_overlap(np.ones(4), np.ones(4), 2) == 0.5


def test_ties_are_shuffled_and_order_is_kept_otherwise() -> None:
    values = np.array([1.0, 2, 1, 1, 0])
    orders = [stats.best_first(values, np.random.default_rng(seed)) for seed in range(30)]
    assert {order[0] for order in orders} == {1}
    assert {order[-1] for order in orders} == {4}
    assert {order[1] for order in orders} == {0, 2, 3}


# -- answers and intervals ------------------------------------------------------------------


def test_exact_match_forgives_outer_space_only() -> None:
    assert stats.exact_match(" The car is red. ", "The car is red.")
    assert not stats.exact_match("the car is red.", "The car is red.")
    assert not stats.exact_match("The car is red", "The car is red.")


def test_wilson_equals_the_published_example() -> None:
    low, high = stats.wilson(81, 263)  # Newcombe 1998, table I, method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert stats.wilson(20, 20)[1] == 1.0
    assert stats.wilson(20, 20)[0] > 0.8
    assert stats.wilson(0, 20)[0] == 0.0


def test_clusters_are_drawn_with_replacement_and_a_seed() -> None:
    weights = stats.cluster_bootstrap(lambda drawn: drawn, 7, seed=3)
    assert weights.shape == (stats.RESAMPLES, 7)
    assert (weights.sum(1) == 7).all()
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.1)
    assert weights.var(0) == pytest.approx(6 / 7, abs=0.1)
    np.testing.assert_array_equal(weights, stats.cluster_bootstrap(lambda drawn: drawn, 7, seed=3))
    singly = stats.cluster_bootstrap(lambda drawn: drawn, 7, seed=3, one_by_one=True)
    assert singly.var(0) == pytest.approx(6 / 7, abs=0.1)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_both_streams_give_the_numbers_that_stored_results_hold(one_by_one: bool) -> None:
    """The bootstrap written out: sums of the drawn pictures over their questions."""
    rng = np.random.default_rng(5)
    values, pictures = rng.random(40), rng.integers(0, 9, 40)
    sums = np.array([values[pictures == picture].sum() for picture in range(9)])
    sizes = np.array([(pictures == picture).sum() for picture in range(9)])
    again = np.random.default_rng(2)
    if one_by_one:
        picks = again.integers(0, 9, (2000, 9))
        means = sums[picks].sum(1) / sizes[picks].sum(1)
    else:
        times = again.multinomial(9, np.full(9, 1 / 9), 2000)
        means = times @ sums / (times @ sizes)
    interval, error = stats.resampled_means(values, pictures, seed=2, one_by_one=one_by_one)
    np.testing.assert_allclose(interval, np.quantile(means, [0.025, 0.975]), rtol=1e-12)
    assert error == pytest.approx(means.std(ddof=1))


def test_pictures_are_resampled_whole() -> None:
    """Ten questions that always agree within their picture are no more evidence than one."""
    rng = np.random.default_rng(0)
    single = (rng.random(60) < 0.5).astype(float)
    one, _ = stats.resampled_means(single, np.arange(60))
    ten, _ = stats.resampled_means(np.repeat(single, 10), np.repeat(np.arange(60), 10))
    assert ten == pytest.approx(one, abs=0.02)
    assert one[1] - one[0] == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(60), rel=0.15)
    # two pictures that each say one thing, then two that each say both
    values, pictures = np.array([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]]), np.array(["a", "a", "b", "b"])
    np.testing.assert_array_equal(stats.resampled_means(values, pictures)[0], [[0, 1], [0.5, 0.5]])


def test_cluster_interval_is_wider_when_pictures_decide_together() -> None:
    rng = np.random.default_rng(0)
    together = np.repeat(rng.random(100) < 0.7, 10)
    alone = rng.random(1000) < 0.7
    low, high = stats.cluster_interval(together, np.repeat(np.arange(100), 10))
    low_alone, high_alone = stats.cluster_interval(alone, np.arange(1000))
    assert high - low > 2 * (high_alone - low_alone)
    assert low < together.mean() < high


def test_cluster_interval_of_all_right_is_not_a_point() -> None:
    low, high = stats.cluster_interval(np.ones(50, bool), np.arange(50))
    assert high == 1.0
    assert 0.9 < low < 1.0
    with pytest.raises(OptionError, match="equally long"):
        stats.cluster_interval(np.ones(3, bool), np.arange(4))


# -- verdicts -------------------------------------------------------------------------------


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
    assert p == pytest.approx(distributions.ttest_rel(two, one).pvalue)
    expected = distributions.ttest_1samp(two - one, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert stats.paired_t(np.zeros(5)) == (1.0, (0.0, 0.0))
    assert stats.paired_t(np.full(5, 0.25)) == (2 / 2**5, (0.25, 0.25))  # equal differences: no more than their signs say


def test_holm_raises_the_smallest_most_and_keeps_the_order() -> None:
    """By hand: 0.01 x 3, then 0.02 x 2, then 0.04 raised to what stands before it."""
    assert stats.holm(np.array([0.04, 0.01, 0.02])) == pytest.approx([0.04, 0.03, 0.04])
    assert stats.holm(np.array([0.9, 0.8])).max() == 1


def test_more_noise_wants_more_seeds_and_a_larger_effect_fewer() -> None:
    """By hand at 10 seeds and an effect of one standard deviation: (2.262 + 0.883) / sqrt(10) = 0.995."""
    assert stats.detectable(1.0, 10) == pytest.approx((2.262 + 0.883) / math.sqrt(10), rel=1e-3)
    assert stats.seeds_needed(0.01, 0.01) == 10
    assert stats.seeds_needed(0.02, 0.01) < 10 < stats.seeds_needed(0.01, 0.02)
    assert stats.seeds_needed(0.0, 0.01) == math.inf
    assert stats.seeds_needed(0.02, 0.0) == 2
    assert stats.detectable(0.01, 5) == pytest.approx((2.776 + 0.941) * 0.01 / math.sqrt(5), rel=1e-3)


@pytest.mark.parametrize("family", [1, 2, 6, 24])
def test_the_seeds_it_would_take_never_contradict_what_so_many_find(family: int) -> None:
    """At the level of a family of pairs: with as many seeds the effect is found, with one fewer it is not."""
    level = stats.ALPHA / family
    for effect, sd in ((0.02, 0.0127), (0.01, 0.01), (0.03, 0.01), (0.001, 0.02)):
        count = int(stats.seeds_needed(effect, sd, level))
        assert stats.detectable(sd, count, level) <= effect
        assert count == 2 or stats.detectable(sd, count - 1, level) > effect


def test_holm_s_levels_are_those_its_adjusted_p_values_are_held_against() -> None:
    levels = stats.holm_levels(np.array([0.04, 0.01, 0.02]))
    assert levels == pytest.approx([0.05, 0.05 / 3, 0.05 / 2])
    p = np.random.default_rng(0).random(12) ** 4
    alone = (p < stats.holm_levels(p))[np.argsort(p)]
    assert ((stats.holm(p) < stats.ALPHA)[np.argsort(p)] == np.logical_and.accumulate(alone)).all()


def test_the_observed_difference_does_not_say_how_many_seeds_it_takes() -> None:
    """Two pairs with the same spread over seeds and other differences need the same seeds for a stated one."""
    rng = np.random.default_rng(1)
    first = rng.random((5, 200)) < 0.5
    noise = rng.random((5, 200)) < 0.1
    second, third = first ^ noise, (first ^ noise) | (np.arange(200) < 20)
    found = stats.compare(np.stack([first, second, third]), [(0, 1), (0, 2)], np.arange(200))
    assert found["effect"][0] != found["effect"][1]
    for name, sd in zip(found["seeds_needed"], found["seed_sd"], strict=True):
        assert name == stats.seeds_needed(stats.STATED, float(sd))
    other = stats.compare(np.stack([first, second]), [(0, 1)], np.arange(200), stated=0.1)
    assert other["seeds_needed"][0] < found["seeds_needed"][0]


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
    for side, sign in ((right, 1), (right[::-1], -1)):
        verdict, effect = _verdict(side)
        assert verdict == sign
        assert effect == pytest.approx(0.2 * sign, abs=0.005)


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


def test_calibration_by_hand() -> None:
    sure = np.array([0.95, 0.92, 0.55, 0.05, np.nan])
    right = np.array([True, False, True, False, True])
    told = stats.calibration(sure, right)
    # 2 of 4 in the last bin: mean 0.935, half right; then |0.55 - 1| and |0.05 - 0|
    assert told["error"] == round((2 * 0.435 + 0.45 + 0.05) / 4, 4)
    assert told["bins"] == [(0.05, 0.0, 1), (0.55, 1.0, 1), (0.935, 0.5, 2)]
    assert told["auroc"] == 0.75  # three of four pairs of a right and a wrong answer
    assert told["confidence"] == round((0.95 + 0.92 + 0.55 + 0.05) / 4, 4)
    assert stats.calibration(sure[:1], right[:1])["auroc"] is None
    assert stats.calibration(np.array([]), np.array([], bool))["confidence"] is None


def test_comparisons_and_accuracies_resample_pictures_and_not_questions() -> None:
    """Eight questions about a picture that are right together say no more than one."""
    pictures, right = np.arange(12), np.random.default_rng(0).random((2, 3, 12)) < 0.6
    zero = np.zeros(12, np.int64)
    once = stats.compare(right, [(0, 1)], pictures)
    often = stats.compare(np.repeat(right, 8, 2), [(0, 1)], np.repeat(pictures, 8))
    for name in ("picture_interval", "pictures_needed"):
        np.testing.assert_allclose(often[name], once[name])
    asked = stats.Questions(zero, zero + 1, pictures, 1, 2)
    again = stats.Questions(np.repeat(zero, 8), np.repeat(zero + 1, 8), np.repeat(pictures, 8), 1, 2)
    known, found = stats.accuracies(right, asked), stats.accuracies(np.repeat(right, 8, 2), again)
    np.testing.assert_allclose(found["accuracy_interval"], known["accuracy_interval"])
