"""Stills of the widgets: a patch is painted where it is, the same bytes every time, every word readable and only text."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from llava_lab.geometry import Mode
from llava_lab.plots import palette, sheet, stills
from llava_lab.results import Run
from tests.support import flow_examples, lens_examples
from tests.support.compare_examples import heads_example
from tests.support.families import family
from tests.support.widget_examples import car_picture, example, make_relevance, make_run, spots

RUN, MAPS = example()
LAST = {name: given if not isinstance(given, list) else given[-1][1] for name, given in MAPS.items()}
FLOW_RUN, SWEEP, GRID = flow_examples.two()
LENS_RUN, LENS, NEAR = lens_examples.example()
ONE, TWO = ("mlp", "The car is red.", spots(RUN)[1]), ("linear", "The car is blue.", spots(RUN, seed=2)[3])
CURVE = [(step, 3 / (step + 1)) for step in range(20)]

DRAWN: dict[str, Callable[[], Figure]] = {
    "word_maps": lambda: stills.word_maps(RUN, LAST, beats={"occlusion": [True, False, None]}, controls=("random",)),
    "method_maps": lambda: stills.method_maps(RUN, {"good": spots(RUN)[1], "none": None}, scores={"good": 0.3}),
    "head_maps": lambda: stills.head_maps(*heads_example(), targets=[1, 3]),
    "lens_states": lambda: stills.lens_states(LENS_RUN, LENS, NEAR, word="car", state=3),
    "connector_maps": lambda: stills.connector_maps(RUN, ONE, TWO),
    "flow_and_patching": lambda: stills.flow_and_patching(FLOW_RUN, SWEEP, GRID, SWEEP.targets[0], notes=("One cut.",)),
    "losses": lambda: stills.losses({"align": CURVE, "instruct": CURVE[:3]}),
}


PICTURES = {"wide": (400, 260), "square": (288, 288), "upright": (180, 400)}
LONG = {"integrated_gradients": -0.0358, "localization_heads": 0.00314, "token_knockout": 0.904}


def texts(figure: Figure) -> list[str]:
    """Everything written, axes by axes."""
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def crowded(run: Run) -> dict[str, Callable[[], Figure]]:
    """Each still with the longest labels it has for a picture: surest words, most states, lowest scores."""
    wide = run.map.rows * run.map.cols
    sure = np.full((31, wide, 1), 1e-6, np.float32)
    sure[0, 5], sure[30, 5] = 1, 0.25
    known = {"words": ("car",), "word_ids": (1,), "probs": sure, "ranks": np.ones(sure.shape, np.int32)}
    ids = np.tile(np.array([1, 3, 4]), (31, wide, 1))
    lens = lens_examples.lens_of(run, ids, np.full(ids.shape, 0.3), **known, lens="jacobian")
    _, few = heads_example()
    every = np.full((1, 28, 32, 12, 12), 1 / 144, np.float16)
    heads = dataclasses.replace(few, map=run.map, targets=few.targets[:1], values=every)
    grid = dataclasses.replace(
        GRID,
        corruption="another picture of the same place",
        sites=("question", "the whole picture", "last"),
        noise_floor=(1.2, 1.2),
    )
    unsure = dataclasses.replace(SWEEP, noise_floor=(1e-3, 1e-3))
    faint = make_relevance(run, partly(run), extras={"noise_floor": [0.01] * len(run.words)})
    hidden = {f"{name} of the connector in stage {stage}": CURVE for stage in range(5) for name in ("loss", "best")}
    return {
        "word_maps": lambda: stills.word_maps(
            run, {"rollout": make_relevance(run, spots(run)), "occlusion": faint}, note="a word. " * 30
        ),
        "method_maps": lambda: stills.method_maps(
            run,
            {n: faint.drawn[place % 2] for place, n in enumerate(LONG)},
            scores=LONG,
            floors=dict.fromkeys(LONG, 0.01),
            about="Maps. " * 40,
        ),
        "head_maps": lambda: stills.head_maps(run, heads, targets=[0]),
        "lens_states": lambda: stills.lens_states(run, lens, word="car"),
        "connector_maps": lambda: stills.connector_maps(
            run,
            ("mlp", "The car is red.", faint.drawn[0]),
            ("linear fit", "The car is blue.", spots(run, seed=2)[3] / 997),
            floors=(0.01, 1e-4),
        ),
        "flow_and_patching": lambda: stills.flow_and_patching(run, unsure, grid, SWEEP.targets[1]),
        "losses": lambda: stills.losses(hidden),
    }


@family("shape", PICTURES, quick=1)
@pytest.mark.parametrize("name", DRAWN)
def test_every_label_is_whole_on_the_page_and_beside_the_others(name: str, shape: str) -> None:
    figure = crowded(make_run(picture=car_picture(*PICTURES[shape])))[name]()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in found]
    for said, box in boxes:
        assert not said.endswith("…") or said == "the wh…", said
        assert box.x0 >= 0, said
        assert box.x1 <= figure.bbox.width, said
        assert box.y0 >= 0, said
        assert box.y1 <= figure.bbox.height, said
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        down = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert across < 1 or down < 3, (one, other)


@family("name", DRAWN, quick=3)
def test_a_still_is_the_same_bytes_whatever_the_reader_s_settings(name: str) -> None:
    first = stills.png(DRAWN[name]())
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "figure.dpi": 50, "savefig.bbox": "tight"}):
        assert stills.png(DRAWN[name]()) == first
    image = Image.open(io.BytesIO(first))
    assert image.width == sheet.DENSITY * sheet.WIDTH
    assert image.info.keys() <= {"dpi"}  # no date and no version
    assert len(first) < 2 * sheet.PNG_LIMIT


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_a_patch_is_painted_in_its_own_box_and_the_unseen_is_dark(mode: Mode) -> None:
    run = make_run(picture=np.full((60, 80, 3), 200, np.uint8), mode=mode, grid=4, size=32)
    values = np.zeros((4, 4), np.float32)
    values[1, 2] = 1
    painted = stills.overlay(run, values, (0.0, 1.0), (160, 120)).astype(int)
    for row in range(4):
        for col in range(4):
            left, top, right, bottom = (2 * edge for edge in run.map.patch_box(row, col))
            x, y = int((left + right) / 2), int((top + bottom) / 2)
            if 0 <= x < 160 and 0 <= y < 120:
                bright = painted[y, x, 0] - painted[y, x, 2] > 80
                assert bright == ((row, col) == (1, 2)), (row, col)
    dark = painted.max(-1) < 90
    assert dark[:, :19].all() == dark[:, 141:].all() == (mode == "crop")
    assert not dark[:, 22:138].any()


def test_doubtful_maps_are_grey_and_signs_have_their_own_colours() -> None:
    run = make_run(picture=np.full((96, 96, 3), 230, np.uint8), grid=2, size=96)
    values = np.array([[-1, 0], [0, 1]], np.float32)
    assert stills.range_over([values]) == (-1, 1)
    painted = stills.overlay(run, values, (-1.0, 1.0), (96, 96)).astype(int)
    less, nothing, more = painted[24, 24], painted[24, 72], painted[72, 72]
    assert less[2] > less[0] + 60
    assert more[0] > more[2] + 60
    assert np.ptp(nothing) < 8
    doubtful = stills.overlay(run, values, (-1.0, 1.0), (96, 96), doubtful=True).astype(int)
    assert np.ptp(doubtful, axis=-1).max() < 12
    flat = stills.overlay(run, 0 * values, (0.0, 0.0), (96, 96))
    assert len(np.unique(flat.reshape(-1, 3), axis=0)) == 1


def test_words_say_how_likely_they_were_and_what_was_left_out() -> None:
    said = texts(DRAWN["word_maps"]())
    for part in ("What color is the car?", "The car is red.", "tiny, seed 0, 12 × 12 patches", "random (control)"):
        assert part in said
    assert said.count("car 94%") == 3  # a row for each method
    assert said.count("no map") == 2  # occlusion explains two of the words
    many = make_run(" ".join(f"w{i}" for i in range(40)), grid=4)
    figure = stills.word_maps(many, {"m": make_relevance(many, np.ones((40, 4, 4)))}, note="the last layer of each method")
    assert texts(figure)[-1] == "Shown here: 14 of 40 words, those with the highest peaks; the last layer of each method"


def test_texts_are_only_text() -> None:
    """A formula is drawn as it is written; a sign that no font here has is a question mark, and no warning."""
    run = make_run("$\\frac{1$ 猫 is über red", picture=car_picture(400, 260))
    figure = stills.word_maps(run, {"a method with a very long name " * 5: make_relevance(run, spots(run))})
    said = texts(figure)
    assert "$\\frac{1$ ? is über red" in said
    assert any(text.startswith("a method with") and text.endswith("…") for text in said)
    stills.png(figure)


def test_methods_stand_in_the_order_given_with_their_scores() -> None:
    figure = stills.method_maps(
        RUN, {f"m{i}": spots(RUN, seed=i)[1] for i in range(32)}, about="Maps.", scores={"m1": 0.25}, doubtful=("m0",)
    )
    said = texts(figure)
    assert [text for text in said if text.startswith("m") and text[1:].isdigit()] == [f"m{i}" for i in range(30)]
    assert said[said.index("m1") + 1] == "0.25"
    assert said[-2:] == ["Grey: not shown to beat random maps.", "Shown here: 30 of 32 methods."]
    assert "no map for this" in texts(DRAWN["method_maps"]())


def test_the_heads_that_look_most_are_beside_their_matrix() -> None:
    run, heads = heads_example()
    figure = stills.head_maps(run, heads, targets=[1, 3])
    said = texts(figure)
    share = heads.image_share
    assert f'"car": {share[1].mean():.1%} of its attention on the picture, mean over all heads' in said
    assert f"layer 2, head 1: {share[1, 2, 1]:.0%}" in said
    assert said[said.index("Shown here: 2 of 4 words.") :][0]
    shown: list[Any] = [ax.images[0].get_array() for ax in figure.axes[1:]]
    np.testing.assert_allclose(shown[0], share[1])


@pytest.mark.parametrize("text", ["x" * 200_000, "a word " * 30_000, "漢" * 50_000], ids=["no space", "words", "not in the font"])
def test_a_question_or_answer_of_many_pages_is_shortened_at_once(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    measure = sheet.Sheet.measure
    monkeypatch.setattr(sheet.Sheet, "measure", lambda self, text, size: measured.append(len(text)) or measure(self, text, size))
    page = sheet.Sheet(dataclasses.replace(RUN, question=text, answer=text))
    question, *answer, _ = texts(page.done())
    assert sum(measured) < 20_000
    for line, size in ((question, 18), (answer[-1], 20)):
        assert line.endswith("…")
        assert 0.9 < page.measure(line, size) / (sheet.WIDTH - sheet.MARGIN - page.ax.texts[0].get_position()[0]) <= 1


def test_a_lens_without_the_word_shows_entropy_and_says_so() -> None:
    said = texts(DRAWN["lens_states"]())
    assert 'Probability of "car"' in said
    assert "Likeliest words at row 8, column 5" in said
    assert "Nearest words of this projected token: wheel 0.50, roof 0.25, sky -0.20. Norm 9." in said
    said = texts(stills.lens_states(LENS_RUN, LENS, word="horse"))
    assert "Entropy in nats: how undecided each patch is" in said
    assert '"horse" is never among the top 4 words kept; the maps show entropy.' in said


def test_of_patches_that_are_as_sure_the_first_on_the_picture_is_read() -> None:
    run = make_run(picture=car_picture(400, 260))
    assert (run.map.coverage()[0] == 0).all()  # padding
    probs = np.full((5, 144, 1), 0.1, np.float32)
    probs[4, [3, 60, 61, 90]] = [[1.0], [0.9991], [0.9999], [1.0]]
    known = {"words": ("car",), "word_ids": (1,), "probs": probs, "ranks": np.ones(probs.shape, np.int32)}
    lens = lens_examples.lens_of(run, np.tile(np.array([1, 3]), (5, 144, 1)), np.full((5, 144, 2), 0.3), **known)
    assert "Likeliest words at row 5, column 0" in texts(stills.lens_states(run, lens, word="car"))


def test_some_states_are_spread_with_both_ends_and_the_one_wanted() -> None:
    assert stills.some_states(5, 7) == [0, 1, 2, 3, 4]
    assert stills.some_states(33, 5) == [0, 8, 16, 24, 32]
    assert stills.some_states(33, 5, 9) == [0, 9, 16, 24, 32]


def test_flows_and_patching_show_their_numbers_and_their_holes() -> None:
    figure = DRAWN["flow_and_patching"]()
    _, cutting, patching = figure.axes[:3]
    lines: list[Any] = [line for line in cutting.lines if line.get_marker() in ("o", "s", "^", "D")]
    np.testing.assert_allclose([line.get_ydata() for line in lines], SWEEP.change[..., 0])
    assert [line.get_color() for line in lines] == list(palette.FLOWS[:3])
    crosses = [np.asarray(line.get_xdata()).tolist() for line in cutting.lines if line.get_marker() == "x"]
    assert crosses == [[], [], [3]]
    shown: Any = patching.images[0].get_array()
    np.testing.assert_allclose(shown.filled(np.nan), GRID.values[0, ..., 0])
    assert {"1.00", "1.50", "-0.50"} <= set(texts(figure))
    hole = stills.flow_and_patching(FLOW_RUN, None, GRID, SWEEP.targets[0], component=1)
    assert len([text for text in hole.axes[1].texts if text.get_text().replace(".", "").replace("-", "").isdigit()]) == 11
    assert "logit difference (red, not blue)" in " ".join(
        texts(stills.flow_and_patching(FLOW_RUN, SWEEP, None, SWEEP.targets[1]))
    )


def test_losses_are_drawn_at_their_steps_and_odd_ones_left_out() -> None:
    figure = stills.losses({"align": [(0, 2.0), (5, np.nan), (10, 0.5)], "next": []}, log=True)
    ax: Any = figure.axes[1]
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0.0, 2.0], [10.0, 0.5]])
    assert ax.get_yscale() == "log"
    legend: Any = ax.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["align 0.500", "next"]
    waiting = stills.losses({"loss": []})
    assert texts(waiting) == ["No step was logged yet. The curve appears here while the training runs."]


def test_the_difference_of_two_connectors_is_second_minus_first() -> None:
    said = texts(DRAWN["connector_maps"]())
    reach = float(np.abs(TWO[2] - ONE[2]).max())
    assert ["linear − mlp", f"orange: more, blue: less, full at {reach:.3g}"] == said[-2:]


def partly(run: Run) -> np.ndarray:
    """(words, rows, cols): nothing of the first word, one patch of each other, and everywhere less than 0.01."""
    values = np.full((len(run.words), 12, 12), 1e-3, np.float32)
    values[1:, 5, 4] = 0.5
    return values


def test_what_lies_below_the_noise_floor_is_called_negligible_and_counted() -> None:
    floor = {"noise_floor": [0.01] * len(RUN.words)}
    rel = make_relevance(RUN, partly(RUN), extras=floor)
    said = texts(stills.word_maps(RUN, {"occlusion": rel, "rollout": LAST["rollout"]}))
    assert said.count("negligible") == 1  # under "The"
    on_picture = int((rel.map.coverage() > 0).sum())
    counted = f"Negligible (below the noise floor), not drawn: {on_picture - 1} of {on_picture} patches."
    assert said.count(counted) == 1
    faint = {"weak": rel.drawn[0], "strong": rel.drawn[1], "unknown": rel.drawn[0]}
    said = texts(stills.method_maps(RUN, faint, scores={"weak": 0.25}, floors={"weak": 0.01, "strong": 0.01}))
    assert said.count("negligible") == 1  # on the weak one; where no floor was measured, nothing is
    assert said[said.index("weak") + 1] == "0.25"
    assert said[-1] == counted
    sides = [(name, "The car is red.", rel.drawn[word]) for name, word in (("mlp", 0), ("linear", 1))]
    said = texts(stills.connector_maps(RUN, *sides, floors=(0.01, 0.01)))
    assert said.count("negligible") == 1  # on the first
    assert said.count(counted) == 1  # of the second and of the difference
    said = texts(stills.connector_maps(RUN, sides[1], ("linear", "The car is red.", sides[1][2] + 0.012), floors=(0.01, 0.01)))
    assert said.count("negligible") == 1  # the difference: 0.012 is less than both floors together
    said = texts(stills.connector_maps(RUN, *sides))
    assert not any("egligible" in text for text in said)


def test_a_cut_or_a_patching_below_the_noise_floor_is_explained_where_it_is_drawn() -> None:
    sweep, grid = (dataclasses.replace(one, noise_floor=(floor, floor)) for one, floor in ((SWEEP, 1e-3), (GRID, 1.2)))
    figure = stills.flow_and_patching(FLOW_RUN, sweep, grid, SWEEP.targets[0])
    labels = [text.get_text() for ax in figure.axes if ax.get_legend() for text in ax.get_legend().get_texts()]
    assert labels[-1] == "negligible (below the noise floor)"
    assert "·  negligible" in texts(figure)
    plain = DRAWN["flow_and_patching"]()
    assert not any("negligible" in text for text in texts(plain))


def test_large_stills_have_fewer_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = DRAWN["losses"]()
    whole = stills.png(figure)
    monkeypatch.setattr(sheet, "PNG_LIMIT", 1000)
    assert Image.open(io.BytesIO(stills.png(figure))).mode == "P"
    assert len(stills.png(figure)) < len(whole)


def test_scales_are_256_colours_that_fade_where_nothing_is_said() -> None:
    for name, colors in palette.palettes().items():
        assert colors.shape == (256, 4), name
        assert colors.dtype == np.uint8, name
    assert palette.sequential()[0, 3] == round(255 * palette.FAINTEST)
    middle = palette.diverging()[127:129, 3]
    assert middle.max() < 15
    np.testing.assert_array_equal(palette.colors_of(True, doubtful=True)[:, 3], palette.diverging()[:, 3])
