"""What a target scores: log-odds do not saturate, their noise floor holds against float64, and guards follow from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import llava_lab as ll
from llava_lab.errors import LabError, OptionError
from llava_lab.interventions import knockout
from llava_lab.models import Lab
from llava_lab.replay.prefix import AGREE, agree
from llava_lab.replay.score import noise_floor, read_scores
from llava_lab.results import Relevance, Run, Target

SAID = Target("word", "red", (0,), (0,))
TWO = Target("answer", "red car", (0, 1), (0, 1))
CONTRAST = Target("contrast", "red, not blue", (0,), (0,), (1,))


def test_log_odds_by_hand() -> None:
    """Logits (2, 0, 0): p = e^2 / (e^2 + 2), so log-odds are 2 - ln 2; of two tokens the sum, of a contrast 2 - 0."""
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, -1.0]]])
    both = 2 - np.log(2) + 1 - np.log(1 + np.exp(-1))
    got = read_scores(logits, (0, 1), (SAID, TWO, CONTRAST), score="logodds")[0]
    np.testing.assert_allclose(got, [2 - np.log(2), both, 2.0], rtol=1e-6)
    p = np.exp(2) / (np.exp(2) + 2)
    np.testing.assert_allclose(read_scores(logits, (0,), (SAID, CONTRAST))[0], [np.log(p), 2.0], rtol=1e-6)


def test_log_odds_are_the_log_probability_far_from_certainty_and_move_on_near_it() -> None:
    logits = torch.tensor([[[-12.0, 0.0, 0.0]], [[40.0, 0.0, 0.0]], [[50.0, 0.0, 0.0]]])
    odds, plain = (read_scores(logits, (0,), (SAID,), score=score)[:, 0] for score in ("logodds", "logprob"))
    assert abs(odds[0] - plain[0]) < 1e-5
    assert odds[2] - odds[1] == pytest.approx(10)
    assert plain[2] - plain[1] < 1e-16


def test_the_floor_by_hand() -> None:
    """Eight units in the last place of the larger logit; of a log-probability times 1 - p; squares add up over tokens."""
    logits = torch.tensor([[[16.0, 0.0], [0.0, 8.0]]])
    unit = 8 * torch.finfo(torch.float32).eps
    got = noise_floor(logits, (0, 1), (SAID, TWO, CONTRAST), score="logodds")[0]
    np.testing.assert_allclose(got, [16 * unit, np.hypot(16, 8) * unit, 16 * unit], rtol=1e-6)
    saturated = noise_floor(logits, (0,), (SAID,), score="logprob")[0]
    np.testing.assert_allclose(saturated, 16 * unit / (1 + np.exp(16)), rtol=1e-6)
    rough = noise_floor(logits.bfloat16(), (0,), (SAID,), score="logodds")[0]
    np.testing.assert_allclose(rough, 16 * 2 * torch.finfo(torch.bfloat16).eps, rtol=1e-6)


@pytest.fixture(scope="module")
def lab() -> Lab:
    return ll.load("tiny")


@pytest.fixture(scope="module")
def run(lab: Lab) -> Run:
    return lab.ask("notebooks/images/red-car-and-fish.png", "What color is the car?")


def test_token_knockout_ranks_as_the_same_logits_in_double_do_and_its_floor_holds(lab: Lab, run: Run) -> None:
    """The README's example: near certainty its log-probabilities are of the size 1e-7."""
    single = ll.attribute(lab, run, method="token_knockout", target="words")
    lab.model.double()
    try:
        double = ll.attribute(lab, replace(run, fingerprint=lab.fingerprint), method="token_knockout", target="words").values
    finally:
        lab.model.float()
    for values, exact, floor in zip(single.values, double, single.noise_floor, strict=True):
        assert spearmanr(values.ravel(), exact.ravel()).statistic > 0.999
        assert len(np.unique(values)) > 130
        assert np.abs(values - exact).max() < 1.5 * floor  # a processor's own kernels decide: it was 1.08 of it on one
        assert floor < 0.01 * np.abs(exact).max()


def test_in_bfloat16_little_is_above_the_floor_and_the_map_says_so(lab: Lab, run: Run) -> None:
    lab.model.bfloat16()
    try:
        rough = ll.attribute(lab, replace(run, fingerprint=lab.fingerprint), method="token_knockout", target="red")
    finally:
        lab.model.float()
    below = int((np.abs(rough.values) < rough.noise_floor[0]).sum())
    assert below > 100
    assert f"({below} of 144 patches below)" in rough.notes[-1]
    assert np.count_nonzero(rough.drawn) == 144 - below
    exact = ll.attribute(lab, run, method="token_knockout", target="red")
    assert np.abs(rough.values - exact.values).max() < rough.noise_floor[0]


def test_what_reaches_the_floor_is_kept_by_the_map_algebra(lab: Lab, run: Run) -> None:
    one = ll.attribute(lab, run, method="token_knockout", target="red")
    assert (one - one).noise_floor == pytest.approx(np.sqrt(2) * one.noise_floor)
    assert Relevance.mean([one, one]).noise_floor == pytest.approx(one.noise_floor / np.sqrt(2))
    half = one.normalised()
    assert (half.drawn == 0).tolist() == (one.drawn == 0).tolist()
    assert not (one - one).drawn.any()


def test_the_old_score_is_there_by_name_and_stands_in_the_result(lab: Lab, run: Run) -> None:
    plain = ll.attribute(lab, run, method="token_knockout", target="red", score="logprob")
    assert (plain.options["score"], plain.extras["unit"]) == ("logprob", "logprob")
    assert np.abs(plain.values).max() < 1e-6
    effect = knockout(
        lab, run, source="image", target="last", layers=(0, 1), draws=0, answer=False, metric="red", score="logprob"
    )
    assert (effect.score, len(effect.noise_floor)) == ("logprob", 1)
    assert abs(effect.change[0]) < 1e-5 < abs(knockout(lab, run, source="image", target="last", layers=(0, 1), draws=0,
                                                       answer=False, metric="red").change[0])  # fmt: skip
    with pytest.raises(OptionError, match="score must be one of 'logodds', 'logprob', got 'p'"):
        knockout(lab, run, source="image", target="last", score="p")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_guard_follows_from_type_and_values(dtype: torch.dtype) -> None:
    """In bfloat16 half a nat of a certain word's log-probability was let through; now what rounding explains is, and no more."""
    logits = torch.tensor([[[12.0, 0.0, 0.0]]]).to(dtype)
    for score in ("logodds", "logprob"):
        plain = read_scores(logits, (0,), (SAID,), score=score)[0]
        floor = noise_floor(logits, (0,), (SAID,), score=score)[0]
        agree(plain + 0.9 * AGREE * floor.float(), plain, floor)
        with pytest.raises(LabError, match="where rounding explains"):
            agree(plain + 1.1 * AGREE * floor.float(), plain, floor)
        assert AGREE * floor[0] < 0.5
        with pytest.raises(LabError, match="same score"):
            agree(torch.tensor([float("nan")]), plain, floor)
