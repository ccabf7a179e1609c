"""TokenLens in a real browser: pointing, typing, locking, keys, states, and both ways to and from Python."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from playwright.sync_api import Locator, expect

from tests.support.lens_examples import CAR, ONCE, SPOT, STATES, example, three
from tests.support.widget_page import WidgetPage, center, difference
from widgets import TokenLens


def mounted(page: WidgetPage, **options: Any) -> Locator:
    return page.mount(TokenLens(*example(), **options))


def row(shown: Locator, state: int) -> list[str]:
    """A state's line of the table: word and share by turns, then the entropy."""
    cells = shown.locator(".lab-lens-row").nth(state + 1).locator(".lab-lens-text, .lab-lens-share, .lab-lens-entropy")
    return cells.all_inner_texts()


def find(page: WidgetPage, shown: Locator, word: str, *, enter: bool = True) -> str:
    """Type a word; what the view says of it."""
    shown.locator(".lab-lens-input").fill(word)
    if enter:
        shown.locator(".lab-lens-input").press("Enter")
    page.settle()
    return shown.locator(".lab-lens-status > span").first.inner_text()


def lit(page: WidgetPage) -> set[int]:
    """Patches painted unlike the last one, away from the words written on them."""
    spots = [(x - 0.03, y + 0.03) for x, y in map(center, range(144))]
    page.page.get_by_role("radio", name="None").click()
    pixels = page.pixels(spots)
    return {patch for patch in range(144) if max(map(abs, (a - b for a, b in zip(pixels[patch], pixels[143], strict=True)))) > 60}


def test_pointing_shows_a_patchs_words_at_every_state_and_leaving_those_of_all(widget_page: WidgetPage) -> None:
    shown = mounted(widget_page)
    title = shown.locator(".lab-lens-title").first
    assert title.inner_text() == "Likeliest words, over all patches"
    assert row(shown, 4)[:4] == ["grass", "99%", "car", "0.7%"]
    widget_page.move(*center(SPOT))
    widget_page.settle()
    assert title.inner_text() == "Likeliest words at row 8, column 5"
    assert [row(shown, state)[:2] for state in range(STATES)] == [["car", p] for p in ("1.0%", "5.0%", "20%", "50%", "90%")]
    assert row(shown, 0)[-1] == "5.35"
    widget_page.page.mouse.move(2, 2)
    widget_page.settle()
    assert title.inner_text() == "Likeliest words, over all patches"
    assert widget_page.page.evaluate("() => window.test.saves()") == 0  # Python heard nothing


@pytest.mark.long
def test_nearest_words_and_norm_follow_the_patch(widget_page: WidgetPage) -> None:
    shown = mounted(widget_page)
    near = shown.locator(".lab-lens-near-line")
    assert near.first.inner_text().split() == ["sky", "99%"]
    widget_page.move(*center(SPOT))
    widget_page.settle()
    assert near.first.inner_text().split() == ["wheel", "0.50"]
    assert near.nth(2).inner_text().split() == ["sky", "−0.20"]
    assert shown.locator(".lab-lens-norm").inner_text().startswith("Norm 9, rank 1 of 144; median 1.5")


@pytest.mark.long
def test_without_nearest_words_there_is_no_place_for_them(widget_page: WidgetPage) -> None:
    run, lens, _ = example()
    assert widget_page.mount(TokenLens(run, lens)).locator(".lab-lens-near").count() == 0


def test_a_word_asked_for_lights_up_where_it_is_and_says_where_and_when(widget_page: WidgetPage) -> None:
    shown = mounted(widget_page)
    said = find(widget_page, shown, "car")
    assert said == "“car” is likeliest at state 4, row 8, column 5: 90%, rank 1. Its probability is known everywhere."
    assert lit(widget_page) == {SPOT}
    assert shown.locator(".lab-legend-title").inner_text() == "“car” at state 4"
    widget_page.move(*center(3))
    widget_page.settle()
    assert shown.locator(".lab-lens-value").inner_text() == "0.2%, rank 300 of 1,000"
    assert widget_page.get("word") == "car"


def test_any_other_word_says_plainly_that_it_is_seen_only_among_the_top(widget_page: WidgetPage) -> None:
    shown = mounted(widget_page)
    said = find(widget_page, shown, "sky")
    assert "“sky” (2 tokens read so; summed) is shown only where it is among the top 4: 719 of 720 places" in said
    said = find(widget_page, shown, "red")
    assert "only where it is among the top 4: 1 of 720 places, likeliest at state 3, row 3, column 4: 20%" in said
    widget_page.move(*center(0))
    widget_page.settle()
    assert shown.locator(".lab-lens-value").inner_text() == "at most 5.0%: not in the top 4"
    assert shown.locator(".lab-ends .lab-low").inner_text() == "not in the top 4"  # not "0%"


