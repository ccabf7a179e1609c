"""ConnectorBench in a real browser: the rank slider, linked maps, and that nothing stays behind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.support.bench_examples import bench_example
from tests.support.widget_page import WidgetPage, difference
from widgets import ConnectorBench


def test_the_rank_slider_is_answered_in_the_page(widget_page: WidgetPage) -> None:
    one, two, ranks = bench_example()
    shown = widget_page.mount(ConnectorBench(one, two, ranks=ranks))
    expect(shown.locator(".lab-bench-sentence")).to_contain_text("linear")
    shown.get_by_role("radio", name="cut to a rank").click()
    expect(shown.locator(".lab-bench-name").nth(1)).to_have_text("rank 16")
    right = shown.locator("canvas").nth(1)
    points = [(0.25, 0.71), (0.5, 0.87)]
    before = widget_page.pixels(points, right)
    slider = shown.get_by_role("slider", name="Rank")
    slider.focus()
    slider.press("Home")
    expect(shown.locator(".lab-bench-name").nth(1)).to_have_text("rank 1")
    expect(shown.locator(".lab-bench-said").nth(1)).to_contain_text("blue.")
    after = widget_page.pixels(points, right)
    assert max(difference(a, b) for a, b in zip(before, after, strict=True)) > 40
    assert widget_page.get("rank") == 1
    assert widget_page.sent() == []


@pytest.mark.long
def test_what_lies_below_the_noise_floor_is_called_negligible(widget_page: WidgetPage) -> None:
    one, two, _ = bench_example()
    lit, flat = np.zeros_like(one.values), np.zeros_like(one.values)
    lit[0, 1] = 0.5
    shown = widget_page.mount(ConnectorBench(replace(one, values=flat, floor=0.01), replace(two, values=lit, floor=0.01)))
    canvas, lines = shown.locator("canvas").nth(1), shown.locator(".lab-bench-line")
    expect(lines.nth(0)).to_have_text("No patch here reaches the noise floor: the effect is negligible.")
    expect(lines.nth(1)).to_have_text("Point at a patch.")
    canvas.focus()
    canvas.press("ArrowRight")
    for place, said in enumerate(("negligible · near", "negligible · near", "difference negligible")):
        expect(lines.nth(place)).to_contain_text(said)
    canvas.press("ArrowRight")
    for place, said in enumerate(("negligible · near", "0.5 · near", "difference 0.5")):
        expect(lines.nth(place)).to_contain_text(said)
    canvas.press("Escape")
    widget_page.page.reload()
    shown = widget_page.mount(ConnectorBench(replace(one, values=flat), replace(two, values=lit)))
    expect(shown.locator(".lab-bench-line").nth(0)).to_have_text("Point at a patch.")  # no floor was measured


def test_pointing_at_one_map_reads_all_three(widget_page: WidgetPage) -> None:
    one, two, _ = bench_example()
    shown = widget_page.mount(ConnectorBench(one, two))
    canvas = shown.locator("canvas").first
    canvas.focus()
    canvas.press("ArrowRight")
    canvas.press("ArrowRight")
    lines = shown.locator(".lab-bench-line")
    for place in (0, 1):
        expect(lines.nth(place)).to_contain_text("near red 0.50, p1 0.25")
    expect(lines.nth(2)).to_contain_text("difference")
    reach = float(np.abs(two.values - one.values).max())
    said = shown.locator(".lab-bench-said").nth(2).inner_text()
    assert abs(float(said.split("±")[1]) - reach) < 0.02 * reach, "the difference says how much its full colour is"
    canvas.press("Escape")
    expect(lines.first).to_have_text("Point at a patch.")
