"""The cloud's measures against clouds whose answer is known, and the table with its shuffled-weights control."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.probes import geometry, token_geometry
from llava_lab.results import TokenGeometry
from tests.support.interrupts import interrupting
from tests.support.probe_cases import placed_lab, red_squares

AT = ("before", "after", 3)


@pytest.fixture(scope="module")
def found(tiny_folder: Path) -> TokenGeometry:
    return token_geometry(placed_lab(tiny_folder), red_squares(6)[0], at=AT, per_picture=16, neighbours=4, progress=False)


def test_effective_rank_counts_equal_directions() -> None:
    square = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]], float)
    assert geometry.effective_rank(square) == pytest.approx(2)
    assert geometry.effective_rank(square + 100) == pytest.approx(2)
    assert geometry.effective_rank(square * [1, 0, 0]) == pytest.approx(1)
    assert np.isnan(geometry.effective_rank(np.ones((4, 3))))


def test_anisotropy_is_the_mean_cosine_of_pairs() -> None:
    rows = np.random.default_rng(0).normal(1, 1, (9, 5))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = (unit @ unit.T)[~np.eye(9, dtype=bool)]
    assert geometry.anisotropy(rows) == pytest.approx(pairs.mean())
    assert geometry.anisotropy(np.ones((4, 3))) == pytest.approx(1)


def test_gap_is_the_distance_of_mean_directions() -> None:
    assert geometry.gap(np.array([[2.0, 0]]), np.array([[0, 5.0]])) == pytest.approx(2**0.5)
    assert geometry.gap(np.eye(2), 3 * np.eye(2)) == 0


def test_cka_is_one_for_turned_and_scaled_clouds_and_small_for_unrelated_ones() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 5))
    turn, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    assert geometry.linear_cka(rows, 3 * rows @ turn + 7) == pytest.approx(1)
    assert geometry.linear_cka(rows, rng.normal(size=(400, 8))) < 0.1
    wide = rng.normal(size=(6, 40))  # fewer points than dimensions: the other Gram matrix
    assert geometry.linear_cka(wide, wide) == pytest.approx(1)
    assert np.isnan(geometry.linear_cka(rows, np.ones((400, 2))))


def test_neighbours_are_the_nearest_by_angle_and_never_oneself() -> None:
    angles = np.deg2rad([0, 10, 90, 101])
    rows = np.stack([np.cos(angles), np.sin(angles)], 1) * [[1], [5], [1], [9]]
    sets = geometry.nearest_sets(rows, 1)
    assert np.argwhere(sets).tolist() == [[0, 1], [1, 0], [2, 3], [3, 2]]


def test_outliers_are_found_by_their_own_spread_at_any_scale() -> None:
    norms = np.exp(np.random.default_rng(0).normal(0, 0.1, 200))
    assert not geometry.outliers(norms).any()
    norms[[3, 77]] = 6
    for scale in (1e-3, 1.0, 1e4):
        assert np.flatnonzero(geometry.outliers(scale * norms)).tolist() == [3, 77]
    assert not geometry.outliers(np.full(16, 2.0)).any()
    assert np.flatnonzero(geometry.outliers(np.array([1.0] * 15 + [9.0]))).tolist() == [15]


def test_table_has_its_ranges_its_identities_and_a_control(found: TokenGeometry) -> None:
    assert found.stages == ("before", "after", "layer 3")
    assert np.isnan(found.measure("modality gap")[0])
    assert np.isfinite(found.measure("modality gap")[1:]).all()
    np.testing.assert_allclose(found.measure("norm"), np.median(found.norms, axis=(1, 2)))
    np.testing.assert_allclose(np.diag(found.cka), 1, atol=1e-5)
    np.testing.assert_allclose(found.cka, found.cka.T, atol=1e-5)
    np.testing.assert_allclose(np.diag(found.overlap), 1)
    assert (found.overlap >= 0).all()
    assert (found.measure("position") > 3 * found.chance_position).all()
    assert found.chance_position == 0.25
    assert found.chance_overlap == pytest.approx(4 / 15)
    assert found.norms.shape == found.sinks.shape == (3, 6, 16)
    assert np.isfinite(found.control[1:]).all()
    assert np.abs(found.control - found.values)[1:].max() > 1e-2
    assert (found.measure("norm", control=True) != found.measure("norm")).all()


def test_weights_come_back_bitwise_and_no_control_means_not_a_number(tiny_random: Lab) -> None:
    before = {name: one.clone() for name, one in tiny_random.model.state_dict().items()}
    token_geometry(tiny_random, red_squares(2)[0], at="after", per_picture=8, progress=False)
    assert all(torch.equal(one, before[name]) for name, one in tiny_random.model.state_dict().items())
    bare = token_geometry(tiny_random, red_squares(2)[0], at="after", per_picture=8, control=False, progress=False)
    assert np.isnan(bare.control).all()
    assert np.isfinite(bare.values).all()


@pytest.mark.parametrize(("stops", "pictures"), [(3, 3), (8, 6)])
def test_ctrl_c_keeps_what_was_read_and_puts_the_weights_back(
    tiny_random: Lab, stops: int, pictures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: one.clone() for name, one in tiny_random.model.state_dict().items()}
    monkeypatch.setattr(geometry, "read_stages", interrupting(geometry.read_stages, at=stops + 1))
    found = token_geometry(tiny_random, red_squares(6)[0], at="after", per_picture=8, progress=False)
    assert found.interrupted
    assert found.pictures == pictures
    assert np.isnan(found.control).all()
    assert all(torch.equal(one, before[name]) for name, one in tiny_random.model.state_dict().items())


def test_result_survives_the_disk(found: TokenGeometry, tmp_path: Path) -> None:
    again = TokenGeometry.load(found.save(tmp_path / "cloud.npz"))
    np.testing.assert_array_equal(again.values, found.values)
    np.testing.assert_array_equal(again.sinks, found.sinks)
    with pytest.raises(OptionError, match="measure must be one of norm, effective rank, .*, got 'size'"):
        again.measure("size")


def test_bad_input_is_refused(tiny_random: Lab) -> None:
    with pytest.raises(OptionError, match="at least two pictures, got 1"):
        token_geometry(tiny_random, red_squares(1)[0])
    with pytest.raises(OptionError, match="neighbours must be fewer than the 16 patches of a picture, got 16"):
        token_geometry(tiny_random, red_squares(2)[0], neighbours=16)
    with pytest.raises(OptionError, match="a stage is 'before', 'after' or a layer from 0 to 3, got 'middle'"):
        token_geometry(tiny_random, red_squares(2)[0], at="middle")
