"""CompareView in a real browser: one patch lights in all maps, any score orders them, what is doubtful is grey."""

from __future__ import annotations

import statistics
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, expect

from tests.support.compare_examples import CELLS, GREY, comparison_example, methods_example, three
from tests.support.widget_examples import make_relevance, make_run, single_cell
from tests.support.widget_page import WidgetPage, center, difference
from widgets import CompareView


def tile(shown: Locator, name: str) -> Locator:
    return shown.locator(".lab-tile").filter(has=shown.page.locator(".lab-tile-name", has_text=name))


def names(shown: Locator) -> list[str]:
    return shown.locator(".lab-tile-name").all_inner_texts()


def test_each_method_has_its_own_map_over_the_same_picture(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(three())
    points = [center(patch) for patch in (*CELLS.values(), 143)]
    for name in CELLS:
        *lit, silent = widget_page.pixels(points, tile(shown, name).locator("canvas"))
        assert [difference(pixel, silent) > 60 for pixel in lit] == [name == other for other in CELLS]


def test_a_patch_pointed_at_in_one_map_lights_in_all_and_is_read_in_all(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(three())
    edge = (3 / 12 + 0.008, 7.5 / 12)  # the left side of patch 87
    before = widget_page.pixels([edge])[0]
    lights = shown.locator(".lab-light")
    assert lights.evaluate_all("(nodes) => nodes.every((node) => getComputedStyle(node).visibility === 'hidden')")
    box = tile(shown, "two").locator("canvas").bounding_box()
    assert box is not None
    widget_page.page.mouse.move(box["x"] + 3.5 / 12 * box["width"], box["y"] + 7.5 / 12 * box["height"], steps=3)
    assert difference(widget_page.pixels([edge])[0], before) > 60  # in the enlarged map
    for name in CELLS:
        light, canvas = tile(shown, name).locator(".lab-light").bounding_box(), tile(shown, name).locator("canvas").bounding_box()
        assert light is not None
        assert canvas is not None
        assert (light["x"] - canvas["x"]) / canvas["width"] == pytest.approx(3 / 12, abs=0.01)
        assert (light["y"] - canvas["y"]) / canvas["height"] == pytest.approx(7 / 12, abs=0.01)
        assert light["width"] / canvas["width"] == pytest.approx(1 / 12, abs=0.01)
    assert lights.evaluate_all("(nodes) => nodes.every((node) => getComputedStyle(node).visibility === 'visible')")
    assert [tile(shown, name).locator(".lab-tile-line").inner_text() for name in CELLS] == ["0 here, rank 2"] * 3
    assert shown.locator(".lab-place").first.inner_text() == "row 7, column 3"
    widget_page.page.mouse.move(2, 2)
    assert widget_page.pixels([edge])[0] == before
    assert lights.evaluate_all("(nodes) => nodes.every((node) => getComputedStyle(node).visibility === 'hidden')")
    assert widget_page.page.evaluate("() => window.test.saves()") == 0  # Python heard nothing


@pytest.mark.long
def test_any_score_orders_the_maps_the_best_first_or_the_worst(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(three())
    assert names(shown) == ["two", "three", "one"]  # by the first score
    shown.get_by_role("radio", name="deletion").click()
    widget_page.settle()
    assert names(shown) == ["three", "one", "two"]  # where lower is better
    assert shown.locator(".lab-tile-score").all_inner_texts() == ["0.10", "0.30", "0.50"]
    assert widget_page.get("sort") == "deletion"
    shown.get_by_role("radio", name="Worst first").click()
    widget_page.settle()
    assert names(shown) == ["two", "one", "three"]
    shown.get_by_role("radio", name="as given").click()
    widget_page.settle()
    assert names(shown) == list(CELLS)


@pytest.mark.long
def test_likeness_orders_by_the_enlarged_map(widget_page: WidgetPage) -> None:
    likes = [[1.0, 0.2, 0.9], [0.2, 1.0, 0.5], [0.9, 0.5, 1.0]]
    shown = widget_page.mount(three(agreement=likes, sort="agreement"))
    assert names(shown) == ["one", "three", "two"]
    tile(shown, "two").click()
    widget_page.settle()
    assert names(shown) == ["two", "three", "one"]
    assert "Most alike: three (0.50), one (0.20)." in shown.inner_text()


def test_what_is_not_better_than_random_is_grey_small_and_large(widget_page: WidgetPage) -> None:
    run, maps = methods_example(names=("rollout", "attention"))
    widget = CompareView(run, maps, beats_random={"rollout": [True, True, True, False, True], "attention": True}, target="red.")
    shown = widget_page.mount(widget)
    points = [center(patch) for patch in range(144)]

    def colour(canvas: Locator) -> int:
        return max(max(pixel[:3]) - min(pixel[:3]) for pixel in widget_page.pixels(points, canvas))

    assert colour(tile(shown, "rollout").locator("canvas")) <= 12
    assert colour(shown.locator("canvas.lab-canvas")) <= 12
    assert colour(tile(shown, "attention").locator("canvas")) > 80
    assert tile(shown, "rollout").locator(".lab-tile-line").inner_text() == "not shown to beat random"
    assert shown.locator(".lab-stage-verdict").inner_text() == "not shown to beat random"
    shown.get_by_role("radio", name="car, ").click()  # it beats random there
    assert colour(tile(shown, "rollout").locator("canvas")) > 80
    expect(shown.locator(".lab-stage-verdict")).to_have_text("beats random")


@pytest.mark.long
def test_a_map_below_its_noise_floor_is_dim_and_called_negligible(widget_page: WidgetPage) -> None:
    run, flat = make_run(picture=GREY), np.full((4, 12, 12), 1e-3)
    floors = {"noise_floor": [0.01] * 4}
    spot = flat + np.eye(12)[None] * 0.5
    maps = {"weak": make_relevance(run, flat, extras=floors), "strong": make_relevance(run, spot, extras=floors)}
    shown = widget_page.mount(CompareView(run, {**maps, "unknown": make_relevance(run, flat)}))
    lines = {name: tile(shown, name).locator(".lab-tile-line").inner_text() for name in ("weak", "strong", "unknown")}
    assert lines == {"weak": "negligible everywhere", "strong": "", "unknown": ""}
    colors = {
        name: tile(shown, name).locator(".lab-tile-name").evaluate("(node) => getComputedStyle(node).color") for name in lines
    }
    assert colors["weak"] != colors["strong"] == colors["unknown"]
    assert "negligible everywhere" in (tile(shown, "weak").get_attribute("aria-label") or "")
    assert shown.locator(".lab-legend-scale").inner_text() == "negligible everywhere"  # the enlarged one is the first
    box = tile(shown, "strong").locator("canvas").bounding_box()
    assert box is not None
    shown.page.mouse.move(box["x"] + 7.5 / 12 * box["width"], box["y"] + 2.5 / 12 * box["height"])
    for name in ("weak", "strong"):
        expect(tile(shown, name).locator(".lab-tile-line")).to_have_text("negligible here")


def test_a_click_enlarges_and_says_what_made_the_map(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(three())
    tile(shown, "three").click()
    widget_page.settle()
    assert widget_page.get("method") == "three"
    assert shown.locator(".lab-stage-name").inner_text() == "three"
    assert tile(shown, "three").get_attribute("aria-pressed") == "true"
    assert tile(shown, "one").get_attribute("aria-pressed") == "false"
    lit, silent = widget_page.pixels([center(101), center(17)])
    assert difference(lit, silent) > 60
    assert "three" in (shown.locator(".lab-live").text_content() or "")


@pytest.mark.long
def test_what_has_no_map_says_why_and_long_notes_are_folded(widget_page: WidgetPage) -> None:
    run, comparison = comparison_example()
    shown = widget_page.mount(CompareView(run, comparison))
    assert shown.locator(".lab-remarks").inner_text().split("\n") == [
        "relative_attention: method 'relative_attention' needs a question",
        *comparison.notes,
    ]
    widget_page.page.reload()
    shown = widget_page.mount(CompareView(run, replace(comparison, notes=tuple("abcdef"))))
    assert shown.locator(".lab-remarks li").first.is_hidden()
    shown.locator(".lab-remarks summary").click()
    expect(shown.locator(".lab-remarks li")).to_have_count(7)
    expect(shown.locator(".lab-remarks li").first).to_be_visible()


@pytest.mark.long
def test_the_contrast_shows_who_can_answer_it(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(CompareView(*methods_example(names=("rollout", "occlusion"))))
    shown.get_by_role("radio", name="why red, not blue").click()
    widget_page.settle()
    assert widget_page.get("target") == 5
    assert tile(shown, "rollout").locator(".lab-tile-line").inner_text() == "no map for “why red, not blue”"
    assert shown.locator(".lab-legend-title").inner_text() == "rollout · “why red, not blue”"
    assert tile(shown, "occlusion").locator(".lab-tile-line").inner_text() == ""
    shown.get_by_role("radio", name="red., ").hover()  # a look at another target, not a choice
    widget_page.settle()
    assert tile(shown, "rollout").locator(".lab-tile-line").inner_text() == ""
    assert widget_page.get("target") == 5


def test_one_slider_sets_the_colour_range_of_all_maps(widget_page: WidgetPage) -> None:
    run = make_run(picture=GREY)
    values = np.zeros((4, 12, 12))
    values[:, 0, 0], values[:, 6, 6] = 1.0, 0.4
    maps = {
        "plain": make_relevance(run, values),
        "signed": make_relevance(run, 7 * values - 7 * np.eye(12)[11] * values[0, 0, 0]),
    }
    shown = widget_page.mount(CompareView(run, maps))
    canvases = [tile(shown, name).locator("canvas") for name in maps]
    half, whole = center(78), center(0)
    for canvas in canvases:
        assert difference(*widget_page.pixels([half, whole], canvas)) > 60
    slider = shown.get_by_role("slider", name="Colour range")
    slider.focus()
    for _ in range(13):
        widget_page.page.keyboard.press("ArrowLeft")  # down to 35%
    for canvas in canvases:
        assert difference(*widget_page.pixels([half, whole], canvas)) <= 6  # both at the end of the scale
    assert shown.locator(".lab-high").inner_text() == "0.350"


@pytest.mark.long
def test_by_rank_a_colour_means_the_same_in_every_map(widget_page: WidgetPage) -> None:
    run = make_run(picture=GREY)
    values = np.arange(144, dtype=float).reshape(1, 12, 12).repeat(4, 0)
    maps = {"linear": make_relevance(run, values), "steep": make_relevance(run, np.exp(values / 30))}
    shown = widget_page.mount(CompareView(run, maps))
    canvases = [tile(shown, name).locator("canvas") for name in maps]
    middle = center(100)
    assert difference(*(widget_page.pixels([middle], canvas)[0] for canvas in canvases)) > 60
    shown.get_by_role("radio", name="Rank").click()
    assert difference(*(widget_page.pixels([middle], canvas)[0] for canvas in canvases)) <= 6


def test_selected_patches_are_outlined_and_counted_in_every_map(widget_page: WidgetPage) -> None:
    widget = three()
    shown = widget_page.mount(widget)
    shown.locator("canvas.lab-canvas").click(position=widget_page.at(*center(60)))
    widget_page.page.mouse.move(2, 2)
    widget_page.settle()
    assert widget_page.get("selected") == [60]
    assert [tile(shown, name).locator(".lab-tile-line").inner_text() for name in CELLS] == [
        "0% in selection",
        "100% in selection",
        "0% in selection",
    ]
    widget_page.set("selected", [])
    assert tile(shown, "two").locator(".lab-tile-line").inner_text() == ""


@pytest.mark.long
def test_scores_stand_on_a_line_with_those_of_the_others(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(three(method="three"))
    gain, deletion = shown.locator(".lab-score").all()
    assert gain.inner_text().split("\n") == ["gain", "0.40"]
    assert deletion.inner_text().split("\n") == ["deletion", "lower is better", "0.10"]
    assert gain.locator(".lab-tick").count() == 3
    assert gain.locator(".lab-tick-own").evaluate("(node) => parseFloat(node.style.left)") == pytest.approx(50, abs=0.01)
    assert deletion.locator(".lab-tick-own").evaluate("(node) => node.style.left") == "0%"


def test_ranks_count_half_of_equals(widget_page: WidgetPage) -> None:
    widget_page.module = CompareView._esm
    code = """async (levels) => {
      const ranks = (await import('/module.js')).ranksOf(Uint8Array.from(levels));
      return levels.map((level) => ranks[level]);
    }"""
    assert widget_page.page.evaluate(code, [0, 9, 9, 200, 3]) == [0, 0.625, 0.625, 1, 0.25]
    assert widget_page.page.evaluate(code, [4, 4, 4]) == [0.5, 0.5, 0.5]


@pytest.mark.long
def test_the_saved_sheet_has_every_map_in_order(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(three())
    with widget_page.page.expect_download() as download:
        shown.get_by_role("button", name="Save as PNG").click()
    saved = download.value
    assert saved.suggested_filename == "patches-compare-red.png"
    image = np.asarray(Image.open(BytesIO(Path(saved.path()).read_bytes())).convert("RGB"), int)
    for place, name in enumerate(("two", "three", "one")):
        x, y = 48 + place * 270, 190
        row, col = divmod(CELLS[name], 12)
        lit = image[int(y + (row + 0.5) * 250 / 12), int(x + (col + 0.5) * 250 / 12)]
        assert difference(lit.tolist(), image[y + 245, x + 245].tolist()) > 60, name


@pytest.mark.long
def test_wide_pictures_keep_the_maps_aligned(widget_page: WidgetPage) -> None:
    run = make_run(picture=np.full((200, 400, 3), 200, np.uint8), mode="crop")
    maps = {f"a method with a rather long name {i}": single_cell(run, [i] * 4) for i in range(7)}
    shown = widget_page.mount(CompareView(run, maps))
    boxes = [one.bounding_box() for one in shown.locator(".lab-tile-canvas").all()]
    assert all(box is not None and box["width"] / box["height"] == pytest.approx(2, abs=0.02) for box in boxes)
    assert len({round(box["width"]) for box in boxes if box}) == 1
    assert len({round(box["x"]) for box in boxes if box}) == 2  # columns line up
    first = shown.locator(".lab-tile-canvas").first
    *unseen, seen = widget_page.pixels([*((0.04, 0.1 + 0.05 * i) for i in range(9)), (0.6, 0.6)], first)
    assert statistics.median(max(pixel[:3]) for pixel in unseen) < 140 < min(seen[:3])  # hatched, so not every pixel


def test_maps_are_reached_and_enlarged_by_keyboard(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(three(sort=""))
    keyboard = widget_page.page.keyboard
    shown.locator(".lab-tile").first.focus()
    keyboard.press("ArrowRight")
    keyboard.press("Enter")
    assert widget_page.get("method") == "two"
    keyboard.press("End")
    keyboard.press(" ")
    assert widget_page.get("method") == "three"
    widget_page.settle()
    stops = shown.locator(".lab-tile").evaluate_all("(nodes) => nodes.map((node) => node.tabIndex)")
    assert stops == [-1, -1, 0]
    shown.locator("canvas.lab-canvas").focus()
    for key in ("ArrowRight", "ArrowDown", " "):
        keyboard.press(key)
    assert widget_page.get("selected") == [12]
    expect(shown.locator(".lab-live")).to_contain_text("row 1, column 0")


@pytest.mark.parametrize(
    ("key", "at", "expected"),
    [
        ("ArrowRight", 2, 3),
        ("ArrowLeft", 0, -1),
        ("ArrowDown", 1, 6),
        ("ArrowUp", 4, -1),
        ("End", 0, 7),
        ("Home", 5, 0),
        ("a", 1, -1),
    ],
)
def test_keys_move_over_rows_of_maps(widget_page: WidgetPage, key: str, at: int, expected: int) -> None:
    widget_page.module = CompareView._esm
    assert widget_page.call("nextTile", key, at, 8, 5) == expected
