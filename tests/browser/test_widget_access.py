"""The explorer for everyone: by keyboard, by screen reader, in the dark; and what it must not do.

It lets no key through to the notebook, no markup into the page, and leaves nothing behind.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser

from tests.support.widget_examples import example, make_relevance, make_run, single_cell, spots
from tests.support.widget_page import WidgetPage
from widgets import PatchExplorer

FOCUSED = "() => document.activeElement.getAttribute('aria-label') || document.activeElement.innerText"
ATTACK = '<img/src=x/onerror="window.attacked=1"><script>window.attacked=1</script>'


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


def test_the_tab_key_reaches_every_control_once(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(PatchExplorer(*example(), ask=lambda patches: ("x", None)))
    reached = []
    for _ in range(11):  # Clear and Ask wait for a selection
        widget_page.page.keyboard.press("Tab")
        reached.append(widget_page.page.evaluate(FOCUSED))
    picture = shown.locator("canvas.lab-canvas").get_attribute("aria-label")
    controls = ["rollout", "Layer", "Opacity", "Patches", "Colour", "All words", "Strongest 14", "Random 14"]
    assert reached == ["Save as PNG", "red., 81%", picture, *controls]


def test_the_picture_works_from_the_keyboard_and_speaks(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(PatchExplorer(*example()))
    keyboard = widget_page.page.keyboard
    shown.locator("canvas.lab-canvas").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", " "):
        keyboard.press(key)
    assert widget_page.get("selected") == [13]
    assert "row 1, column 1" in (shown.locator(".lab-live").text_content() or "")
    assert "selected" in (shown.locator(".lab-live").text_content() or "")
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
    assert "rollout · “car”" in (shown.locator(".lab-live").text_content() or "")
    assert "Strongest: row 5, column 0: 0.500" in (shown.locator(".lab-live").text_content() or "")
    row, col, value = rel.top(1, target=1)[0]
    assert shown.get_by_role("listitem").first.inner_text().split("\n") == [f"row {row}, column {col}", f"{value:.3f}"]


def test_keys_do_not_leave_the_widget(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(PatchExplorer(*example()))
    widget_page.page.evaluate(
        "() => { window.leaked = 0; document.body.addEventListener('keydown', () => (window.leaked += 1)); }"
    )
    for name in ("canvas.lab-canvas", ".lab-button >> nth=0", ".lab-range >> nth=0"):
        shown.locator(name).first.focus()
        widget_page.page.keyboard.type("abdd")
    assert widget_page.page.evaluate("() => window.leaked") == 0


def test_markup_in_answers_names_and_notes_stays_text(widget_page: WidgetPage) -> None:
    run = make_run(f"The {ATTACK} is red.", question=ATTACK, model=ATTACK)
    rel = make_relevance(run, spots(run), options={"fill": ATTACK}, notes=(ATTACK,))
    widget = PatchExplorer(run, {ATTACK: rel}, ask=lambda patches: (ATTACK, None))
    shown = widget_page.mount(widget)
    shown.get_by_role("button", name="Strongest 14").click()
    shown.get_by_role("button", name="Ask again without these patches").click()
    widget._hear(widget, widget_page.sent()[0], [])
    widget_page.set("reply", widget.reply)
    widget_page.set(
        "reply", {**widget.reply, "id": widget_page.sent()[0]["id"], "state": "error", "message": ATTACK, "trace": ATTACK}
    )
    assert shown.locator("img, script").count() == 0
    assert ATTACK in shown.locator(".lab-question").inner_text()
    assert widget_page.page.evaluate("() => window.attacked") is None


def test_export_saves_a_png_with_the_map_in_it(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(PatchExplorer(*example()))
    with widget_page.page.expect_download() as download:
        shown.get_by_role("button", name="Save as PNG").click()
    saved = download.value
    assert saved.suggested_filename == "patches-rollout-red-layer-5.png"
    image = Image.open(BytesIO(Path(saved.path()).read_bytes())).convert("RGB")
    assert image.width >= 900
    assert len(image.getcolors(1 << 22) or []) > 1000


def test_closing_leaves_no_listener_and_no_element(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(PatchExplorer(*example()))
    assert widget_page.page.evaluate("() => window.test.listeners()") == 6
    widget_page.page.evaluate(
        """() => {
          window.frames_asked = 0;
          const ask = window.requestAnimationFrame.bind(window);
          window.kept = document.querySelector('canvas.lab-canvas');
          window.test.close();
          window.requestAnimationFrame = (call) => { window.frames_asked += 1; return ask(call); };
          for (const kind of ['pointermove', 'pointerdown', 'pointerleave', 'blur', 'keydown'])
            window.kept.dispatchEvent(new (kind === 'keydown' ? KeyboardEvent : PointerEvent)(kind, { key: ' ', bubbles: true }));
          window.test.model.set('word', 1);
        }"""
    )
    assert widget_page.page.evaluate("() => window.test.listeners()") == 0
    assert widget_page.page.evaluate("() => window.frames_asked") == 0
    assert shown.count() == 0
    assert widget_page.get("selected") == []


def test_screen_reader_tree_names_everything(widget_page: WidgetPage) -> None:
    run = make_run()
    rel = single_cell(run, [17, 60, 101, 130], value=0.5)
    shown = widget_page.mount(PatchExplorer(run, {"rollout": rel, "random": rel}, ask=lambda patches: ("x", None)))
    tree = shown.aria_snapshot()
    for line in (
        '- group "Patch explorer"',
        '- heading "What color is the car?" [level=2]',
        '- radiogroup "Words of the answer"',
        '- radio "red., 81%" [checked]',
        '- application "The picture in 12 by 12 patches.',
        '- radiogroup "Method"',
        '- radio "random, control"',
        '- slider "Opacity"',
        '- radiogroup "Scale"',
        '- heading "Strongest patches" [level=3]',
        "- listitem: row 10, column 10 0.500",
        '- group "Selected patches"',
        '- button "Ask again without these patches" [disabled]',
    ):
        assert line in tree, f"{line} is missing in\n{tree}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground_outside_jupyter(chromium: Browser, scheme: str) -> None:
    page = WidgetPage(chromium, color_scheme=scheme)
    shown = page.mount(PatchExplorer(*example()))
    code = """(card) => {
      const canvas = document.createElement('canvas');
      const ctx = canvas.getContext('2d');
      const light = (color) => {
        ctx.fillStyle = color;
        ctx.fillRect(0, 0, 1, 1);
        const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = [...ctx.getImageData(0, 0, 1, 1).data].map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const ground = light(getComputedStyle(card).backgroundColor);
      return ['.lab-question', '.lab-about', '.lab-percent', '.lab-caption', '.lab-link', '.lab-low'].map((name) => {
        const ink = light(getComputedStyle(card.querySelector(name)).color);
        return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
      });
    }"""
    assert min(shown.locator(".lab-card").evaluate(code)) >= 4.5
    page.close()
