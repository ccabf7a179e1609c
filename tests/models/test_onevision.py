"""LLaVA-OneVision: squares with unseen pixels at their edge, and a grid of tiles that is drawn smaller where it is too large."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaOnevisionProcessor

import llava_lab as ll
from llava_lab.models.tiles import TiledLab
from tests.support.next_folders import PATCH, build_onevision

SHAPES = {"wide": (90, 40), "tall": (33, 100), "square": (64, 64), "large": (200, 190), "tiny": (9, 7)}
QUESTION = "What color is the car?"


@pytest.fixture(scope="module", params=[32, 35], ids=["whole patches", "an unseen rim"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TiledLab:
    found = ll.load(build_onevision(tmp_path_factory.mktemp("onevision"), side=request.param))
    assert isinstance(found, TiledLab)
    return found


def drawn(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def stock_count(lab: TiledLab, width: int, height: int) -> int:
    """The processor's own number of image tokens; it is made without its video part, which wants torchvision."""
    stock = object.__new__(LlavaOnevisionProcessor)
    stock.image_processor, stock.num_image_tokens = lab.processor.image_processor, lab.grid[0] * lab.grid[1]
    stock.vision_aspect_ratio = lab.model.config.vision_aspect_ratio
    side = lab.model.config.vision_config.image_size
    return stock._get_number_of_features(height, width, side, side)


@pytest.mark.parametrize("shape", SHAPES)
def test_as_many_tokens_as_processor_and_model_make_and_the_answers_probabilities_check_out(lab: TiledLab, shape: str) -> None:
    width, height = SHAPES[shape]
    run = lab.ask(drawn(width, height), QUESTION, max_new_tokens=4)
    assert len(run.image_positions) == stock_count(lab, width, height)
    with torch.no_grad():
        logits = lab.model(**lab.inputs(run, tiles=True)).logits[0]
    at = run.answer_positions
    assert np.abs(logits.log_softmax(-1)[at - 1, run.token_ids[at]].numpy() - run.logprobs).max() < 1e-4
    overview, tiles = run.views
    covered = np.concatenate([overview.positions.ravel(), tiles.positions.ravel(), tiles.newlines])
    assert sorted(covered) == run.image_positions.tolist()


def test_a_large_picture_has_the_smaller_grid(lab: TiledLab) -> None:
    side = lab.grid[0]
    views = {shape: lab.preprocessing.views(*size)[1] for shape, size in SHAPES.items()}
    assert views["large"].map.rows * views["large"].map.cols <= 4 * side**2
    assert max(views["large"].tile_rows) == 3
    assert views["square"].map.rows in (2 * side, side)


@pytest.mark.parametrize("shape", ["wide", "tall", "large"])
def test_a_bright_spot_is_found_by_the_tiles_map(lab: TiledLab, shape: str) -> None:
    """The packed cells' own mean brightness, laid over the picture by the map, is brightest on the spot."""
    width, height = SHAPES[shape]
    for x, y in ((0.2, 0.3), (0.75, 0.6), (0.5, 0.85)):
        picture = np.full((height, width, 3), 90, np.uint8)
        spot = np.s_[max(round(y * height) - 6, 0) : round(y * height) + 6, max(round(x * width) - 6, 0) : round(x * width) + 6]
        picture[spot] = 255
        tiles = lab.preprocessing.views(width, height)[1]
        painted = tiles.map.project(bright(lab, picture, tiles))
        assert np.nanmean(painted[spot]) > 0.45 * np.nanmax(painted) + 0.55 * np.nanmin(painted)
        row, col = np.unravel_index(np.nanargmax(painted), painted.shape)
        assert abs(row - y * height) < 12 + height / tiles.map.rows
        assert abs(col - x * width) < 12 + width / tiles.map.cols


def bright(lab: TiledLab, picture: np.ndarray, tiles: ll.View) -> np.ndarray:
    """Every cell's brightness: the squares' patches through transformers' own packing."""
    given = lab.shown(picture)
    side = lab.grid[0]
    squares = given["pixel_values"][0].mean(1)[:, : side * PATCH, : side * PATCH]
    means = squares.reshape(len(squares), side, PATCH, side, PATCH).mean((2, 4)).reshape(len(squares), -1, 1).expand(-1, -1, 64)
    (packed,), _ = lab.model.model.pack_image_features(
        [means.contiguous()], given["image_sizes"], torch.zeros(64), lab.model.config.vision_aspect_ratio
    )
    return packed[:, 0].numpy()[tiles.positions]


def test_maps_and_a_causal_check_work(lab: TiledLab) -> None:
    run = lab.ask(drawn(90, 40), QUESTION, max_new_tokens=2)
    rel = ll.attribute(lab, run, method="rollout")
    assert rel.view_values[1].shape[1:] == (run.views[1].map.rows, run.views[1].map.cols)
    assert np.isfinite(rel.on_picture(view="tiles")).mean() > 0.8
    covered = ll.attribute(lab, run, method="occlusion")
    assert covered.extras["score"][0] == pytest.approx(float(run.logprobs.sum()), abs=1e-4)


def test_a_saved_run_is_the_same(lab: TiledLab, tmp_path: Path) -> None:
    run = lab.ask(drawn(200, 190), QUESTION, max_new_tokens=1)
    assert ll.Run.load(run.save(tmp_path / "run.npz")).views == run.views
