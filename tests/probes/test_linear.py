"""Linear probes: ridge against plain algebra, labels that are there are read, leakage and chance are not; labels of patches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava_lab import stats
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import connector_of
from llava_lab.probes import linear, linear_probe
from llava_lab.probes.linear import PATCH_LABELS, QUESTION, Ridge, Stage, held_out_classes, patch_labels, read_stages
from llava_lab.results import ProbeScores
from llava_lab.worlds import picturebook
from llava_lab.worlds.scenes import Scene, Thing
from tests.support.closeness import TERMS, close
from tests.support.interrupts import interrupting
from tests.support.logit_cases import states_and_logits
from tests.support.planted import scripted_run
from tests.support.probe_cases import placed_lab, red_squares

COUNT = 12


@pytest.fixture(scope="module")
def red() -> tuple[list[np.ndarray], np.ndarray]:
    return red_squares(COUNT)


@pytest.fixture(scope="module")
def places(tiny_folder: Path, red: tuple[list[np.ndarray], np.ndarray]) -> ProbeScores:
    lab = placed_lab(tiny_folder)
    return linear_probe(lab, red[0], "row", at=("before", "after", 2), per_picture=None, shuffles=4, progress=False)


def test_ridge_is_the_normal_equations() -> None:
    rng = np.random.default_rng(0)
    rows, labels, fresh = rng.normal(size=(30, 5)), rng.integers(0, 3, 30), rng.normal(size=(40, 5))
    fitted = Ridge(rows)
    x, new = (rows - rows.mean(0)) / rows.std(0), (fresh - rows.mean(0)) / rows.std(0)
    y = np.eye(3)[labels]
    cost = 0.7 * np.mean(fitted.values**2)
    weights = np.linalg.solve(x.T @ x + cost * np.eye(5), x.T @ (y - y.mean(0)))
    said = fitted.predict(labels[None], 3, fresh, 5, 0.7)[0]
    np.testing.assert_array_equal(said, (new @ weights + y.mean(0)).argmax(1))
    kept = x @ fitted.right[:2].T
    weights = np.linalg.solve(kept.T @ kept + cost * np.eye(2), kept.T @ (y - y.mean(0)))
    np.testing.assert_array_equal(
        fitted.predict(labels[None], 3, fresh, 2, 0.7)[0], (new @ fitted.right[:2].T @ weights + y.mean(0)).argmax(1)
    )


def test_a_constant_column_and_wide_rows_do_no_harm() -> None:
    rng = np.random.default_rng(0)
    rows = np.hstack([rng.normal(size=(12, 40)), np.full((12, 1), 7.0)])
    labels = (rows[:, 0] > 0).astype(int)
    assert (Ridge(rows).predict(labels[None], 2, rows, 99, 1e-3)[0] == labels).all()
    assert np.isfinite(Ridge(np.ones((4, 3))).predict(np.array([[0, 1, 1, 1]]), 2, np.ones((2, 3)), 3, 1.0)).all()


def test_folds_are_of_pictures_so_what_only_its_own_picture_knows_is_not_read() -> None:
    """Each picture has its own direction and its own label: patch-wise folds would read it, picture-wise ones must not."""
    rng = np.random.default_rng(0)
    where = np.repeat(np.arange(60), 10)
    rows = 5 * rng.normal(size=(60, 80))[where] + 0.01 * rng.normal(size=(600, 80))
    labels = rng.permutation(np.arange(60) % 2)[where][None]
    leaky = held_out_classes(rows, labels, np.arange(600), rng.permutation(np.arange(600) % 5), 2, (80,), 0)
    honest = held_out_classes(rows, labels, where, rng.permutation(np.arange(60) % 5), 2, (80,), 0)
    assert (leaky[0] == labels).mean() > 0.95
    assert (honest[0] == labels).mean() < 0.7


def test_no_held_out_label_is_ever_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows, where, fold_of = rng.normal(size=(40, 6)), np.repeat(np.arange(10), 4), np.arange(10) % 5
    labels = rng.integers(0, 2, (1, 40))
    said = held_out_classes(rows, labels, where, fold_of, 2, (6, 3), 0)
    other = labels.copy()
    test = fold_of[where] == 2
    other[:, test] = 1 - other[:, test]
    again = held_out_classes(rows, other, where, fold_of, 2, (6, 3), 0)
    np.testing.assert_array_equal(said[:, :, test], again[:, :, test])


def test_an_interval_resamples_pictures_with_all_their_labels(places: ProbeScores) -> None:
    rng, counts = np.random.default_rng(1), np.arange(1, COUNT + 1)
    right = rng.random(places.right.shape).astype(np.float32)
    times = np.random.default_rng(places.seed).multinomial(COUNT, np.full(COUNT, 1 / COUNT), stats.RESAMPLES) * counts
    by_hand = np.quantile(right @ times.T / times.sum(1), stats.EDGES, axis=-1)
    found = replace(places, right=right, counts=counts).interval
    np.testing.assert_allclose(found, np.moveaxis(by_hand, 0, -1), rtol=1e-5)


def test_rows_are_read_off_patches_and_shuffled_labels_are_not(places: ProbeScores) -> None:
    assert places.stages == ("before", "after", "layer 2")
    assert (places.accuracy > 0.9).all()
    assert (places.shuffled < 0.5).all()
    assert places.majority < 0.3
    assert (places.selectivity > 0.5).all()
    assert (places.interval[..., 0] <= places.accuracy).all()
    assert (places.interval[..., 1] >= places.accuracy).all()
    assert places.widths[:, 0].tolist() == [32, 64, 64]
    assert set(places.widths[:, 1]) == {32}
    assert places.counts.tolist() == [16] * COUNT
    assert places.per == "patch"


def test_a_connector_that_throws_away_loses_and_a_straight_one_keeps(tiny_folder: Path) -> None:
    pictures, _ = red_squares(20)
    lab = placed_lab(tiny_folder)
    connector: Any = connector_of(lab.model)
    with torch.no_grad():
        connector.linear_2.weight.zero_()
    lost = linear_probe(lab, pictures, "column", at=("before", "after"), shuffles=1, progress=False)
    assert lost.verdict() == "loses"
    difference, low, high = lost.difference("before", "after")
    assert low <= difference <= high < 0
    assert difference == pytest.approx(lost.accuracy[1, 1] - lost.accuracy[0, 1], abs=1e-6)
    assert lost.difference("before", "before") == (0, 0, 0)


def test_one_label_per_picture_is_read_off_the_mean_token(tiny_random: Lab) -> None:
    rng = np.random.default_rng(0)
    names = np.array(["dark", "light"])[np.arange(12) % 2]
    pictures = [np.clip(rng.normal(60 if name == "dark" else 190, 20, (32, 32, 3)), 0, 255).astype(np.uint8) for name in names]
    found = linear_probe(tiny_random, pictures, names, at="after", progress=False)
    assert found.per == "picture"
    assert found.classes == ("dark", "light")
    assert found.accuracy.min() == 1
    assert found.counts.tolist() == [1] * 12


def test_stages_are_what_the_model_computes(tiny_random: Lab, picture: np.ndarray) -> None:
    run = scripted_run(tiny_random, picture, "red", question=QUESTION)
    states, _ = states_and_logits(tiny_random, run)
    image = slice(*run.segments["image"])
    text: dict[Stage, np.ndarray] = {}
    found = read_stages(tiny_random, picture, ("before", "after", 1, 2), text=text)
    close(found["after"], states[0][image], terms=TERMS)
    close(found[2], states[2][image], terms=TERMS)
    assert found["before"].shape == (16, 32)
    with torch.no_grad():
        given = torch.from_numpy(found["before"])
        close(connector_of(tiny_random.model)(given), found["after"], terms=TERMS)
    assert set(text) == {"after", 1, 2}
    close(text["after"][0], states[0][0], terms=TERMS)


def test_left_out_patches_are_not_asked(tiny_random: Lab, red: tuple[list[np.ndarray], np.ndarray]) -> None:
    labels = red[1].copy()
    labels[:, 0] = -1
    found = linear_probe(tiny_random, red[0], labels, at="before", per_picture=None, shuffles=1, progress=False)
    assert found.counts.tolist() == [12] * COUNT
    assert found.classes == ("0", "1")


def test_ctrl_c_probes_the_pictures_read_and_leaves_the_model(
    tiny_random: Lab, red: tuple[list[np.ndarray], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = scripted_run(tiny_random, red[0][0], "red")
    logits = states_and_logits(tiny_random, run)[1]
    monkeypatch.setattr(linear, "read_stages", interrupting(read_stages, at=8))
    found = linear_probe(tiny_random, red[0], "row", at="after", progress=False)
    assert found.interrupted
    assert len(found.counts) == 7
    monkeypatch.setattr(linear, "read_stages", interrupting(read_stages, at=4))
    with pytest.raises(KeyboardInterrupt):
        linear_probe(tiny_random, red[0], "row", at="after", progress=False)
    monkeypatch.undo()
    assert not connector_of(tiny_random.model)._forward_hooks
    assert torch.equal(states_and_logits(tiny_random, run)[1], logits)


def test_scores_survive_the_disk(places: ProbeScores, tmp_path: Path) -> None:
    again = ProbeScores.load(places.save(tmp_path / "probe.npz"))
    np.testing.assert_array_equal(again.interval, places.interval)
    assert (again.stages, again.classes, again.notes) == (places.stages, places.classes, places.notes)
    with pytest.raises(OptionError, match="stage must be one of before, after, layer 2, got 'layer 1'"):
        again.difference("before", "layer 1")
    with pytest.raises(OptionError, match="width must be one of own, matched, got 'full'"):
        again.difference("before", "after", width="full")


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (np.zeros(5, int), {}, r"expected labels \(12,\), one per picture, or \(12, 4, 4\), one per patch; got \(5,\)"),
        (np.arange(12) / 3, {}, "labels must be whole numbers or text, got float64"),
        (np.zeros(12, int), {}, "at least two different labels, got 1"),
        (np.arange(12) - 1, {}, "labels of pictures must be 0 or more"),
        ("colour", {}, "labels must be an array, 'row' or 'column', got 'colour'"),
        ("row", {"at": ("before", 9)}, "a stage is 'before', 'after' or a layer from 0 to 3, got 9"),
        ("row", {"at": ("after", "after")}, "expected stages, each once"),
        ("row", {"folds": 13}, "got 12 pictures for 13 folds"),
        ("row", {"folds": 1}, "folds must be a whole number of at least 2"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    tiny_random: Lab, red: tuple[list[np.ndarray], np.ndarray], labels: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message) as error:
        linear_probe(tiny_random, red[0], labels, progress=False, **options)
    assert "\n" not in str(error.value)


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


@pytest.mark.parametrize("what", ["color", "kind"])
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
def test_bad_labels_are_refused_in_one_line(tiny_random: Lab, scenes: list[Scene], given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as error:
        patch_labels(tiny_random, given.get("scenes", scenes), given.get("what", "object"), most=given.get("most", 0.5))
    assert "\n" not in str(error.value)
