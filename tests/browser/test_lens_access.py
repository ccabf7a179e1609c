"""TokenLens for everyone: by screen reader, in the dark; what it must not do; how soon a hover is seen at 7B size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.support.lens_examples import big, example
from tests.support.measure_widget import hover_times
from tests.support.widget_page import CONTRAST, WidgetPage
from widgets import TokenLens

ATTACK = '<img/src=x/onerror="window.attacked=1"><script>window.attacked=1</script>'
FRAME_MS = 16  # or what the barest repaint takes here and now, until it is seen: someone else may be using the machine
FLOOR_TIMES = 4  # of that, for a hover until it is seen
ATTEMPTS = 3
PAINT = """async () => {
  const canvas = document.querySelector('canvas.lab-canvas');
  const box = canvas.getBoundingClientRect();
  const own = window.requestAnimationFrame;
  const times = [];
  window.requestAnimationFrame = (call) => own((now) => {
    const start = performance.now();
    call(now);
    document.body.offsetHeight;  // style and layout belong to it
    times.push(performance.now() - start);
  });
  for (let i = 0; i < 60; i++) {
    const [x, y] = [((i * 7) % 23 + 0.5) / 24, ((i * 5) % 23 + 0.5) / 24];
    const at = { clientX: box.left + x * box.width, clientY: box.top + y * box.height, bubbles: true };
    canvas.dispatchEvent(new PointerEvent('pointermove', at));
    await new Promise((done) => own(() => own(done)));
  }
  window.requestAnimationFrame = own;
  return times.slice(10).sort((a, b) => a - b);
}"""  # what one hover costs from the frame's start to the end of layout


def test_at_7b_size_a_hover_repaints_within_one_frame_and_loads_nothing(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(TokenLens(*big()))
    for _ in range(ATTEMPTS):
        times = widget_page.page.evaluate(PAINT)
        found = hover_times(widget_page, shown.locator("canvas.lab-canvas"), 33)
        print(json.dumps({"paint_ms": round(times[len(times) // 2], 2), "p95_ms": round(times[-3], 2), "seen": found}))
        allowed = max(FRAME_MS, found["floor_ms"])
        if times[len(times) // 2] < allowed and found["median_ms"] < max(50, FLOOR_TIMES * found["floor_ms"]):
            break
    assert len(times) >= 40
    assert times[len(times) // 2] < allowed
    assert found["median_ms"] < max(50, FLOOR_TIMES * found["floor_ms"])
    assert widget_page.sent() == []
    assert widget_page.page.evaluate("() => window.test.saves()") == 0


def test_screen_reader_tree_names_everything(widget_page: WidgetPage) -> None:
    tree = widget_page.mount(TokenLens(*example(), word="car", patch=(8, 5))).aria_snapshot()
    for line in (
        '- group "Token lens"',
        '- heading "What color is the car? The car is red." [level=2]',
        '- combobox "Word to look for": car',
        '- group "Words known everywhere"',
        '- button "car" [pressed]',
        '- application "The picture in 12 by 12 patches. Arrow keys move, space locks',
        '- slider "State"',
        '- table "Likeliest words at row 8, column 5 · locked"',
        '- columnheader "likeliest"',
        '- rowheader "state 0, what the connector gives"',
        '- heading "Nearest words of the projected token" [level=3]',
        '- radiogroup "Colour by"',
    ):
        assert line in tree, f"{line} is missing in\n{tree}"


def test_keys_do_not_leave_the_widget(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(TokenLens(*example()))
    widget_page.page.evaluate(
        "() => { window.leaked = 0; document.body.addEventListener('keydown', () => (window.leaked += 1)); }"
    )
    for name in ("canvas.lab-canvas", ".lab-lens-input", ".lab-lens-state >> nth=0", ".lab-range >> nth=0"):
        shown.locator(name).first.focus()
        widget_page.page.keyboard.type("abdd")
    assert widget_page.page.evaluate("() => window.leaked") == 0


def test_markup_in_pieces_notes_and_typed_words_stays_text(widget_page: WidgetPage) -> None:
    run, lens, near = example()
    pieces = (lens.pieces[0], *[ATTACK] * (len(lens.pieces) - 1))
    shown = widget_page.mount(TokenLens(run, replace(lens, pieces=pieces, notes=(ATTACK,)), near))
    shown.locator(".lab-lens-input").fill(ATTACK)
    widget_page.settle()
    assert shown.locator("img, script").count() == 0
    assert ATTACK in shown.locator(".lab-notes").inner_text()
    assert widget_page.page.evaluate("() => window.attacked") is None


def test_closing_leaves_no_listener_and_no_element(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(TokenLens(*example()))
    assert widget_page.page.evaluate("() => window.test.listeners()") == 4
    widget_page.page.evaluate("() => { window.kept = document.querySelector('.lab-canvas'); window.test.close(); }")
    widget_page.page.evaluate("() => window.kept.dispatchEvent(new PointerEvent('pointermove', { bubbles: true }))")
    assert widget_page.page.evaluate("() => window.test.listeners()") == 0
    assert shown.count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1000, 420])
def test_it_fits_and_can_be_read(chromium: Browser, scheme: str, width: int, tmp_path: Path) -> None:
    page = WidgetPage(chromium, color_scheme=scheme, viewport={"width": width, "height": 1000})
    shown = page.mount(TokenLens(*example(), word="sky", patch=(8, 5)))
    assert page.page.evaluate("() => document.documentElement.scrollWidth") <= width
    said = shown.locator(".lab-lens-text, .lab-lens-entropy, .lab-label, .lab-caption, .lab-lens-status, .lab-lens-soft")
    assert said.evaluate_all(CONTRAST, ".lab-card") >= 4.5
    shown.screenshot(path=tmp_path / f"lens-{scheme}-{width}.png")
    assert page.errors == []
    page.close()


def test_one_state_needs_no_slider(widget_page: WidgetPage) -> None:
    run, lens, near = example()
    cut = {name: getattr(lens, name)[2:3] for name in ("top_ids", "top_probs", "entropy", "ranks", "probs")}
    shown = widget_page.mount(TokenLens(run, replace(lens, states=(2,), **cut), near, word="car"))
    assert not shown.get_by_role("slider", name="State").is_visible()
    assert shown.locator(".lab-legend-title").inner_text() == "“car” at state 2"
