"""Shapley values: equal to captum's and to the sum over all orders, and they add up to what there is to share."""

from __future__ import annotations

import sys
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import ShapleyValueSampling
from torch import Tensor

from llava_lab.attribution import attribute
from llava_lab.attribution.shapley import Game, LeastSquares, _fit, _walks, open_game
from llava_lab.capture import undisturbed
from llava_lab.errors import LabError, OptionError
from llava_lab.models import Lab
from llava_lab.results import Run
from tests.support.games import formula_game
from tests.support.planted import RED, planted_lab, red_picture, scripted_run

LABELS = np.array([[0, 0, 1], [2, 2, 1], [3, 3, 3]])
TARGETS = ["answer", "blue", ("blue", "green")]
SMALL: dict[str, dict[str, Any]] = {"shapley": {"regions": 4, "orders": 3}, "kernel_shap": {"regions": 4, "samples": 12}}


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.", fit="crop")


def _formula(shown: Tensor) -> Tensor:
    """Two targets: a plain sum, and one with a pair that counts only together and a pair of which one is enough."""
    one, two, three, four = shown.unbind(1)
    return torch.stack([one - 2 * two + 3 * three + 1, 4 * one * two + torch.maximum(three, four)], 1)


def _all_orders(game: Game) -> np.ndarray:
    """The definition: each region's gain, averaged over every order."""
    total = np.zeros((2, game.players))
    orders = list(permutations(range(game.players)))
    for order in orders:
        shown = torch.zeros(1, game.players, dtype=torch.bool)
        before = game.worth(shown)[0]
        for region in order:
            shown[0, region] = True
            after = game.worth(shown)[0]
            total[:, region] += (after - before).numpy()
            before = after
    return total / len(orders)


def test_all_orders_give_what_the_formula_says() -> None:
    np.testing.assert_allclose(
        _all_orders(formula_game(LABELS, _formula)), np.array([[1, -2, 3, 0], [2, 2, 0.5, 0.5]]), atol=1e-6
    )


def test_sampled_orders_come_near_the_definition_and_are_exact_for_a_plain_sum() -> None:
    game = formula_game(LABELS, _formula)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = _walks(game, 300, batch=3).mean(0)
    np.testing.assert_allclose(values[0], [1, -2, 3, 0], atol=1e-5)
    np.testing.assert_allclose(values[1], [2, 2, 0.5, 0.5], atol=0.3)
    assert game.forwards <= 16  # there are only so many coalitions


def test_the_fit_comes_near_the_definition_and_is_exact_for_a_plain_sum() -> None:
    game = formula_game(LABELS, _formula)
    with torch.random.fork_rng(devices=[]):
        values, samples = _fit(game, 400, batch=8, seed=0)
    assert samples == 400
    np.testing.assert_allclose(values[0], [1, -2, 3, 0], atol=1e-4)
    np.testing.assert_allclose(values[1], [2, 2, 0.5, 0.5], atol=0.3)
    np.testing.assert_allclose(values.sum(1), [2, 5], atol=1e-3)
    assert game.forwards <= 16


def test_one_region_has_it_all() -> None:
    game = formula_game(np.zeros((2, 2), int), lambda shown: 3 * shown)
    with torch.random.fork_rng(devices=[]):
        assert _fit(game, 10, batch=4, seed=0)[0].tolist() == [[3]]
        assert _walks(game, 2, batch=4).tolist() == [[[3]], [[3]]]


def test_least_squares_is_the_weighted_fit_of_the_normal_equations() -> None:
    random = torch.Generator().manual_seed(0)
    shown = (torch.rand(30, 5, generator=random) < 0.5).float()
    scores, weights = torch.rand(30, generator=random), torch.rand(30, generator=random)
    model = LeastSquares()
    model.fit([(shown[:20], scores[:20], weights[:20]), (shown[20:], scores[20:], weights[20:])])
    design = torch.cat([shown, torch.ones(30, 1)], 1).double()
    scale = weights.double()[:, None]
    want = torch.linalg.solve(design.T @ (scale * design), design.T @ (scale[:, 0] * scores.double()))
    torch.testing.assert_close(model.representation()[0].double(), want[:5], atol=1e-5, rtol=0)


def test_equals_one_call_of_captum_with_the_same_seed(tiny_random: Lab, run: Run) -> None:
    rel = attribute(tiny_random, run, method="shapley", regions=5, orders=4, seed=3, target=TARGETS)
    with undisturbed(tiny_random.model):
        targets = rel.targets
        game = open_game(tiny_random, run, targets, regions=5)
        torch.manual_seed(3)
        captum = ShapleyValueSampling(lambda shown: game.worth(shown > 0.5))
        want = captum.attribute(torch.ones(1, 5), n_samples=4)[0]
    np.testing.assert_allclose(rel.values, game.shared_out(want.numpy()), atol=1e-5)


