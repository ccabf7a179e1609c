"""ConnectorBench as Python sees it: what reaches the page, what is refused, and the still picture."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import traitlets
from PIL import Image

from llava_lab.errors import OptionError
from tests.support.bench_examples import bench_example, one_seen
from tests.support.widget_examples import make_relevance
from widgets import ConnectorBench, seen


def test_the_maps_of_every_rank_are_in_the_page_before_the_slider_moves() -> None:
    one, two, ranks = bench_example()
    widget = ConnectorBench(one, two, ranks=ranks)
    levels = np.frombuffer(widget.maps, np.uint8).reshape(5, *one.values.shape)
    scales = np.frombuffer(widget.scales, "<f4").reshape(5, 2)
    for level, (offset, step), given in zip(levels, scales, (one, two, *ranks.values()), strict=True):
        np.testing.assert_allclose(offset + step * level, given.values, atol=step * 0.51)
    assert [side["answer"] for side in widget.spec["sides"]][1:3] == ["The house is blue.", "The car is blue."]
    assert widget.spec["ranks"] == [1, 4, 16]


def test_a_map_s_noise_floor_travels_with_it() -> None:
    run, flat = one_seen().run, np.full((4, 12, 12), 1e-3)
    floors = {"noise_floor": [0.01, 0.02, 0.03, 0.04]}
    sides = [seen(name, run, make_relevance(run, flat, extras=extras), target=1) for name, extras in (("a", floors), ("b", {}))]
    assert [side["floor"] for side in ConnectorBench(*sides).spec["sides"]] == [0.02, 0.0]
    assert sides[0].values.max() == 0 < sides[1].values.max()


def test_what_is_shown_and_its_picture_follow_the_rank() -> None:
    one, two, ranks = bench_example()
    widget = ConnectorBench(one, two, ranks=ranks)
    assert widget.shown is two
    before = widget.draw_png()
    widget.rank = 4
    assert widget.shown is ranks[4]
    assert widget.draw_png() != before
    assert Image.open(io.BytesIO(before)).width == 960
    assert ConnectorBench(one, ranks=ranks).rank == 16


def test_what_cannot_be_compared_is_refused() -> None:
    one, two, ranks = bench_example()
    with pytest.raises(ValueError, match="give a second connector, ranks of a linear fit, or both"):
        ConnectorBench(one)
    other = replace(two, run=replace(two.run, question="What is this?"))
    with pytest.raises(ValueError, match="'linear' was asked 'What is this.', 'mlp2x_gelu' 'What color is the car.'"):
        ConnectorBench(one, other)
    with pytest.raises(ValueError, match=r"the map of 'linear' must be 12 x 12, got \(6, 6\)"):
        ConnectorBench(one, replace(two, values=two.values[:6, :6]))
    with pytest.raises(ValueError, match="'linear' has words for 3 of 144 patches"):
        ConnectorBench(one, replace(two, words=two.words[:3]))
    with pytest.raises(ValueError, match="target must be one of the 4 maps of 'x', got 9"):
        one_seen("x", place=9)
    with pytest.raises(traitlets.TraitError, match="rank must be one of 0, 1, 4, 16, got 2"):
        ConnectorBench(one, two, ranks=ranks, rank=2)
    with pytest.raises(OptionError, match="no option 'rankz'"):
        ConnectorBench(one, two, rankz={})
