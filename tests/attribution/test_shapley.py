"""Shapley values against their definition, greedy search against one by hand, superpixels connected and along colours."""

from __future__ import annotations

import sys
from itertools import permutations
from math import exp
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import ShapleyValueSampling
from torch import Tensor

from llava_lab.attribution import attribute
from llava_lab.attribution.shapley import (
    LeastSquares,
    Path,
    RegionGame,
    fit,
    in_reading_order,
    merged,
    open_game,
    search,
    superpixels,
    walks,
)
from llava_lab.capture import undisturbed
from llava_lab.errors import LabError, OptionError
from llava_lab.models import Lab
from llava_lab.results import Run
from tests.support.closeness import TERMS, close
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


def _all_orders(game: RegionGame) -> np.ndarray:
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
        values = walks(game, 300, batch=3).mean(0)
    np.testing.assert_allclose(values[0], [1, -2, 3, 0], atol=1e-5)
    np.testing.assert_allclose(values[1], [2, 2, 0.5, 0.5], atol=0.3)
    assert game.forwards <= 16  # there are only so many coalitions


def test_the_fit_comes_near_the_definition_and_is_exact_for_a_plain_sum() -> None:
    game = formula_game(LABELS, _formula)
    with torch.random.fork_rng(devices=[]):
        values, samples = fit(game, 400, batch=8, seed=0)
    assert samples == 400
    np.testing.assert_allclose(values[0], [1, -2, 3, 0], atol=1e-4)
    np.testing.assert_allclose(values[1], [2, 2, 0.5, 0.5], atol=0.3)
    np.testing.assert_allclose(values.sum(1), [2, 5], atol=1e-3)
    assert game.forwards <= 16


def test_one_region_has_it_all() -> None:
    game = formula_game(np.zeros((2, 2), int), lambda shown: 3 * shown)
    with torch.random.fork_rng(devices=[]):
        assert fit(game, 10, batch=4, seed=0)[0].tolist() == [[3]]
        assert walks(game, 2, batch=4).tolist() == [[[3]], [[3]]]


def test_least_squares_is_the_weighted_fit_of_the_normal_equations() -> None:
    random = torch.Generator().manual_seed(0)
    shown = (torch.rand(30, 5, generator=random) < 0.5).float()
    scores, weights = torch.rand(30, generator=random), torch.rand(30, generator=random)
    model = LeastSquares()
    model.fit([(shown[:20], scores[:20], weights[:20]), (shown[20:], scores[20:], weights[20:])])
    design = torch.cat([shown, torch.ones(30, 1)], 1).double()
    scale = weights.double()[:, None]
    want = torch.linalg.solve(design.T @ (scale * design), design.T @ (scale[:, 0] * scores.double()))
    close(model.representation()[0].double(), want[:5], terms=TERMS)


def test_equals_one_call_of_captum_with_the_same_seed(tiny_random: Lab, run: Run) -> None:
    rel = attribute(tiny_random, run, method="shapley", regions=5, orders=4, seed=3, target=TARGETS)
    with undisturbed(tiny_random.model):
        targets = rel.targets
        game = open_game(tiny_random, run, targets, regions=5)
        torch.manual_seed(3)
        captum = ShapleyValueSampling(lambda shown: game.worth(shown > 0.5))
        want = captum.attribute(torch.ones(1, 5), n_samples=4)[0]
    close(rel.values, game.shared_out(want.numpy()), of=rel.extras["full"], terms=TERMS)


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
def test_shapley_values_find_a_planted_cause(method: str, fit: str) -> None:
    lab = planted_lab()
    picture = red_picture(120, 80, (60, 10, 80, 30))
    run = scripted_run(lab, picture, "The car is red.", fit=fit)
    covered = run.map.mask_to_patches((picture == np.array(RED)).all(-1))
    for target in ("red", ("red", "blue")):
        rel = attribute(lab, run, method=method, target=target, **{**SMALL[method], "regions": 6})
        assert covered.ravel()[rel.values[0].argmax()] > 0
        assert rel.values[0][covered == 1].min() > rel.values[0][covered == 0].max()


