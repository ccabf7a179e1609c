"""Ground truth: right, wrong and empty maps score what they should by hand, with chance beside them; ranks against scipy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_lab.errors import OptionError
from llava_lab.geometry import Mode, PictureMap
from llava_lab.judging import ground_truth
from llava_lab.judging.ground_truth import INSIDE, MEASURES
from llava_lab.results import GroundTruth, Relevance, Run, Target
from llava_lab.worlds import picturebook
from tests.support.score_examples import example_truth
from tests.support.stand_in import finished_run

GRID = 4


def run_of(width: int = 40, height: int = 40, mode: Mode = "pad") -> Run:
    where = PictureMap.make(width, height, size=32, rows=GRID, cols=GRID, mode=mode)
    return finished_run(picture=np.zeros((height, width, 3), np.uint8), map=where)


def map_of(run: Run, *values: np.ndarray) -> Relevance:
    targets = tuple(Target("word", str(i), (7,), (8,)) for i in range(len(values)))
    stacked = np.stack(values).astype(np.float32)
    return Relevance(stacked, targets, "by hand", {}, run.map, run.model, run.fingerprint, 0.0, {})


def box(run: Run, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros(run.picture.shape[:2], bool)
    mask[top:bottom, left:right] = True
    return mask


def test_right_wrong_and_flat_maps_by_hand() -> None:
    run = run_of()
    mask = box(run, 10, 10, 30, 20)  # patches (1, 1) and (1, 2), whole
    right = np.zeros((GRID, GRID))
    right[1, 1], right[1, 2], right[0, 0] = 3, 2, 1
    flat = np.ones((GRID, GRID))
    result = ground_truth(run, map_of(run, right, -right, flat), mask)
    assert result.measures == MEASURES == ("pointing", "mass", "auc", "iou")
    np.testing.assert_allclose(result.deciding, [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(result.values[0], [1, 5 / 6, 1, 1], atol=1e-6)
    np.testing.assert_allclose(result.values[1], [0, 0, 0, 0])  # nothing positive: it claims nothing
    common = 2 * 2 / 16
    np.testing.assert_allclose(result.values[2], [2 / 16, 2 / 16, 0.5, common / (4 - common)], atol=1e-6)  # chance
    assert result.value("mass") == pytest.approx(5 / 6)
    assert result.notes == ("The deciding things hold 12% of the picture the model saw.",)


def test_several_things_are_one_place_and_part_patches_count_by_area() -> None:
    run = run_of()
    things = np.stack([box(run, 0, 0, 10, 10), box(run, 30, 30, 34, 40)])  # a whole patch, four tenths of another
    values = np.zeros((GRID, GRID))
    values[0, 0] = values[3, 3] = 1
    result = ground_truth(run, map_of(run, values), things)
    np.testing.assert_allclose(result.values[0], [1, (1 + 0.4) / 2, 1, 1], atol=1e-6)
    thin = box(run, 30, 30, 32, 40)  # a fifth: below INSIDE
    assert INSIDE > 0.2
    assert ground_truth(run, map_of(run, values), thin).value("iou") == pytest.approx(0.5 / 1.5)  # alone, it is the fullest
    both = ground_truth(run, map_of(run, values), np.stack([things[0], thin]))
    assert both.value("pointing") == 0.5  # a tie, one of them wrong


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize(("width", "height"), [(80, 30), (30, 80), (40, 40)])
def test_masks_travel_with_the_picture_and_padding_has_no_say(width: int, height: int, mode: Mode) -> None:
    run = run_of(width, height, mode)
    left, top, right, bottom = (round(edge) for edge in run.map.patch_box(2, 1))
    mask = box(run, max(left, 0), max(top, 0), right, bottom)
    values = run.map.mask_to_patches(mask)
    outside = run.map.coverage() == 0
    assert outside.any() == (mode == "pad" and width != height)
    values[outside] = 9  # a map that shines on padding
    result = ground_truth(run, map_of(run, values), mask)
    assert result.value("pointing") == 1
    assert result.value("auc") == 1


def test_random_maps_and_the_centre_stand_beside() -> None:
    run = run_of()
    mask = box(run, 10, 10, 30, 30)  # the four patches of the middle
    result = ground_truth(run, map_of(run, np.ones((GRID, GRID))), mask, seeds=400)
    assert result.random.shape == (400, 4)
    expected = dict(zip(MEASURES, result.expected, strict=True))
    assert expected["pointing"] == pytest.approx(4 / 16, abs=0.07)
    assert expected["mass"] == pytest.approx(4 / 16, abs=0.02)
    assert expected["auc"] == pytest.approx(0.5, abs=0.04)
    assert result.center[[0, 2, 3]].tolist() == [1, 1, 1]
    again = ground_truth(run, map_of(run, np.ones((GRID, GRID))), mask, seeds=400)
    assert np.array_equal(again.random, result.random)


def test_the_picture_books_masks_fit_its_own_runs() -> None:
    scene = picturebook.scene("test", 2)
    picture = np.asarray(scene.picture())
    where = PictureMap.make(*picture.shape[1::-1], size=96, rows=12, cols=12, mode="pad")
    run = finished_run(picture=picture, map=where)
    deciding = scene.masks()[[0]]
    result = ground_truth(run, map_of(run, where.mask_to_patches(deciding[0])), deciding)
    assert result.value("pointing") == result.value("auc") == result.value("iou") == 1
    assert result.value("mass") > 0.7
    assert result.expected[1] < 0.15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run, mask: (mask[None][:0], {}), "an absence does"),
        (lambda run, mask: (mask[:10], {}), r"deciding must be masks, bool \(things, 40, 40\), got bool \(1, 10, 40\)"),
        (lambda run, mask: (mask & False, {}), "deciding has an empty mask"),
        (lambda run, mask: (mask, {"seeds": 0}), "seeds must be a whole number of at least 1, got 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    change: Callable[[Run, np.ndarray], tuple[np.ndarray, dict[str, Any]]], message: str
) -> None:
    run = run_of()
    masks, options = change(run, box(run, 0, 0, 20, 20))
    with pytest.raises(OptionError, match=message):
        ground_truth(run, map_of(run, np.ones((GRID, GRID))), masks, **options)


def test_another_pictures_map_and_unseen_things_are_refused() -> None:
    run = run_of(80, 40, "crop")
    rel = map_of(run, np.ones((GRID, GRID)))
    with pytest.raises(OptionError, match="the model saw nothing of the deciding things; ask with fit='pad'"):
        ground_truth(run, rel, box(run, 0, 0, 10, 40))
    with pytest.raises(OptionError, match="another picture or by another checkpoint"):
        ground_truth(run, replace(rel, fingerprint="other"), box(run, 30, 0, 50, 40))


def test_round_trips_exactly(tmp_path: Path) -> None:
    truth = example_truth()
    again = GroundTruth.load(truth.save(tmp_path / "truth.npz"))
    for name in truth.__dataclass_fields__:
        one, two = getattr(truth, name), getattr(again, name)
        assert np.array_equal(one, two, equal_nan=True) if isinstance(one, np.ndarray) else one == two, name
    with pytest.raises(OptionError, match="no measure 'dice' here; there is pointing, mass, auc, iou"):
        truth.value("dice")
