"""The verdict: random and flat maps do not beat random, right ones do, and what cannot be told is said."""

from __future__ import annotations

import numpy as np
import pytest

from llava_lab.judging import faithfulness
from llava_lab.judging.faithfulness import SIGMAS, step_counts, told_apart, verdict
from llava_lab.models import Lab
from llava_lab.results import Run, area, trapezoid
from tests.support.additive import QUICK, Install, additive_model, judge_of, map_by_hand
from tests.support.planted import scripted_run


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.", fit="crop")


@pytest.fixture
def additive(monkeypatch: pytest.MonkeyPatch) -> Install:
    return additive_model(monkeypatch)


def test_random_maps_do_not_beat_random(tiny_random: Lab, run: Run, additive: Install) -> None:
    passed = 0
    for model in range(5):
        rng = np.random.default_rng(model)
        additive(rng.random((1, 4, 4)) ** 3)
        judge = judge_of(tiny_random, run, scale="logprob", steps=8, seeds=10, seed=model)
        for _ in range(40):
            score = judge.score(map_by_hand(run, rng.random((1, 4, 4))))
            passed += int(score.beats_random[0])
            assert not (score.beats_random[0] and score.interval[0, 0] <= 0)
    assert passed <= 2  # of 200; the interval from the mean random map would pass about 100


def test_flat_maps_do_not_beat_random(tiny_random: Lab, run: Run, additive: Install) -> None:
    weights = np.zeros((1, 4, 4))
    weights[0, 0, :2] = weights[0, 1, :2] = 1  # what a map broken by reading order would find by accident
    additive(weights)
    gains = []
    for seed in range(20):
        score = judge_of(tiny_random, run, scale="logprob", steps=8, seeds=10, seed=seed).score(
            map_by_hand(run, np.zeros((1, 4, 4)))
        )
        gains.append(score.gain[0])
        assert not score.beats_random[0]
    assert abs(np.mean(gains)) < 0.2


def test_the_right_map_beats_random_under_both_fills(tiny_random: Lab, run: Run, additive: Install) -> None:
    weights = np.random.default_rng(0).random((1, 4, 4)) ** 3
    additive(weights)
    for seed in range(10):
        judge = judge_of(tiny_random, run, scale="logprob", steps=8, seeds=10, seed=seed)
        right, wrong = judge.score(map_by_hand(run, weights)), judge.score(map_by_hand(run, -weights))
        assert right.beats_random[0]
        assert 0 < right.interval[0, 0] < right.gain[0] < right.interval[0, 1]
        assert not wrong.beats_random[0]


def test_good_under_one_fill_only_is_not_good() -> None:
    fractions = step_counts(100, 8) / 100
    rng = np.random.default_rng(0)
    wobble = rng.normal(0, 0.05, (2, 10, 2, len(fractions)))
    wobble[..., [0, -1]] = 0
    random = 0.5 + wobble
    down = np.stack([1 - fractions**0.2] * 2)
    assert verdict(fractions, down, 1 - down[:, ::-1] * 0 - down, random)[1]
    half = down.copy()
    half[1] = 0.5
    assert not verdict(fractions, half, 1 - half, random)[1]
    half[1] = np.nan
    interval, beats = verdict(fractions, half, 1 - half, random)
    assert not beats
    assert np.isnan(interval).all()


def test_where_one_patch_decides_a_note_says_that_nothing_can_be_told(tiny_random: Lab, run: Run, additive: Install) -> None:
    weights = np.zeros((1, 4, 4))
    weights[0, 2, 2] = 1
    additive(weights)
    score = judge_of(tiny_random, run, scale="logprob", steps=8, seeds=10).score(map_by_hand(run, weights))
    assert not score.beats_random[0]
    assert any(note.startswith("A few patches decide 'blue', so random maps scatter too widely") for note in score.notes)
    assert not told_apart(score.fractions, score.random[:, :, 0])
    spread = np.sqrt((score.random_gains[:, 0] ** 2).mean(0))
    assert (SIGMAS * spread > trapezoid(score.fractions)[1:-1].sum()).all()


@pytest.mark.parametrize("steps", [2, 3, 8, 9])
@pytest.mark.parametrize("patches", [1, 2, 15, 16, 144, 576])
def test_steps_are_the_same_backwards(patches: int, steps: int) -> None:
    counts = step_counts(patches, steps)
    assert counts[0] == 0
    assert counts[-1] == patches
    assert (np.diff(counts) > 0).all()
    assert (counts + counts[::-1] == patches).all()
    assert area(counts / patches, np.ones(len(counts))) == pytest.approx(1)
    assert area(counts / patches, counts / patches) == pytest.approx(0.5)


def test_a_target_that_needs_no_picture_is_not_judged(tiny_random: Lab, run: Run, additive: Install) -> None:
    weights = np.zeros((4, 4, 4))
    weights[3] = np.random.default_rng(0).random((4, 4))
    additive(weights)
    score = faithfulness(tiny_random, run, map_by_hand(run, np.ones((4, 4, 4)), None), scale="logprob", **QUICK)
    assert np.isnan(score.deletion[:3]).all()
    assert np.isnan(score.gain).tolist() == [True, True, True, False]
    assert "Fewer than two fills tell anything about 'The': no map of it can be judged." in score.notes
    assert "Filling the whole picture with grey hardly lowers 'The'; it is not counted." in score.notes
    assert not score.beats_random[:3].any()