@pytest.mark.long
def test_a_word_that_never_appears_says_so_and_offers_the_closest(widget_page: WidgetPage) -> None:
    shown = mounted(widget_page)
    said = find(widget_page, shown, "gras")
    assert said.startswith("“gras” is never among the top 4, at no patch and no state.")
    offered = shown.locator(".lab-lens-closest button")
    assert offered.first.inner_text() == "grass"
    offered.first.click()
    widget_page.settle()
    assert widget_page.get("word") == "grass"
    assert shown.locator(".lab-lens-input").input_value() == "grass"


def test_the_field_knows_every_piece_that_can_be_found_and_no_other(widget_page: WidgetPage) -> None:
    shown = mounted(widget_page)
    shown.locator(".lab-lens-input").focus()
    known = shown.locator("datalist option").evaluate_all("(nodes) => nodes.map((node) => node.value)")
    assert known == ["car", "cup", "Red", "grass", "of", "sky"]  # asked for first; "wheel" is a nearest word only


def test_typing_shows_at_once_and_python_hears_of_it_when_it_is_entered(widget_page: WidgetPage) -> None:
    shown = mounted(widget_page)
    find(widget_page, shown, "car", enter=False)
    assert lit(widget_page) == {SPOT}
    shown.locator(".lab-lens-input").focus()
    assert widget_page.get("word") in ("", "car")  # leaving the field enters what is in it
    find(widget_page, shown, "cup")
    assert widget_page.get("word") == "cup"
    shown.locator(".lab-lens-input").press("Escape")
    widget_page.settle()
    assert widget_page.get("word") == ""
    assert shown.locator(".lab-legend-title").inner_text() == "entropy at state 4"


def test_the_words_asked_for_are_buttons(widget_page: WidgetPage) -> None:
    shown = mounted(widget_page)
    pill = shown.get_by_role("button", name="car", exact=True)
    pill.click()
    widget_page.settle()
    assert widget_page.get("word") == "car"
    assert pill.get_attribute("aria-pressed") == "true"
    pill.click()
    widget_page.settle()
    assert widget_page.get("word") == ""


def test_a_click_locks_a_patch_and_escape_unlocks_it(widget_page: WidgetPage) -> None:
    shown = mounted(widget_page)
    canvas, title = shown.locator("canvas.lab-canvas"), shown.locator(".lab-lens-title").first
    canvas.click(position=widget_page.at(*center(SPOT)))
    assert widget_page.get("selected") == [SPOT]
    widget_page.move(*center(3))
    widget_page.settle()
    assert title.inner_text() == "Likeliest words at row 8, column 5 · locked"
    assert shown.locator(".lab-place").inner_text() == "row 0, column 3"  # the line below still follows
    canvas.click(position=widget_page.at(*center(7)))
    assert widget_page.get("selected") == [7]
    canvas.click(position=widget_page.at(*center(7)))
    assert widget_page.get("selected") == []
    canvas.click(position=widget_page.at(*center(SPOT)))
    shown.locator(".lab-lens-state").first.focus()
    widget_page.page.keyboard.press("Escape")
    assert widget_page.get("selected") == []


def test_arrows_move_the_cursor_and_then_the_lock(widget_page: WidgetPage) -> None:
    shown = mounted(widget_page)
    shown.locator("canvas.lab-canvas").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        widget_page.page.keyboard.press(key)
    widget_page.settle()
    assert widget_page.get("selected") == []
    assert shown.locator(".lab-lens-title").first.inner_text() == "Likeliest words at row 1, column 1"
    widget_page.page.keyboard.press(" ")
    assert widget_page.get("selected") == [13]
    widget_page.page.keyboard.press("ArrowDown")
    assert widget_page.get("selected") == [25]
    expect(shown.locator(".lab-live")).to_have_text("row 2, column 1, locked. State 4: grass 40%, sky 20%, of 10%. Norm 1.2.")


def test_a_row_of_the_table_previews_its_state_and_a_click_keeps_it(widget_page: WidgetPage) -> None:
    shown = mounted(widget_page, word="car")
    shown.locator(".lab-lens-row").nth(3).hover()
    widget_page.settle()
    assert shown.locator(".lab-legend-title").inner_text() == "“car” at state 2"
    assert widget_page.get("state") == 4
    shown.locator(".lab-lens-row").nth(3).click()
    assert widget_page.get("state") == 2
    widget_page.page.mouse.move(2, 2)
    widget_page.settle()
    assert shown.locator(".lab-legend-title").inner_text() == "“car” at state 2"


def test_a_click_on_the_curve_and_the_slider_go_to_a_state(widget_page: WidgetPage) -> None:
    shown = mounted(widget_page, word="car")
    box = shown.locator("canvas.lab-lens-curve").bounding_box()
    assert box is not None
    shown.locator("canvas.lab-lens-curve").click(position={"x": 8 + (box["width"] - 16) / 4, "y": 30})
    assert widget_page.get("state") == 1
    shown.get_by_role("slider", name="State").focus()
    widget_page.page.keyboard.press("ArrowRight")
    assert widget_page.get("state") == 2
    expect(shown.locator(".lab-live")).to_have_text("State 2, after 2 layers. “car”: highest 20%.")


