"""CompareView and HeadGrid through JupyterLab: kept choices reach the kernel, links join the views, keys stay in."""

from __future__ import annotations

import pytest
from playwright.sync_api import Locator

from tests.support.lab_server import LabPage

CELLS = [
    """
import ipywidgets as ipw
from tests.support.compare_examples import comparison_example, heads_example
from widgets import CompareView, HeadGrid

run, comparison = comparison_example()
compare, heads = CompareView(run, comparison), HeadGrid(*heads_example(run))
link = ipw.jslink((compare, "selected"), (heads, "selected"))
""",
    "compare",
    "heads",
]


@pytest.fixture(scope="module")
def views(lab: LabPage) -> Locator:
    lab.open(CELLS)
    lab.run_all()
    return lab.page.locator(".jp-Notebook")


def test_what_is_kept_reaches_the_kernel(views: Locator, lab: LabPage) -> None:
    views.locator(".lab-tile").filter(has_text="relevancy").click()
    views.get_by_role("radio", name="deletion").click()
    views.locator(".lab-compare").get_by_role("radio", name="car, ").click()
    views.locator(".lab-compare").get_by_role("radio", name="car, ", checked=True).wait_for()
    lab.page.wait_for_function("() => document.querySelector('.lab-stage-name').textContent === 'relevancy'")
    lab.becomes("[compare.method, compare.sort, compare.target]", ["relevancy", "deletion", 1])


def test_a_linked_selection_is_one_selection(views: Locator, lab: LabPage) -> None:
    views.locator(".lab-compare canvas.lab-canvas").click(position={"x": 5, "y": 5})
    lab.page.mouse.move(2, 2)
    lab.page.wait_for_function(
        "() => document.querySelector('.lab-matrix-head .lab-legend-title').textContent.endsWith('on the selected patch')"
    )
    lab.becomes("[compare.selected, heads.selected]", [[0], [0]])
    lab.becomes("heads.patches", [[0, 0]])


def test_python_sets_what_the_page_shows(views: Locator, lab: LabPage) -> None:
    assert lab.python("[setattr(heads, 'layer', 4), setattr(heads, 'head', -1)] and heads.layer") == 4
    title = views.locator(".lab-heads .lab-figure .lab-legend-title")
    title.get_by_text("layer 4, mean of its heads").wait_for()


def test_keys_typed_in_the_widgets_do_not_edit_the_notebook(views: Locator, lab: LabPage) -> None:
    before = lab.cells()
    for part in (".lab-tile", "canvas.lab-matrix", ".lab-line"):
        views.locator(part).first.focus()
        lab.page.keyboard.type("abdd")
    assert lab.cells() == before
    assert lab.outside == []
    assert lab.errors == []
