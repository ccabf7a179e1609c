"""Figures of interventions: the mean over questions is drawn where it is, with its interval; odd sweeps are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot

from llava_lab.errors import OptionError
from llava_lab.plots import scores as plots_flow
from llava_lab.results import FlowSweep, Target

FLOWS = ("image -> question", "image -> last")


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    pyplot.close("all")


def sweep(after: np.ndarray) -> FlowSweep:
    """A sweep of two flows over three windows; the target had probability 1 before, `after` is what is left."""
    return FlowSweep(
        flows=FLOWS,
        windows=np.array([(0, 1), (1, 2), (2, 3)]),
        centres=np.array([0, 1, 2]),
        targets=(Target("word", "red", (3,), (7,)),),
        before=np.zeros(1, np.float32),
        after=np.log(after, dtype=np.float32)[..., None],
        proof={},
        model="m",
        fingerprint="f",
        passes={},
        seconds=0.0,
    )


LEFT = [np.array([[1, 0.5, 1], [1, 1, 1]]), np.array([[1, 0.1, 1], [1, 1, 0.9]])]


def test_the_mean_over_questions_is_that_of_relative_changes() -> None:
    mean, low, high = plots_flow.mean_sweep([sweep(one) for one in LEFT])
    np.testing.assert_allclose(mean, np.mean(LEFT, 0) - 1, atol=1e-6)
    assert (low <= mean + 1e-6).all()
    assert (high >= mean - 1e-6).all()
    np.testing.assert_allclose([low[0, 1], high[0, 1]], [-0.9, -0.5], atol=1e-6)  # a draw may be one question twice


def test_every_flow_has_its_panel_in_per_cent() -> None:
    figure = plots_flow.flows([sweep(one) for one in LEFT])
    assert [ax.get_title() for ax in figure.axes] == ["image → question", "image → last"]
    lines: list[Any] = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    np.testing.assert_allclose(np.asarray(lines[0].get_ydata(), float), [0, -70, 0], atol=1e-4)


def test_points_and_bars_of_how_often_an_answer_stays() -> None:
    ax = plots_flow.stays({"half": [(0.5, 0.25, 1.0), (1.0, 0.75, 1.0)]}, xlabel="layers")
    drawn: Any = ax.containers[0]
    line, _, (bars,) = drawn.lines
    np.testing.assert_allclose(np.asarray(line.get_ydata(), float), [50, 100])
    ends = bars.get_segments()
    np.testing.assert_allclose([end[:, 1] for end in ends], [(25, 100), (75, 100)])
    assert plots_flow.stays({"all": [(0, 0, 0.2)]}, ax=ax) is ax


def test_sweeps_that_do_not_belong_together_are_refused() -> None:
    one = sweep(LEFT[0])
    with pytest.raises(OptionError, match="at least one sweep"):
        plots_flow.mean_sweep([])
    with pytest.raises(OptionError, match="same flows and windows"):
        plots_flow.mean_sweep([one, replace(one, windows=one.windows + 1)])
    with pytest.raises(OptionError, match="not a number"):
        plots_flow.mean_sweep([replace(one, after=one.after * np.nan)])
