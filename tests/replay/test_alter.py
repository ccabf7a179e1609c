"""Altered pictures: the same promises wherever a picture can be altered, in a model, before one that tiles, on a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llava_lab as ll
from llava_lab.errors import CheckpointError, LabError, OptionError
from llava_lab.geometry import PictureMap
from llava_lab.judging.faithfulness import Judge
from llava_lab.models import Lab
from llava_lab.replay import Altered, open_altered
from llava_lab.replay.alter import Pixels, Tiles, within_budget
from llava_lab.replay.fills import EVERY_FILL
from llava_lab.results import Run
from tests.support.checkpoints import build_llava
from tests.support.closeness import TERMS, close, tolerance
from tests.support.endpoint_server import open_box, serving, weighing
from tests.support.next_folders import build_next
from tests.support.planted import scripted_run

QUESTION = "What color is the car?"
ROUGH = np.random.default_rng(0).choice(np.array([20, 60, 240], np.uint8), (36, 36, 3))
WEIGHTS = np.array([[0.0, 1.0, 0.25], [0.5, 3.0, 0.0], [0.0, 0.0, -0.5]])
Opened = Callable[..., Altered]


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return ll.load(build_next(tmp_path_factory.mktemp("next")))


@pytest.fixture(params=["pixels", "vision", "projector", "tiles", "server"])
def opened(request: pytest.FixtureRequest, tiny_random: Lab, tmp_path: Path) -> Iterator[Opened]:
    """`open_altered` for a run of an ordinary model, one that tiles, or one behind a server, which has answered it."""
    if request.param == "server":
        with serving(weighing(WEIGHTS, ROUGH)) as server:
            box = open_box(server, tmp_path)
            run = box.ask(ROUGH, QUESTION)
            yield partial(open_altered, box, run, (run.target(),))
        return
    lab = request.getfixturevalue("tiled") if request.param == "tiles" else tiny_random
    run = lab.ask(ROUGH, QUESTION, max_new_tokens=4)
    place = {} if request.param == "tiles" else {"at": request.param}
    yield partial(open_altered, lab, run, (run.target(), run.target(0)), **place)


SIZES = [(384, 14), (50, 8), (100, 30), (37, 5), (64, 16), (48, 8), (29, 7), (30, 11), (33, 8), (46, 15), (62, 9), (32, 4)]


@pytest.mark.parametrize(("size", "patch"), SIZES)
def test_a_hidden_patch_is_what_the_tower_sees_in_it(tmp_path: Path, size: int, patch: int) -> None:
    """Whether or not patches tile the square: its own embedding becomes the fill's, every other stays, bit for bit."""
    folder = build_llava(tmp_path, image=size, patch=patch, vision_layers=2, layers=1, vision_width=16, context=2048)
    lab = ll.load(folder)
    run = scripted_run(
        lab, np.random.default_rng(1).integers(0, 255, (60, 90, 3), np.uint8), "It is red.", fit="crop" if size % 2 else "pad"
    )
    where, side = run.map, run.map.rows
    altered = open_altered(lab, run, (run.target(),), fill="noise")
    assert isinstance(altered, Pixels)
    embed = lab.model.model.vision_tower.embeddings.patch_embedding
    chosen = [(0, 0), (side - 1, side - 1), (0, side - 1), (side // 2, side // 2)]
    masks = torch.zeros(len(chosen), side, side, dtype=torch.bool)
    for mask, place in zip(masks, chosen, strict=True):
        mask[place] = True
    with torch.no_grad():
        own, filled = embed(altered.values)[0], embed(altered.filling("noise"))[0]
        hidden = embed(altered.altered(altered._enlarged(~masks)))
    for mask, changed in zip(masks, hidden, strict=True):
        torch.testing.assert_close(changed, torch.where(mask, filled, own), rtol=0, atol=1e-5)
    # the same patch, by way of the picture: its box, the pixels that are painted with it, the point in its middle
    painted = where.project(np.arange(side * side, dtype=np.float32).reshape(side, side))
    for row, col in chosen:
        left, top, right, bottom = where.patch_box(row, col)
        assert (right - left) * where.scale_x == pytest.approx(patch)
        middle = (left + right) / 2, (top + bottom) / 2
        if where.coverage()[row, col] == 1:
            assert where.patch_at(*middle) == (row, col)
            assert painted[int(middle[1]), int(middle[0])] == row * side + col
    # a thing that is exactly a patch is covered where the patch is
    inner = next((r, c) for r in range(side) for c in range(side) if where.coverage()[r, c] == 1)
    left, top, right, bottom = where.patch_box(*inner)
    thing = np.zeros((1, *run.picture.shape[:2]), bool)
    thing[0, round(top) : max(round(bottom), round(top) + 1), round(left) : max(round(right), round(left) + 1)] = True
    judge = Judge(lab, run, (run.target(),), ("grey", "mean"), things=thing)
    box = judge._box(judge.things[0])
    assert box.shape == altered.frame
    ys, xs = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
    for found, start in ((ys, inner[0] * patch), (xs, inner[1] * patch)):
        assert abs(found[0] - start) <= 1 + where.scale_x
        assert abs(found[-1] + 1 - start - patch) <= 1 + where.scale_x


def test_the_picture_itself_is_altered_where_patches_are(tiled: Lab) -> None:
    """A square of 384 with 27 patches of 14: the last 6 pixels' worth of the picture is in no cell and stays."""
    picture = np.random.default_rng(2).integers(0, 255, (384, 768, 3), np.uint8)
    run = tiled.ask(ROUGH, QUESTION, max_new_tokens=1)
    altered = open_altered(tiled, run, (run.target(),), fill="grey")
    assert isinstance(altered, Tiles)
    altered.run = replace(run, map=PictureMap(768, 384, 378, 27, 27, "whole", 0.5, 1.0, 0.0, 0.0))
    altered.picture = picture
    shown = np.ones((27, 27), np.float32)
    shown[3, 26] = 0
    changed = (altered.altered(shown, "grey") != picture).any(-1)
    assert (np.flatnonzero(changed.any(1))[[0, -1]] == (42, 55)).all()
    assert (np.flatnonzero(changed.any(0))[[0, -1]] == (728, 755)).all()


def recorded(opened: Opened) -> np.ndarray:
    """What the run's own log-probabilities say of the two targets."""
    run, targets = opened.args[1:]  # type: ignore[attr-defined]
    own = run.logprobs.astype(np.float64)
    return np.array([own.sum(), own[0]])[: len(targets)]


def test_the_whole_picture_scores_what_the_run_recorded(opened: Opened) -> None:
    altered = opened(fill="grey")
    # an answer of one token more or less, or read one position off, is another number
    np.testing.assert_allclose(altered.whole, recorded(opened), rtol=0, atol=10 * tolerance(recorded(opened), terms=TERMS))
    assert altered.whole.dtype == torch.float32


def test_hidden_patches_are_gone_and_the_rest_is_not(opened: Opened) -> None:
    altered = opened(fill="grey")
    rows, cols = altered.grid
    masks = torch.zeros(3, rows, cols, dtype=torch.bool)
    masks[1, 1, 1] = True
    masks[2] = True
    scores = altered.hidden(masks)
    close(scores[0], altered.whole, terms=TERMS)
    assert (scores[1:] - scores[0]).abs().min() > 1e-4, "a hidden patch that hides nothing"
    shown = torch.ones(3, *altered.frame)
    shown[1, altered.patch : 2 * altered.patch, altered.patch : 2 * altered.patch] = 0
    shown[2, : rows * altered.patch, : cols * altered.patch] = 0
    close(altered.scores(shown), scores, terms=TERMS)
    half = altered.scores(torch.full((1, *altered.frame), 0.5))
    assert (half - scores[[0, 2]]).abs().min() > 1e-4, "half shown is neither shown nor hidden"


def test_fills_differ_where_something_is_hidden_and_nowhere_else(opened: Opened) -> None:
    altered = opened(fill="grey")
    masks = torch.zeros(2, *altered.grid, dtype=torch.bool)
    masks[1, :2, :2] = True
    scores = torch.stack([altered.hidden(masks, fill) for fill in EVERY_FILL])
    assert (scores[:, 0] == altered.whole).all()
    assert len({round(float(score), 5) for score in scores[:, 1, 0]}) == len(EVERY_FILL)
    again = opened(fill="noise", seed=1).hidden(masks[1:])
    assert not torch.equal(again[0], scores[EVERY_FILL.index("noise"), 1])


def test_what_was_scored_is_remembered_and_every_picture_is_counted(opened: Opened) -> None:
    altered = opened(fill="mean", batch=2)
    masks = torch.zeros(5, *altered.grid, dtype=torch.bool)
    for i in range(4):
        masks[i, i % 3, i // 3] = True
    masks[4] = masks[0]
    scores = altered.hidden(masks)
    assert altered.passes == 4
    assert torch.equal(altered.hidden(masks[[3, 0]]), scores[[3, 4]])
    assert altered.passes == 4
    _ = altered.whole, altered.whole
    assert altered.passes == 5


def test_a_sweep_gives_every_mask_its_own_score(opened: Opened) -> None:
    altered, plain = opened(fill="mean", batch=3), opened(fill="mean")
    rows, cols = altered.grid
    masks = torch.eye(rows * cols, dtype=torch.bool).reshape(-1, rows, cols)
    order: list[int] = []
    scores = []
    for which, part in altered.sweep(masks):
        order += which
        scores.append(part)
    assert sorted(order) == list(range(rows * cols))
    close(torch.cat(scores)[np.argsort(order)], plain.hidden(masks), terms=TERMS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fill": "red"}, "fill must be one of grey, mean, blur, noise, neighbours, got 'red'"),
        ({"fill": "neighbours", "fills": ("grey",)}, "fill must be one of grey, got 'neighbours'"),
        ({"at": "the tower"}, "at must be one of 'pixels', 'vision', 'projector', got 'the tower'"),
    ],
)
def test_unknown_places_and_fills_are_refused(opened: Opened, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        opened(**options)


def test_models_that_cannot_be_reached_say_that_the_pixels_are_the_only_place(tiled: Lab) -> None:
    run = tiled.ask(ROUGH, QUESTION, max_new_tokens=1)
    with pytest.raises(OptionError, match="looks at the picture whole and in tiles, which leaves no other place, got 'vision'"):
        open_altered(tiled, run, (run.target(),), at="vision")


def test_a_run_of_other_weights_is_refused(opened: Opened) -> None:
    lab, run, targets = opened.args  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="ask again"):
        open_altered(lab, replace(run, fingerprint="0" * 16), targets, **opened.keywords)  # type: ignore[attr-defined]


def test_nothing_of_the_model_changes(tiny_random: Lab) -> None:
    model = tiny_random.model
    run = tiny_random.ask(ROUGH, QUESTION, max_new_tokens=2)
    model.train()
    hooks = _hooks(model)
    state = torch.get_rng_state()
    try:
        for place in ("pixels", "vision"):
            altered = open_altered(tiny_random, run, (run.target(),), at=place, fill="noise")
            list(altered.sweep(torch.eye(16, dtype=torch.bool).reshape(16, 4, 4)))
        assert all(module.training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), state)
        assert _hooks(model) == hooks
    finally:
        model.eval()


def _hooks(model: Any) -> list[tuple[int, int]]:
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


# -- a server -------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[tuple[Any, Run, Any]]:
    with serving(weighing(WEIGHTS, ROUGH)) as server:
        box = open_box(server, tmp_path)
        yield box, box.ask(ROUGH, QUESTION), server


def test_a_cell_of_a_weighed_picture_costs_its_weight(asked: tuple[Any, Run, Any]) -> None:
    box, run, _ = asked
    altered = open_altered(box, run, (run.target("red"),), fill="grey")
    drops = altered.whole - altered.hidden(torch.eye(9, dtype=torch.bool).reshape(9, 3, 3))
    np.testing.assert_allclose(drops[:, 0].reshape(3, 3), WEIGHTS, atol=1e-5)


def test_work_is_counted_before_anything_is_sent(asked: tuple[Any, Run, Any]) -> None:
    box, run, server = asked
    sent: list[int] = []

    def work(model: Any) -> float:
        altered = open_altered(model, run, (run.target("red"),), fill="grey")
        sent.append(len(server.asked))
        return float(altered.hidden(torch.eye(9, dtype=torch.bool).reshape(9, 3, 3)).sum())

    done = within_budget(box, run, work)
    assert sent == [1, 1], "counting sent something"
    assert len(server.asked) == 10
    assert done.result == pytest.approx(9 * (WEIGHTS.sum() - 5) - WEIGHTS.sum(), abs=1e-4)
    assert any("closed model" in note for note in done.notes)
    box.max_requests = len(server.asked)
    everything = torch.ones(1, 3, 3, dtype=torch.bool)
    with pytest.raises(LabError, match="this needs 1 requests and 0 of max_requests=10 are left"):
        within_budget(box, run, lambda model: open_altered(model, run, (run.target("red"),)).hidden(everything))


def test_an_ordinary_lab_just_works(tiny_random: Lab) -> None:
    run = tiny_random.ask(ROUGH, QUESTION, max_new_tokens=1)
    done = within_budget(tiny_random, run, lambda lab: lab.name)
    assert (done.result, done.notes, done.extras) == (tiny_random.name, (), {})
