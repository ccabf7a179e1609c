"""Activation patching: clean into clean is nothing, all of a layer is everything, and a planted path is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_lab.errors import OptionError
from llava_lab.interventions import patch
from llava_lab.models import Lab
from llava_lab.results import PatchGrid, Run
from tests.support.closeness import TERMS, close
from tests.support.gradients import noise_run
from tests.support.interrupts import interrupting
from tests.support.leftovers import state_of
from tests.support.planted import planted_lab, red_picture, scripted_run

TARGETS = ["blue", ("blue", "green")]
BLACK = np.zeros((20, 20, 3), np.uint8)


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    return noise_run(tiny_random, fit="crop")


def test_clean_into_clean_is_identity(tiny_random: Lab, run: Run) -> None:
    before = state_of(tiny_random)
    grid = patch(tiny_random, run, run, metric=TARGETS, components=("residual", "attention", "mlp"))
    np.testing.assert_array_equal(grid.scores, np.broadcast_to(grid.clean, grid.scores.shape))
    assert np.isnan(grid.values).all()
    assert any("changes nothing" in note for note in grid.notes)
    assert state_of(tiny_random) == before


@pytest.mark.parametrize("corrupt", ["grey", "blur", "noise", BLACK], ids=["grey", "blur", "noise", "other"])
def test_all_of_a_layer_brings_the_clean_answer_back_exactly(tiny_random: Lab, run: Run, corrupt: Any) -> None:
    grid = patch(tiny_random, run, corrupt, sites=["all"], metric=TARGETS)
    assert (grid.clean != grid.corrupt).all()
    np.testing.assert_array_equal(grid.scores[0, 0], np.broadcast_to(grid.clean, (3, 2)))
    np.testing.assert_array_equal(grid.values, 1)
    assert (grid.answers == grid.clean_answer).all()


def test_information_moves_from_the_picture_to_the_last_position(tiny_random: Lab, run: Run) -> None:
    grid = patch(tiny_random, run, "noise", sites=["image", "last"], metric="blue")
    # after the last layer nobody reads the picture any more, and all is at the last position
    close(grid.values[0, :, 2, 0] * (grid.clean - grid.corrupt), [0, 1] * (grid.clean - grid.corrupt), of=grid.clean, terms=TERMS)
    assert grid.proof["states"] > 0


def test_the_planted_path_is_found(tmp_path: Path) -> None:
    lab = planted_lab()
    run = scripted_run(lab, red_picture(64, 64, (24, 24, 40, 40)), "It is red.")
    grid = patch(lab, run, "grey", sites=["image", "last"], components=("residual", "attention", "mlp"), metric=("red", "blue"))
    values = dict(zip(grid.components, grid.values[..., 0], strict=True))
    # layer 0 moves redness from the patches to the text by attention; nothing else ever happens
    np.testing.assert_allclose(values["residual"], [[0, 0], [1, 1]], atol=1e-4)
    np.testing.assert_allclose(values["attention"], [[0, 0], [1, 0]], atol=1e-4)
    np.testing.assert_allclose(values["mlp"], 0, atol=1e-4)
    again = PatchGrid.load(grid.save(tmp_path / "grid.npz"))
    np.testing.assert_array_equal(again.values, grid.values)
    np.testing.assert_array_equal(again.answers, grid.answers)


@pytest.mark.parametrize(
    ("corrupt", "options", "message"),
    [
        ("black", {}, "corrupt must be one of grey, blur, noise, a picture, or a Run; got 'black'"),
        ("grey", {"sites": []}, "sites must be a list"),
        ("grey", {"sites": ["tail"]}, "no segment 'tail'"),
        ("grey", {"sites": ["system"]}, "lies before the picture"),
        ("grey", {"components": ("heads",)}, "components must be one of 'residual'"),
        ("grey", {"layers": [3]}, "layer numbers from 0 to 2"),
    ],
)
def test_bad_input_is_said_in_one_line(tiny_random: Lab, run: Run, corrupt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as error:
        patch(tiny_random, run, corrupt, **options)
    assert "\n" not in str(error.value)


def test_ctrl_c_gives_the_finished_cells(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state_of(tiny_random)
    # two beginnings, two readings, two cells
    monkeypatch.setattr(tiny_random.model, "forward", interrupting(tiny_random.model.forward, at=7))
    grid = patch(tiny_random, run, "grey")
    monkeypatch.undo()
    assert grid.interrupted
    assert int((~np.isnan(grid.scores[..., 0])).sum()) == 2
    assert state_of(tiny_random) == before
