"""The linear stand-in: closed form against hand oracles, scored on pictures it never saw, controls beside it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llava_lab as ll
from llava_lab.connectors.linearize import Slopes, Sums, gelu_slope, jacobian, random_map
from llava_lab.errors import DataError, OptionError
from llava_lab.models import Lab, layout
from tests.support.leftovers import state_of

PICTURES = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8) for i in range(16)]


@pytest.fixture(scope="module")
def fit(tiny_random: Lab) -> ll.Linearized:
    return ll.linearize(tiny_random, PICTURES)


def test_normal_equations_give_ridge_s_own_solution_in_any_portions() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(5, 1, (60, 7)), rng.normal(-3, 2, (60, 4))
    penalty = 0.1
    centred, wanted = x - x.mean(0), y - y.mean(0)
    gram = centred.T @ centred
    oracle = np.linalg.solve(gram + penalty * np.trace(gram) / 7 * np.eye(7), centred.T @ wanted).T
    for portions in (1, 3, 60):
        sums = Sums()
        for part_x, part_y in zip(np.array_split(x, portions), np.array_split(y, portions), strict=True):
            sums.add(torch.from_numpy(part_x), torch.from_numpy(part_y))
        full, _ = sums.solve(penalty)
        assert np.allclose(full, oracle, atol=1e-10)
        assert np.allclose(sums.output_mean, y.mean(0))
        error = ((wanted - centred @ oracle.T) ** 2).sum() / (wanted**2).sum()
        assert sums.r2(full) == pytest.approx(1 - error)
        assert sums.xx.shape == (7, 7)  # what is kept does not grow


def test_a_linear_connector_is_recovered(tiny_random: Lab) -> None:
    planted: Any = ll.new_connector(tiny_random, "linear", seed=4)
    with ll.connector(tiny_random, planted) as lab:
        found = ll.linearize(lab, PICTURES, ridge=0)
    assert found.r2 == pytest.approx(1, abs=1e-9)
    assert np.allclose(found.weight, planted.linear_1.weight, atol=1e-3)
    assert found.token_r2.shape == (4, 4)
    assert found.token_r2.min() > 1 - 1e-6
    assert found.rank_r2[-1] == pytest.approx(found.r2)
    assert found.cosine[0] == pytest.approx(1)
    assert found.norm_error[0] == pytest.approx(0, abs=1e-5)


def test_controls_stand_below_the_fit(fit: ll.Linearized) -> None:
    assert fit.variants == ("linear", "mean", "shuffle", "random")  # identity needs equal widths
    linear, mean, shuffle, random = fit.variant_r2
    assert mean == pytest.approx(0, abs=1e-9)
    assert linear > 0.5 > mean > max(shuffle, random)
    assert fit.r2 == linear < fit.train_r2 <= 1
    low, high = fit.r2_interval
    assert low < fit.r2 < high
    assert fit.pictures == (12, 4)
    assert fit.tokens == (192, 64)


def test_the_random_control_has_the_fit_s_size(fit: ll.Linearized) -> None:
    full = torch.from_numpy(fit.full)
    assert float(random_map(full).norm()) == pytest.approx(float(full.norm()), rel=1e-5)
    assert torch.equal(random_map(full, seed=1), random_map(full, seed=1))
    assert not torch.equal(random_map(full, seed=1), random_map(full, seed=2))


def test_the_rank_curve_is_what_each_cut_map_scores(tiny_random: Lab, fit: ll.Linearized) -> None:
    features, outputs = _held_out(tiny_random)
    spread = ((outputs - fit.output_mean) ** 2).sum()
    for rank, r2 in zip(fit.ranks, fit.rank_r2, strict=True):
        cut = fit.at_rank(rank)
        assert np.linalg.matrix_rank(cut.weight.astype(np.float64), tol=1e-4) == rank
        guess = features @ cut.weight.T.astype(np.float64) + cut.bias
        assert 1 - ((outputs - guess) ** 2).sum() / spread == pytest.approx(r2, abs=1e-4)
    assert fit.ranks[-1] == fit.limit == 32
    assert np.array_equal(fit.at_rank(fit.limit).weight, fit.full)


def test_the_cut_keeps_more_of_the_training_outputs_than_any_other_of_its_rank(tiny_random: Lab, fit: ll.Linearized) -> None:
    features = np.concatenate([_tokens(tiny_random, i)[0] for i in range(16) if i % 4 != 3])
    moved = (features - fit.feature_mean) @ fit.full.T.astype(np.float64)
    best = np.linalg.svd(moved, compute_uv=False)
    kept = moved @ fit.directions[:, :3]
    assert (kept**2).sum() == pytest.approx((best[:3] ** 2).sum(), rel=1e-5)


def test_scored_pictures_never_reach_the_fit(tiny_random: Lab, fit: ll.Linearized) -> None:
    others = [np.zeros((32, 32, 3), np.uint8) if i % 4 == 3 else one for i, one in enumerate(PICTURES)]
    again = ll.linearize(tiny_random, others)
    assert np.array_equal(again.weight, fit.weight)
    assert again.r2 != fit.r2


def test_pictures_are_drawn_when_needed_and_let_go(tiny_random: Lab) -> None:
    alive: list[weakref.ref] = []
    most = 0

    def drawer(i: int) -> Callable[[], np.ndarray]:
        def draw() -> np.ndarray:
            nonlocal most
            picture = PICTURES[i].copy()
            alive.append(weakref.ref(picture))
            most = max(most, sum(one() is not None for one in alive))
            return picture

        return draw

    ll.linearize(tiny_random, [drawer(i) for i in range(16)], batch=2)
    assert len(alive) == 16  # each once
    assert most <= 3


def test_nothing_is_left_behind(tiny_random: Lab, fit: ll.Linearized) -> None:
    tiny_random.ask(PICTURES[0], "What?", max_new_tokens=1)  # transformers keeps hooks of its own from the first forward on
    before, module = state_of(tiny_random), layout.connector_of(tiny_random.model)
    ll.local_linearity(tiny_random, fit, PICTURES, tokens=2)
    assert state_of(tiny_random) == before
    assert layout.connector_of(tiny_random.model) is module
    assert not any(p.requires_grad for p in tiny_random.model.parameters())


def test_the_fit_is_plugged_in_as_a_linear_connector(tiny_random: Lab, fit: ll.Linearized, picture: np.ndarray) -> None:
    with ll.connector(tiny_random, fit) as lab:  # fitted beside this model: no warning
        assert lab.card.connector == "linear"
        assert lab.ask(picture, "What color is the car?", max_new_tokens=2).fingerprint != fit.fingerprint
    assert tiny_random.fingerprint == fit.fingerprint


def test_results_come_back_from_their_files(tiny_random: Lab, fit: ll.Linearized, tmp_path: Path) -> None:
    local = ll.local_linearity(tiny_random, fit, PICTURES, tokens=2)
    for result in (fit, local):
        again = type(result).load(result.save(tmp_path / "result.npz"))
        for name, value in vars(result).items():
            assert np.array_equal(getattr(again, name), value), name


def test_a_line_is_a_line_everywhere_and_an_mlp_is_not(tiny_random: Lab, fit: ll.Linearized) -> None:
    bent = ll.local_linearity(tiny_random, fit, PICTURES, tokens=4)
    assert bent.units == 64
    assert bent.bent_share > 0
    assert bent.open_share + bent.shut_share + bent.bent_share == pytest.approx(1)
    assert bent.cosine.max() < 0.999
    assert abs(bent.random_cosine).max() < 0.2 < bent.cosine.min()
    with ll.connector(tiny_random, ll.new_connector(tiny_random, "linear")) as lab:
        straight = ll.local_linearity(lab, ll.linearize(lab, PICTURES, ridge=0), PICTURES, tokens=4)
    assert straight.units == 0
    assert straight.cosine.min() > 0.9999
    assert straight.distance.max() < 1e-2


def test_the_jacobian_is_the_connector_s_own(tiny_random: Lab) -> None:
    feature = torch.randn(32, generator=torch.Generator().manual_seed(0))
    found = jacobian(tiny_random, feature)
    connector: Any = layout.connector_of(tiny_random.model)
    slope = gelu_slope(connector.linear_1(feature))
    oracle = connector.linear_2.weight @ (slope[:, None] * connector.linear_1.weight)
    assert torch.allclose(found.float(), oracle, atol=1e-4)


def test_gelu_slopes_are_counted_where_they_are() -> None:
    h = torch.linspace(-4, 4, 9, dtype=torch.float64).requires_grad_()
    torch.nn.functional.gelu(h).sum().backward()
    assert torch.allclose(gelu_slope(h.detach()), h.grad)  # type: ignore[arg-type]
    gelu = torch.nn.GELU()
    slopes = Slopes(0.05)
    with slopes.watched(gelu):
        gelu(torch.tensor([[5.0, -5.0, 0.0], [6.0, -6.0, 1.0]]))
    found = slopes.found()
    assert [found[name] for name in ("units", "open_share", "shut_share", "bent_share")] == pytest.approx(
        [3, 1 / 3, 1 / 3, 1 / 3]
    )
    assert found["unit_r2"][0] == pytest.approx(1, abs=1e-5)
    assert not gelu._forward_hooks


@pytest.mark.parametrize(
    ("pictures", "options", "error", "message"),
    [
        (PICTURES[:1], {}, DataError, "1 pictures with held_out=0.25 leave 1 to fit and 0 to score"),
        (iter(PICTURES), {}, OptionError, "pictures must be a list of pictures, got list_iterator"),
        (PICTURES, {"held_out": 1}, OptionError, "between 0 and 1, got 1"),
        (PICTURES, {"ridge": -1}, OptionError, "ridge must be 0 or more, got -1"),
        (PICTURES, {"rank": 99}, OptionError, "rank must be None or from 1 to 32, got 99"),
        (PICTURES, {"ranks": (0, 4)}, OptionError, r"ranks must be from 1 to 32, got \[0\]"),
    ],
)
def test_bad_requests_are_refused(
    tiny_random: Lab, pictures: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ll.linearize(tiny_random, pictures, **options)


def test_a_connector_that_mixes_patches_has_no_linear_map(tiny_random: Lab, fit: ll.Linearized) -> None:
    with (
        ll.connector(tiny_random, ll.new_connector(tiny_random, "avgpool")) as lab,
        pytest.raises(OptionError, match=r"got 4 tokens of 16 patches \(avgpool"),
    ):
        ll.linearize(lab, PICTURES)
    with pytest.raises(OptionError, match="rank must be from 1 to 32, got 33"):
        fit.at_rank(33)


def _tokens(lab: Lab, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and outputs of one picture, read by hand: states before the last layer, without the class token."""
    with torch.no_grad():
        states = layout.vision_tower(lab.model)(lab.pixels(PICTURES[number]), output_hidden_states=True).hidden_states
        features = states[-2][0, 1:]
        return features.double().numpy(), layout.connector_of(lab.model)(features).double().numpy()


def _held_out(lab: Lab) -> tuple[np.ndarray, np.ndarray]:
    pairs = [_tokens(lab, number) for number in range(3, 16, 4)]
    return np.concatenate([x for x, _ in pairs]), np.concatenate([y for _, y in pairs])
