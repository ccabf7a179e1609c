"""LossPlot as Python sees it: what is told, the time left, and the stop that ends a training as an interrupt does."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from widgets import LossPlot
from widgets.loss_plot import MOST_POINTS, thinned


def feed(plot: LossPlot, steps: int, of: int = 10) -> None:
    for step in range(1, steps + 1):
        plot.told({"step": step, "loss": 4 / step, "epoch": step / of, "seconds": 2.0 * step})


def test_time_left_is_the_pace_so_far_times_the_steps_to_go() -> None:
    plot = LossPlot("align")
    assert plot.left() is None
    feed(plot, 4)
    assert plot.left() == 12.0  # 6 steps of 2 s
    plot.publish()
    assert plot.spec["curves"][0]["total"] == 10


def test_curves_follow_one_another_in_the_page() -> None:
    plot = LossPlot("align")
    feed(plot, 3)
    plot.curve("instruct", total=2)
    feed(plot, 2)
    plot.publish()
    assert [(one["name"], one["count"]) for one in plot.spec["curves"]] == [("align", 3), ("instruct", 2)]
    rows = np.frombuffer(plot.data, "<f4").reshape(-1, 2)
    np.testing.assert_allclose(rows, [[1, 4], [2, 2], [3, 4 / 3], [1, 4], [2, 2]], rtol=1e-6)
    with pytest.raises(ValueError, match="there is a curve 'align' already"):
        plot.curve("align")


def test_stop_ends_the_training_as_an_interrupt_does() -> None:
    plot = LossPlot()
    plot.stopped = True
    with pytest.raises(KeyboardInterrupt):
        feed(plot, 2)
    assert len(plot.curves["loss"]) == 1
    feed(plot, 2)  # asked once: a second interrupt would lose the checkpoint of the first
    assert len(plot.curves["loss"]) == 3


def test_stop_reaches_a_training_beside_the_kernel() -> None:
    plot = LossPlot()
    heard = []

    def train() -> int:
        try:
            feed(plot, 3)
            plot.stopped = True  # as the button does
            feed(plot, 3)
        except KeyboardInterrupt:
            heard.append(len(plot.curves["loss"]))
        return 7

    assert plot.start(train).result(timeout=5) == 7
    assert heard == [4]
    assert not plot.running


def test_an_error_beside_the_kernel_comes_back() -> None:
    with pytest.raises(ZeroDivisionError):
        LossPlot().start(lambda: 1 / 0).result(timeout=5)


def test_long_curves_are_averaged_and_short_ones_left_alone() -> None:
    rows = [(step, float(step)) for step in range(2 * MOST_POINTS)]
    assert thinned(rows)[:2] == [(0.5, 0.5), (2.5, 2.5)]
    assert len(thinned(rows)) == MOST_POINTS
    assert thinned([(1, 2.0)]) == [(1.0, 2.0)]


def test_the_still_picture_is_drawn_with_and_without_steps() -> None:
    plot = LossPlot(log=True)
    empty = plot.draw_png()
    feed(plot, 5)
    assert plot.draw_png() != empty
    assert Image.open(io.BytesIO(plot.draw_png())).width == 960


def test_a_row_without_a_loss_and_a_wrong_total_are_refused() -> None:
    with pytest.raises(ValueError, match="a logged step needs 'step' and 'loss', got 'step'"):
        LossPlot().told({"step": 1})
    with pytest.raises(ValueError, match="total must be 1 or more steps, got 0"):
        LossPlot(total=0)
