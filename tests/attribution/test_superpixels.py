"""Superpixels: connected, as many as asked for, along colours, never on padding; and the game over them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llava_lab.attribution.shapley import _in_reading_order, _merged, superpixels
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.results import Run
from tests.support.games import formula_game
from tests.support.planted import RED, planted_lab, red_picture, scripted_run


@pytest.fixture(scope="module")
def planted() -> Lab:
    return planted_lab()


def _run(lab: Lab, picture: np.ndarray, fit: str = "pad") -> Run:
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
    run = _run(planted, red_picture(120, 80, (60, 10, 80, 30)), fit)
    labels = superpixels(run, regions, shape=shape)
    assert ((labels >= 0) == (run.map.coverage() > 0)).all()
    count = int(labels.max()) + 1
    assert count == regions if shape == "color" else abs(count - regions) <= max(2, regions // 2)
    assert all(_connected(labels == region) for region in range(count))
    first = [int(np.flatnonzero(labels.ravel() == region)[0]) for region in range(count)]
    assert first == sorted(first), "regions are numbered in reading order"


def test_a_colour_of_its_own_is_a_region_of_its_own(planted: Lab) -> None:
    picture = red_picture(96, 96, (24, 48, 48, 72))  # four patches
    run = _run(planted, picture)
    red = run.map.mask_to_patches((picture == np.array(RED)).all(-1)) > 0.9
    labels = superpixels(run, 4)
    assert set(labels[red].tolist()).isdisjoint(labels[~red].tolist())
    assert len(set(labels[red].tolist())) == 1


def test_a_plain_picture_is_cut_by_place(planted: Lab) -> None:
    sizes = np.bincount(superpixels(_run(planted, np.full((96, 96, 3), 90, np.uint8)), 4).ravel())
    assert len(sizes) == 4
    assert sizes.min() >= 8
    assert sizes.max() <= 26


def test_neighbours_are_merged_by_what_their_union_costs() -> None:
    """Three patches of 0 and one of 1 would be mixed for 3/4 of a square of 1, 1 and 2.1 for 1/2 of one of 1.1."""
    row = np.array([0, 0, 0, 1, 2.1])[None, :, None]
    assert _in_reading_order(_merged(row, np.ones((1, 5), bool), 2)).tolist() == [[0, 0, 0, 1, 1]]
    assert _in_reading_order(_merged(row, np.array([[True, True, False, True, True]]), 2)).tolist() == [[0, 0, -1, 1, 1]]


def test_same_picture_same_regions(planted: Lab) -> None:
    run = _run(planted, np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    np.testing.assert_array_equal(superpixels(run, 9), superpixels(run, 9))


def test_few_patches_are_a_region_each(tiny_random: Lab) -> None:
    labels = superpixels(scripted_run(tiny_random, np.zeros((32, 32, 3), np.uint8), "The car is blue."), 30)
    assert sorted(labels.ravel().tolist()) == list(range(16))


def test_unknown_shapes_and_too_few_regions_are_refused(planted: Lab) -> None:
    run = _run(planted, np.zeros((32, 32, 3), np.uint8))
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
