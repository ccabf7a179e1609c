"""Greedy search: the naive search's order, insight and necessity as defined, shared looks, and an honest interrupt."""

from __future__ import annotations

from math import exp
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llava_lab.attribution import attribute
from llava_lab.attribution.shapley import _Path, _search
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.results import Run
from tests.support.games import formula_game
from tests.support.planted import RED, planted_lab, red_picture, scripted_run

LABELS = np.array([[0, 0, 1], [2, 2, 1], [3, 3, 3]])
SMALL: dict[str, Any] = {"method": "greedy", "regions": 4}


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.", fit="crop")


def _probability(shown: Tensor) -> Tensor:
    """Log-probability of a word for which 0 or 1 is enough, 2 cannot be replaced, and 3 speaks against it."""
    zero, one, two, three = shown.unbind(1)
    return torch.log(0.1 + 0.4 * torch.maximum(zero, one) + 0.35 * two - 0.05 * three)[:, None]


def test_the_order_and_the_two_parts_are_those_of_a_search_by_hand() -> None:
    path = _Path(slice(0, 1), contrast=False)
    _search(formula_game(LABELS, _probability), [path], 4)
    # alone, 0 gives 0.5 and 2 only 0.45; but without 0 there is 1, and without 2 only 0.45 is left of 0.8
    assert path.chosen == [2, 0, 1, 3]
    np.testing.assert_allclose(path.insight, [0.45, 0.85, 0.85, 0.8], atol=1e-6)
    np.testing.assert_allclose(path.necessity, [0.55, 0.55, 0.95, 0.9], atol=1e-6)
    assert path.before == pytest.approx(0.1 + 1 - 0.8, abs=1e-6)
    # the sum of both goes 0.3, 1.0, 1.4, 1.8, 1.7: steps of 0.7, 0.4, 0.4, 0.1
    np.testing.assert_allclose(path.values(4), [0.9, 0.5, 1.6, 0.1], atol=1e-6)


def test_of_equals_the_first_in_reading_order_is_taken() -> None:
    path = _Path(slice(0, 1), contrast=False)
    _search(formula_game(LABELS, lambda shown: torch.zeros(len(shown), 1) - 1), [path], 4)
    assert path.chosen == [0, 1, 2, 3]
    np.testing.assert_allclose(path.values(4), 0, atol=1e-6)


def test_equals_one_look_at_a_time(tiny_random: Lab, run: Run) -> None:
    """The same search, written out, on the probabilities that whole forwards give."""
    rel = attribute(tiny_random, run, **SMALL, target="blue", fill="mean", batch=3)
    labels = np.array(rel.extras["regions"])
    inputs = tiny_random.inputs(run)
    pixels = inputs["pixel_values"]
    mean = pixels.mean((2, 3), keepdim=True)  # cropped: all of the square is picture
    word = run.word("blue")
    known: dict[frozenset[int], float] = {}

    def probability(shown: frozenset[int]) -> float:
        if shown not in known:
            visible = torch.from_numpy(np.isin(labels, list(shown))).repeat_interleave(8, 0).repeat_interleave(8, 1)
            with torch.no_grad():
                seen = {**inputs, "pixel_values": torch.where(visible, pixels, mean)}
                logprobs = tiny_random.model(**seen).logits[0].float().log_softmax(-1)
            each = [exp(float(logprobs[i - 1, run.token_ids[i]])) for i in range(word.start, word.stop)]
            known[shown] = sum(each) / len(each)
        return known[shown]

    every = frozenset(range(4))
    chosen: list[int] = []
    while len(chosen) < 4:
        tried = {one: frozenset({*chosen, one}) for one in every - set(chosen)}
        chosen.append(max(sorted(tried), key=lambda one: probability(tried[one]) + 1 - probability(every - tried[one])))
    assert rel.extras["order"] == [chosen]
    np.testing.assert_allclose(rel.extras["insight"][0], [probability(frozenset(chosen[: k + 1])) for k in range(4)], atol=1e-6)
    without = [1 - probability(every - set(chosen[: k + 1])) for k in range(4)]
    np.testing.assert_allclose(rel.extras["necessity"][0], without, atol=1e-6)
    assert rel.passes["forward"] == len(known)
    means = [rel.values[0][labels == region].mean() for region in chosen]
    assert means == sorted(means, reverse=True)


def test_several_targets_share_looks_and_get_their_own_search(tiny_random: Lab, run: Run) -> None:
    wanted: list[Any] = ["blue", ("blue", "green"), "answer"]
    together = attribute(tiny_random, run, **SMALL, target=wanted)
    alone = [attribute(tiny_random, run, **SMALL, target=one) for one in wanted]
    for i, one in enumerate(alone):
        assert together.extras["order"][i] == one.extras["order"][0]
        np.testing.assert_allclose(together.values[i], one.values[0], atol=1e-5)
    assert together.passes["forward"] <= 16 < sum(one.passes["forward"] for one in alone)


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("at", ["pixels", "projector"])
def test_a_planted_cause_is_chosen_first(fit: str, at: str) -> None:
    lab = planted_lab()
    picture = red_picture(120, 80, (60, 10, 80, 30))
    run = scripted_run(lab, picture, "The car is red.", fit=fit)
    covered = run.map.mask_to_patches((picture == np.array(RED)).all(-1))
    rel = attribute(lab, run, method="greedy", regions=6, steps=2, at=at, target=["red", ("red", "blue")])
    labels = np.array(rel.extras["regions"])
    for order, values in zip(rel.extras["order"], rel.values, strict=True):
        assert len(order) == 2
        assert covered[labels == order[0]].max() > 0, "any red patch is enough by itself"
        assert labels.ravel()[values.argmax()] == order[0]
        assert values[~np.isin(labels, order)].max() == 0
    assert "The first 2 of 6 regions; the others are 0." in rel.notes


def test_ctrl_c_gives_the_finished_steps(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    target = ["blue", "answer"]
    whole = attribute(tiny_random, run, method="greedy", regions=6, target=target)
    calls, forward = 0, tiny_random.model.forward

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:  # both ends; twelve looks in two batches for the first step; then the second step's
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny_random.model, "forward", interrupted)
    part = attribute(tiny_random, run, method="greedy", regions=6, target=target)
    done = len(part.extras["order"][0])
    assert 1 <= done < 6
    assert [order[:done] for order in whole.extras["order"]] == part.extras["order"]
    assert f"Interrupted after {done} of 6 steps; regions not reached are 0." in part.notes
    labels = np.array(part.extras["regions"])
    assert (part.values[0][~np.isin(labels, part.extras["order"][0])] == 0).all()
    calls = 3
    with pytest.raises(KeyboardInterrupt):
        attribute(tiny_random, run, method="greedy", regions=6, target=target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"batch": 0}, "batch must be a whole number of at least 1, got 0"),
        ({"fill": "black"}, "fill must be one of 'grey', 'mean', 'blur', 'noise', 'neighbours', got 'black'"),
    ],
)
def test_options_out_of_range_are_refused(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        attribute(tiny_random, run, method="greedy", **options)