@pytest.mark.parametrize("method", SMALL)
@pytest.mark.parametrize("at", ["pixels", "projector"])
def test_values_sum_to_the_whole_picture_minus_the_filled_one(tiny_random: Lab, run: Run, method: str, at: str) -> None:
    rel = attribute(tiny_random, run, method=method, target=TARGETS, at=at, **SMALL[method])
    full, empty = np.array(rel.extras["full"]), np.array(rel.extras["empty"])
    assert np.abs(full - empty).max() > 0.1
    np.testing.assert_allclose(rel.values.sum((1, 2)), full - empty, atol=1e-3)
    np.testing.assert_allclose(rel.extras["efficiency_gap"], 0, atol=1e-3)
    np.testing.assert_allclose(rel.extras["sum"], full - empty, atol=1e-3)
    labels = np.array(rel.extras["regions"])
    assert all(np.ptp(rel.values[:, labels == region], axis=1).max() < 1e-6 for region in range(labels.max() + 1))


@pytest.mark.parametrize("method", SMALL)
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_a_planted_cause_is_found(method: str, fit: str) -> None:
    lab = planted_lab()
    picture = red_picture(120, 80, (60, 10, 80, 30))
    run = scripted_run(lab, picture, "The car is red.", fit=fit)
    covered = run.map.mask_to_patches((picture == np.array(RED)).all(-1))
    for target in ("red", ("red", "blue")):
        rel = attribute(lab, run, method=method, target=target, **{**SMALL[method], "regions": 6})
        assert covered.ravel()[rel.values[0].argmax()] > 0
        assert rel.values[0][covered == 1].min() > rel.values[0][covered == 0].max()


def test_ctrl_c_gives_the_orders_that_were_finished(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"regions": 6, "batch": 2, "seed": 1}
    two = attribute(tiny_random, run, method="shapley", orders=2, **options)
    calls, forward = 0, tiny_random.model.forward
    # the filled picture, three pairs in the first order, then at most three in the second; the third stops
    passes = len(_passes(tiny_random, run, monkeypatch, {"orders": 2, **options}))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > passes:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny_random.model, "forward", interrupted)
    part = attribute(tiny_random, run, method="shapley", orders=9, **options)
    np.testing.assert_allclose(part.values, two.values, atol=1e-5)
    assert part.extras["orders"] == 2
    assert "Interrupted after 2 of 9 orders; the values are the mean over these." in part.notes
    calls = passes
    with pytest.raises(KeyboardInterrupt):
        attribute(tiny_random, run, method="shapley", orders=9, **options)


def _passes(lab: Lab, run: Run, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> list[None]:
    seen: list[None] = []
    forward = lab.model.forward
    with monkeypatch.context() as patch:
        patch.setattr(lab.model, "forward", lambda *args, **kwargs: seen.append(None) or forward(*args, **kwargs))
        attribute(lab, run, method="shapley", **options)
    return seen


def test_ctrl_c_fits_to_the_coalitions_that_were_seen(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"regions": 8, "batch": 5, "target": TARGETS}
    ten = attribute(tiny_random, run, method="kernel_shap", samples=10, **options)
    calls, forward = 0, tiny_random.model.forward

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:  # the whole picture, then two batches of five
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny_random.model, "forward", interrupted)
    part = attribute(tiny_random, run, method="kernel_shap", samples=60, **options)
    np.testing.assert_allclose(part.values, ten.values, atol=1e-4)
    assert "Interrupted after 10 of 60 coalitions; the fit is to these." in part.notes
    calls = 2
    with pytest.raises(KeyboardInterrupt):
        attribute(tiny_random, run, method="kernel_shap", samples=60, **options)


@pytest.mark.parametrize("method", SMALL)
def test_without_captum_it_says_what_to_install(tiny_random: Lab, run: Run, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(LabError, match="need captum, which is not installed; `pip install captum`"):
        attribute(tiny_random, run, method=method)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("shapley", {"orders": 0}, "orders must be a whole number of at least 1, got 0"),
        ("shapley", {"regions": 1}, "regions must be a whole number of at least 2, got 1"),
        ("shapley", {"shape": "round"}, "shape must be one of 'color', 'grid', got 'round'"),
        ("kernel_shap", {"samples": 2}, "samples must be a whole number of at least 3, got 2"),
        ("kernel_shap", {"at": "answer"}, "at must be one of 'pixels', 'vision', 'projector'"),
    ],
)
def test_options_out_of_range_are_refused(tiny_random: Lab, run: Run, method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        attribute(tiny_random, run, method=method, **options)
