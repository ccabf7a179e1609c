"""The explorer's module in a bare page: what a reader points at is what is painted, selected and asked."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.support.widget_examples import car_picture, example, make_relevance, make_run, single_cell, spots
from tests.support.widget_page import WidgetPage, center, difference
from widgets import PatchExplorer


def test_pixels_change_at_the_word_s_own_cell_and_nowhere_else(widget_page: WidgetPage) -> None:
    run = make_run(picture=np.full((288, 288, 3), 128, np.uint8))
    cells = [17, 60, 101, 130]
    shown = widget_page.mount(PatchExplorer(run, {"rollout": single_cell(run, cells)}, word=0))
    points = [center(patch) for patch in range(144)]
    first = widget_page.pixels(points)
    for word, cell in enumerate(cells[1:], 1):
        shown.get_by_role("radio").nth(word).hover()
        now = widget_page.pixels(points)
        changed = {patch for patch in range(144) if difference(first[patch], now[patch]) > 30}
        assert changed == {cells[0], cell}
    assert widget_page.get("word") == 0  # hovering is not choosing
    assert widget_page.page.evaluate("() => window.test.saves()") == 0  # and Python heard nothing


def test_each_layer_paints_its_own_map(widget_page: WidgetPage) -> None:
    run = make_run(picture=np.full((288, 288, 3), 128, np.uint8))
    cells = [30, 77, 119]
    layers = [(f"layer {i}", single_cell(run, [cell] * 4)) for i, cell in enumerate(cells)]
    shown = widget_page.mount(PatchExplorer(run, {"rollout": layers, "other": single_cell(run, [5] * 4)}))
    points = [center(patch) for patch in (*cells, 5)]
    silent = widget_page.pixels([center(143)])[0]
    for layer in (2, 1, 0):
        widget_page.set("layer", layer)
        assert [difference(pixel, silent) > 30 for pixel in widget_page.pixels(points)] == [layer == i for i in range(4)]
    shown.get_by_role("radio", name="other").click()
    assert [difference(pixel, silent) > 30 for pixel in widget_page.pixels(points)] == [False, False, False, True]
    assert shown.get_by_role("slider", name="Layer").is_hidden()


def test_leaving_the_words_brings_the_chosen_one_back(widget_page: WidgetPage) -> None:
    run = make_run(picture=np.full((288, 288, 3), 128, np.uint8))
    shown = widget_page.mount(PatchExplorer(run, {"rollout": single_cell(run, [17, 60, 101, 130])}, word=1))
    before = widget_page.pixels([center(60)])
    shown.get_by_role("radio", name="red.").hover()
    assert difference(widget_page.pixels([center(60)])[0], before[0]) > 30
    widget_page.page.mouse.move(2, 2)
    assert widget_page.pixels([center(60)]) == before


@pytest.mark.long
def test_legend_has_the_real_range_over_all_words(widget_page: WidgetPage) -> None:
    run = make_run()
    values = spots(run) * 3.7
    shown = widget_page.mount(PatchExplorer(run, {"rollout": make_relevance(run, values)}))
    assert shown.locator(".lab-high").text_content() == f"{values.max():.2f}"
    shown.get_by_role("radio", name="This map").click()
    widget_page.settle()
    assert shown.locator(".lab-high").text_content() == f"{values[3].max():.2f}"
    assert shown.locator(".lab-legend-scale").text_content() == "colours of this map alone"


def test_signed_maps_are_centred_on_zero(widget_page: WidgetPage) -> None:
    run = make_run(picture=np.full((288, 288, 3), 128, np.uint8))
    values = np.zeros((4, 12, 12))
    values[:, 2, 2], values[:, 5, 5] = 3.0, -1.5
    shown = widget_page.mount(PatchExplorer(run, {"gradient": make_relevance(run, values)}))
    texts = [shown.locator(name).text_content() for name in (".lab-low", ".lab-middle", ".lab-high")]
    assert texts == ["−3.00", "0", "3.00"]
    positive, negative, zero, other = widget_page.pixels([center(26), center(65), center(0), center(143)])
    assert positive[0] > positive[2] + 60  # orange
    assert negative[2] > negative[0] + 60  # blue
    assert zero == other
    assert max(zero[:3]) - min(zero[:3]) <= 2  # the grey picture itself


@pytest.mark.long
def test_a_method_without_a_map_for_the_word_says_so(widget_page: WidgetPage) -> None:
    run = make_run()
    whole = make_relevance(run, spots(run).mean(0, keepdims=True), [run.target(None)], method="occlusion")
    one = make_relevance(run, spots(run)[3:4], [run.target("red")], method="gradient")
    shown = widget_page.mount(PatchExplorer(run, {"occlusion": whole, "gradient": one}, word="car"))
    said = shown.locator(".lab-fallback")
    assert said.text_content() == "occlusion has no map of its own for “car”: this is its map for the whole answer."
    shown.get_by_role("radio", name="gradient").click()
    widget_page.settle()
    assert said.text_content() == "gradient has no map for “car”."
    shown.get_by_role("radio", name="red.").click()
    widget_page.settle()
    assert said.text_content() == ""


def test_hovering_a_patch_reads_its_place_value_and_box(widget_page: WidgetPage) -> None:
    run = make_run()
    shown = widget_page.mount(PatchExplorer(run, {"rollout": single_cell(run, [17, 60, 101, 130], value=0.5)}, word=1))
    widget_page.move(*center(60))
    widget_page.settle()
    assert shown.locator(".lab-readout").inner_text().split("\n") == ["row 5, column 0", "0.500", "x 0–24, y 120–144 px"]
    assert shown.locator(".lab-marker").evaluate("(node) => node.style.left") == "100%"


def test_click_and_drag_select_and_take_away(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(PatchExplorer(*example()))
    mouse = widget_page.page.mouse
    shown.locator("canvas.lab-canvas").click(position=widget_page.at(*center(5)))
    assert widget_page.get("selected") == [5]
    widget_page.move(*center(38))
    mouse.down()
    widget_page.move(*center(13))
    mouse.up()
    assert widget_page.get("selected") == [5, 13, 14, 25, 26, 37, 38]
    widget_page.move(*center(13))
    mouse.down()
    widget_page.move(*center(26))
    mouse.up()
    assert widget_page.get("selected") == [5, 37, 38]
    widget_page.settle()
    assert shown.locator(".lab-count").text_content() == "3 patches of 144 selected"


def test_asking_again_sends_the_selection_and_shows_the_reply(widget_page: WidgetPage) -> None:
    widget = PatchExplorer(*example(), ask=lambda patches: ("A new answer", [0.9, 0.5, 0.25]))
    shown = widget_page.mount(widget)
    ask = shown.get_by_role("button", name="Ask again without these patches")
    assert ask.is_disabled()
    widget_page.set("selected", [3, 4])
    ask.click()
    widget_page.settle()
    (message,) = widget_page.sent()
    assert message["selected"] == [3, 4]
    assert shown.get_by_role("button", name="Asking…").is_disabled()
    assert "Asking again without 2 patches" in shown.locator(".lab-waiting").inner_text()
    widget._hear(widget, message, [])  # what the kernel does
    widget_page.set("reply", widget.reply)
    assert shown.locator(".lab-verdict").all_inner_texts() == ["", "new answer"]
    assert [text.split() for text in shown.locator(".lab-said").all_inner_texts()][4:] == [
        ["A", "90%"],
        ["new", "50%"],
        ["answer", "25%"],
    ]
    assert ask.is_enabled()


@pytest.mark.long
def test_an_earlier_reply_does_not_answer_a_new_question(widget_page: WidgetPage) -> None:
    widget = PatchExplorer(*example(), ask=lambda patches: ("x", None))
    widget.reply = {"id": 1, "state": "done", "selected": [3], "answer": "old", "words": [], "p": None}
    shown = widget_page.mount(widget)
    widget_page.set("selected", [3])
    shown.get_by_role("button", name="Ask again without these patches").click()
    widget_page.settle()
    assert shown.locator(".lab-waiting").count() == 1


def test_crop_shows_what_was_not_seen_and_selects_nothing_there(widget_page: WidgetPage) -> None:
    picture = np.full((200, 400, 3), 200, np.uint8)
    run = make_run(picture=picture, mode="crop")
    shown = widget_page.mount(PatchExplorer(run, {"rollout": single_cell(run, [0, 0, 0, 0])}))
    unseen, seen, lit = widget_page.pixels([(0.05, 0.1), (0.6, 0.6), (0.25 + 0.5 / 24, 0.5 / 12)])
    assert max(unseen[:3]) < 140
    assert min(seen[:3]) > 150
    assert difference(lit, seen) > 100  # the first patch begins at a quarter of the width
    shown.locator("canvas.lab-canvas").click(position=widget_page.at(0.05, 0.1))
    assert widget_page.get("selected") == []
    shown.locator("canvas.lab-canvas").click(position=widget_page.at(0.26, 0.02))
    assert widget_page.get("selected") == [0]


def test_pad_clips_patches_to_the_picture(widget_page: WidgetPage) -> None:
    run = make_run(picture=car_picture(400, 200), mode="pad")
    shown = widget_page.mount(PatchExplorer(run, {"rollout": make_relevance(run, spots(run))}))
    shown.locator("canvas.lab-canvas").focus()
    for key in ("ArrowUp", "ArrowUp", " "):
        widget_page.page.keyboard.press(key)
    assert widget_page.get("selected") == [36]  # rows 0 to 2 are padding
    widget_page.page.keyboard.press("Escape")
    shown.get_by_role("button", name="Random 14").click()
    assert all(36 <= patch < 108 for patch in widget_page.get("selected"))
    assert len(widget_page.get("selected")) == 14


@pytest.mark.long
def test_smooth_and_spotlight_repaint(widget_page: WidgetPage) -> None:
    run = make_run(picture=np.full((288, 288, 3), 180, np.uint8))
    shown = widget_page.mount(PatchExplorer(run, {"rollout": single_cell(run, [17, 60, 65, 130])}, word=2))
    border = (5.0 / 12 - 0.006, 5.5 / 12)  # just left of the bright patch
    sharp = widget_page.pixels([border])[0]
    shown.get_by_role("radio", name="Smooth").click()
    assert difference(widget_page.pixels([border])[0], sharp) > 30
    shown.get_by_role("radio", name="Spotlight").click()
    dark, bright = widget_page.pixels([center(143), center(65)])
    assert sum(dark[:3]) < 200
    assert sum(bright[:3]) > 450


@pytest.mark.long
def test_opacity_zero_is_the_picture_itself(widget_page: WidgetPage) -> None:
    run = make_run(picture=np.full((288, 288, 3), (180, 40, 40), np.uint8))
    shown = widget_page.mount(PatchExplorer(run, {"rollout": single_cell(run, [17, 60, 65, 130])}))
    slider = shown.get_by_role("slider", name="Opacity")
    slider.focus()
    widget_page.page.keyboard.press("Home")
    assert widget_page.pixels([center(130)])[0] == [180, 40, 40, 255]


@pytest.mark.long
def test_pictures_of_any_size_reach_the_page_once_and_small(widget_page: WidgetPage) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2200, 3), dtype=np.uint8)
    run = make_run(picture=noise, mode="crop")
    widget = PatchExplorer(run, {"rollout": make_relevance(run, spots(run))})
    assert widget.picture[:2] == b"\xff\xd8"  # a photograph travels as JPEG
    assert len(base64.b64encode(widget.picture)) < 1_500_000
    widget_page.mount(widget)
    assert widget_page.page.locator("canvas.lab-canvas").evaluate("(c) => Math.round((c.width / c.height) * 100)") == 147


@pytest.mark.long
def test_arrows_choose_words_methods_and_layers(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(PatchExplorer(*example()))
    keyboard = widget_page.page.keyboard
    shown.get_by_role("radio", name="red.").focus()
    keyboard.press("ArrowLeft")
    assert widget_page.get("word") == 2
    widget_page.settle()  # the chips are marked with the next frame
    assert shown.get_by_role("radio", name="is, ").get_attribute("aria-checked") == "true"
    keyboard.press("Home")
    assert widget_page.get("word") == 0
    shown.get_by_role("radio", name="rollout").focus()
    keyboard.press("ArrowRight")
    assert widget_page.get("method") == "occlusion"
    keyboard.press("ArrowLeft")
    widget_page.settle()  # the slider comes back with the next frame
    shown.get_by_role("slider", name="Layer").focus()
    keyboard.press("ArrowLeft")
    widget_page.settle()
    assert widget_page.get("layer") == 4
    assert shown.locator(".lab-legend-title").text_content() == "rollout · “The” · layer 4"


def test_the_picture_works_from_the_keyboard_and_speaks(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(PatchExplorer(*example()))
    keyboard = widget_page.page.keyboard
    shown.locator("canvas.lab-canvas").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", " "):
        keyboard.press(key)
    assert widget_page.get("selected") == [13]
    expect(shown.locator(".lab-live")).to_contain_text("row 1, column 1")
    expect(shown.locator(".lab-live")).to_contain_text("selected")
    keyboard.press("Shift+ArrowRight")
    keyboard.press("Shift+ArrowDown")
    assert widget_page.get("selected") == [13, 14, 25, 26]
    keyboard.press("Escape")
    assert widget_page.get("selected") == []


def test_choosing_a_word_says_its_strongest_patches(widget_page: WidgetPage) -> None:
    run = make_run()
    rel = single_cell(run, [17, 60, 101, 130], value=0.5)
    shown = widget_page.mount(PatchExplorer(run, {"rollout": rel}))
    shown.get_by_role("radio", name="car").click()
    expect(shown.locator(".lab-live")).to_contain_text("rollout · “car”")
    expect(shown.locator(".lab-live")).to_contain_text("Strongest: row 5, column 0: 0.500")
    widget_page.settle()
    row, col, value = rel.top(1, target=1)[0]
    assert shown.get_by_role("listitem").first.inner_text().split("\n") == [f"row {row}, column {col}", f"{value:.3f}"]


@pytest.mark.long
def test_the_strongest_patches_are_of_the_picture_and_padding_is_counted(widget_page: WidgetPage) -> None:
    run = make_run(picture=car_picture(400, 200), mode="pad")
    values = np.zeros((4, 12, 12))
    values[:, 0, 0], values[:, 1, 5], values[:, 6, 3], values[:, 7, 7] = 0.9, 0.8, 0.7, 0.6  # the first two are padding
    values[3, :2] = 0
    shown = widget_page.mount(PatchExplorer(run, {"rollout": make_relevance(run, values)}, word="car"))
    assert shown.locator(".lab-top .lab-place").all_inner_texts()[:2] == ["row 6, column 3", "row 7, column 7"]
    expect(shown.locator(".lab-side")).to_contain_text("Stronger still: 2 patches of padding.")
    shown.get_by_role("radio", name="red.").click()
    expect(shown.locator(".lab-live")).to_contain_text("Strongest: row 6, column 3: 0.700; row 7, column 7: 0.601")
    expect(shown.get_by_text("Stronger still")).to_be_hidden()


def test_export_saves_a_png_with_the_map_in_it(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(PatchExplorer(*example()))
    with widget_page.page.expect_download() as download:
        shown.get_by_role("button", name="Save as PNG").click()
    saved = download.value
    assert saved.suggested_filename == "patches-rollout-red-layer-5.png"
    image = Image.open(BytesIO(Path(saved.path()).read_bytes())).convert("RGB")
    assert image.width >= 900
    assert len(image.getcolors(1 << 22) or []) > 1000


def test_a_patch_below_the_noise_floor_is_called_negligible(widget_page: WidgetPage) -> None:
    run = make_run()
    values = np.full((4, 12, 12), 1e-3)
    values[:, 5, 0] = 0.5
    occlusion = make_relevance(run, values, extras={"noise_floor": [0.01] * 4})
    shown = widget_page.mount(PatchExplorer(run, {"occlusion": occlusion, "other": make_relevance(run, values)}))
    strong, *weak = shown.locator(".lab-top .lab-value").all_inner_texts()
    assert (strong, set(weak)) == ("0.500", {"negligible"})
    assert shown.locator(".lab-top .lab-negligible").count() == len(weak)
    assert "negligible" not in shown.inner_text().split("Strongest patches")[0]
    soft = shown.locator(".lab-top .lab-place").first.evaluate("(node) => getComputedStyle(node).color")
    for (row, column), text, faint in (((5, 0), "0.500", False), ((2, 7), "negligible", True)):
        widget_page.move(*center(12 * row + column))
        value = shown.locator(".lab-readout .lab-value")
        expect(value).to_have_text(text)
        assert (value.evaluate("(node) => getComputedStyle(node).color") == soft) == faint
    shown.get_by_role("radio", name="other").click()
    expect(shown.locator(".lab-top .lab-negligible")).to_have_count(0)
    assert set(shown.locator(".lab-top .lab-value").all_inner_texts()) == {"0.500", "0.001"}


@pytest.mark.long
def test_a_map_that_lies_below_its_noise_floor_says_that_it_is_negligible(widget_page: WidgetPage) -> None:
    run = make_run()
    values = np.zeros((4, 12, 12))
    values[1:, 5, 0] = 0.5
    shown = widget_page.mount(PatchExplorer(run, {"occlusion": make_relevance(run, values, extras={"noise_floor": [0.01] * 4})}))
    said = "No patch here reaches the noise floor: the effect is negligible."
    shown.locator(".lab-chips button").nth(0).click()
    expect(shown).to_contain_text(said)
    shown.locator(".lab-chips button").nth(1).click()
    expect(shown).not_to_contain_text(said)
