"""LossPlot in a real browser: live losses, one step read off, the stop button and what is said of the end."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.support.all_widgets import losses
from tests.support.widget_page import WidgetPage


def test_losses_are_drawn_and_read_off(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(losses())
    expect(shown.locator(".lab-loss-status")).to_have_text("step 4 of 10 · 12 s left")
    canvas = shown.locator("canvas")
    canvas.focus()
    canvas.press("ArrowRight")
    canvas.press("ArrowLeft")
    expect(shown.locator(".lab-loss-name")).to_have_text("align 1.333 at 3")


def test_the_stop_button_is_heard_and_the_page_says_where_the_training_ended(widget_page: WidgetPage) -> None:
    plot = losses()
    shown = widget_page.mount(plot)
    shown.get_by_role("button", name="Stop").click()
    assert widget_page.get("stopped") is True
    expect(shown.locator(".lab-loss-status")).to_have_text("step 4 · stopping after this step")
    plot.stopped, plot.running = True, False
    with pytest.raises(KeyboardInterrupt):
        plot.told({"step": 5, "loss": 0.7, "seconds": 10.0})
    widget_page.page.evaluate("() => window.test.close()")
    shown = widget_page.mount(plot)
    expect(shown.locator(".lab-loss-status")).to_have_text("stopped at step 5, the model is kept")
    expect(shown.get_by_role("button", name="Stop")).to_be_hidden()


def test_a_cell_that_trains_cannot_hear_a_click_and_says_what_stops_it(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(losses(beside=False))
    expect(shown.get_by_role("button", name="Stop")).to_be_hidden()
    expect(shown.locator(".lab-loss-status")).to_have_text("step 4 of 10 · 12 s left · ■ of the notebook stops it")


def test_a_finished_training_has_no_stop_button(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(losses(10))
    expect(shown.locator(".lab-loss-status")).to_have_text("finished after step 10")
    expect(shown.get_by_role("button", name="Stop")).to_be_hidden()


def test_the_axis_ends_at_round_numbers(widget_page: WidgetPage) -> None:
    plot = losses()
    widget_page.mount(plot)
    for value, top in ((5.43, 6), (0.9, 1), (4, 4), (0.013, 0.016)):
        assert widget_page.call("roundTop", value) == pytest.approx(top)
