"""RISE: equal to a naive loop over its masks, right for a formula, and open about its noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from llava_lab.attribution import attribute
from llava_lab.attribution.occlusion import looks, natural_cells, rise_masks, weighed
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.replay import fill_pixels
from llava_lab.results import Run
from tests.support.games import Formula
from tests.support.planted import RED, planted_lab, red_picture, scripted_run

TARGETS = ["answer", "blue", ("blue", "green")]


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.", fit="crop")


@pytest.mark.parametrize("fill", ["grey", "noise"])
def test_equals_a_loop_over_its_masks(tiny_random: Lab, run: Run, fill: str) -> None:
    rel = attribute(tiny_random, run, method="rise", masks=7, cells=3, shown=0.6, seed=2, batch=3, fill=fill, target=TARGETS)
    inputs = tiny_random.inputs(run)
    pixels = inputs["pixel_values"]
    other = fill_pixels(tiny_random, pixels, fill, run.map, seed=2)
    masks = rise_masks(7, (32, 32), cells=3, shown=0.6, seed=2)(0, 7)
    word, (start, stop) = run.word("blue"), run.segments["answer"]
    against = tiny_random.tokenizer.encode(" green", add_special_tokens=False)[0]
    scores, shares = [], []
    for mask in masks:
        with torch.no_grad():
            seen = {**inputs, "pixel_values": mask * pixels + (1 - mask) * other}
            logprobs = tiny_random.model(**seen).logits[0].float().log_softmax(-1)
        said = [
            float(sum(logprobs[i - 1, run.token_ids[i]] for i in range(a, b)))
            for a, b in ((start, stop), (word.start, word.stop))
        ]
        at = logprobs[word.start - 1]
        scores.append([*said, float(at[run.token_ids[word.start]] - at[against])])
        shares.append(mask.reshape(4, 8, 4, 8).mean((1, 3)).numpy())
    table, weights = np.array(scores), np.array(shares)
    want = np.einsum("mn,myx->nyx", table - table.mean(0), weights) / weights.sum(0)
    np.testing.assert_allclose(rel.values, want, atol=2e-5)
    assert rel.passes["forward"] == 7


def test_a_sum_of_patches_gives_back_the_patches() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, -2.0], [0.0] * 4, [3.0, 0.0, 0.0, 0.0]])
    game = Formula((4, 4), lambda shown: (shown * weights).sum((1, 2))[:, None], batch=50)
    values, errors = weighed(*looks(game, rise_masks(3000, (4, 4), cells=4, shown=0.5, seed=0), 3000))
    assert values[0].argmax() == 12
    assert values[0].argmin() == 7
    # a patch that is shown half the time gains half its weight, here with the share of it that its cell covers
    assert values[0, 3, 0] == pytest.approx(1.5, abs=0.15)
    assert values[0, 1, 3] == pytest.approx(-1, abs=0.15)
    assert float((values[0] - 0.5 * weights).abs().max()) < 6 * float(errors.max())


def test_the_standard_error_is_the_spread_over_seeds() -> None:
    game = Formula((4, 4), lambda shown: (shown[:, 0, 0] + 2 * shown[:, 2, 2])[:, None], batch=50)
    each = [weighed(*looks(game, rise_masks(100, (4, 4), cells=4, shown=0.5, seed=seed), 100)) for seed in range(40)]
    spread = torch.stack([values for values, _ in each]).std(0).mean()
    said = torch.stack([errors for _, errors in each]).mean()
    assert float(said) == pytest.approx(float(spread), rel=0.2)


def test_masks_are_smooth_shares_with_the_chance_they_were_asked_for() -> None:
    masks = rise_masks(400, (24, 20), cells=5, shown=0.3, seed=0)
    every = torch.cat([masks(0, 150), masks(150, 400)])
    assert every.shape == (400, 24, 20)
    assert 0 <= float(every.min()) <= float(every.max()) <= 1
    assert float(every.mean()) == pytest.approx(0.3, abs=0.02)
    assert float((every.mean(0) - 0.3).abs().max()) < 0.12, "no place is favoured"
    torch.testing.assert_close(masks(3, 5), every[3:5])
    assert not torch.equal(rise_masks(2, (24, 20), cells=5, shown=0.3, seed=1)(0, 2), every[:2])


@pytest.mark.parametrize(("grid", "cells"), [((24, 24), 8), ((12, 12), 4), ((4, 4), 2), ((1, 1), 1), ((40, 40), 8)])
def test_cells_follow_the_grid(grid: tuple[int, int], cells: int) -> None:
    assert natural_cells(grid) == cells


@pytest.mark.parametrize("at", ["pixels", "vision", "projector"])
def test_a_planted_cause_is_found(at: str) -> None:
    lab = planted_lab()
    picture = red_picture(96, 96, (12, 60, 36, 84))
    run = scripted_run(lab, picture, "The car is red.", fit="pad")
    rel = attribute(lab, run, method="rise", masks=96, at=at, target=["red", ("red", "blue")])
    red = run.map.mask_to_patches((picture == np.array(RED)).all(-1)) > 0
    for values in rel.values:
        near = functional.max_pool2d(torch.from_numpy(red)[None, None].float(), 5, 1, 2)[0, 0].numpy() > 0  # cells are wide
        assert near.ravel()[values.argmax()]
        assert values[red].mean() > values[~near].mean() + 2 * values[~near].std()


def test_padding_is_zero(tiny_random: Lab) -> None:
    run = scripted_run(
        tiny_random, np.random.default_rng(0).integers(0, 255, (20, 80, 3), dtype=np.uint8), "The car is blue.", fit="pad"
    )
    rel = attribute(tiny_random, run, method="rise", masks=8)
    assert (rel.values[0][run.map.coverage() == 0] == 0).all()
    assert (rel.values[0][run.map.coverage() > 0] != 0).all()
    assert rel.extras["standard_error"][0] > 0


def test_ctrl_c_gives_the_mean_over_what_was_seen(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    want = attribute(tiny_random, run, method="rise", masks=8, batch=4, cells=2)
    assert want.extras["masks"] == 8
    calls, forward = 0, tiny_random.model.forward

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny_random.model, "forward", interrupted)
    part = attribute(tiny_random, run, method="rise", masks=30, batch=4, cells=2)
    assert part.extras["masks"] == 8
    assert part.passes["forward"] == 8
    assert "Interrupted after 8 of 30 masks; the means are over these." in part.notes
    assert np.isfinite(part.values).all()
    calls = 2
    with pytest.raises(KeyboardInterrupt):
        attribute(tiny_random, run, method="rise", masks=30, batch=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shown": 1}, "shown is the share of the picture a mask shows, between 0 and 1; got 1"),
        ({"shown": "half"}, "got 'half'"),
        ({"cells": 5}, "cells must be at most 4 for a grid of 4x4, got 5"),
        ({"masks": 1}, "masks must be a whole number of at least 2, got 1"),
        ({"fill": "neighbours"}, "fill must be one of 'grey', 'mean', 'blur', 'noise', got 'neighbours'"),
    ],
)
def test_options_out_of_range_are_refused(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        attribute(tiny_random, run, method="rise", **options)