@pytest.mark.parametrize("method", SMALL)
def test_without_captum_it_says_what_to_install(tiny_random: Lab, run: Run, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(LabError, match="needs captum, which is not installed; `pip install captum`"):
        attribute(tiny_random, run, method=method)


# -- greedy search -------------------------------------------------------------------------


GREEDY: dict[str, Any] = {"method": "greedy", "regions": 4}


def _probability(shown: Tensor) -> Tensor:
    """Log-probability of a word for which 0 or 1 is enough, 2 cannot be replaced, and 3 speaks against it."""
    zero, one, two, three = shown.unbind(1)
    return torch.log(0.1 + 0.4 * torch.maximum(zero, one) + 0.35 * two - 0.05 * three)[:, None]


def test_the_order_and_the_two_parts_are_those_of_a_search_by_hand() -> None:
    path = Path(slice(0, 1), contrast=False)
    search(formula_game(LABELS, _probability), [path], 4)
    # alone, 0 gives 0.5 and 2 only 0.45; but without 0 there is 1, and without 2 only 0.45 is left of 0.8
    assert path.chosen == [2, 0, 1, 3]
    np.testing.assert_allclose(path.insight, [0.45, 0.85, 0.85, 0.8], atol=1e-6)
    np.testing.assert_allclose(path.necessity, [0.55, 0.55, 0.95, 0.9], atol=1e-6)
    assert path.before == pytest.approx(0.1 + 1 - 0.8, abs=1e-6)
    # the sum of both goes 0.3, 1.0, 1.4, 1.8, 1.7: steps of 0.7, 0.4, 0.4, 0.1
    np.testing.assert_allclose(path.values(4), [0.9, 0.5, 1.6, 0.1], atol=1e-6)


def test_of_equals_the_first_in_reading_order_is_taken() -> None:
    path = Path(slice(0, 1), contrast=False)
    search(formula_game(LABELS, lambda shown: torch.zeros(len(shown), 1) - 1), [path], 4)
    assert path.chosen == [0, 1, 2, 3]
    np.testing.assert_allclose(path.values(4), 0, atol=1e-6)


def test_equals_one_look_at_a_time(tiny_random: Lab, run: Run) -> None:
    """The same search, written out, on the probabilities that whole forwards give."""
    rel = attribute(tiny_random, run, **GREEDY, target="blue", fill="mean", batch=3)
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
    close(rel.extras["insight"][0], [probability(frozenset(chosen[: k + 1])) for k in range(4)], terms=TERMS)
    without = [1 - probability(every - set(chosen[: k + 1])) for k in range(4)]
    close(rel.extras["necessity"][0], without, terms=TERMS)
    assert rel.passes["forward"] == len(known)
    means = [rel.values[0][labels == region].mean() for region in chosen]
    assert means == sorted(means, reverse=True)


def test_several_targets_share_looks_and_get_their_own_search(tiny_random: Lab, run: Run) -> None:
    wanted: list[Any] = ["blue", ("blue", "green"), "answer"]
    together = attribute(tiny_random, run, **GREEDY, target=wanted)
    alone = [attribute(tiny_random, run, **GREEDY, target=one) for one in wanted]
    for i, one in enumerate(alone):
        assert together.extras["order"][i] == one.extras["order"][0]
        close(together.values[i], one.values[0], terms=TERMS)
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


# -- superpixels ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> Lab:
    return planted_lab()


def _red_run(lab: Lab, picture: np.ndarray, fit: str = "pad") -> Run:
    return scripted_run(lab, picture, "The car is red.", fit=fit)


def _connected(mask: np.ndarray) -> bool:
    """Whether the patches of `mask` hang together by their edges."""
    left = set(zip(*np.nonzero(mask), strict=True))
    edge = [left.pop()]
    while edge:
        y, x = edge.pop()
        for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if near in left:
                left.remove(near)
                edge.append(near)
    return not left


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("regions", [2, 5, 16])
@pytest.mark.parametrize("shape", ["color", "grid"])
def test_regions_are_connected_and_cover_the_picture_alone(planted: Lab, fit: str, regions: int, shape: str) -> None:
    run = _red_run(planted, red_picture(120, 80, (60, 10, 80, 30)), fit)
    labels = superpixels(run, regions, shape=shape)
    assert ((labels >= 0) == (run.map.coverage() > 0)).all()
    count = int(labels.max()) + 1
    assert count == regions if shape == "color" else abs(count - regions) <= max(2, regions // 2)
    assert all(_connected(labels == region) for region in range(count))
    first = [int(np.flatnonzero(labels.ravel() == region)[0]) for region in range(count)]
    assert first == sorted(first), "regions are numbered in reading order"


def test_a_colour_of_its_own_is_a_region_of_its_own(planted: Lab) -> None:
    picture = red_picture(96, 96, (24, 48, 48, 72))  # four patches
    run = _red_run(planted, picture)
    red = run.map.mask_to_patches((picture == np.array(RED)).all(-1)) > 0.9
    labels = superpixels(run, 4)
    assert set(labels[red].tolist()).isdisjoint(labels[~red].tolist())
    assert len(set(labels[red].tolist())) == 1


def test_a_plain_picture_is_cut_by_place(planted: Lab) -> None:
    sizes = np.bincount(superpixels(_red_run(planted, np.full((96, 96, 3), 90, np.uint8)), 4).ravel())
    assert len(sizes) == 4
    assert sizes.min() >= 8
    assert sizes.max() <= 26


def test_neighbours_are_merged_by_what_their_union_costs() -> None:
    """Three patches of 0 and one of 1 would be mixed for 3/4 of a square of 1, 1 and 2.1 for 1/2 of one of 1.1."""
    row = np.array([0, 0, 0, 1, 2.1])[None, :, None]
    assert in_reading_order(merged(row, np.ones((1, 5), bool), 2)).tolist() == [[0, 0, 0, 1, 1]]
    assert in_reading_order(merged(row, np.array([[True, True, False, True, True]]), 2)).tolist() == [[0, 0, -1, 1, 1]]


def test_same_picture_same_regions(planted: Lab) -> None:
    run = _red_run(planted, np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    np.testing.assert_array_equal(superpixels(run, 9), superpixels(run, 9))


def test_few_patches_are_a_region_each(tiny_random: Lab) -> None:
    labels = superpixels(scripted_run(tiny_random, np.zeros((32, 32, 3), np.uint8), "The car is blue."), 30)
    assert sorted(labels.ravel().tolist()) == list(range(16))


def test_unknown_shapes_and_too_few_regions_are_refused(planted: Lab) -> None:
    run = _red_run(planted, np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(OptionError, match="shape must be one of 'color', 'grid', got 'hex'"):
        superpixels(run, 4, shape="hex")
    with pytest.raises(OptionError, match="at least 2, got 1"):
        superpixels(run, 1)


def test_a_game_looks_at_each_coalition_once_and_never_hides_padding() -> None:
    labels = np.array([[0, 0, -1], [1, 2, -1]])
    seen: list[torch.Tensor] = []

    def formula(shown: torch.Tensor) -> torch.Tensor:
        seen.extend(shown.clone())
        return shown @ torch.tensor([[1.0], [2.0], [4.0]])

    game = formula_game(labels, formula, batch=2)
    shown = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 1], [1, 1, 1]], dtype=torch.bool)
    assert game.worth(shown)[:, 0].tolist() == [5, 0, 5, 7]
    assert game.worth(shown[[2, 0]])[:, 0].tolist() == [5, 5]
    assert len(seen) == game.forwards == 3
    np.testing.assert_allclose(game.shared_out(np.array([[2.0, 3.0, 4.0]])), [[[1, 1, 0], [3, 4, 0]]])
