"""The module's pure helpers, called in a real browser, against hand-worked values and Python's own geometry."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from playwright.sync_api import Browser

from llava_lab.geometry import PictureMap
from llava_lab.plots.palette import palettes
from tests.support.widget_page import WidgetPage


@pytest.fixture(scope="module")
def helpers(chromium: Browser) -> Iterator[WidgetPage]:
    page = WidgetPage(chromium)
    yield page
    page.close()


MAPS = [
    PictureMap.make(288, 288, size=96, rows=12, cols=12, mode="pad"),
    PictureMap.make(420, 288, size=96, rows=12, cols=12, mode="pad"),
    PictureMap.make(420, 288, size=96, rows=12, cols=12, mode="crop"),
    PictureMap.make(200, 333, size=336, rows=24, cols=24, mode="crop"),
]


@pytest.mark.parametrize("m", MAPS, ids=lambda m: f"{m.width}x{m.height}-{m.mode}")
def test_patch_boxes_and_places_agree_with_python(helpers: WidgetPage, m: PictureMap) -> None:
    for patch in (0, 5, m.cols, m.rows * m.cols // 2 + 3, m.rows * m.cols - 1):
        np.testing.assert_allclose(helpers.call("patchBox", m.to_dict(), patch), m.patch_box(*divmod(patch, m.cols)), atol=1e-9)
    for x, y in ((0.5, 0.5), (70.2, 33.3), (m.width - 0.5, m.height - 0.5), (m.width / 2, m.height / 2), (-1, 4)):
        place = m.patch_at(x, y)
        assert helpers.call("patchAt", m.to_dict(), x, y) == (-1 if place is None else place[0] * m.cols + place[1])
    np.testing.assert_allclose(
        helpers.call("clipToPicture", m.to_dict(), helpers.call("modelSquare", m.to_dict())), m.seen_box, atol=1e-9
    )


def test_patches_of_pure_padding_are_not_on_the_picture(helpers: WidgetPage) -> None:
    m = MAPS[1]
    covered = (m.coverage() > 0).ravel()
    assert [helpers.call("onPicture", m.to_dict(), patch) for patch in range(144)] == covered.tolist()
    assert not covered.all()


def test_rectangle_holds_both_corners_in_any_order(helpers: WidgetPage) -> None:
    want = [13, 14, 15, 25, 26, 27]
    assert helpers.call("rectangle", 12, 13, 27) == want
    assert helpers.call("rectangle", 12, 27, 13) == want
    assert helpers.call("rectangle", 12, 15, 25) == want


def test_steps_stay_in_the_grid_and_on_the_picture(helpers: WidgetPage) -> None:
    square, wide = MAPS[0].to_dict(), MAPS[1].to_dict()
    assert helpers.call("step", square, 0, -1, 0) == 0
    assert helpers.call("step", square, 11, 0, 1) == 11
    assert helpers.call("step", square, 13, 1, 1) == 26
    first = helpers.call("firstOnPicture", wide)
    assert helpers.call("step", wide, first, -1, 0) == first


def test_outline_of_a_block_is_its_border_only(helpers: WidgetPage) -> None:
    code = "async ([map, cells]) => (await import('/module.js')).outline(map, new Set(cells)).length"
    lines = helpers.page.evaluate(code, [MAPS[0].to_dict(), [13, 14, 25, 26]])
    assert lines == 8  # two sides of each of four patches; the four inner sides are not drawn


def test_palettes_survive_the_way_to_the_page(helpers: WidgetPage) -> None:
    for colors in palettes().values():
        assert helpers.call("readPalette", colors.tobytes().hex()) == colors.ravel().tolist()


def test_smooth_levels_equal_pythons_bilinear_projection(helpers: WidgetPage) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (3, 4))
    zoom = 8
    m = PictureMap.make(4 * zoom, 3 * zoom, size=96, rows=3, cols=4, mode="pad")
    m = PictureMap(**{**m.to_dict(), "scale_x": 96 / 32, "scale_y": 96 / 24, "offset_x": 0.0, "offset_y": 0.0})
    got = np.array(helpers.call("smoothLevels", levels.ravel().tolist(), 3, 4, zoom)).reshape(3 * zoom, 4 * zoom)
    np.testing.assert_allclose(got, m.project(levels.astype(np.float32), smooth=True), atol=0.51)


def test_strongest_prefers_earlier_cells_among_equals(helpers: WidgetPage) -> None:
    code = "async (levels) => (await import('/module.js')).strongest(Uint8Array.from(levels), 3)"
    assert helpers.page.evaluate(code, [5, 9, 9, 1]) == [1, 2, 0]


@pytest.mark.parametrize(
    ("key", "index", "expected"),
    [("ArrowRight", 2, 0), ("ArrowLeft", 0, 2), ("Home", 1, 0), ("End", 0, 2), ("a", 1, -1), ("ArrowDown", -1, -1)],
)
def test_keys_move_through_choices(helpers: WidgetPage, key: str, index: int, expected: int) -> None:
    assert helpers.call("nextChoice", key, index, 3) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0"), (0.0123456, "0.0123"), (-2.5, "−2.5"), (0.0000123, "1.2e−5"), (123456, "1.2e5")]
)
def test_numbers_are_short_and_true(helpers: WidgetPage, value: float, expected: str) -> None:
    assert helpers.call("formatNumber", value) == expected


@pytest.mark.parametrize(
    ("value", "step", "expected"),
    [(0.02093, 8e-5, "0.0209"), (0.017, 8e-5, "0.0170"), (1e-9, 8e-5, "0"), (-1.234, 0.017, "−1.23"), (3.3e-7, 2e-9, "3.3e−7")],
)
def test_values_are_no_finer_than_their_map(helpers: WidgetPage, value: float, step: float, expected: str) -> None:
    assert helpers.call("formatValue", value, step) == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(1.0, "100%"), (0.99731, "99.7%"), (0.814, "81%"), (0.0312, "3.1%"), (0.0001, "<0.1%"), (None, "")]
)
def test_probabilities_never_round_to_certainty(helpers: WidgetPage, p: float | None, expected: str) -> None:
    assert helpers.call("formatPercent", p) == expected


@pytest.mark.parametrize(
    ("before", "after", "fresh"),
    [
        ("The car is red.", "The car is blue.", [False, False, False, True]),
        ("The car is red.", "The car is red.", [False] * 4),
        ("Yes, a car", "No car", [True, False]),
        ("", "new words", [True, True]),
    ],
)
def test_new_words_are_those_not_in_the_old_answer(helpers: WidgetPage, before: str, after: str, fresh: list[bool]) -> None:
    assert helpers.call("newWords", before.split(), after.split()) == fresh


def test_a_saved_file_has_a_harmless_name(helpers: WidgetPage) -> None:
    assert helpers.call("fileName", "rollout · “../red.” · layer 5") == "patches-rollout-red-layer-5.png"
    assert helpers.call("fileName", "///") == "patches-map.png"
