"""Figures of a comparison of connectors: every seed's dot, both intervals, the verdict's colour and words, the chosen rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from llava_lab.errors import OptionError
from llava_lab.plots import ablation as plots
from llava_lab.plots import palette
from tests.support.ablation_examples import CONNECTORS, RATES, example_ablation

DRAWN = {"accuracies": plots.accuracies, "differences": plots.differences, "sweep": plots.sweep}


def _xy(line: Any) -> tuple[list[float], list[float]]:
    return np.asarray(line.get_xdata(), float).tolist(), np.asarray(line.get_ydata(), float).tolist()


def _spans(ax: Axes, color: str) -> list[list[float]]:
    """Ends of the level lines of one colour, top down."""
    lines = [line for line in ax.lines if len(_xy(line)[0]) == 2 and line.get_linestyle() == "-" and line.get_marker() == "None"]
    kept = [_xy(line) for line in lines if to_hex(line.get_color()) == color and _xy(line)[1][0] == _xy(line)[1][1]]
    return [x for x, y in sorted(kept, key=lambda both: both[1][0])]


def _names(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def test_every_seed_has_a_dot_beside_the_mean_and_its_interval() -> None:
    result = example_ablation()
    ax = plots.accuracies(result)
    assert _names(ax) == list(CONNECTORS)
    dots = [line for line in ax.lines if len(_xy(line)[0]) == 5]
    assert len(dots) == 6  # three connectors, with and without stage 1
    np.testing.assert_allclose(_xy(dots[0])[0], np.array([4, 5, 4, 5, 4]) / 12 * 100)  # by hand: 4 right, 5 with odd seeds
    assert (to_hex(dots[0].get_color()), dots[0].get_marker()) == (palette.BLUE, "o")
    assert (to_hex(dots[3].get_color()), dots[3].get_marker()) == (palette.ORANGE, "s")
    mean = 4.4 / 12 * 100
    np.testing.assert_allclose(_spans(ax, palette.BLUE)[0], [mean - 5, mean + 5])
    strong = [line for line in ax.lines if len(_xy(line)[0]) == 1]
    np.testing.assert_allclose(_xy(strong[0])[0], [mean])
    assert _xy(dots[0])[1][0] < 0 < _xy(dots[3])[1][0]  # with stage 1 above without
    assert "12 questions" in ax.get_xlabel()
    assert ax.get_title() == "test, equal samples"


def test_another_split_is_drawn_from_its_own_questions() -> None:
    ax = plots.accuracies(example_ablation(), split="compositions")
    dots = [line for line in ax.lines if len(_xy(line)[0]) == 5]
    np.testing.assert_allclose(_xy(dots[0])[0], np.array([3, 4, 5, 6, 7]) / 12 * 100)
    for draw in (plots.accuracies, plots.differences):
        with pytest.raises(OptionError, match="split must be one of test, compositions, got 'validation'"):
            draw(example_ablation(), split="validation")


def test_one_type_of_question_is_drawn_from_its_own_cells() -> None:
    result = example_ablation()
    ax = plots.accuracies(result, type="color")
    dots = [line for line in ax.lines if len(_xy(line)[0]) == 5]
    np.testing.assert_allclose(_xy(dots[0])[0], np.array([2, 3, 2, 3, 2]) / 6 * 100)  # of 4 or 5 right every second is of color
    assert ("6 questions" in ax.get_xlabel(), ax.get_title()) == (True, "test, color, equal samples")
    ax = plots.differences(result, type="color")
    assert {text.get_text() for text in ax.texts} == {"not distinguishable; 2 points: 40 seeds"}
    assert ax.get_title() == "test, color, equal samples, 5 seeds"
    for draw in (plots.accuracies, plots.differences):
        with pytest.raises(OptionError, match="type must be one of all, color, count, got 'kind'"):
            draw(result, type="kind")


def test_a_difference_has_its_verdict_in_colour_and_in_words() -> None:
    ax = plots.differences(example_ablation())
    assert _names(ax)[:4] == ["with stage 1", "mlp2x_gelu − linear", "bottleneck − linear", "bottleneck − mlp2x_gelu"]
    words = [text.get_text() for text in ax.texts]
    assert words[:3] == ["better", "not distinguishable; 2 points: 40 seeds", "worse"]
    assert words[3:] == ["not distinguishable; 2 points: 40 seeds"] * 3
    dots = [line for line in ax.lines if len(_xy(line)[0]) == 1]
    np.testing.assert_allclose([_xy(dot)[0][0] for dot in dots], [10, 2, -8, 0, 0, 0], atol=1e-9)
    assert [to_hex(dot.get_color()) for dot in dots[:3]] == [palette.BLUE, palette.GREY, palette.RED]
    np.testing.assert_allclose(_spans(ax, palette.BLUE), [[7, 13], [9, 11]])  # seeds, then pictures below
    widths = {tuple(np.round(_xy(line)[0])): line.get_linewidth() for line in ax.lines if len(_xy(line)[0]) == 2}
    assert widths[7, 13] > 2 * widths[9, 11]  # thick: seeds; thin: pictures
    assert any(_xy(line)[0] == [0, 0] for line in ax.lines)  # the line at 0


def test_only_connectors_under_the_same_stages_and_the_first_budget_are_paired() -> None:
    result = example_ablation(budgets=("samples", "flops"))
    assert len(result.pairs) == 18
    assert len([line for line in plots.differences(result).lines if len(_xy(line)[0]) == 1]) == 6
    alone = replace(result, stage1=np.ones(12, bool))
    assert "without stage 1" not in _names(plots.differences(alone))


def test_the_chosen_rate_has_the_ring() -> None:
    result = example_ablation()
    ax = plots.sweep(result)
    rings = [_xy(line)[0] for line in ax.lines if line.get_markerfacecolor() == "none"]
    np.testing.assert_allclose(np.ravel(rings), [*RATES, *RATES])
    curves = [line for line in ax.lines if len(_xy(line)[0]) == 3]
    np.testing.assert_allclose([_xy(line)[1] for line in curves], result.sweep_loss)
    assert [line.get_linestyle() for line in curves] == ["-"] * 3 + ["--"] * 3
    assert len({to_hex(line.get_color()) for line in curves}) == 3
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [*CONNECTORS, "with stage 1", "without stage 1"]


def test_a_rate_that_diverged_has_no_point() -> None:
    losses = example_ablation().sweep_loss.copy()
    losses[0, 2] = np.inf
    curve = plots.sweep(example_ablation(sweep_loss=losses)).lines[0]
    assert np.isnan(_xy(curve)[1][2])


@pytest.mark.parametrize("name", DRAWN)
def test_figures_take_axes_and_draw_to_a_file(name: str, tmp_path: Path) -> None:
    figure, ax = pyplot.subplots(layout="constrained")
    assert DRAWN[name](example_ablation(), ax=ax) is ax
    assert pyplot.get_fignums() == [figure.number]  # no other figure was opened
    DRAWN[name](example_ablation(stage1=np.ones(6, bool)))
    pyplot.savefig(tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 5000
