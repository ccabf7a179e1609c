"""Occlusion from coarse to fine: exact where it is fine, honest where it is coarse, and much cheaper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llava_lab.attribution import attribute
from llava_lab.attribution.occlusion import cut, first_side, tiles
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.results import Run
from tests.support.planted import RED, planted_lab, red_picture, scripted_run

TARGETS = ["answer", "blue", ("blue", "green")]


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.", fit="crop")


@pytest.fixture(scope="module")
def planted() -> Lab:
    return planted_lab()


@pytest.mark.parametrize("at", ["pixels", "projector"])
def test_is_exact_where_it_is_fine_and_shared_out_where_it_is_not(tiny_random: Lab, run: Run, at: str) -> None:
    options: dict[str, Any] = {"at": at, "target": TARGETS}
    rough = attribute(tiny_random, run, method="occlusion_coarse", first=2, keep=2, **options)
    fine = attribute(tiny_random, run, method="occlusion", block=1, **options).values
    coarse = attribute(tiny_random, run, method="occlusion", block=2, **options).values / 4
    assert rough.extras["rounds"] == [4, 8]
    assert rough.passes["forward"] == 12 + 1 + (at == "projector")  # one more through the tower for the grey picture
    exact = np.isclose(rough.values, fine, atol=3e-5).all(0)
    shared = np.isclose(rough.values, coarse, atol=3e-5).all(0)
    assert exact.sum() == 8
    assert (exact | shared).all()


@pytest.mark.parametrize("seed", [3, 5])  # of 5, the largest change makes the answer likelier
def test_looks_closer_where_the_answer_changed_most_either_way(tiny_random: Lab, seed: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    run = scripted_run(tiny_random, picture, "The car is blue.", fit="crop")
    tokens = list(range(len(run.token_ids) - run.segments["answer"][0]))
    drops = attribute(tiny_random, run, method="occlusion", block=2, target=tokens).values[:, ::2, ::2]
    change = np.abs(drops).max(0)
    assert (change.argmax() == drops.max(0).argmax()) == (seed == 3)
    rel = attribute(tiny_random, run, method="occlusion_coarse", first=2, keep=1, target="blue")
    row, col = np.unravel_index(change.argmax(), change.shape)
    here = rel.values[0, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
    assert len(set(here.ravel().tolist())) == 4
    elsewhere = [rel.values[0, y : y + 2, x : x + 2] for y in (0, 2) for x in (0, 2) if (y, x) != (2 * row, 2 * col)]
    assert all(np.ptp(block) == 0 for block in elsewhere)


def test_sums_are_those_of_the_blocks(tiny_random: Lab, run: Run) -> None:
    rel = attribute(tiny_random, run, method="occlusion_coarse", first=4, keep=1, target="blue")
    whole = attribute(tiny_random, run, method="occlusion_coarse", first=4, keep=1, target="answer")
    assert rel.extras["rounds"] == whole.extras["rounds"] == [1, 4, 4]
    assert rel.extras["score"] != whole.extras["score"]
    one = attribute(tiny_random, run, method="occlusion", block=4, target="blue").values[0]
    alone = attribute(tiny_random, run, method="occlusion", block=2, target="blue").values[0]
    quarters = [rel.values[0, y : y + 2, x : x + 2].sum() for y in (0, 2) for x in (0, 2)]
    expected = [alone[y, x] for y in (0, 2) for x in (0, 2)]
    assert sum(np.isclose(quarters, expected, atol=3e-5)) >= 3  # the fourth was cut further
    assert np.ptp(one) == 0


@pytest.mark.parametrize("at", ["pixels", "projector"])
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_a_planted_cause_is_found_at_a_part_of_the_cost(planted: Lab, at: str, fit: str) -> None:
    picture = red_picture(96, 96, (12, 60, 24, 72))  # one patch of 8x8
    run = scripted_run(planted, picture, "The car is red.", fit=fit)
    rel = attribute(planted, run, method="occlusion_coarse", at=at, keep=1, target="red")
    covered = run.map.mask_to_patches((picture == np.array(RED)).all(-1))
    assert rel.values[0].argmax() == covered.argmax()
    assert rel.passes["forward"] <= 16 + 4 + 2


def test_padding_is_not_tried(planted: Lab) -> None:
    run = scripted_run(planted, red_picture(120, 40, (60, 10, 80, 30)), "The car is red.", fit="pad")
    rel = attribute(planted, run, method="occlusion_coarse", target="red")
    assert (rel.values[0][run.map.coverage() == 0] == 0).all()
    assert rel.extras["rounds"][0] < 16


@pytest.mark.parametrize("at", ["pixels", "projector"])
def test_ctrl_c_gives_the_map_as_fine_as_it_got(tiny_random: Lab, run: Run, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = 0, tiny_random.model.forward
    last = {"pixels": 4, "projector": 5}[at]  # in the second round: whole, kept, blocks of two, (kept again,) patches of four

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    coarse = attribute(tiny_random, run, method="occlusion", block=2, at=at).values / 4
    monkeypatch.setattr(tiny_random.model, "forward", interrupted)
    part = attribute(tiny_random, run, method="occlusion_coarse", first=2, keep=4, at=at, batch=4)
    done = part.extras["blocks"]
    assert 4 <= done < 20
    assert f"Interrupted after {done} blocks; the map is as fine as it got." in part.notes
    assert np.isclose(part.values, coarse, atol=3e-5).sum() >= 16 - (done - 4)
    monkeypatch.setattr(tiny_random.model, "forward", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        attribute(tiny_random, run, method="occlusion_coarse", at=at)


@pytest.mark.parametrize(("grid", "side"), [((24, 24), 8), ((12, 12), 4), ((27, 27), 8), ((4, 4), 2), ((1, 1), 1), ((2, 2), 2)])
def test_the_first_blocks_are_about_a_quarter_of_the_grid(grid: tuple[int, int], side: int) -> None:
    assert first_side(grid) == side


def test_blocks_are_cut_without_gaps_or_overlap() -> None:
    for grid, side in (((5, 7), 3), ((12, 12), 4), ((3, 1), 2)):
        blocks = tiles(grid, side)
        for _ in range(4):
            count = np.zeros(grid, int)
            for block in blocks:
                count[block] += 1
            assert (count == 1).all()
            blocks = [part for block in blocks for part in cut(block)]
        assert len(blocks) == grid[0] * grid[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": 5}, "first must be at most 4 for a grid of 4x4, got 5"),
        ({"keep": 0}, "keep must be a whole number of at least 1, got 0"),
        ({"fill": "red"}, "fill must be one of 'grey', 'mean', 'blur', 'noise', 'neighbours'"),
    ],
)
def test_options_out_of_range_are_refused(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        attribute(tiny_random, run, method="occlusion_coarse", **options)
