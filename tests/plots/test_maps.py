"""Figures: drawn where the patch is, one scale where it is shared, the unseen marked, no torch needed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from llava_lab.errors import OptionError
from llava_lab.geometry import Mode, PictureMap
from llava_lab.plots import maps as plots
from llava_lab.plots.palette import SEGMENTS
from llava_lab.results import Relevance, Run, Word

TEXTS = ("The", "car", "is", "red", ".")


def make_run(width: int = 80, height: int = 60, mode: Mode = "crop") -> Run:
    words = tuple(Word(text, 20 + i, 21 + i) for i, text in enumerate(TEXTS))
    return Run(
        picture=np.full((height, width, 3), 200, np.uint8),
        question="What color is the car?",
        answer="The car is red.",
        prompt="USER: <image>",
        token_ids=np.arange(25),
        tokens=("x",) * 25,
        segments={"system": (0, 1), "image": (1, 17), "question": (17, 19), "cue": (19, 20), "answer": (20, 25)},
        words=words,
        logprobs=np.zeros(5, np.float32),
        map=PictureMap.make(width, height, size=32, rows=4, cols=4, mode=mode),
        model="tiny",
        fingerprint="f",
    )


def make_map(run: Run, values: np.ndarray | None = None, **fields: Any) -> Relevance:
    targets = run.word_targets()
    if values is None:
        values = np.random.default_rng(0).random((len(targets), 4, 4)).astype(np.float32)
    rel = Relevance(values, targets[: len(values)], "attention", {}, run.map, "tiny", "f", 0.1, {"forward": 1})
    return replace(rel, **fields)


def _pixels(ax: Axes) -> np.ndarray:
    """The figure as drawn, RGB in 0..255."""
    ax.figure.canvas.draw()
    return np.asarray(ax.figure.canvas.buffer_rgba())[..., :3].astype(int)  # type: ignore[attr-defined]


def _at(ax: Axes, drawn: np.ndarray, x: float, y: float) -> np.ndarray:
    column, row = ax.transData.transform((x, y))
    return drawn[drawn.shape[0] - 1 - int(row), int(column)]


@pytest.mark.parametrize(("width", "height"), [(80, 60), (60, 80), (60, 60)])
@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_a_bright_patch_is_painted_in_its_own_box_and_nowhere_else(width: int, height: int, mode: Mode) -> None:
    run = make_run(width, height, mode)
    values = np.zeros((1, 4, 4), np.float32)
    values[0, 1, 2] = 1
    ax = plots.overlay(run, make_map(run, values), colorbar=False)
    drawn = _pixels(ax)
    for row in range(4):
        for col in range(4):
            left, top, right, bottom = run.map.patch_box(row, col)
            x, y = (left + right) / 2, (top + bottom) / 2
            if not (0 < x < width and 0 < y < height):
                continue
            changed = np.abs(_at(ax, drawn, x, y) - 200).max() > 20
            assert changed == ((row, col) == (1, 2)), (row, col)


def test_what_the_model_never_saw_is_hatched_and_only_that() -> None:
    ax = plots.overlay(run := make_run(80, 60, "crop"), make_map(run))
    boxes = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    assert [patch.get_hatch() for patch in boxes] == ["///", "///"]
    left, top, right, bottom = run.map.seen_box
    assert sum(box.get_width() * box.get_height() for box in boxes) == pytest.approx(80 * 60 - (right - left) * (bottom - top))
    assert all(box.get_x() >= right or box.get_x() + box.get_width() <= left for box in boxes)
    assert [text.get_text() for text in ax.texts] == ["never seen"]
    square = make_run(60, 60, "crop")
    assert not plots.overlay(square, make_map(square)).patches


def test_padding_is_named_with_its_share() -> None:
    run = make_run(80, 20, "pad")
    values = np.zeros((1, 4, 4), np.float32)
    values[0, 0] = 1  # all of it on padding
    assert "hold 100% of the map" in plots.overlay(run, make_map(run, values)).get_xlabel()
    values[0] = 1
    rows = int((run.map.coverage()[:, 0] == 0).sum())
    label = plots.overlay(run, make_map(run, values)).get_xlabel()
    assert label == f"{4 * rows} patches are padding, not drawn;\nthey hold {rows / 4:.0%} of the map"


@pytest.mark.parametrize(
    ("top", "said"),
    [
        (0.5, "15 patches negligible (noise floor 0.01), not drawn"),
        (0.0, "negligible everywhere: no patch reaches the noise floor 0.01"),
    ],
)
def test_what_does_not_reach_the_noise_floor_is_called_negligible(top: float, said: str) -> None:
    run = make_run(60, 60)
    values = np.full((5, 4, 4), 1e-3, np.float32)
    values[:, 1, 2] += top
    rel = make_map(run, values, extras={"noise_floor": [0.01] * 5})
    assert plots.overlay(run, rel, target=3).get_xlabel() == said
    assert plots.overlay(run, make_map(run, values), target=3).get_xlabel() == ""


def test_negative_values_centre_the_colours_on_zero() -> None:
    run = make_run(60, 60)
    signed = np.full((1, 4, 4), -0.5, np.float32)
    signed[0, 0] = 2.0
    signed[0, 1] = 0.0
    assert plots.color_scale([make_map(run, signed)]) == (-2.0, 2.0)
    ax = plots.overlay(run, make_map(run, signed), colorbar=False)
    drawn = _pixels(ax)
    more, nothing, less = (_at(ax, drawn, 30, y) for y in (7, 22, 52))
    assert more[0] > more[2], "more is red"
    assert less[2] > less[0], "less is blue"
    assert np.abs(nothing - 200).max() < 12, "zero leaves the picture alone"
    assert plots.color_scale([make_map(run, np.abs(signed))])[0] == 0


def test_scale_survives_one_odd_patch_and_constant_maps() -> None:
    run = make_run(60, 60)
    odd = np.ones((30, 4, 4), np.float32)
    odd[0, 0, 0] = 1e6
    rel = replace(make_map(run), values=odd, targets=(run.target(),) * 30)
    assert plots.color_scale([rel]) == (0, 1)
    assert plots.color_scale([make_map(run, np.zeros((1, 4, 4), np.float32))]) == (0, 1)


def test_words_share_one_scale_and_one_legend() -> None:
    run = make_run()
    values = np.arange(1, 6, dtype=np.float32)[:, None, None] * np.ones((1, 4, 4), np.float32)
    figure = plots.words_figure(run, make_map(run, values), columns=3)
    panels = [ax for ax in figure.axes if ax.images and ax.get_title()]
    assert [ax.get_title() for ax in panels] == [f"“{text}”" for text in TEXTS]
    assert {ax.images[1].get_clim() for ax in panels} == {(0.0, 5.0)}
    assert len(figure.axes) == len(panels) + 1, "one colour bar for all"
    assert figure.get_suptitle() == "What color is the car?\nThe car is red."


def test_methods_side_by_side_keep_their_own_scales() -> None:
    run = make_run()
    one, two = make_map(run), make_map(run)
    two = replace(two, values=two.values * 100)
    figure = plots.compare_figure(run, {"small": one, "large": two}, target=3)
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["small", "large"]
    assert panels[1].images[1].get_clim()[1] == pytest.approx(100 * panels[0].images[1].get_clim()[1])
    assert "“red”" in figure.get_suptitle()


def test_every_figure_draws_into_the_callers_axes() -> None:
    run = make_run()
    rel = make_map(run, extras={"mass": [{"system": 0.5, "image": 0.5}] * 5})
    figure, axes = pyplot.subplots(1, 5)
    assert plots.overlay(run, rel, ax=axes[0]) is axes[0]
    assert plots.words_figure(run, rel, ax=axes) is figure
    assert plots.compare_figure(run, {"a": rel, "b": rel}, ax=axes[:2]) is figure
    assert plots.segment_bars(run, rel, ax=axes[4]) is axes[4]
    assert figure.get_suptitle() == ""
    with pytest.raises(OptionError, match="at least 5 axes, one per panel, got 2"):
        plots.words_figure(run, rel, ax=axes[:2])


def test_segment_bars_fill_the_row_and_show_the_mask_alone() -> None:
    run = make_run()
    mass = [{"system": 0.25, "image": 0.5, "question": 0.125}] * 5
    ax = plots.segment_bars(run, make_map(run, extras={"mass": mass, "null_mass": [{"system": 1.0}] * 5}))
    bars = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    first = sorted((bar.get_x(), bar.get_width()) for bar in bars if abs(bar.get_y() + bar.get_height() / 2) < 0.1)
    assert sum(width for _, width in first) == pytest.approx(1)
    assert ax.get_yticklabels()[-1].get_text() == "mask alone"
    image = next(bar for bar in bars if bar.get_width() == 0.5)
    assert image.get_facecolor() == to_rgba(SEGMENTS["image"])
    with pytest.raises(OptionError, match="mass per segment"):
        plots.segment_bars(run, make_map(run))


def test_smooth_and_nearest_differ_and_both_draw() -> None:
    run = make_run()
    rel = make_map(run)
    drawn: list[Any] = [plots.overlay(run, rel, smooth=smooth, colorbar=False).images[1].get_array() for smooth in (False, True)]
    nearest, smooth = (len(np.unique(one.compressed())) for one in drawn)
    assert nearest <= 16 < smooth


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 5}, "targets run from 0 to 4, got 5"),
        ({"opacity": 0}, "opacity must be above 0"),
        ({"cmap": "jetty"}, "cmap must be None or a matplotlib colour map such as 'viridis' or 'gray', got 'jetty'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    run = make_run()
    with pytest.raises(OptionError, match=message):
        plots.overlay(run, make_map(run), **options)


def test_a_map_of_another_picture_is_refused() -> None:
    with pytest.raises(OptionError, match="a map of this run"):
        plots.overlay(make_run(80, 60), make_map(make_run(60, 80)))
    with pytest.raises(OptionError, match="at least one map"):
        plots.compare_figure(make_run(), {})


def test_text_is_drawn_as_text() -> None:
    run = make_run()
    odd = replace(run.target("red"), text="$\\frac{1}{0$ <b>")
    ax = plots.overlay(run, make_map(run, np.ones((1, 4, 4), np.float32), targets=(odd,)))
    ax.figure.canvas.draw()
    assert ax.get_title() == "“$\\frac{1}{0$ <b>” by attention"
    plots.segment_bars(run, make_map(run, np.ones((1, 4, 4), np.float32), targets=(odd,), extras={"mass": [{"image": 1.0}]}))
    plots.words_figure(replace(run, answer="$\\frac{1$"), make_map(run)).canvas.draw()


def test_plots_need_neither_torch_nor_the_model() -> None:
    """Widgets import the palette and results at once: matplotlib, too, waits until something is drawn."""
    code = "import sys, llava_lab.plots; print([n for n in ('torch', 'transformers', 'matplotlib') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_figures_are_returned_not_shown() -> None:
    run = make_run()
    assert isinstance(plots.words_figure(run, make_map(run)), Figure)
    assert isinstance(plots.overlay(run, make_map(run)), Axes)
