"""LLaVA-NeXT and LLaVA-OneVision: every token of every view has its place in the sequence and on the picture, and maps keep
views apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor, LlavaOnevisionProcessor
from transformers.image_processing_utils import select_best_resolution

import llava_lab as ll
from llava_lab.errors import CheckpointError, OptionError, PictureError
from llava_lab.models import layout
from llava_lab.models.tiles import TiledLab
from tests.support.answers import probabilities_check_out
from tests.support.closeness import TERMS, close
from tests.support.next_folders import MISTRAL, PATCH, PINPOINTS, SIDE, build_next, build_onevision

NEXT_SHAPES = {"wide": (90, 40), "tall": (33, 100), "square": (64, 64), "tiny": (7, 5), "long": (300, 31), "odd": (101, 67)}
QUESTION = "What color is the car?"
ONEVISION_SHAPES = {"wide": (90, 40), "tall": (33, 100), "square": (64, 64), "large": (200, 190), "tiny": (9, 7)}


def drawn(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_next(tmp_path_factory.mktemp("next"))


@pytest.fixture(scope="module")
def lab(folder: Path) -> TiledLab:
    found = ll.load(folder)
    assert isinstance(found, TiledLab)
    return found


@pytest.mark.parametrize("shape", NEXT_SHAPES)
def test_logits_and_answers_are_the_stock_processors_and_models(lab: TiledLab, folder: Path, shape: str) -> None:
    picture = drawn(*NEXT_SHAPES[shape])
    run = lab.ask(picture, QUESTION, max_new_tokens=5)
    stock = LlavaNextForConditionalGeneration.from_pretrained(folder).eval()
    processor = LlavaNextProcessor(
        lab.processor.image_processor,
        lab.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    given = processor(images=Image.fromarray(picture), text=run.prompt, return_tensors="pt")
    start = run.segments["answer"][0]
    assert given["input_ids"][0].tolist() == run.token_ids[:start].tolist()
    with torch.no_grad():
        answer = stock.generate(**given, max_new_tokens=5, do_sample=False)[0, start:].tolist()
        ours = lab.model(**lab.inputs(run, tiles=True)).logits[0, : start - 1]
        theirs = stock(**given).logits[0, : start - 1]
    assert [token for token in answer if token not in lab.eos_ids] == run.token_ids[start:].tolist()
    close(ours, theirs, terms=64 * 3)


@pytest.mark.parametrize("shape", NEXT_SHAPES)
def test_every_token_is_where_a_naive_walk_finds_it(lab: TiledLab, shape: str) -> None:
    """Numbered patches through transformers' own packing: the token at a position holds the patch the view says."""
    run = lab.ask(drawn(*NEXT_SHAPES[shape]), QUESTION, max_new_tokens=1)
    overview, tiles = run.views
    given = lab.inputs(run, tiles=True)
    squares, per = given["pixel_values"].shape[1], (SIDE // PATCH) ** 2
    numbers = (torch.arange(squares * per, dtype=torch.float32) + 1).reshape(squares, per, 1).expand(-1, -1, 64)
    newline = torch.full((64,), -1.0)
    (packed,), _ = lab.model.model.pack_image_features([numbers], given["image_sizes"], "default", newline)
    start, stop = run.segments["image"]
    found = np.zeros(len(run.token_ids))
    found[start:stop] = packed[:, 0].numpy()
    assert (found[overview.positions].ravel() == np.arange(per) + 1).all()
    assert (found[tiles.newlines] == -1).all()
    assert len(tiles.newlines) == tiles.map.rows
    side = SIDE // PATCH
    cut = cut_of(run)
    for (row, col), position in np.ndenumerate(tiles.positions):
        y, x = row + cut[0], col + cut[1]
        square = y // side * tiles.across + x // side + 1
        assert found[position] == square * per + y % side * side + x % side + 1
        assert tiles.tiles[row, col] == square
    covered = np.concatenate([overview.positions.ravel(), tiles.positions.ravel(), tiles.newlines])
    assert sorted(covered) == list(range(start, stop))


@pytest.mark.parametrize("shape", ["wide", "tall", "odd", "tiny"])
@pytest.mark.parametrize("view", [0, 1])
def test_a_change_in_the_picture_reaches_the_cells_whose_boxes_hold_it(lab: TiledLab, shape: str, view: int) -> None:
    """A block of pixels is changed; the squares' pixels change in the cells the map names and nowhere far from them."""
    width, height = NEXT_SHAPES[shape]
    before = np.full((height, width, 3), 100, np.uint8)
    run = lab.ask(before, QUESTION, max_new_tokens=1)
    where = run.views[view].map
    hits = 0
    for row, col in ((0, 0), (where.rows // 2, where.cols // 2), (where.rows - 1, where.cols - 1), (0, where.cols - 1)):
        left, top, right, bottom = where.patch_box(row, col)
        box = np.s_[max(round(top), 0) : round(bottom), max(round(left), 0) : round(right)]
        after = before.copy()
        after[box] = 255
        if (after == before).all():
            continue
        changed = cells(lab, run, after, view) - cells(lab, run, before, view)
        strongest = np.unravel_index(np.abs(changed).argmax(), changed.shape)
        share = where.mask_to_patches((after != before).any(2))
        assert share[strongest] > 0.5 * share.max()
        assert np.abs(changed[share == 0]).max(initial=0) <= 0.5 * np.abs(changed).max()  # resizing smears over an edge
        hits += 1
    assert hits >= 2


def cut_of(run: ll.Run) -> tuple[int, int]:
    """Rows and columns of padding cut from the top and the left: half of what the tiles have more than the view."""
    tiles = run.views[1]
    height, width = select_best_resolution(run.picture.shape[:2], PINPOINTS)
    whole = height // PATCH, width // PATCH
    return (whole[0] - tiles.map.rows) // 2, (whole[1] - tiles.map.cols) // 2


def cells(lab: TiledLab, run: ll.Run, picture: np.ndarray, view: int) -> np.ndarray:
    """Mean pixel value of every cell of a view, through the processor's own pixels."""
    squares = lab.shown(picture)["pixel_values"][0].mean(1)  # squares, S, S
    side, one = SIDE // PATCH, run.views[view]
    means = squares.reshape(len(squares), side, PATCH, side, PATCH).mean((2, 4)).numpy()
    if view == 0:
        return means[0]
    rows, cols = np.indices((one.map.rows, one.map.cols))
    y, x = (index + cut for index, cut in zip((rows, cols), cut_of(run), strict=True))
    return means[one.tiles, y % side, x % side]


@pytest.mark.parametrize("method", ["attention", "rollout", "value_attention"])
def test_maps_of_both_views_hold_all_that_lies_on_the_picture(lab: TiledLab, method: str) -> None:
    run = lab.ask(drawn(90, 40), QUESTION, max_new_tokens=4)
    rel = ll.attribute(lab, run, method=method)
    assert [values.shape[1:] for values in rel.view_values] == [(v.map.rows, v.map.cols) for v in run.views]
    assert (rel.values == rel.view_values[0]).all()
    assert "overview and tiles" in rel.notes[-1]
    if method == "attention":
        mass = rel.extras["mass"][0]["image"]
        rows = eager_rows(lab, run)
        on_picture = sum(values.sum() for values in rel.view_values)
        close(on_picture + rows[run.views[1].newlines].sum(), mass, terms=TERMS)
        for view, values in zip(run.views, rel.view_values, strict=True):
            close(values[0], rows[view.positions], terms=64 * 3)
    assert np.isfinite(rel.on_picture(view="tiles")).mean() > 0.9


def eager_rows(lab: TiledLab, run: ll.Run) -> np.ndarray:
    """Mean attention of the predicting positions, from transformers' own eager attentions."""
    before = lab.model.config._attn_implementation
    lab.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            seen = lab.model(**lab.inputs(run, tiles=True), output_attentions=True).attentions
    finally:
        lab.model.set_attn_implementation(before)
    at = list(run.target().positions)
    return torch.stack(seen)[:, 0, :, at].mean((0, 1, 2)).numpy()


def test_occlusion_alters_the_picture_and_scores_exactly(lab: TiledLab) -> None:
    run = lab.ask(drawn(90, 40), QUESTION, max_new_tokens=3)
    rel = ll.attribute(lab, run, method="occlusion", fill="mean", score="logprob")
    assert rel.values.shape == (1, *lab.grid)
    assert not rel.views
    assert any("in the picture itself" in note for note in rel.notes)
    close(rel.extras["score"][0], float(run.logprobs.sum()), terms=TERMS)
    row, col = rel.top(1)[0][:2]
    covered = run.picture.copy()
    covered[run.map.project(np.eye(lab.grid[0] * lab.grid[1])[row * lab.grid[1] + col].reshape(lab.grid)) == 1] = (
        run.picture.astype(np.float32).mean((0, 1)).round()
    )
    with torch.no_grad():
        logits = lab.model(**lab.inputs(run, picture=covered, tiles=True)).logits[0].log_softmax(-1)
    at = run.answer_positions
    dropped = float(run.logprobs.sum()) - float(logits[at - 1, run.token_ids[at]].sum())
    close(rel.values[0, row, col], dropped, of=run.logprobs.sum(), terms=TERMS)


def test_faithfulness_and_comparison_work_on_altered_pictures(lab: TiledLab) -> None:
    run = lab.ask(drawn(64, 64), QUESTION, max_new_tokens=2)
    rel = ll.attribute(lab, run, method="rollout")
    score = ll.faithfulness(lab, run, rel, steps=4, seeds=2)
    assert score.whole.shape == (1,)
    assert np.isfinite(score.deletion).all()
    found = ll.compare(lab, run, ["rollout", "occlusion", "random", "relevancy"], steps=4, seeds=2)
    assert set(found.maps) == {"rollout", "occlusion", "random"}
    assert "whole and in tiles" in found.refused["relevancy"]


@pytest.mark.parametrize(
    "call",
    [
        lambda lab, run: ll.attribute(lab, run, method="relevancy"),
        lambda lab, run: ll.attribute(lab, run, method="tam"),
        lambda lab, run: ll.attribute(lab, run, method="rollout", through_vision=True),
        lambda lab, run: ll.attribute(lab, run, method="occlusion", at="projector"),
        lambda lab, run: ll.knockout(lab, run, source="image", target="question", layers=(0, 1)),
        lambda lab, run: ll.logit_lens(lab, run),
        lambda lab, run: ll.nearest_words(lab, run),
        lambda lab, run: lab.sequence(QUESTION),
        lambda lab, run: lab.ask(run.picture, QUESTION, fit="pad"),
    ],
)
def test_what_knows_one_square_only_is_refused_in_one_line(lab: TiledLab, call) -> None:  # type: ignore[no-untyped-def]
    run = lab.ask(drawn(64, 64), QUESTION, max_new_tokens=2)
    before = hooks(lab)
    with pytest.raises(OptionError) as error:
        call(lab, run)
    assert "\n" not in str(error.value)
    assert hooks(lab) == before


def hooks(lab: TiledLab) -> list[int]:
    """How many hooks every module has; transformers keeps some of its own."""
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lab.model.modules()]


def test_a_run_and_a_map_come_back_from_disk(lab: TiledLab, tmp_path: Path) -> None:
    run = lab.ask(drawn(90, 40), QUESTION, max_new_tokens=2)
    rel = ll.attribute(lab, run, method="attention")
    again, map_again = ll.Run.load(run.save(tmp_path / "run.npz")), ll.Relevance.load(rel.save(tmp_path / "rel.npz"))
    assert again.views == run.views
    assert map_again.views == rel.views
    assert all((one == two).all() for one, two in zip(map_again.view_values, rel.view_values, strict=True))
    torch.testing.assert_close(lab.inputs(again, tiles=True)["pixel_values"], lab.inputs(run, tiles=True)["pixel_values"])


def test_it_asks_in_its_own_turns_where_it_has_others(tmp_path: Path) -> None:
    lab = ll.load(build_next(tmp_path, template=MISTRAL))
    run = lab.ask(drawn(64, 64), QUESTION, max_new_tokens=2)
    assert run.prompt.startswith("[INST] <image>\n")
    assert run.prompt.endswith("[/INST]")
    assert lab.card.connector == "mlp2x_gelu"


def test_what_does_not_fit_is_refused(lab: TiledLab, tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="leaves no row of tiles"):
        lab.ask(drawn(2, 300), QUESTION)
    folder = build_next(tmp_path, pinpoints=[[32, 64]])
    (folder / "processor_config.json").write_text((folder / "processor_config.json").read_text().replace("64", "96", 1))
    with pytest.raises(CheckpointError, match="the image processor to"):
        ll.load(folder)


def test_its_grid_is_the_overviews(lab: TiledLab) -> None:
    assert lab.grid == (4, 4)
    assert layout.image_token_count(lab.model) == 16
    assert lab.card.fit == "whole"


@pytest.fixture(scope="module", params=[32, 35], ids=["whole patches", "an unseen rim"])
def onevision(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TiledLab:
    found = ll.load(build_onevision(tmp_path_factory.mktemp("onevision"), side=request.param))
    assert isinstance(found, TiledLab)
    return found


def stock_count(onevision: TiledLab, width: int, height: int) -> int:
    """The processor's own number of image tokens; it is made without its video part, which wants torchvision."""
    stock = object.__new__(LlavaOnevisionProcessor)
    stock.image_processor, stock.num_image_tokens = onevision.processor.image_processor, onevision.grid[0] * onevision.grid[1]
    stock.vision_aspect_ratio = onevision.model.config.vision_aspect_ratio
    side = onevision.model.config.vision_config.image_size
    return stock._get_number_of_features(height, width, side, side)


@pytest.mark.parametrize("shape", ONEVISION_SHAPES)
def test_as_many_tokens_as_processor_and_model_make_and_probabilities_check_out(onevision: TiledLab, shape: str) -> None:
    width, height = ONEVISION_SHAPES[shape]
    run = onevision.ask(drawn(width, height), QUESTION, max_new_tokens=4)
    assert len(run.image_positions) == stock_count(onevision, width, height)
    probabilities_check_out(onevision, run, tiles=True)
    overview, tiles = run.views
    covered = np.concatenate([overview.positions.ravel(), tiles.positions.ravel(), tiles.newlines])
    assert sorted(covered) == run.image_positions.tolist()


def test_a_large_picture_has_the_smaller_grid(onevision: TiledLab) -> None:
    side = onevision.grid[0]
    views = {shape: onevision.preprocessing.views(*size)[1] for shape, size in ONEVISION_SHAPES.items()}
    assert views["large"].map.rows * views["large"].map.cols <= 4 * side**2
    assert max(views["large"].tile_rows) == 3
    assert views["square"].map.rows in (2 * side, side)


@pytest.mark.parametrize("shape", ["wide", "tall", "large"])
def test_a_bright_spot_is_found_by_the_tiles_map(onevision: TiledLab, shape: str) -> None:
    """The packed cells' own mean brightness, laid over the picture by the map, is brightest on the spot."""
    width, height = ONEVISION_SHAPES[shape]
    for x, y in ((0.2, 0.3), (0.75, 0.6), (0.5, 0.85)):
        picture = np.full((height, width, 3), 90, np.uint8)
        spot = np.s_[max(round(y * height) - 6, 0) : round(y * height) + 6, max(round(x * width) - 6, 0) : round(x * width) + 6]
        picture[spot] = 255
        tiles = onevision.preprocessing.views(width, height)[1]
        painted = tiles.map.project(bright(onevision, picture, tiles))
        assert np.nanmean(painted[spot]) > 0.45 * np.nanmax(painted) + 0.55 * np.nanmin(painted)
        row, col = np.unravel_index(np.nanargmax(painted), painted.shape)
        assert abs(row - y * height) < 12 + height / tiles.map.rows
        assert abs(col - x * width) < 12 + width / tiles.map.cols


def bright(onevision: TiledLab, picture: np.ndarray, tiles: ll.View) -> np.ndarray:
    """Every cell's brightness: the squares' patches through transformers' own packing."""
    given = onevision.shown(picture)
    side = onevision.grid[0]
    squares = given["pixel_values"][0].mean(1)[:, : side * PATCH, : side * PATCH]
    means = squares.reshape(len(squares), side, PATCH, side, PATCH).mean((2, 4)).reshape(len(squares), -1, 1).expand(-1, -1, 64)
    (packed,), _ = onevision.model.model.pack_image_features(
        [means.contiguous()], given["image_sizes"], torch.zeros(64), onevision.model.config.vision_aspect_ratio
    )
    return packed[:, 0].numpy()[tiles.positions]


def test_maps_and_a_causal_check_work_on_onevision(onevision: TiledLab) -> None:
    run = onevision.ask(drawn(90, 40), QUESTION, max_new_tokens=2)
    rel = ll.attribute(onevision, run, method="rollout")
    assert rel.view_values[1].shape[1:] == (run.views[1].map.rows, run.views[1].map.cols)
    assert np.isfinite(rel.on_picture(view="tiles")).mean() > 0.8
    covered = ll.attribute(onevision, run, method="occlusion", score="logprob")
    close(covered.extras["score"][0], float(run.logprobs.sum()), terms=TERMS)
