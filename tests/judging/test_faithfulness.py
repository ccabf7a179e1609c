"""Faithfulness: curves and things as computed by hand, a planted cause confirmed, and a verdict that chance does not pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import llava_lab as ll
from llava_lab.judging import faithfulness
from llava_lab.judging.faithfulness import SIGMAS, step_counts, told_apart, verdict
from llava_lab.models import Lab
from llava_lab.replay import fill_pixels
from llava_lab.results import Faithfulness, Run, area, trapezoid
from tests.support.additive import QUICK, Install, additive_model, everything_tells, judge_of, map_by_hand
from tests.support.closeness import TERMS, close, tolerance
from tests.support.families import family
from tests.support.planted import RED, planted_lab, red_picture, scripted_run
from tests.support.score_examples import example_score


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.", fit="crop")


@pytest.fixture
def additive(monkeypatch: pytest.MonkeyPatch) -> Install:
    return additive_model(monkeypatch)


# -- by hand --------------------------------------------------------------------------------


def test_curves_of_an_additive_model_are_the_sums_left(tiny_random: Lab, run: Run, additive: Install) -> None:
    weights = np.zeros((1, 4, 4))
    weights[0, 1, 1], weights[0, 2, 3] = 3, 1
    additive(weights)
    score = faithfulness(tiny_random, run, map_by_hand(run, weights), scale="logprob", **QUICK)
    assert score.fractions.tolist() == [0, 2 / 16, 8 / 16, 14 / 16, 1]  # 2, 8 and 14 of 16 patches
    for fill in range(2):
        assert score.deletion[0, fill].tolist() == [1, 0, 0, 0, 0]  # both patches go in the first step
        assert score.insertion[0, fill].tolist() == [0, 1, 1, 1, 1]
    assert score.deletion_area.tolist() == [0.0625]  # half of the first step's width, 1/8
    assert score.insertion_area.tolist() == [0.9375]
    assert score.gain.tolist() == [0.875]
    assert score.whole.tolist() == [4]
    assert score.filled.tolist() == [[0, 0]]


def test_a_half_right_map_by_hand(tiny_random: Lab, run: Run, additive: Install) -> None:
    weights = np.zeros((1, 4, 4))
    weights[0, 0, 0], weights[0, 3, 3] = 3, 1
    additive(weights)
    values = -np.arange(16.0).reshape(1, 4, 4)  # reading order: the heavy patch first, the light one last
    score = faithfulness(tiny_random, run, map_by_hand(run, values), scale="logprob", **QUICK)
    assert score.deletion[0, 0].tolist() == [1, 0.25, 0.25, 0.25, 0]
    assert score.insertion[0, 0].tolist() == [0, 0.75, 0.75, 0.75, 1]


def test_each_target_is_scored_by_its_own_map(tiny_random: Lab, run: Run, additive: Install) -> None:
    weights = np.zeros((4, 4, 4))
    for i in range(4):
        weights[i, i, 0] = 1
    additive(weights)
    maps = weights.copy()
    maps[[1, 2]] = weights[[2, 1]] - weights[[1, 2]]  # the second and third word: each other's patch first, their own last
    score = faithfulness(tiny_random, run, map_by_hand(run, maps, None), scale="logprob", **QUICK)
    assert (score.gain > 0.8).tolist() == [True, False, False, True]


def test_upside_down_has_the_opposite_gain(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    everything_tells(monkeypatch)
    values = np.random.default_rng(0).normal(size=(1, 4, 4))
    judge = judge_of(tiny_random, run, scale="logprob")
    one, two = judge.score(map_by_hand(run, values)), judge.score(map_by_hand(run, -values))
    np.testing.assert_allclose(two.gain, -one.gain, atol=1e-6)
    np.testing.assert_allclose(np.stack([two.deletion, two.insertion]), one.inverse, atol=1e-6)
    np.testing.assert_allclose(one.random_gains.sum(0), 0, atol=1e-6)
    assert two.passes["forward"] == 0  # the same pictures, read backwards


@family("scale", ["probability", "logprob"], quick=("logprob",))
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_equals_filling_one_picture_after_the_other(
    tiny_random: Lab, fit: str, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything_tells(monkeypatch)
    wide = np.random.default_rng(5).integers(0, 255, (20, 60, 3), dtype=np.uint8)
    run = scripted_run(tiny_random, wide, "The car is blue.", fit=fit)
    values = np.random.default_rng(1).normal(size=(1, 4, 4))
    score = faithfulness(
        tiny_random, run, map_by_hand(run, values, "answer"), fills=("blur", "grey"), scale=scale, batch=3, **QUICK
    )
    seen = np.flatnonzero(run.map.coverage().ravel() > 0)
    order = seen[np.argsort(-values.ravel()[seen])]
    pixels = tiny_random.inputs(run)["pixel_values"]
    start, stop = run.segments["answer"]
    tokens = run.token_ids

    def measured(now: Tensor) -> float:
        with torch.no_grad():
            logits = tiny_random.model(**{**tiny_random.inputs(run), "pixel_values": now}).logits[0]
        logprob = float(sum(logits[i - 1].log_softmax(-1)[tokens[i]] for i in range(start, stop)))
        return logprob if scale == "logprob" else float(np.exp(logprob / (stop - start)))

    def filled(patches: np.ndarray, fill: str) -> float:
        now, source = pixels.clone(), fill_pixels(tiny_random, pixels, fill, run.map)
        for patch in patches:
            here = (..., slice(patch // 4 * 8, patch // 4 * 8 + 8), slice(patch % 4 * 8, patch % 4 * 8 + 8))
            now[here] = source[here]
        return measured(now)

    counts = np.rint(score.fractions * len(seen)).astype(int)
    assert counts.tolist() == step_counts(len(seen), 4).tolist()
    for w, fill in enumerate(("blur", "grey")):
        low, high = filled(seen, fill), measured(pixels)
        deletion = [(filled(order[:k], fill) - low) / (high - low) for k in counts]
        insertion = [(filled(order[k:], fill) - low) / (high - low) for k in counts]
        for found, want in ((score.deletion[0, w], deletion), (score.insertion[0, w], insertion)):
            close(found * (high - low), np.array(want) * (high - low), of=(high, low), terms=TERMS)


# -- a cause that was planted ---------------------------------------------------------------


@family(("width", "height", "box", "fit"), [(96, 64, (40, 16, 52, 28), "crop"), (64, 96, (20, 60, 38, 78), "pad")], quick=1)
def test_a_planted_cause_is_confirmed_and_chance_is_not(
    width: int, height: int, box: tuple[int, int, int, int], fit: str
) -> None:
    lab = planted_lab()
    picture = red_picture(width, height, box)
    run = scripted_run(lab, picture, "It is red.", fit=fit)
    red = (picture == np.array(RED)).all(-1)
    other = np.zeros_like(red)
    other[:10, 30:40] = True
    judge = judge_of(lab, run, ("grey", "mean"), "red", steps=6, seeds=8, things=np.stack([other, red]), batch=64)
    assert judge.whole[0] > 0.8
    assert judge.filled.max() < 0.2
    right = map_by_hand(run, run.map.mask_to_patches(red)[None], "red")
    for rel in (right, ll.attribute(lab, run, method="occlusion", target="red", block=2, stride=1, fill="blur")):
        found = judge.score(rel)
        assert found.beats_random[0], (rel.method, found.gain, found.interval)
        assert found.effects[0, :, 1].min() > 0.5 > found.effects[0, :, 0].max()  # the red thing makes the answer
        assert found.hits.tolist() == [1]
    for seed in range(5):
        assert not judge.score(ll.attribute(lab, run, method="random", target="red", seed=seed)).beats_random[0]


# -- things ---------------------------------------------------------------------------------


def test_removing_one_thing_by_hand(tiny_random: Lab, run: Run, additive: Install) -> None:
    weights = np.ones((1, 4, 4))
    weights[0, 0, 0] = 5
    additive(weights)  # 20 in all
    things = _patches_on_picture(run, [(0, 0)], [(3, 2), (3, 3)], [(1, 1)])
    judge = judge_of(tiny_random, run, scale="logprob", things=things)
    right = judge.score(map_by_hand(run, weights))
    np.testing.assert_allclose(right.effects[0], np.broadcast_to([5 / 20, 2 / 20, 1 / 20], (2, 3)), atol=1e-6)
    np.testing.assert_allclose(right.claims[0], [5 - 20 / 16, 2 * (1 - 20 / 16), 1 - 20 / 16], atol=1e-6)
    assert right.hits.tolist() == [1]
    values = np.zeros((1, 4, 4))
    values[0, 3, 2] = 1
    assert judge.score(map_by_hand(run, values)).hits.tolist() == [0]
    assert judge.score(map_by_hand(run, np.zeros((1, 4, 4)))).hits.tolist() == [pytest.approx(1 / 3)]  # says nothing: chance
    assert 0.15 < right.random_hits[0] < 0.5


def _patches_on_picture(run: Run, *things: list[tuple[int, int]]) -> np.ndarray:
    masks = np.zeros((len(things), *run.picture.shape[:2]), bool)
    for mask, patches in zip(masks, things, strict=True):
        for patch in patches:
            left, top, right, bottom = (round(edge) for edge in run.map.patch_box(*patch))
            mask[top:bottom, left:right] = True
    return masks


def test_a_thing_outside_the_crop_has_no_effect(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    everything_tells(monkeypatch)
    things = np.zeros((2, *run.picture.shape[:2]), bool)
    things[0, 10:20, 2:8] = True  # left of what the crop of a 60x40 picture shows
    things[1, 10:20, 20:40] = True
    judge = judge_of(tiny_random, run, scale="logprob", things=things)
    rounding = 2 * tolerance(run.logprobs.sum(), terms=64)  # the same picture in batches of two shapes
    assert np.abs(judge.effects[..., 0]).max() <= rounding < np.abs(judge.effects[..., 1]).min()


def test_no_things_no_columns(tiny_random: Lab, run: Run) -> None:
    score = faithfulness(tiny_random, run, map_by_hand(run, np.ones((1, 4, 4))), **QUICK)
    assert score.effects.shape == (1, 2, 0)
    assert np.isnan(score.hits).all()


# -- as a file ------------------------------------------------------------------------------


def test_round_trips_exactly(tmp_path: Path) -> None:
    score = example_score()
    again = Faithfulness.load(score.save(tmp_path / "score.npz"))
    for name in score.__dataclass_fields__:
        one, two = getattr(score, name), getattr(again, name)
        if isinstance(one, np.ndarray):
            assert one.dtype == two.dtype, name
            assert np.array_equal(one, two, equal_nan=one.dtype.kind == "f"), name
        else:
            assert one == two, name


def test_numbers_of_an_example_by_hand() -> None:
    score = example_score()
    down = (1 + 0.2) / 2 * 0.25 + (0.2 + 0.1) / 2 * 0.5 + 0.1 / 2 * 0.25
    up = 0.8 / 2 * 0.25 + (0.8 + 0.9) / 2 * 0.5 + 1.9 / 2 * 0.25
    np.testing.assert_allclose(score.deletion_area, down, atol=1e-6)  # the fill that tells nothing is left out
    np.testing.assert_allclose(score.gain, up - down, atol=1e-6)
    assert score.random_gains.shape == (6, 2, 2)
    np.testing.assert_allclose(score.random_gains, 0, atol=1e-6)
    assert score.hits.tolist() == [1, 0]
    assert score.random_hits.tolist() == [0.25, 0.75]


@pytest.mark.long
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


@pytest.mark.long
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
