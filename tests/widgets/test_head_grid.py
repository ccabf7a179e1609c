"""HeadGrid as Python sees it: levels that keep small values, a bounded page, and what stays when no script runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import traitlets

from llava_lab.errors import OptionError
from llava_lab.results import HeadMaps
from tests.support.compare_examples import heads_example
from tests.support.widget_examples import make_run
from widgets import HeadGrid
from widgets.head_grid import roomy, square_root_levels


def decoded(widget: HeadGrid) -> tuple[np.ndarray, np.ndarray]:
    """What the page reads: maps (words, layers, heads, rows, cols) and shares (words, layers, heads)."""
    spec = widget.spec
    shape = (len(spec["chips"]), spec["layers"], spec["heads"])
    levels = np.frombuffer(widget.maps, np.uint8).reshape(*shape, spec["map"]["rows"], spec["map"]["cols"])
    peaks, shares = np.frombuffer(widget.scales, "<f4").reshape(2, *shape)
    return peaks[..., None, None] * (levels / 255.0) ** 2, shares


def test_every_value_comes_back_and_small_ones_keep_their_digits() -> None:
    run, maps = heads_example()
    got, shares = decoded(HeadGrid(run, maps))
    values = maps.values.astype(np.float64)
    peak = values.max((-2, -1), keepdims=True)
    step = 2 * np.sqrt(values * peak) / 255 + peak / 255**2  # what one level is worth at this value
    assert (np.abs(got - values) <= 0.51 * step + 1e-9).all()
    np.testing.assert_allclose(shares, maps.image_share, rtol=1e-6)
    small = (values > 0) & (values < peak / 1000)
    assert small.any()  # a linear byte would make these zero
    assert got[values > peak / 10_000].min() > 0


def test_a_head_that_looks_nowhere_does_not_divide_by_zero() -> None:
    levels, peaks = square_root_levels(np.zeros((1, 1, 2, 3, 3), np.float16))
    assert not levels.any()
    assert not peaks.any()


def test_7b_takes_six_tenths_of_a_megabyte_per_word() -> None:
    run = make_run(grid=24, size=336)
    maps = HeadMaps(np.zeros((4, 32, 32, 24, 24), np.float16), run.word_targets(), run.map, run.model, run.fingerprint, 1.0)
    widget = HeadGrid(run, maps)
    assert len(widget.maps) == 4 * 32 * 32 * 576 < 2_400_000
    assert len(widget.scales) == 2 * 4 * 32 * 32 * 4
    fewer = HeadGrid(run, maps, megabytes=1.3)
    assert len(fewer.spec["chips"]) == 2
    assert len(fewer.maps) <= 1_300_000


def test_where_there_is_no_room_the_words_that_look_most_stay_in_reading_order() -> None:
    shares = np.array([0.1, 0.5, 0.2, 0.4])[:, None, None] * np.ones((4, 2, 2))
    assert roomy(1_000_000, shares, 2.9) == (1, 3)
    assert roomy(1_000_000, shares, 0.1) == (1,)  # one is always kept
    assert roomy(1_000_000, shares, 4.0) == (0, 1, 2, 3)
    run, maps = heads_example()
    widget = HeadGrid(run, maps, megabytes=2 * maps.values[0].size / 1e6)
    assert [chip["text"] for chip in widget.spec["chips"]] == [run.words[i].text for i in widget.kept]
    assert "Left out for want of room" in widget.spec["notes"][-1]
    assert HeadGrid(run, maps).spec["notes"] == ["Made by hand."]


def test_the_first_head_is_the_one_that_looks_most() -> None:
    run, maps = heads_example()
    widget = HeadGrid(run, maps)
    assert (widget.word, widget.layer, widget.head) == (3, 2, 3)
    assert HeadGrid(run, maps, word="car").head == 1
    widget = HeadGrid(run, maps, word="car", layer=5, head=-1)
    np.testing.assert_allclose(widget.values, maps.values[1, 5].astype(np.float32).mean(0))
    widget.head = 0
    np.testing.assert_array_equal(widget.values, maps.values[1, 5, 0].astype(np.float32))


def test_selection_is_sorted_unique_and_inside_the_grid() -> None:
    widget = HeadGrid(*heads_example())
    widget.selected = [14, 3, 14]
    assert widget.patches == [(0, 3), (1, 2)]
    assert widget.mask.sum() == 2
    for name, value in (("selected", [144]), ("word", 4), ("layer", 6), ("head", 4), ("head", -2)):
        with pytest.raises(traitlets.TraitError, match=r"must lie in 0\.\."):
            setattr(widget, name, value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"word": "house"}, ValueError, "the answer has no word 'house'"),
        ({"word": 4}, traitlets.TraitError, r"word must lie in 0\.\.3, got 4"),
        ({"layer": 6}, traitlets.TraitError, r"layer must lie in 0\.\.5, got 6"),
        ({"head": 9}, traitlets.TraitError, r"head must lie in 0\.\.3, got 9"),
        ({"megabytes": 0}, ValueError, "megabytes must be more than 0, got 0"),
        ({"opacity": -1}, ValueError, r"opacity must lie in 0\.\.1, got -1"),
        ({"laier": 3}, OptionError, r"no option 'laier'; did you mean 'layer'\?"),
    ],
)
def test_wrong_options_say_what_is_right(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HeadGrid(*heads_example(), **options)


def test_a_word_that_was_left_out_is_named() -> None:
    run, maps = heads_example()
    kept = HeadGrid(run, maps, megabytes=1e-6).kept[0]
    other = run.words[kept - 1].text
    with pytest.raises(ValueError, match=f"no head maps of {other!r} here; there are {run.words[kept].text!r}"):
        HeadGrid(run, maps, word=other, megabytes=1e-6)


def test_maps_of_another_checkpoint_picture_or_answer_are_refused() -> None:
    run, maps = heads_example()
    wrong = {
        "explains another checkpoint": replace(maps, fingerprint="other"),
        "another picture geometry": replace(maps, map=replace(maps.map, offset_x=3.0)),
        "not finite": replace(maps, values=np.full_like(maps.values, np.nan)),
    }
    for message, broken in wrong.items():
        with pytest.raises(ValueError, match=message):
            HeadGrid(run, broken)
    with pytest.raises(ValueError, match="which this run does not say there"):
        HeadGrid(replace(run, token_ids=run.token_ids + 1), maps)
