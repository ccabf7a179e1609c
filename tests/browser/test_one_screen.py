"""Control and effect on one screen at usual widths, and labels that never lie on one another, also in a narrow panel."""

from __future__ import annotations

from playwright.sync_api import Browser, Locator

from tests.support.all_widgets import EVERY
from tests.support.compare_examples import heads_example, methods_example
from tests.support.families import family
from tests.support.widget_examples import make_run
from tests.support.widget_page import WidgetPage
from widgets import CompareView, HeadGrid

HIGH = 780  # CSS pixels: a laptop's browser without its bars
WIDE = (1440, 1024)
NARROW = (620, 420, 320)
SEEN = ("CompareView", "HeadGrid", "PatchExplorer", "TokenLens")
# With so much to show that only its limit keeps it on one screen: fifteen methods, forty words.
FULL = {
    "CompareView": lambda: CompareView(*methods_example()),
    "HeadGrid": lambda: HeadGrid(*heads_example(make_run(" ".join(["The car is red."] * 10)))),
}
OUTPUT = 0.84  # of the window's width that JupyterLab leaves to an output
# What is chosen by, and what it changes
TOGETHER = {
    "CompareView": (".lab-pills", ".lab-tile >> nth=0", "canvas.lab-canvas", ".lab-stage-name"),
    "PatchExplorer": (".lab-chips button >> nth=0", "canvas.lab-canvas", ".lab-legend", ".lab-selection button >> nth=0"),
    "HeadGrid": ("canvas.lab-matrix", "canvas.lab-canvas", ".lab-line >> nth=0"),
    "TokenLens": (".lab-lens-input", ".lab-range >> nth=0", "canvas.lab-canvas", ".lab-lens-row >> nth=0"),
}
# Pairs of visible texts whose boxes lie on one another by more than a hair; a text that is cut off counts as far as it is seen.
COLLISIONS = """(root) => {
  const seen = [];
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const within = node.parentElement;
    if (!node.textContent.trim() || within.closest('.lab-live, datalist, option, [hidden]')) continue;
    if (getComputedStyle(within).visibility === 'hidden') continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {  // a line each
      let { left, top, right, bottom } = box;
      for (let over = within; over && over !== root.parentElement; over = over.parentElement) {
        if (getComputedStyle(over).overflowX === 'visible') continue;
        const clip = over.getBoundingClientRect();
        [left, top] = [Math.max(left, clip.left), Math.max(top, clip.top)];
        [right, bottom] = [Math.min(right, clip.right), Math.min(bottom, clip.bottom)];
      }
      if (right - left > 1 && bottom - top > 1) seen.push({ node, text: node.textContent.trim(), left, top, right, bottom });
    }
  }
  const out = [];
  seen.forEach((a, i) => seen.slice(i + 1).forEach((b) => {
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (a.node !== b.node && across > 1 && down > 4) out.push([a.text, b.text]);
  }));
  return out;
}"""


def size(node: Locator) -> dict[str, float]:
    box = node.bounding_box()
    assert box is not None
    return dict(box)


@family("width", WIDE, quick=(1024,))
@family("name", SEEN, quick=("CompareView", "PatchExplorer"))
def test_control_and_effect_are_on_one_screen(chromium: Browser, name: str, width: int) -> None:
    page = WidgetPage(chromium, viewport={"width": width, "height": HIGH})
    shown = page.mount(FULL.get(name, EVERY[name])())
    for share in (1.0, OUTPUT):  # a window of its own, and an output beside JupyterLab's margins
        page.page.evaluate("(share) => { document.querySelector('main').style.width = `${100 * share}%`; }", share)
        page.settle()
        own = size(shown)
        assert own["height"] <= HIGH, f"{own['height']:.0f} px at {width} px"
        for part in TOGETHER[name]:
            box = size(shown.locator(part).first)
            assert box["y"] + min(box["height"], 40) <= own["y"] + own["height"], part
        canvas = size(shown.locator("canvas.lab-canvas"))
        assert canvas["y"] + canvas["height"] <= own["y"] + own["height"]
        assert canvas["width"] >= 220
        assert shown.evaluate("(node) => node.scrollWidth <= node.clientWidth + 1")
    assert page.errors == []
    page.close()


@family("width", WIDE, quick=(1024,))
@family("name", FULL, quick=("CompareView",))
def test_without_its_limit_it_would_be_found_too_high(chromium: Browser, name: str, width: int) -> None:
    page = WidgetPage(chromium, viewport={"width": width, "height": HIGH})
    shown = page.mount(FULL[name]())
    page.page.add_style_tag(content=".lab-screen .lab-card { max-height: none !important }")
    page.settle()
    assert size(shown)["height"] > HIGH
    page.close()


FADES = "(node) => getComputedStyle(node).getPropertyValue('--lab-more')"


@family(("name", "column"), [("PatchExplorer", ".lab-side"), ("CompareView", ".lab-maps")], quick=("PatchExplorer",))
def test_a_column_that_goes_on_below_fades_at_its_edge_until_its_end(chromium: Browser, name: str, column: str) -> None:
    page = WidgetPage(chromium, viewport={"width": WIDE[0], "height": HIGH})
    node = page.mount(FULL.get(name, EVERY[name])()).locator(column)
    node.evaluate("(node) => { node.style.maxHeight = '200px'; }")
    page.settle()
    assert node.evaluate("(node) => node.scrollHeight > node.clientHeight")
    assert node.evaluate(FADES) == "36px"
    node.evaluate("(node) => { node.scrollTop = node.scrollHeight; }")
    page.settle()
    assert node.evaluate(FADES) == "0px"
    node.evaluate("(node) => { node.style.maxHeight = '4000px'; }")
    page.settle()
    assert node.evaluate(FADES) == "0px", "all of it is seen"
    page.close()


@family("name", EVERY, quick=("CompareView",))
def test_labels_never_lie_on_one_another(chromium: Browser, name: str) -> None:
    page = WidgetPage(chromium, viewport={"width": NARROW[0], "height": HIGH})
    shown = page.mount(EVERY[name](), painted=name != "LossPlot")
    found = {}
    for width in (*NARROW, *WIDE):
        page.page.set_viewport_size({"width": width, "height": HIGH})
        page.settle()
        found[width] = shown.evaluate(COLLISIONS)
        assert shown.evaluate("(node) => node.scrollWidth <= node.clientWidth + 1"), width
    assert found == {width: [] for width in found}
    page.close()


def test_two_texts_on_one_place_would_be_found(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(EVERY["HeadGrid"]())
    widget_page.page.add_style_tag(content=".lab-line-more { margin-top: -12px }")
    assert shown.evaluate(COLLISIONS) != []
