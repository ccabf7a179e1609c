"""FlowView in a real browser: pointing, putting flows on and off, choosing by mouse and key, and staying in step with Python."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from playwright.sync_api import Locator, expect

from tests.support.flow_examples import two
from tests.support.widget_page import WidgetPage, difference
from widgets import FlowView

CURVES, CELLS = "canvas.lab-flow-curves", "canvas.lab-flow-cells"
MARK = """async ([rows, flow, window, width, height]) => {
  const { frameOf, layerX, valueY } = await import('/module.js');
  const windows = [[0, 2], [1, 3], [2, 4], [3, 4]];
  const frame = frameOf({ rows, open: [true, true, true], windows }, width, height);
  const value = rows[flow][window];
  return [layerX(frame, window), value === null ? frame.bottom - 11 : valueY(frame, value)];
}"""
CELL = """async ([site, window, width]) => {
  const { cellFrame } = await import('/module.js');
  const { left, top, wide, high } = cellFrame(3, 4, width);
  return [left + (window + 0.5) * wide, top + (site + 0.5) * high];
}"""


def size(canvas: Locator) -> tuple[float, float]:
    box = canvas.bounding_box()
    assert box is not None
    return box["width"], box["height"]


def mark(page: WidgetPage, flow: int, window: int) -> dict:
    """Where a mark of the first target lies, CSS pixels in the curves."""
    _, sweep, _ = two()
    rows = [[None if np.isnan(one) else float(one) for one in row] for row in sweep.change[..., 0]]
    x, y = page.page.evaluate(MARK, [rows, flow, window, *size(page.page.locator(CURVES))])
    return {"x": x, "y": y}


def cell(page: WidgetPage, site: int, window: int) -> dict:
    x, y = page.page.evaluate(CELL, [site, window, size(page.page.locator(CELLS))[0]])
    return {"x": x, "y": y}


def corner(page: WidgetPage, site: int, window: int) -> list[int]:
    """The colour of a cell, beside the number written in it."""
    at, (width, height) = cell(page, site, window), size(page.page.locator(CELLS))
    return page.pixels([(at["x"] / width, (at["y"] - 16) / height)], page.page.locator(CELLS))[0][:3]


def lines(shown: Locator) -> list[str]:
    return shown.locator(".lab-flow-line").all_inner_texts()


def test_pointing_at_a_mark_says_what_the_cut_did_and_python_hears_nothing(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(FlowView(*two()))
    assert lines(shown)[0] == "Point at a mark to read it; click to keep it."
    shown.locator(CURVES).hover(position=mark(widget_page, 0, 1))
    widget_page.settle()
    said = (
        "Cutting image → question in layers 1–2 lowers log p(red.) by 1.30: from −0.20 to −1.50, the probability from 82% to 22%."
    )
    assert lines(shown)[0] == said
    shown.locator(CURVES).hover(position=mark(widget_page, 1, 2))
    widget_page.settle()
    assert lines(shown)[0].startswith("Cutting question → last in layers 2–3 lowers log p(red.) by 3.00")
    widget_page.page.mouse.move(2, 2)
    widget_page.settle()
    assert lines(shown)[0].startswith("Point at")
    assert widget_page.page.evaluate("() => window.test.saves()") == 0


def test_what_does_not_reach_the_noise_floor_is_called_negligible_and_its_mark_is_empty(widget_page: WidgetPage) -> None:
    run, sweep, grid = two()
    shown = widget_page.mount(FlowView(run, replace(sweep, noise_floor=(1e-3, 1e-3)), replace(grid, noise_floor=(1.2, 1.2))))
    at, (width, height) = mark(widget_page, 0, 3), size(shown.locator(CURVES))
    empty = widget_page.pixels([(at["x"] / width, at["y"] / height)], shown.locator(CURVES))[0]
    shown.locator(CURVES).hover(position=at)
    widget_page.settle()
    assert lines(shown)[0].startswith("Cutting image → question in layer 3 has a negligible effect on log p(red.)")
    shown.locator(CELLS).hover(position=cell(widget_page, 1, 3))
    widget_page.settle()
    assert "brings back a negligible part of what log p(red.) lost" in lines(shown)[1]
    widget_page.page.reload()
    shown = widget_page.mount(FlowView(run, sweep, grid))  # where no floor was measured, nothing is
    assert difference(widget_page.pixels([(at["x"] / width, at["y"] / height)], shown.locator(CURVES))[0], empty) > 60


@pytest.mark.long
def test_the_window_under_the_pointer_is_a_band(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(FlowView(*two()))
    canvas = shown.locator(CURVES)
    width, _ = size(canvas)
    at = mark(widget_page, 0, 1)
    other = mark(widget_page, 0, 2)
    places = [(at["x"] / width, 0.6), (other["x"] / width, 0.61), (mark(widget_page, 0, 0)["x"] / width, 0.6)]
    assert [pixel[3] for pixel in widget_page.pixels(places, canvas)][::2] == [0, 0]
    canvas.hover(position=at)
    inside, _, outside = (pixel[3] for pixel in widget_page.pixels(places, canvas))
    assert inside > 10
    assert outside == 0


def test_a_hole_says_not_measured_in_both_halves(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(FlowView(*two(), component="mlp"))
    shown.locator(CURVES).hover(position=mark(widget_page, 2, 3))
    widget_page.settle()
    assert lines(shown)[0] == "Cutting image → last in layer 3: not measured."
    shown.locator(CELLS).click(position=cell(widget_page, 2, 3))
    widget_page.settle()
    assert lines(shown)[1] == "Clean mlp at last, layer 3: not measured."
    assert shown.locator(".lab-flow-now strong").inner_text() == "not measured"


@pytest.mark.long
def test_nothing_to_bring_back_is_said_and_not_drawn(widget_page: WidgetPage) -> None:
    run, _, grid = two()
    shown = widget_page.mount(FlowView(run, grid=replace(grid, corrupt=grid.clean), selected={"cell": [0, 0]}))
    assert "corrupting did not change log p(red.), so there is nothing to bring back" in lines(shown)[0]


def test_flows_are_put_off_and_on(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(FlowView(*two()))
    canvas = shown.locator(CURVES)
    places = [(x / size(canvas)[0], y / size(canvas)[1]) for x, y in (mark(widget_page, 1, 1).values(),)]
    orange = [213, 94, 0]
    assert widget_page.pixels(places, canvas)[0][:3] == orange
    toggle = shown.get_by_role("button", name="question → last")
    toggle.click()
    assert widget_page.pixels(places, canvas)[0][:3] != orange
    assert toggle.get_attribute("aria-pressed") == "false"
    toggle.click()
    assert widget_page.pixels(places, canvas)[0][:3] == orange


@pytest.mark.long
def test_the_probability_is_offered_where_there_is_one(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(FlowView(*two()))
    unit = shown.get_by_role("radiogroup", name="Unit")
    before = widget_page.pixels([(x / 40, y / 40) for x in range(40) for y in range(40)], shown.locator(CURVES))
    unit.get_by_role("radio", name="Probability, %").click()
    assert widget_page.pixels([(x / 40, y / 40) for x in range(40) for y in range(40)], shown.locator(CURVES)) != before
    shown.get_by_role("radio", name="red, not blue").click()
    widget_page.settle()
    assert widget_page.get("target") == 1
    assert unit.is_hidden()  # a contrast has no probability


def test_a_click_on_a_cell_shows_its_answer_between_the_two_runs(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(FlowView(*two()))
    assert shown.locator(".lab-flow-answer strong").all_inner_texts() == ["red.", "–", "blue."]
    shown.locator(CELLS).click(position=cell(widget_page, 0, 1))
    widget_page.page.mouse.move(2, 2)
    widget_page.settle()
    assert widget_page.get("selected") == {"cell": [0, 1]}
    assert shown.locator(".lab-flow-answer strong").all_inner_texts() == ["red.", "red.", "blue."]
    said = "Clean residual at image, layer 1, brings back 0.75 of what log p(red.) lost: "
    assert lines(shown)[1] == said + "−4.20 corrupted, −1.20 patched, −0.20 clean."
    shown.get_by_role("radio", name="MLP").click()
    widget_page.settle()
    assert widget_page.get("component") == 1
    assert shown.locator(".lab-flow-now strong").inner_text() == "blue."
    shown.locator(CURVES).click(position=mark(widget_page, 0, 1))
    assert widget_page.get("selected") == {"cell": [0, 1], "flow": [0, 1]}


@pytest.mark.long
def test_zero_is_grey_one_orange_less_blue_and_more_than_one_deeper(widget_page: WidgetPage) -> None:
    widget_page.mount(FlowView(*two()))
    zero, one, less, more = (corner(widget_page, *spot) for spot in ((1, 0), (0, 0), (2, 0), (1, 2)))
    assert max(zero) - min(zero) <= 6
    assert one[0] > one[2] + 80
    assert less[2] > less[0] + 40
    assert sum(more) < sum(one)


def test_keys_move_through_marks_and_cells_and_speak(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(FlowView(*two()))
    shown.locator(CELLS).focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        widget_page.page.keyboard.press(key)
    assert widget_page.get("selected") == {"cell": [1, 1]}
    expect(shown.locator(".lab-live")).to_have_text(re.compile("^Clean residual at question, layer 1, brings back 0.00"))
    shown.get_by_role("button", name="question → last").click()
    shown.locator(CURVES).focus()
    for key in ("ArrowRight", "ArrowDown", "End"):
        widget_page.page.keyboard.press(key)
    assert widget_page.get("selected")["flow"] == [2, 3]  # the flow that is off is passed over
    widget_page.page.keyboard.press("Escape")
    assert widget_page.get("selected") == {"cell": [1, 1]}


def test_what_python_sets_is_shown(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(FlowView(*two()))
    widget_page.set("selected", {"flow": [1, 2], "cell": [2, 3]})
    assert lines(shown)[0].startswith("Cutting question → last in layers 2–3")
    assert lines(shown)[1].startswith("Clean residual at last, layer 3")
    widget_page.set("target", 1)
    assert "logit difference (red, not blue) by 6.00" in lines(shown)[0]
    widget_page.set("component", 1)
    assert lines(shown)[1].startswith("Clean mlp at last, layer 3")


@pytest.mark.long
def test_a_target_that_one_half_lacks_is_said(widget_page: WidgetPage) -> None:
    run, sweep, grid = two()
    shown = widget_page.mount(FlowView(run, sweep, replace(grid, targets=(run.target("car"), grid.targets[1])), target="car"))
    assert lines(shown)[0] == "“car” was not swept: choose another target above."


@pytest.mark.parametrize("which", ["sweep", "grid"])
def test_either_half_stands_alone(widget_page: WidgetPage, which: str) -> None:
    run, sweep, grid = two()
    shown = widget_page.mount(FlowView(run, sweep) if which == "sweep" else FlowView(run, grid=grid))
    assert shown.locator(".lab-flow-half").count() == 1
    assert shown.locator("canvas.lab-flow-plot").count() == 1
