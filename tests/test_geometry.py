"""PictureMap: where a patch lies on the picture, under pad and under crop, whatever the shape."""

from __future__ import annotations

import numpy as np
import pytest

from llava_lab.errors import OptionError
from llava_lab.geometry import MODES, PictureMap

SHAPES = [(640, 480), (480, 640), (336, 336), (101, 37), (37, 101)]


def made(width: int, height: int, mode: str, grid: int = 24) -> PictureMap:
    return PictureMap.make(width, height, size=336, rows=grid, cols=grid, mode=mode)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_going_there_and_back_is_exact(shape: tuple[int, int], mode: str) -> None:
    at = made(*shape, mode)
    for point in [(0.0, 0.0), (10.5, 20.25), (float(shape[0]), float(shape[1]))]:
        assert at.to_picture(*at.to_model(*point)) == pytest.approx(point)
    assert PictureMap(**at.to_dict()) == at


def test_crop_of_640x480_sees_the_middle_480() -> None:
    assert made(640, 480, "crop").seen_box == pytest.approx((80, 0, 560, 480), abs=1.0)


def test_pad_sees_everything_and_leaves_rows_of_padding() -> None:
    at = made(640, 480, "pad")
    assert at.seen_box == (0, 0, 640, 480)
    coverage = at.coverage()
    assert coverage.shape == (24, 24)
    assert (coverage[:3] == 0).all()
    assert (coverage[3:21] == 1).all()
    assert (coverage[21:] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_patch_at_and_patch_box_agree(shape: tuple[int, int], mode: str) -> None:
    at = made(*shape, mode)
    seen = 0
    for row in range(24):
        for col in range(24):
            left, top, right, bottom = at.patch_box(row, col)
            x, y = (left + right) / 2, (top + bottom) / 2
            inside = 0 <= x < at.width and 0 <= y < at.height
            assert at.patch_at(x, y) == ((row, col) if inside else None)
            seen += inside
    assert seen > 100


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_a_projected_spike_lands_in_its_patch_box(shape: tuple[int, int], mode: str) -> None:
    at = made(*shape, mode, grid=6)
    values = np.zeros((6, 6), np.float32)
    values[2, 3] = 1
    ys, xs = np.nonzero(at.project(values) == 1)
    left, top, right, bottom = at.patch_box(2, 3)
    assert left - 1 <= xs.min() <= xs.max() <= right + 1
    assert top - 1 <= ys.min() <= ys.max() <= bottom + 1
    assert len(xs) == pytest.approx((right - left) * (bottom - top), rel=0.35)


def test_unseen_area_is_nan_under_crop_and_nowhere_under_pad() -> None:
    values = np.ones((24, 24), np.float32)
    cropped = made(640, 480, "crop").project(values)
    assert np.isnan(cropped[:, :78]).all()
    assert not np.isnan(cropped[:, 82:558]).any()
    assert not np.isnan(made(640, 480, "pad").project(values)).any()


def test_mask_shares_conserve_area() -> None:
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        mask = rng.random((shape[1], shape[0])) < 0.3
        at = made(*shape, "pad")
        cell = (336 / 24) ** 2 / (at.scale_x * at.scale_y)  # one patch in picture pixels
        assert at.mask_to_patches(mask).sum() * cell == pytest.approx(mask.sum(), rel=1e-5)


def test_smooth_keeps_a_constant_and_stays_between_neighbours() -> None:
    at = made(101, 37, "pad", grid=6)
    assert np.nanmax(np.abs(at.project(np.full((6, 6), 2.5, np.float32), smooth=True) - 2.5)) < 1e-6
    values = np.random.default_rng(0).random((6, 6)).astype(np.float32)
    smooth = at.project(values, smooth=True)
    assert np.nanmin(smooth) >= values.min() - 1e-6
    assert np.nanmax(smooth) <= values.max() + 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_an_enlarged_picture_is_painted_as_its_pixels_are(mode: str) -> None:
    at = made(60, 37, mode, grid=6)
    values = np.random.default_rng(0).random((6, 6)).astype(np.float32)
    # every third pixel of three has the centre of a pixel of the picture
    np.testing.assert_array_equal(at.project(values, shape=(3 * 37, 3 * 60))[1::3, 1::3], at.project(values))


def test_wrong_requests_say_what_was_expected() -> None:
    with pytest.raises(OptionError, match="pad, crop"):
        made(10, 10, "stretch")
    with pytest.raises(OptionError, match="at least 1"):
        made(0, 10, "pad")
    at = made(10, 20, "pad")
    with pytest.raises(OptionError, match="24x24 grid"):
        at.patch_box(24, 0)
    with pytest.raises(OptionError, match="20x10"):
        at.mask_to_patches(np.zeros((10, 20), bool))
    with pytest.raises(OptionError, match="24x24"):
        at.project(np.zeros((6, 6), np.float32))


def test_places_on_the_picture_become_patches() -> None:
    where = PictureMap.make(96, 48, size=96, rows=4, cols=4, mode="pad")  # padded above and below by 24 pixels: rows 1 and 2
    assert where.patches(box=(0, 0, 48, 24)) == [(1, 0), (1, 1)]
    assert where.patches(box=(0, 0, 47, 13)) == [(1, 0), (1, 1)]  # half of a patch and more
    assert where.patches(box=(40, 2, 44, 6)) == [(1, 1)]  # a small thing is in the patch that holds most of it
    assert where.patches(points=[(1, 1), (95, 47), (2, 3)]) == [(1, 0), (2, 3)]
    assert where.patches(points=[(-5, 0)]) == []
    mask = np.zeros((48, 96), bool)
    assert where.patches(mask=mask) == []
    mask[24:, 72:] = True
    assert where.patches(mask=mask) == [(2, 3)]
    for wrong in ({}, {"box": (0, 0, 1, 1), "points": []}, {"box": (5, 0, 5, 9)}, {"mask": mask.T}):
        with pytest.raises(OptionError):
            where.patches(**wrong)
