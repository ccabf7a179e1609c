"""Figures of scores and sweeps: numbers are drawn where they are, grey means not told from random, axes are the caller's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from llava_lab.errors import OptionError
from llava_lab.plots import palette
from llava_lab.plots import scores as plots
from llava_lab.results import FlowSweep, Target
from tests.support.score_examples import example_board, example_comparison, example_sanity, example_score


def _x(line: Any) -> np.ndarray:
    return np.asarray(line.get_xdata(), float)


def _y(line: Any) -> np.ndarray:
    return np.asarray(line.get_ydata(), float)


def _points(ax: Axes) -> dict[float, tuple[float, str]]:
    """height -> (value, colour) of the dots."""
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    return {float(_y(dot)[0]): (float(_x(dot)[0]), to_hex(dot.get_color())) for dot in dots}


def test_dots_stand_at_their_means_and_grey_is_not_told_from_random() -> None:
    board = example_board()
    ax = plots.dots(board)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["attention", "rollout"]  # the highest at the top
    assert _points(ax) == {0.0: (0.1, palette.GREY), 1.0: (0.5, palette.BLUE)}
    spans = [sorted(_x(line)) for line in ax.lines if len(_x(line)) == 2]
    np.testing.assert_allclose(spans, [[0.0, 0.2], [0.4, 0.6]])
    ticks = [float(_x(line)[0]) for line in ax.lines if line.get_marker() == "|"]
    np.testing.assert_allclose(ticks, [0, 0], atol=1e-12)  # random on the same pictures
    assert "40 pictures" in ax.get_xlabel()


def test_worse_than_random_is_red_and_a_low_deletion_is_better() -> None:
    board = example_board()
    worse = replace(board, against=-board.against, against_interval=-board.against_interval[..., ::-1])
    assert _points(plots.dots(worse))[1.0][1] == palette.RED
    assert _points(plots.dots(replace(worse, measures=("deletion", "pointing", "seconds")), "deletion"))[1.0][1] == palette.BLUE


def test_unmeasured_is_last_and_has_no_interval() -> None:
    ax = plots.dots(example_board(), "pointing", kind="color")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["attention", "rollout"]
    assert np.isnan(_points(ax)[0.0][0])


def test_measures_stand_side_by_side_in_one_order() -> None:
    figure = plots.leaderboard(example_board())
    assert isinstance(figure, Figure)
    assert [len(_points(ax)) for ax in figure.axes] == [2, 2, 2]
    assert _points(figure.axes[2])[1.0][0] == 2.0  # rollout's seconds, in the row of its gain
    assert not any(label.get_text() for label in figure.axes[1].get_yticklabels())


def test_matrices_print_their_numbers() -> None:
    board, example = example_board(), example_comparison()
    texts = [text.get_text() for text in plots.by_type(board, "pointing").texts]
    assert texts == ["0.80", "1.00", "0.40"]  # the unmeasured cell is empty
    ax = plots.agreement(example)
    assert [text.get_text() for text in ax.texts] == ["1.00", "0.25", "0.25", "1.00"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["rollout", "random"]
    assert plots.agreement(example, "overlap").get_title() == "share of the top patches in common; by chance 0.12"
    assert len(plots.agreement(board).texts) == 4


@pytest.mark.parametrize(("kind", "want"), [("deletion", [1, 0.2, 0.1, 0]), ("insertion", [0, 0.8, 0.9, 1])])
def test_curves_are_the_scores_inside_the_band_of_random_maps(kind: str, want: list[float]) -> None:
    ax = plots.curve(example_score(), kind, target=1)  # of its two fills one tells nothing, and is left out
    lines = {line.get_label(): line for line in ax.lines}
    np.testing.assert_allclose(_y(lines["rollout"]), want, atol=1e-6)
    np.testing.assert_allclose(_x(lines["rollout"]), [0, 25, 75, 100])
    assert {"centre", "upside down", "6 random maps"} <= set(ax.get_legend_handles_labels()[1])
    edges = np.asarray(ax.collections[0].get_paths()[0].vertices)[:, 1]
    assert np.nanmin(edges) >= 0
    assert to_hex(lines["rollout"].get_color()) == palette.GREY  # this target was not told from random
    assert to_hex(plots.curve(example_score()).lines[2].get_color()) == palette.BLUE


def test_a_chosen_fill_is_drawn_alone() -> None:
    score = example_score()
    changed = replace(score, deletion=score.deletion + np.array([0, 0.5])[None, :, None].astype(np.float32))
    one = _y(plots.curve(changed, fill="mean").lines[2])
    two = _y(plots.curve(changed, fill="blur").lines[2])
    np.testing.assert_allclose(two - one, 0.5, atol=1e-6)


def test_comparison_greys_what_does_not_beat_random() -> None:
    figure = plots.comparison(example_comparison())
    colors = [color for _, (_, color) in sorted(_points(figure.axes[0]).items())]
    assert colors == [palette.GREY, palette.BLUE]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["random", "rollout"]


DRAWN: dict[str, Any] = {
    "dots": lambda **ax: plots.dots(example_board(), **ax),
    "by_type": lambda **ax: plots.by_type(example_board(), **ax),
    "agreement": lambda **ax: plots.agreement(example_comparison(), **ax),
    "curve": lambda **ax: plots.curve(example_score(), **ax),
    "leaderboard": lambda **ax: plots.leaderboard(example_board(), **ax),
    "curves": lambda **ax: plots.curves(example_score(), **ax),
    "comparison": lambda **ax: plots.comparison(example_comparison(), **ax),
}


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_is_drawn_on_the_axes_given(name: str) -> None:
    figure, axes = pyplot.subplots(1, 3)
    many = name in ("leaderboard", "curves", "comparison")
    drawn = DRAWN[name](ax=axes if many else axes[0])
    assert drawn is (figure if many else axes[0])
    assert len(pyplot.get_fignums()) == 1
    figure.canvas.draw()
    if many:
        with pytest.raises(OptionError, match="axes, one per panel, got 1"):
            DRAWN[name](ax=axes[:1])
    DRAWN[name]()
    assert len(pyplot.get_fignums()) == 2


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.curve(example_score(), "removal"), "kind must be one of deletion, insertion, got 'removal'"),
        (lambda: plots.curve(example_score(), target=2), "targets run from 0 to 1, got 2"),
        (lambda: plots.curve(example_score(), fill="red"), "fill must be one of mean, blur, got 'red'"),
        (lambda: plots.agreement(example_board(), "overlap"), "which must be one of spearman here, got 'overlap'"),
        (lambda: plots.dots(example_board(), "speed"), "no measure 'speed' here; there is gain, pointing, seconds"),
        (lambda: plots.dots(example_board(), kind="shape"), "no type 'shape' here; there is all, color"),
    ],
)
def test_what_is_not_there_is_refused(draw: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        draw()


def test_sanity_starts_at_one_and_the_band_is_of_unrelated_maps() -> None:
    ax = plots.sanity(example_sanity())
    lines = {line.get_label(): line for line in ax.lines}
    np.testing.assert_allclose(_y(lines["layers randomised"]), [1, 0.6, 0.1], atol=1e-6)
    np.testing.assert_allclose(_y(lines["another question"]), [0.5])
    assert _x(lines["another question"]).min() > _x(lines["layers randomised"]).max()
    band = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    np.testing.assert_allclose([band.y0, band.y1], [-0.36, 0.36], atol=1e-5)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["as it is", "+ layer 1", "+ layer 0", "question 1"]
    assert ax.get_title() == "rollout\nmodel: changed, question: partly"


def test_a_map_that_never_changes_is_red() -> None:
    lines = {line.get_label(): to_hex(line.get_color()) for line in plots.sanity(example_sanity("edges", dull=True)).lines}
    assert {lines["layers randomised"], lines["another question"]} == {palette.RED}
    lines = {line.get_label(): to_hex(line.get_color()) for line in plots.sanity(example_sanity()).lines}
    assert {lines["layers randomised"], lines["another question"]} == {palette.BLUE}


def test_a_test_that_was_not_run_is_not_drawn() -> None:
    nothing = np.zeros((0, 1), np.float32)
    empty: dict[str, Any] = {
        "questions": (),
        "question_maps": np.zeros((0, 1, 4, 4)),
        "question_spearman": nothing,
        "question_overlap": nothing,
    }
    ax = plots.sanity(example_sanity(**empty))
    assert "another question" not in {line.get_label() for line in ax.lines}
    assert ax.get_title() == "rollout\nmodel: changed"
    figure = plots.sanity_maps([example_sanity(**empty)])
    assert [len(panel.images) for panel in figure.axes] == [1, 1, 1, 0]


def test_several_checks_stand_side_by_side_with_their_maps_below() -> None:
    checks = [example_sanity("edges", dull=True), example_sanity()]
    figure = plots.sanities(checks)
    assert [ax.get_title().splitlines()[0] for ax in figure.axes] == ["edges", "rollout"]
    assert [ax.get_legend() is not None for ax in figure.axes] == [True, False]
    shown = plots.sanity_maps(checks).axes
    assert [ax.get_title() for ax in shown] == [
        *("edges", "to layer 0", "all random", "another question"),
        *("rollout", "to layer 0", "all random", "another question"),
    ]
    np.testing.assert_array_equal(shown[7].images[0].get_array(), checks[1].question_maps[-1, 0])
    with pytest.raises(OptionError, match="targets run from 0 to 0, got 1"):
        plots.sanity(checks[0], target=1)


# -- knockout sweeps over many questions -----------------------------------------------------

FLOWS = ("image -> question", "image -> last")


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
    mean, low, high = plots.mean_sweep([sweep(one) for one in LEFT])
    np.testing.assert_allclose(mean, np.mean(LEFT, 0) - 1, atol=1e-6)
    assert (low <= mean + 1e-6).all()
    assert (high >= mean - 1e-6).all()
    np.testing.assert_allclose([low[0, 1], high[0, 1]], [-0.9, -0.5], atol=1e-6)  # a draw may be one question twice


def test_every_flow_has_its_panel_in_per_cent() -> None:
    figure = plots.flows([sweep(one) for one in LEFT])
    assert [ax.get_title() for ax in figure.axes] == ["image → question", "image → last"]
    lines: list[Any] = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    np.testing.assert_allclose(np.asarray(lines[0].get_ydata(), float), [0, -70, 0], atol=1e-4)


def test_points_and_bars_of_how_often_an_answer_stays() -> None:
    ax = plots.stays({"half": [(0.5, 0.25, 1.0), (1.0, 0.75, 1.0)]}, xlabel="layers")
    drawn: Any = ax.containers[0]
    line, _, (bars,) = drawn.lines
    np.testing.assert_allclose(np.asarray(line.get_ydata(), float), [50, 100])
    ends = bars.get_segments()
    np.testing.assert_allclose([end[:, 1] for end in ends], [(25, 100), (75, 100)])
    assert plots.stays({"all": [(0, 0, 0.2)]}, ax=ax) is ax


def test_sweeps_that_do_not_belong_together_are_refused() -> None:
    one = sweep(LEFT[0])
    with pytest.raises(OptionError, match="at least one sweep"):
        plots.mean_sweep([])
    with pytest.raises(OptionError, match="same flows and windows"):
        plots.mean_sweep([one, replace(one, windows=one.windows + 1)])
    with pytest.raises(OptionError, match="not a number"):
        plots.mean_sweep([replace(one, after=one.after * np.nan)])
