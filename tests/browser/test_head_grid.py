"""HeadGrid in a real browser: from heads to patches, from patches to heads and words, and back, without a reload."""

from __future__ import annotations

import numpy as np
import pytest
from playwright.sync_api import Locator, expect

from tests.support.compare_examples import HEADS, LAYERS, heads_example, one_patch_each, patch_of
from tests.support.widget_page import WidgetPage, center, difference
from widgets import HeadGrid


def cell(page: WidgetPage, layer: int, head: int) -> tuple[float, float]:
    """The middle of a head's cell, CSS pixels in the matrix."""
    code = """async ([layer, head, width]) => {
      const { cellBox, layoutOf } = await import('/module.js');
      const [x, y, w, h] = cellBox(layoutOf(6, 4, width), { layer, head });
      return [x + w / 2, y + h / 2];
    }"""
    width = page.page.locator(".lab-grid").evaluate("(node) => node.clientWidth")
    x, y = page.page.evaluate(code, [layer, head, width])
    return x, y


def hover_cell(page: WidgetPage, layer: int, head: int) -> None:
    x, y = cell(page, layer, head)
    page.page.locator("canvas.lab-matrix").hover(position={"x": x, "y": y})
    page.settle()


def cell_colors(page: WidgetPage) -> np.ndarray:
    """RGB of every cell, (layers, heads + mean, 3)."""
    canvas = page.page.locator("canvas.lab-matrix")
    box = canvas.bounding_box()
    assert box is not None
    places = [cell(page, layer, head) for layer in range(LAYERS) for head in (*range(HEADS), -1)]
    pixels = page.pixels([(x / box["width"], y / box["height"]) for x, y in places], canvas)
    return np.array(pixels)[:, :3].reshape(LAYERS, HEADS + 1, 3)


def lit(page: WidgetPage) -> set[int]:
    """Patches of the large picture that are painted unlike the rest."""
    pixels = page.pixels([center(patch) for patch in range(144)])
    return {patch for patch in range(144) if difference(pixels[patch], pixels[143]) > 60}


def words_said(shown: Locator) -> dict[str, str]:
    lines = shown.locator(".lab-line").filter(has=shown.page.locator(".lab-line-more:not(:empty)"))
    texts = [line.inner_text().split("\n") for line in lines.all()]
    return {text[0]: text[1] for text in texts}


