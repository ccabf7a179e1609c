"""CompareView for everyone: by keyboard, by screen reader, in the dark; what it must not do; how soon a hover is seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser

from tests.support.compare_examples import METHODS, comparison_example, methods_example, three
from tests.support.measure_widget import hover_times
from tests.support.widget_examples import make_relevance, make_run
from tests.support.widget_page import CONTRAST, WidgetPage
from widgets import CompareView

ATTACK = '<img/src=x/onerror="window.attacked=1"><script>window.attacked=1</script>'
SLOWEST_MS = 50  # three frames; under 16 are meant, 14 were measured
FLOOR_TIMES = 4  # or as many times what any repaint takes here and now: someone else may be using the machine
ATTEMPTS = 3


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
    assert "row 1, column 0" in (shown.locator(".lab-live").text_content() or "")


def test_keys_do_not_leave_the_widget(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(three())
    widget_page.page.evaluate(
        "() => { window.leaked = 0; document.body.addEventListener('keydown', () => (window.leaked += 1)); }"
    )
    for name in ("canvas.lab-canvas", ".lab-tile >> nth=0", ".lab-range >> nth=0", ".lab-pills-item[aria-checked=true]"):
        shown.locator(name).first.focus()
        widget_page.page.keyboard.type("abdd")
    assert widget_page.page.evaluate("() => window.leaked") == 0


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


def test_screen_reader_tree_names_everything(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(CompareView(*comparison_example(), target="car"))
    tree = shown.aria_snapshot()
    for line in (
        '- group "Compare methods"',
        '- heading "What color is the car?" [level=2]',
        '- radiogroup "What is explained"',
        '- application "The picture in 12 by 12 patches.',
        '- heading "rollout" [level=3]',
        '- heading "Faithful to the model" [level=3]',
        '- radiogroup "Sort by"',
        '- slider "Colour range"',
        '- group "Maps by method"',
        '- button "rollout, gain 0.27, strongest row 8, column 2" [pressed]',
        '- button "gradcam, gain 0.12, not shown to beat random, strongest',
        '- button "random, control, gain 0, not shown to beat random, strongest',
    ):
        assert line in tree, f"{line} is missing in\n{tree}"


def test_markup_in_names_and_notes_stays_text(widget_page: WidgetPage) -> None:
    run = make_run(f"The {ATTACK} is red.", question=ATTACK, model=ATTACK)
    rel = make_relevance(run, np.ones((4, 12, 12)), options={"fill": ATTACK}, notes=(ATTACK,))
    widget = CompareView(run, {ATTACK: rel}, scores={ATTACK: {ATTACK: 1.0}})
    shown = widget_page.mount(widget)
    assert shown.locator("img, script").count() == 0
    assert ATTACK in shown.locator(".lab-tile-name").inner_text()
    assert widget_page.page.evaluate("() => window.attacked") is None


def test_closing_leaves_no_listener_and_no_element(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(three())
    assert widget_page.page.evaluate("() => window.test.listeners()") == 5
    widget_page.page.evaluate("() => { window.kept = document.querySelector('.lab-tile-canvas'); window.test.close(); }")
    widget_page.page.evaluate("() => window.kept.dispatchEvent(new PointerEvent('pointermove', { bubbles: true }))")
    assert widget_page.page.evaluate("() => window.test.listeners()") == 0
    assert shown.count() == 0
    assert widget_page.get("pointed") == -1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_thousand_pixels_and_text_stands_out(chromium: Browser, scheme: str, tmp_path: Path) -> None:
    page = WidgetPage(chromium, color_scheme=scheme, viewport={"width": 1000, "height": 1000})
    shown = page.mount(CompareView(*comparison_example()))
    assert page.page.evaluate("() => document.documentElement.scrollWidth") <= 1000
    lines = shown.locator(".lab-tile-name, .lab-caption, .lab-tile-line, .lab-score-name, .lab-pills-item")
    assert lines.evaluate_all(CONTRAST, ".lab-card") >= 4.5
    shown.screenshot(path=tmp_path / f"compare-{scheme}.png")
    page.close()


def test_pointing_lights_all_maps_within_frames(widget_page: WidgetPage) -> None:
    run, maps = methods_example(make_run(grid=24, size=336), METHODS)
    shown = widget_page.mount(CompareView(run, maps))
    for _ in range(ATTEMPTS):
        times = hover_times(widget_page, shown.locator(".lab-tile-canvas").nth(7), 33)
        found = {"methods": len(maps), **times}
        print(json.dumps(found))
        allowed = max(SLOWEST_MS, FLOOR_TIMES * times["floor_ms"])
        if times["median_ms"] < allowed:
            break
    assert found["median_ms"] < allowed
