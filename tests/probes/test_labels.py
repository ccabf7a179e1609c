"""Patch labels say what the scene put there, leave out what is mixed, and serve the linear probe as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.probes import linear_probe
from llava_lab.probes.linear import PATCH_LABELS, patch_labels
from llava_lab.worlds import picturebook
from llava_lab.worlds.scenes import Scene, Thing

KINDS_OF_LABEL = ("color", "kind")


def scene_of(*things: Thing) -> Scene:
    return Scene("lesson", 0, 0, things, (5, 0, 0, 77))


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [picturebook.scene("lesson", index) for index in range(12)]


def areas(scene: Scene, rows: int, cols: int) -> np.ndarray:
    """Share of each patch under each thing, by plain counting of pixels, (things, rows, cols)."""
    masks = scene.masks()
    high, wide = masks.shape[1] // rows, masks.shape[2] // cols
    return masks.reshape(len(masks), rows, high, cols, wide).mean((2, 4))


@pytest.mark.parametrize("what", KINDS_OF_LABEL)
def test_a_label_is_that_of_the_one_thing_that_covers_most_of_the_patch(tiny_random: Lab, scenes: list[Scene], what: str) -> None:
    labels = patch_labels(tiny_random, scenes, what)
    assert labels.shape == (12, *tiny_random.grid)
    assert (labels >= 0).any()
    for scene, one in zip(scenes, labels, strict=True):
        covered = areas(scene, *tiny_random.grid)
        for (row, col), label in np.ndenumerate(one):
            most = int(covered[:, row, col].argmax())
            wanted = getattr(scene.things[most], what) if covered[most, row, col] > 0.5 else None
            assert (None if label == -1 else PATCH_LABELS[what][label]) == wanted


def test_background_is_what_nothing_touches_and_what_is_mixed_is_left_out(tiny_random: Lab, scenes: list[Scene]) -> None:
    labels = patch_labels(tiny_random, scenes)
    covered = np.stack([areas(scene, *tiny_random.grid).sum(0) for scene in scenes])
    np.testing.assert_array_equal(labels == 0, covered == 0)
    assert ((labels == -1) == ((covered > 0) & (labels != 1))).all()
    assert (covered[labels == 1] > 0.5).all()
    assert {-1, 0, 1} == set(labels.ravel().tolist())


def test_a_higher_share_leaves_out_more_and_changes_no_label_that_stays(tiny_random: Lab, scenes: list[Scene]) -> None:
    loose, strict = (patch_labels(tiny_random, scenes, "kind", most=most) for most in (0.5, 0.6))
    kept = strict >= 0
    assert 0 < kept.sum() < (loose >= 0).sum()
    np.testing.assert_array_equal(strict[kept], loose[kept])


def test_a_thing_in_a_corner_labels_that_corner(tiny_random: Lab) -> None:
    """By hand: one square of a quarter of the picture, upper left, so that row and column cannot be swapped."""
    thing = Thing("house", "green", "large", x=0.625, y=0.25, side=0.5)
    labels = patch_labels(tiny_random, [scene_of(thing)], "color")[0]
    found = np.argwhere(labels >= 0)
    assert set(labels[labels >= 0].tolist()) == {PATCH_LABELS["color"].index("green")}
    assert found[:, 0].max() <= 1  # rows 0 and 1 of 4
    assert found[:, 1].min() >= 1  # columns 1 and 2


def test_the_linear_probe_takes_them_as_they_are(tiny_random: Lab, scenes: list[Scene]) -> None:
    labels = patch_labels(tiny_random, scenes)
    pictures = [scene.picture() for scene in scenes]
    scores = linear_probe(tiny_random, pictures, labels, at="before", folds=3, shuffles=1, per_picture=None, progress=False)
    assert scores.per == "patch"
    assert scores.counts.tolist() == (labels >= 0).sum((1, 2)).tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"what": "colour"}, "what must be one of 'object', 'kind', 'color', got 'colour'"),
        ({"most": 0.4}, r"most must be a share from 0.5 to below 1, .* got 0.4"),
        ({"most": 1.0}, "most must be a share from 0.5 to below 1"),
        ({"scenes": []}, "expected scenes to label, got none"),
    ],
)
def test_bad_input_is_refused_in_one_line(tiny_random: Lab, scenes: list[Scene], given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as error:
        patch_labels(tiny_random, given.get("scenes", scenes), given.get("what", "object"), most=given.get("most", 0.5))
    assert "\n" not in str(error.value)