@pytest.mark.parametrize(("x", "expected"), [(0, 0), (8, 0), (108, 2), (70, 1), (208, 4), (900, 4)])
def test_the_curve_finds_the_nearest_state(widget_page: WidgetPage, x: float, expected: int) -> None:
    widget_page.module = TokenLens._esm
    assert widget_page.call("curveIndex", x, 216, 5) == expected


def test_what_python_sets_is_shown(widget_page: WidgetPage) -> None:
    shown = mounted(widget_page)
    widget_page.set("word", "car")
    assert shown.locator(".lab-lens-input").input_value() == "car"
    assert lit(widget_page) == {SPOT}
    widget_page.set("state", 1)
    assert shown.locator(".lab-legend-title").inner_text() == "“car” at state 1"
    assert shown.locator(".lab-lens-kept .lab-lens-state").inner_text() == "1"
    widget_page.set("selected", [SPOT])
    assert shown.locator(".lab-lens-title").first.inner_text() == "Likeliest words at row 8, column 5 · locked"
    widget_page.set("word", "")
    assert shown.locator(".lab-legend-title").inner_text() == "entropy at state 1"
    assert shown.locator(".lab-lens-input").input_value() == ""


@pytest.mark.long
def test_the_table_marks_the_word_looked_for(widget_page: WidgetPage) -> None:
    shown = mounted(widget_page, word="grass", patch=(8, 5))
    hits = shown.locator(".lab-lens-hit .lab-lens-text").all_inner_texts()
    assert hits == ["grass"] * STATES


@pytest.mark.long
def test_numbers_read_in_the_page_are_those_of_python(widget_page: WidgetPage) -> None:
    run, lens, near = example()
    widget = TokenLens(run, lens, near)
    widget_page.mount(widget)
    code = """async () => {
      const { readLens, findWord, entropyQuantity } = await import('/module.js');
      const lens = readLens(window.test.values.maps, window.test.values.spec);
      const found = findWord(lens, 'car');
      return [[...found.values], found.best, [...entropyQuantity(lens).values]];
    }"""
    values, best, entropy = widget_page.page.evaluate(code)
    assert values == pytest.approx(lens.probs[:, :, 0].ravel().tolist(), abs=2e-5)
    assert best == 4 * 144 + SPOT
    assert entropy == pytest.approx(lens.entropy.ravel().tolist(), abs=1e-4)
    assert max(CAR) == pytest.approx(max(values), abs=2e-5)
    assert ONCE[0] == 3


@pytest.mark.long
def test_words_are_written_on_the_picture_and_can_be_left_out(widget_page: WidgetPage) -> None:
    shown = mounted(widget_page)
    steps = (-0.02, -0.01, 0.0, 0.01, 0.02)  # where a letter has ink depends on the system's font
    places = [(x + step, y) for x, y in map(center, range(144)) for step in steps]
    before = widget_page.pixels(places)
    shown.get_by_role("radio", name="None").click()
    after = widget_page.pixels(places)
    changed = [difference(a, b) > 20 for a, b in zip(before, after, strict=True)]
    assert sum(any(changed[i : i + len(steps)]) for i in range(0, len(changed), len(steps))) > 100


@pytest.mark.long
def test_one_state_needs_no_slider(widget_page: WidgetPage) -> None:
    run, lens, near = example()
    cut = {name: getattr(lens, name)[2:3] for name in ("top_ids", "top_probs", "entropy", "ranks", "probs")}
    shown = widget_page.mount(TokenLens(run, replace(lens, states=(2,), **cut), near, word="car"))
    assert not shown.get_by_role("slider", name="State").is_visible()
    assert shown.locator(".lab-legend-title").inner_text() == "“car” at state 2"


def test_choosing_a_lens_changes_the_words_the_map_and_what_python_hears(widget_page: WidgetPage) -> None:
    run, lenses, near = three()
    shown = widget_page.mount(TokenLens(run, lenses, near, word="cup", patch=(8, 5)))
    assert row(shown, 2)[:2] == ["car", "20%"]
    assert shown.locator(".lab-lens-status > span").first.inner_text().startswith("“cup” is likeliest at state 0")
    shown.get_by_role("radio", name="Jacobian lens").click()
    widget_page.settle()
    assert widget_page.get("kind") == "jacobian"
    assert row(shown, 2)[:2] == ["cup", "95%"]
    assert "95%, rank" in shown.locator(".lab-lens-status > span").first.inner_text()
    assert (shown.locator(".lab-live").text_content() or "").startswith("Jacobian lens. State ")
    assert lit(widget_page) == {SPOT}
    find(widget_page, shown, "")
    entropy = row(shown, 0)[-1]
    widget_page.set("kind", "tuned")
    assert shown.get_by_role("radio", name="Tuned lens").get_attribute("aria-checked") == "true"
    assert row(shown, 0)[-1] != entropy
    assert row(shown, 2)[:2] == ["car", "20%"]


@pytest.mark.long
def test_one_lens_has_no_choice_of_lens(widget_page: WidgetPage) -> None:
    assert mounted(widget_page).get_by_role("radiogroup", name="Lens").count() == 0
