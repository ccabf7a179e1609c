"""The explorer through JupyterLab, as a reader meets it: run the notebook, point, select, ask again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator

from tests.support.lab_server import LabPage

SETUP = """
from tests.support.widget_examples import example, make_run
from widgets import PatchExplorer

run, maps = example()
asked = []

def ask(patches):
    asked.append(patches)
    if len(patches) == 1:
        raise RuntimeError("one patch is not enough")
    return "The car is <b>blue.</b>", [0.98, 0.9, 0.97, 0.55]
"""
CELLS = [SETUP, "w = PatchExplorer(run, maps, ask=ask)\nw"]


@pytest.fixture(scope="module")
def explorer(lab: LabPage) -> Iterator[Locator]:
    lab.open(CELLS)
    lab.run_all()
    yield lab.page.locator(".lab-explorer")
    lab.dark(False)


def cell_center(explorer: Locator, row: int, col: int) -> dict:
    box = explorer.locator("canvas.lab-canvas").bounding_box()
    assert box is not None
    return {"x": (col + 0.5) * box["width"] / 12, "y": (row + 0.5) * box["height"] / 12}


def pixel(explorer: Locator, row: int, col: int) -> list[int]:
    """The colour in the middle of a patch, after the next frame."""
    return explorer.locator("canvas.lab-canvas").evaluate(
        """async (canvas, [row, col]) => {
          await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
          const side = canvas.width / 12;
          return [...canvas.getContext('2d').getImageData((col + 0.5) * side, (row + 0.5) * side, 1, 1).data];
        }""",
        [row, col],
    )


def press_reset(lab: LabPage, explorer: Locator) -> None:
    clear = explorer.get_by_role("button", name="Clear")
    if clear.is_enabled():
        clear.click()
    lab.page.wait_for_function("() => document.querySelector('.lab-count').textContent === 'No patches selected'")


def test_hovering_a_word_repaints_the_cell_it_came_from(explorer: Locator, lab: LabPage) -> None:
    explorer.get_by_role("radio", name="rollout").click()
    explorer.get_by_role("radio", name="is, ").hover()
    before = pixel(explorer, 8, 3)
    explorer.get_by_role("radio", name="red., ").hover()
    after = pixel(explorer, 8, 3)
    assert sum(abs(a - b) for a, b in zip(before, after, strict=True)) > 60  # the car lights up
    assert lab.python("w.word") == 3  # pointing is not choosing; "red." was the first shown


def test_selecting_patches_reaches_the_kernel(explorer: Locator, lab: LabPage) -> None:
    press_reset(lab, explorer)
    canvas = explorer.locator("canvas.lab-canvas")
    canvas.click(position=cell_center(explorer, 8, 3))
    canvas.click(position=cell_center(explorer, 8, 4))
    canvas.click(position=cell_center(explorer, 0, 0))
    canvas.click(position=cell_center(explorer, 0, 0))  # a second click takes away
    lab.page.wait_for_function("() => document.querySelector('.lab-count').textContent.startsWith('2 patches')")
    lab.becomes("w.selected", [8 * 12 + 3, 8 * 12 + 4])
    lab.becomes("w.patches", [[8, 3], [8, 4]])
    lab.becomes("w.mask.sum().item()", 2)


def test_asking_again_shows_the_new_answer_as_text_beside_the_old(explorer: Locator, lab: LabPage) -> None:
    press_reset(lab, explorer)
    explorer.get_by_role("button", name="Strongest 14").click()
    explorer.get_by_role("button", name="Ask again without these patches").click()
    answers = explorer.get_by_role("group", name="Answers before and after")
    answers.get_by_text("new answer", exact=True).wait_for()
    assert answers.get_by_text("<b>blue.</b>").count() == 1  # markup stays text
    assert answers.get_by_text("Without 14 patches").count() == 1
    assert answers.get_by_text("55%").count() == 1
    assert lab.python("[len(a) for a in asked]")[-1] == 14
    lab.becomes("w.reply['state']", "done")


def test_an_error_in_the_callback_is_shown_and_does_not_stick(explorer: Locator, lab: LabPage) -> None:
    press_reset(lab, explorer)
    explorer.locator("canvas.lab-canvas").click(position=cell_center(explorer, 5, 5))
    ask = explorer.get_by_role("button", name="Ask again without these patches")
    ask.click()
    alert = explorer.get_by_role("alert")
    alert.get_by_text("RuntimeError: one patch is not enough", exact=True).wait_for()
    alert.get_by_role("button", name="Show where").click()
    assert "line" in (alert.locator(".lab-trace").text_content() or "")
    assert ask.is_enabled()


def test_keys_typed_in_the_widget_do_not_edit_the_notebook(explorer: Locator, lab: LabPage) -> None:
    before = lab.cells()
    for part in ("canvas.lab-canvas", ".lab-chips-item[aria-checked=true]", ".lab-button >> nth=0"):
        explorer.locator(part).first.focus()
        lab.page.keyboard.type("abdd")
        lab.page.keyboard.press("Escape")
        lab.page.keyboard.type("dd")
    assert lab.cells() == before
    explorer.locator("canvas.lab-canvas").focus()
    assert lab.page.evaluate("() => document.activeElement.className") == "lab-canvas"


def test_python_and_page_share_word_method_and_layer(explorer: Locator, lab: LabPage) -> None:
    assert lab.python("[setattr(w, 'word', 1), setattr(w, 'method', 'occlusion')] and w.word") == 1
    explorer.get_by_role("radio", name="car, ", checked=True).wait_for()
    explorer.get_by_role("radio", name="occlusion", checked=True).wait_for()
    explorer.get_by_role("radio", name="rollout").click()
    layer = explorer.get_by_role("slider", name="Layer")
    layer.focus()
    lab.page.keyboard.press("ArrowLeft")
    lab.page.wait_for_function("() => document.querySelector('.lab-legend-title').textContent.endsWith('layer 4')")
    lab.becomes("[w.method, w.layer]", ["rollout", 4])


def test_dark_theme_reaches_the_widget(explorer: Locator, lab: LabPage, tmp_path) -> None:  # type: ignore[no-untyped-def]
    def paper() -> list[float]:
        text = explorer.locator(".lab-card").evaluate("(node) => getComputedStyle(node).backgroundColor")
        return [float(part) for part in text.removeprefix("rgb(").removesuffix(")").split(",")]

    light = paper()
    lab.dark(True)
    dark = paper()
    explorer.screenshot(path=tmp_path / "dark.png")
    lab.dark(False)
    assert min(light) > 220
    assert max(dark) < 60


def test_nothing_left_this_machine_and_nothing_failed(explorer: Locator, lab: LabPage) -> None:
    assert lab.outside == []
    assert lab.errors == []
