"""Faithfulness: fair fills, refusals in one line, every pass counted, nothing left behind, any target and number format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llava_lab as ll
from llava_lab.capture import undisturbed
from llava_lab.errors import CheckpointError, OptionError
from llava_lab.judging import faithfulness
from llava_lab.judging.faithfulness import allowed_fills
from llava_lab.models import Lab, load
from llava_lab.replay import target_score
from llava_lab.results import Run
from tests.support.additive import HOME, QUICK, everything_tells, judge_of, map_by_hand
from tests.support.closeness import TERMS, close
from tests.support.planted import scripted_run


@pytest.fixture(autouse=True)
def _telling(monkeypatch: pytest.MonkeyPatch) -> None:
    everything_tells(monkeypatch)


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.", fit="crop")


def test_the_fills_are_never_the_methods_own(tiny_random: Lab, run: Run) -> None:
    for fill in ("grey", "mean", "blur"):
        rel = ll.attribute(tiny_random, run, method="occlusion", block=4, fill=fill)
        score = faithfulness(tiny_random, run, rel, **QUICK)
        assert len(score.fills) == 2
        assert fill not in score.fills
        with pytest.raises(OptionError, match=f"made with fill '{fill}' must not be scored with it; choose from "):
            faithfulness(tiny_random, run, rel, fills=("noise", fill))


def test_fusing_heads_by_mean_is_not_a_fill() -> None:
    assert allowed_fills([("attention", {"fusion": "mean"})]) == ("grey", "mean", "blur", "noise")
    assert allowed_fills([("occlusion", {"fill": "grey"}), ("elsewhere", {"baseline": ["blur"]})]) == ("mean", "noise")
    assert allowed_fills([("inverse", {"of": "occlusion", "options": {"fill": "blur"}})]) == ("grey", "mean", "noise")
    assert allowed_fills([("inverse", {"of": "occlusion", "options": None})]) == ("mean", "blur", "noise")
    with pytest.raises(OptionError, match="two fills that made none of them; blur, grey, mean were all used"):
        allowed_fills([("occlusion", {"fill": fill}) for fill in ("grey", "blur", "mean")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fills": ("grey",)}, "at least 2 different fills, since no fill is neutral; got grey"),
        ({"fills": ("grey", "grey")}, "at least 2 different fills"),
        ({"fills": ("grey", "red")}, "fills must be one of 'grey', 'mean', 'blur', 'noise', got 'red'"),
        ({"steps": 1}, "steps must be a whole number of at least 2, got 1"),
        ({"seeds": 1}, "seeds must be a whole number of at least 2, got 1"),
        ({"batch": 0}, "batch must be a whole number of at least 1"),
        ({"scale": "logit"}, "scale must be one of 'probability', 'logprob', 'logodds', got 'logit'"),
        ({"things": np.ones((1, 2, 2), bool)}, r"things must be masks, bool \(things, 40, 60\), got bool \(1, 2, 2\)"),
        ({"things": np.ones((1, 40, 60))}, "things must be masks, bool .* got float64"),
        ({"things": np.zeros((1, 40, 60), bool)}, "things has an empty mask"),
    ],
)
def test_options_out_of_range_are_refused(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        faithfulness(tiny_random, run, map_by_hand(run, np.ones((1, 4, 4))), **{**QUICK, **options})


def test_a_map_of_another_picture_or_checkpoint_is_refused(tiny_random: Lab, run: Run) -> None:
    rel = map_by_hand(run, np.ones((1, 4, 4)))
    square = scripted_run(tiny_random, np.zeros((40, 40, 3), np.uint8), "The car is blue.")
    with pytest.raises(OptionError, match="expected a map of this run and these targets"):
        faithfulness(tiny_random, square, rel, **QUICK)
    with pytest.raises(CheckpointError, match="ask again"):
        faithfulness(tiny_random, replace(run, fingerprint="other"), replace(rel, fingerprint="other"), **QUICK)


# -- cost, and what stays -------------------------------------------------------------------


@pytest.fixture
def counted(tiny_random: Lab, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch of every forward."""
    batches: list[int] = []
    forward = tiny_random.model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        batches.append(len(kwargs["pixel_values"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny_random.model, "forward", counting)
    return batches


def test_every_pass_is_counted_and_none_is_made_twice(tiny_random: Lab, run: Run, counted: list[int]) -> None:
    rel = map_by_hand(run, np.random.default_rng(0).random((1, 4, 4)))
    score = faithfulness(tiny_random, run, rel, fills=("grey", "mean"), batch=5, **QUICK)
    assert score.passes["forward"] == sum(counted)
    assert max(counted) <= 5
    inner = len(score.fractions) - 2
    most = 1 + 2 * (1 + 2 * inner * (QUICK["seeds"] + 1 + 1))  # whole; each fill: filled, random maps, centre, this map
    assert most - 4 <= sum(counted) <= most  # two rankings may fill the same patches
    before = len(counted)
    judge = judge_of(tiny_random, run)
    first = len(counted) - before
    judge.score(rel)
    again = len(counted)
    assert first > 0
    assert judge.score(rel).passes["forward"] == len(counted) - again == 0


def test_fills_that_tell_nothing_cost_nothing(
    tiny_random: Lab, run: Run, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HOME, "MATTERS", {"probability": 2.0})
    score = faithfulness(tiny_random, run, map_by_hand(run, np.ones((1, 4, 4))), fills=("grey", "mean"), **QUICK)
    assert sum(counted) == score.passes["forward"] == 3  # the picture, and filled with each
    assert np.isnan(score.deletion).all()
    assert np.isnan(score.gain).all()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_stays_behind(tiny_random: Lab, run: Run, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_random.model
    model.train()
    state = torch.get_rng_state()
    before, hooks = tiny_random.fingerprint, _hooks(model)
    calls, forward = 0, model.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        torch.rand(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", failing)
    try:
        with pytest.raises(error):
            faithfulness(tiny_random, run, map_by_hand(run, np.ones((1, 4, 4))), **QUICK)
        assert all(module.training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), state)
        assert _hooks(model) == hooks
        assert tiny_random.fingerprint == before
        assert torch.is_grad_enabled()
    finally:
        model.eval()


def _hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_same_seed_same_numbers_other_seed_other_random_maps(tiny_random: Lab, run: Run) -> None:
    rel = map_by_hand(run, np.random.default_rng(0).random((1, 4, 4)))
    one, two, three = (faithfulness(tiny_random, run, rel, seed=seed, **QUICK) for seed in (0, 0, 1))
    assert np.array_equal(one.random, two.random)
    assert np.array_equal(one.interval, two.interval)
    assert not np.array_equal(one.random, three.random)
    assert np.array_equal(one.deletion, three.deletion)


@pytest.mark.parametrize("target", ["answer", "words", ("blue", "green"), 1])
def test_every_kind_of_target_can_be_scored(tiny_random: Lab, run: Run, target: Any) -> None:
    rel = ll.attribute(tiny_random, run, method="random", target=target)
    score = faithfulness(tiny_random, run, rel, scale="logprob", **QUICK)
    assert score.deletion.shape[0] == len(rel.targets) == len(score.beats_random)
    with undisturbed(tiny_random.model):
        pixels, raw = target_score(tiny_random, run, rel.targets)
        close(score.whole, raw(pixels)[0].numpy(), terms=TERMS)


def test_bfloat16_and_576_tokens_go_the_same_way(llava15_folder: Path) -> None:
    lab = load(str(llava15_folder), dtype="bfloat16")
    run = scripted_run(lab, np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8), "The car is blue.")
    rel = ll.attribute(lab, run, method="center", target="blue")
    score = faithfulness(lab, run, rel, steps=2, seeds=2, scale="logprob", batch=4)
    assert score.whole.dtype == np.float64
    assert (score.deletion[..., 0] == 1).all()
    assert (score.deletion[..., -1] == 0).all()
    assert not np.isnan(score.random).any()