def test_hovering_a_cell_shows_its_map_and_leaving_brings_the_kept_one_back(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(HeadGrid(*one_patch_each(), word=0, layer=0, head=0))
    assert lit(widget_page) == {patch_of(0, 0, 0)}
    for layer, head in ((3, 2), (5, 0), (1, 3)):
        hover_cell(widget_page, layer, head)
        assert lit(widget_page) == {patch_of(0, layer, head)}
        assert shown.locator(".lab-figure .lab-legend-title").inner_text() == f"layer {layer}, head {head} · “The”"
    widget_page.page.mouse.move(2, 2)
    assert lit(widget_page) == {patch_of(0, 0, 0)}
    assert widget_page.page.evaluate("() => window.test.saves()") == 0  # Python heard nothing


@pytest.mark.long
def test_the_mean_of_a_layer_is_the_last_column(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(HeadGrid(*one_patch_each(), word=0, layer=0, head=0))
    hover_cell(widget_page, 2, -1)
    assert lit(widget_page) == {patch_of(0, 2, head) for head in range(HEADS)}
    assert shown.locator(".lab-matrix-head .lab-legend-scale").inner_text() == "layer 2, mean of its heads: 10%"
    assert shown.locator(".lab-figure .lab-high").inner_text() == "0.0250"


def test_a_click_keeps_the_head_and_python_hears_of_it(widget_page: WidgetPage) -> None:
    widget_page.mount(HeadGrid(*one_patch_each(), word=0, layer=0, head=0))
    x, y = cell(widget_page, 4, 1)
    widget_page.page.locator("canvas.lab-matrix").click(position={"x": x, "y": y})
    assert (widget_page.get("layer"), widget_page.get("head")) == (4, 1)
    widget_page.page.mouse.move(2, 2)
    assert lit(widget_page) == {patch_of(0, 4, 1)}
    widget_page.set("layer", 5)
    assert lit(widget_page) == {patch_of(0, 5, 1)}


def test_the_matrix_shows_each_head_s_share_on_the_picture(widget_page: WidgetPage) -> None:
    widget_page.mount(HeadGrid(*one_patch_each(), word=0, layer=0, head=0))
    colors = cell_colors(widget_page)
    others = np.delete(np.arange(LAYERS), 1)
    assert (colors[1] == [253, 231, 37]).all()  # the end of viridis
    assert (np.abs(colors[others] - colors[1]).sum(-1) > 200).all()
    assert widget_page.page.locator(".lab-matrix-head .lab-high").inner_text() == "90%"


def test_selected_patches_tell_which_heads_and_words_look_at_them(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(HeadGrid(*one_patch_each(), word=0, layer=0, head=0))
    seen = patch_of(1, 1, 2)  # of "car", layer 1, head 2; also of "The", layer 4, head 0
    assert seen == patch_of(0, 4, 0)
    shown.locator("canvas.lab-canvas").click(position=widget_page.at(*center(seen)))
    widget_page.page.mouse.move(2, 2)
    widget_page.settle()
    assert widget_page.get("selected") == [seen]
    share = {word: float(said.removesuffix("%")) for word, said in words_said(shown).items()}
    assert share == pytest.approx({"The": 10 / 24, "car": 90 / 24, "is": 0, "red.": 0}, abs=0.051)
    bright = np.abs(cell_colors(widget_page) - cell_colors(widget_page)[0, 0]).sum(-1) > 20
    assert np.argwhere(bright[:, :HEADS]).tolist() == [[4, 0]]  # of the word shown, "The"
    shown.get_by_role("radio", name="car, ").click()
    widget_page.settle()
    bright = np.abs(cell_colors(widget_page) - cell_colors(widget_page)[0, 0]).sum(-1) > 20
    assert np.argwhere(bright[:, :HEADS]).tolist() == [[1, 2]]
    assert shown.locator(".lab-matrix-head .lab-legend-title").inner_text() == "“car” on the selected patch"
    shown.get_by_role("button", name="Clear").click()
    widget_page.settle()
    assert shown.locator(".lab-matrix-head .lab-legend-title").inner_text() == "“car” on the picture"


@pytest.mark.long
def test_pointing_at_a_patch_asks_the_same_without_a_click(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(HeadGrid(*one_patch_each(), word=1, layer=0, head=0))
    widget_page.move(*center(patch_of(1, 1, 2)))
    widget_page.settle()
    assert shown.locator(".lab-matrix-head .lab-legend-title").inner_text() == "“car” on this patch"
    bright = np.abs(cell_colors(widget_page) - cell_colors(widget_page)[0, 0]).sum(-1) > 20
    assert np.argwhere(bright[:, :HEADS]).tolist() == [[1, 2]]
    assert widget_page.get("selected") == []


def test_from_patches_back_to_heads_and_words(widget_page: WidgetPage) -> None:
    widget = HeadGrid(*one_patch_each(), word=0, layer=0, head=0)
    widget.selected = [patch_of(1, 1, 2)]
    shown = widget_page.mount(widget)
    first = shown.locator(".lab-line").filter(has_text="layer 4, head 0").first
    first.hover()  # the head of "The" that looks there most
    assert patch_of(0, 4, 0) in lit(widget_page)
    first.click()
    assert (widget_page.get("layer"), widget_page.get("head")) == (4, 0)
    line = shown.locator(".lab-line").filter(has_text="car")
    line.hover()
    widget_page.settle()
    assert shown.locator(".lab-matrix-head .lab-legend-title").inner_text() == "“car” on the selected patch"
    assert widget_page.get("word") == 0
    line.click()
    assert widget_page.get("word") == 1


@pytest.mark.long
def test_the_sum_over_several_patches_is_the_sum_of_their_values(widget_page: WidgetPage) -> None:
    run, maps = heads_example()
    widget = HeadGrid(run, maps, word="car")
    patches = [98, 99, 100, 110]
    widget.selected = patches
    shown = widget_page.mount(widget)
    want = maps.values.astype(np.float64).reshape(4, -1, 144)[:, :, patches].sum(-1).mean(1)
    for text, value in zip(words_said(shown).values(), want, strict=True):
        assert float(text.removesuffix("%")) == pytest.approx(100 * value, abs=0.06)


@pytest.mark.long
def test_one_scale_for_all_heads_or_each_its_own(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(HeadGrid(*one_patch_each(), word=0, layer=0, head=0))
    own = widget_page.pixels([center(patch_of(0, 0, 0))])[0]
    assert shown.locator(".lab-figure .lab-high").inner_text() == "0.100"
    shown.get_by_role("radio", name="All heads").click()
    assert difference(widget_page.pixels([center(patch_of(0, 0, 0))])[0], own) > 60
    assert shown.locator(".lab-figure .lab-high").inner_text() == "0.90"


@pytest.mark.long
def test_every_cell_is_found_under_its_own_middle(widget_page: WidgetPage) -> None:
    widget_page.module = HeadGrid._esm
    code = """async ([layers, heads, width]) => {
      const { cellAt, cellBox, layoutOf, sizeOf } = await import('/module.js');
      const layout = layoutOf(layers, heads, width);
      let wrong = 0;
      for (let layer = 0; layer < layers; layer++) for (let head = -1; head < heads; head++) {
        const [x, y, w, h] = cellBox(layout, { layer, head });
        const at = cellAt(layout, x + w / 2, y + h / 2);
        wrong += Number(!at || at.layer !== layer || at.head !== head);
      }
      const [, top] = cellBox(layout, { layer: 0, head: 0 });
      const gap = cellAt(layout, layout.left + heads * layout.cell[0] + layout.gap / 2, top + 1);
      return [wrong, gap, cellAt(layout, 2, 2), sizeOf(layout)[0] <= width];
    }"""
    for shape in ([6, 4, 460], [32, 32, 460], [32, 40, 420]):
        assert widget_page.page.evaluate(code, shape) == [0, None, None, True]


def test_the_matrix_works_from_the_keyboard_and_speaks(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(HeadGrid(*one_patch_each(), word=0, layer=0, head=0))
    shown.locator("canvas.lab-matrix").focus()
    for key in ("ArrowDown", "ArrowRight"):
        widget_page.page.keyboard.press(key)
    assert (widget_page.get("layer"), widget_page.get("head")) == (1, 1)
    expect(shown.locator(".lab-live")).to_contain_text("layer 1, head 1 · “The”")
    said = shown.locator(".lab-live").text_content() or ""
    assert said.startswith("layer 1, head 1 · “The”")
    assert "Strongest: row 0, column 5: 0.90;" in said
    widget_page.page.keyboard.press("End")
    assert widget_page.get("head") == -1
    widget_page.page.keyboard.press("ArrowLeft")
    assert widget_page.get("head") == 3
    shown.locator("canvas.lab-canvas").focus()
    widget_page.page.keyboard.press("ArrowRight")
    expect(shown.locator(".lab-live")).to_contain_text("Attention on this patch, mean over all heads: The")


@pytest.mark.parametrize(
    ("key", "at", "expected"),
    [
        ("ArrowRight", (0, 3), (0, -1)),
        ("ArrowRight", (0, -1), (0, -1)),
        ("ArrowLeft", (2, 0), (2, 0)),
        ("ArrowUp", (0, 2), (0, 2)),
        ("ArrowDown", (5, 2), (5, 2)),
        ("Home", (3, -1), (3, 0)),
        ("x", (3, 1), None),
    ],
)
def test_keys_stay_in_the_matrix(
    widget_page: WidgetPage, key: str, at: tuple[int, int], expected: tuple[int, int] | None
) -> None:
    widget_page.module = HeadGrid._esm
    found = widget_page.call("nextCell", key, {"layer": at[0], "head": at[1]}, LAYERS, HEADS)
    assert found == (None if expected is None else {"layer": expected[0], "head": expected[1]})
