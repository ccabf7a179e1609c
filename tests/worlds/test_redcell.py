"""The red-cell task: one odd cell, exactly where it says, aligned with the patches; and the positive control built on it."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llava_lab.errors import DataError, OptionError
from llava_lab.interventions import positive_control
from llava_lab.interventions.ablate import Asked, places_of
from llava_lab.models import Lab
from llava_lab.worlds import redcell
from llava_lab.worlds.drawing import COLORS
from tests.support.gradients import noise_run
from tests.support.planted import RED, planted_lab, red_picture


@pytest.mark.parametrize("index", range(12))
def test_one_cell_and_only_it_has_the_odd_colour(index: int) -> None:
    one = redcell.scene("test", index, rows=5, cols=7)
    pixels = np.asarray(one.picture())
    assert pixels.shape == (60, 84, 3)
    assert one.color != one.others
    odd = (pixels == COLORS[one.color]).all(-1)
    np.testing.assert_array_equal(odd, one.mask()[0])
    assert (pixels[~odd] == COLORS[one.others]).all()
    assert odd.sum() == 144
    assert one.color in one.answer


def test_same_seed_same_bytes_and_every_place_and_colour_comes() -> None:
    assert redcell.scene("test", 3).picture().tobytes() == redcell.scene("test", 3).picture().tobytes()
    assert redcell.scene("test", 3) != redcell.scene("train", 3)
    many = [redcell.scene("train", i, rows=3) for i in range(300)]
    assert {(one.row, one.col) for one in many} == {(i, j) for i in range(3) for j in range(3)}
    assert {one.color for one in many} == set(COLORS)


def test_cells_are_patches_exactly(tiny_random: Lab) -> None:
    one = redcell.scene("test", 1, rows=4)
    run = tiny_random.ask(np.asarray(one.picture()), one.question, max_new_tokens=1)
    covered = run.map.mask_to_patches(one.mask()[0])
    np.testing.assert_allclose(covered, one.cells(), atol=1e-6)
    assert one.patches(4, 4) == [(one.row, one.col)]
    assert len(one.patches(8, 8)) == 4
    with pytest.raises(DataError, match="expected a patch grid that 4x4 cells divide, got 6x6"):
        one.patches(6, 6)


def test_a_corrupted_grid_differs_in_the_odd_cell_alone() -> None:
    one = redcell.scene("test", 2, color="red")
    free = next(name for name in COLORS if name not in (one.color, one.others))
    other = redcell.corrupted(one, free)
    changed = (np.asarray(one.picture()) != np.asarray(other.picture())).any(-1)
    np.testing.assert_array_equal(changed, one.mask()[0])
    with pytest.raises(DataError, match="other than red"):
        redcell.corrupted(one, "red")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "exam"}, "split must be"),
        ({"rows": 1}, "at least 2x2 cells"),
        ({"color": "mauve"}, "color must be"),
        ({"index": -1}, "0 or more"),
    ],
)
def test_bad_requests_are_said_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        redcell.scene(**options)


def test_the_control_s_random_patches_are_as_many_and_elsewhere(tiny_random: Lab) -> None:
    run = noise_run(tiny_random, fit="crop")
    mask = np.zeros(run.picture.shape[:2], bool)
    mask[15:25, 25:35] = True
    asked = Asked(run.picture, "?", "?", mask)
    for buffer in (0, 1):
        found = places_of(run, asked, buffer, np.random.default_rng(0))
        if found is None:
            assert buffer
            continue
        assert found[0].sum() == found[1].sum()
        assert not (found[0] & found[1]).any()


def test_the_control_passes_where_the_place_is_planted_and_counts_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = planted_lab()
    module: Any = sys.modules[positive_control.__module__]

    def items(lab: Lab, task: str, split: str, seed: int) -> Any:
        for index in range(40):
            left, top = 8 * (index % 7), 8 * (index // 7)
            picture = red_picture(64, 64, (left, top, left + 8, top + 8))
            question = "What color is the car?"
            right = lab.ask(picture, question, max_new_tokens=48).answer
            yield Asked(picture, question, right, (picture == np.array(RED)).all(-1))

    monkeypatch.setattr(module, "_items", items)
    rates = positive_control(lab, n=12, fill="zero")
    assert rates.n == 12
    assert rates.deciding == rates.changed[:, 0].mean()
    assert rates.random == rates.changed[:, 1].mean()
    assert rates.deciding == 1.0
    assert rates.random == 0.0
    assert rates.passed
    assert (rates.patches == 1).all()
    assert not replace(rates, random_interval=(0.0, 1.0)).passed


def test_a_model_that_answers_nothing_rightly_is_said(tiny_random: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = sys.modules[positive_control.__module__]
    monkeypatch.setattr(module, "MOST", 1)
    with pytest.raises(OptionError, match="answers rightly, got none of 2"):
        positive_control(tiny_random, n=2)
