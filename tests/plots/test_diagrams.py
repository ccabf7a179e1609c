"""Drawings that explain: they carry the run's own numbers, and patches lie where the map says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes

from llava_lab.errors import OptionError
from llava_lab.geometry import PictureMap
from llava_lab.plots import diagrams
from llava_lab.results import Interchange, Sinks
from tests.support.result_examples import examples
from tests.support.stand_in import finished_run


def _said(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_the_journey_states_the_runs_own_counts() -> None:
    run = finished_run(segments={"system": (0, 1), "image": (1, 5), "question": (5, 6), "cue": (6, 7), "answer": (7, 10)})
    said = _said(diagrams.journey(run, widths=(192, 256)))
    for words in ("2 × 2 patches", "4 vectors\nof 192 numbers", "4 vectors\nof 256 numbers", "image", "question", "cue"):
        assert words in said
    assert "The car is red." in [text.replace("\n", " ") for text in said]
    assert "answer" not in said  # the strip is the prompt; the answer comes out of the language model
    assert not any("vectors" in text for text in _said(diagrams.journey(run)))


def test_the_journey_stays_inside_its_frame_with_odd_texts() -> None:
    run = finished_run(answer="A long $\\frac{1$ answer " * 20)
    ax = diagrams.journey(run, widths=(1024, 4096))
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    frame = ax.figure.bbox
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)


def test_a_mosaic_keeps_every_patch_in_its_place_and_greys_the_padding() -> None:
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:20, 60:] = 255, 0, 0  # the top right fifth of the picture
    mosaic = diagrams.patch_mosaic(picture, PictureMap.make(80, 40, size=32, rows=4, cols=4, mode="pad"))
    step = diagrams.PATCH_PIXELS + diagrams.GAP_PIXELS
    centers = mosaic[10::step, 10::step]
    assert centers.shape == (4, 4, 3)
    np.testing.assert_allclose(centers[1, 3], (1, 0, 0))
    np.testing.assert_allclose(centers[[0, 3]], diagrams.PAD_COLOR)
    np.testing.assert_allclose(centers[1:3, :3], 0)
    np.testing.assert_allclose(mosaic[:, diagrams.PATCH_PIXELS], 1)  # a gap


def test_matrices_write_every_number_but_zeros() -> None:
    figure = diagrams.matrices({"A": np.array([[1, 0], [0.25, 0.75]]), "B": np.eye(2)}, labels=("the", "$x"))
    first, second = figure.axes
    assert _said(first) == ["1.00", "0.25", "0.75"]
    assert _said(second) == ["1.00", "1.00"]
    assert first.get_title() == "A"
    assert [label.get_text() for label in first.get_xticklabels()] == ["the", "$x"]
    figure.canvas.draw()


def test_given_axes_are_used_and_too_few_are_refused() -> None:
    _, axes = pyplot.subplots(1, 2)
    assert diagrams.journey(finished_run(), ax=axes[0]) is axes[0]
    diagrams.matrices({"A": np.eye(2)}, ax=[axes[1]])
    assert axes[1].get_title() == "A"
    with pytest.raises(OptionError, match="expected at least 2 axes"):
        diagrams.matrices({"A": np.eye(2), "B": np.eye(2)}, ax=[axes[1]])
    with pytest.raises(OptionError, match="got none"):
        diagrams.matrices({})


def test_a_run_with_earlier_turns_shows_them() -> None:
    segments = {"system": (0, 1), "image": (1, 5), "history": (5, 6), "question": (6, 7), "cue": (7, 8), "answer": (8, 10)}
    assert "history" in _said(diagrams.journey(replace(finished_run(), segments=segments)))


def test_a_subspace_is_drawn_by_layer_beside_its_placebos_and_the_whole_state() -> None:
    found = examples()[Interchange]
    assert isinstance(found, Interchange)
    ax = diagrams.interchange(found)
    lines = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in ax.lines}
    assert lines["8 dimensions, found"] == [0.75, 0.75]
    assert lines["found: the kind stays"] == [0.75, 0.75]
    assert lines["whole state, 256"] == [1, 1]
    assert {"random", "shuffled", "untrained"} < set(lines)
    assert [int(tick) for tick in ax.get_xticks()] == [0, 3]


def test_the_axis_of_sinks_has_numbers_a_reader_can_tell_a_height_by() -> None:
    sinks = examples()[Sinks]
    assert isinstance(sinks, Sinks)
    ax = diagrams.sinks(replace(sinks, drawn=np.full_like(sinks.drawn, 130.0)))
    ax.figure.canvas.draw()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1", "2", "5", "10", "20", "50", "100"]
    pyplot.close("all")
