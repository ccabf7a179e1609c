"""Controls: random, centre and edges know nothing of the answer; inverse turns another map round and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llava_lab.attribution import attribute
from llava_lab.attribution.controls import edge_strength
from llava_lab.errors import OptionError, TargetError
from llava_lab.models import Lab
from llava_lab.results import Run
from tests.support.planted import scripted_run


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (20, 80, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.", fit="pad")


def test_edges_lie_where_brightness_changes(tiny_random: Lab) -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 24:] = 255  # a step inside the second column of patches, which are 16 pixels wide
    run = scripted_run(tiny_random, picture, "The car is blue.")
    rel = attribute(tiny_random, run, method="edges", target="words")
    assert len(rel.values) == len(run.words) > 1
    np.testing.assert_allclose(rel.values[:, :, 1], 1 / 16, atol=1e-6)  # half a step on either side, over 16 pixels
    np.testing.assert_allclose(rel.values[:, :, [0, 2, 3]], 0, atol=1e-6)
    assert rel.passes == {"forward": 0, "backward": 0}
    assert "a control" in rel.notes[0]


def test_edges_do_not_see_the_border_of_the_padding(tiny_random: Lab) -> None:
    picture = np.full((20, 80, 3), 255, np.uint8)
    rel = attribute(tiny_random, scripted_run(tiny_random, picture, "The car is blue.", fit="pad"), method="edges")
    assert (rel.values == 0).all()


def test_edges_of_one_row_are_those_along_it() -> None:
    row = np.repeat(np.array([[0, 51, 102, 255]], np.uint8)[..., None], 3, 2)
    np.testing.assert_allclose(edge_strength(row), [[0.2, 0.2, 0.4, 0.6]], atol=1e-6)


@pytest.mark.parametrize("of", ["center", "occlusion"])
def test_inverse_turns_the_ranking_round_within_the_same_range(tiny_random: Lab, run: Run, of: str) -> None:
    seen = run.map.coverage() > 0
    plain = attribute(tiny_random, run, method=of, target=["blue", "answer"])
    turned = attribute(tiny_random, run, method="inverse", of=of, target=["blue", "answer"])
    for one, two in zip(plain.values, turned.values, strict=True):
        np.testing.assert_array_equal(np.argsort(one[seen], kind="stable"), np.argsort(-two[seen], kind="stable"))
        assert (two[seen].min(), two[seen].max()) == pytest.approx((one[seen].min(), one[seen].max()), abs=1e-6)
        assert (two[~seen] == two[seen].min()).all(), "padding must not come first"
    assert turned.passes == plain.passes
    assert turned.notes == (f"The map of {of} turned round: a control, not an explanation.", *plain.notes)


def test_inverse_hands_on_options_and_contrasts(tiny_random: Lab, run: Run) -> None:
    options: dict[str, Any] = {"of": "occlusion", "options": {"block": 2, "fill": "mean"}}
    turned = attribute(tiny_random, run, method="inverse", target=("blue", "green"), **options).values[0]
    plain = attribute(tiny_random, run, method="occlusion", target=("blue", "green"), block=2, fill="mean").values[0]
    seen = run.map.coverage() > 0
    np.testing.assert_allclose(turned[seen] + plain[seen], plain[seen].min() + plain[seen].max(), atol=1e-5)
    with pytest.raises(TargetError, match="method 'attention' cannot tell"):
        attribute(tiny_random, run, method="inverse", of="attention", target=("blue", "green"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "inverse"}, "of must be the name of another method, one of rollout, .*; got 'inverse'"),
        ({"of": "magic"}, "got 'magic'"),
        ({"options": 3}, "options must be the other method's options by name, or None; got 3"),
        ({"of": "occlusion", "options": {"size": 1}}, "'occlusion' has no option 'size'"),
    ],
)
def test_what_cannot_be_turned_round_is_refused(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        attribute(tiny_random, run, method="inverse", **options)


def test_controls_know_nothing_and_say_so(tiny_random: Lab, run: Run) -> None:
    one, two = (attribute(tiny_random, run, method="random", target="words", seed=seed) for seed in (0, 1))
    assert not np.allclose(one.values, two.values)
    assert not np.allclose(one.values[0], one.values[1])
    middle = attribute(tiny_random, run, method="center").values[0]
    np.testing.assert_allclose(middle, middle[::-1, ::-1], atol=1e-6)
    assert middle[1:3, 1:3].min() > middle[0].max()
    assert all("a control" in note for note in one.notes)
    with pytest.raises(OptionError, match="seed must be a whole number"):
        attribute(tiny_random, run, method="random", seed=-1)
