"""What is hidden, looked at in four ways: each equal to a naive loop, honest about padding, noise, proofs and interruption."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llava_lab.attribution import attribute
from llava_lab.attribution.occlusion import (
    blocks_of,
    cut,
    first_side,
    looks,
    masks_of,
    natural_cells,
    rise_masks,
    spread,
    tiles,
    weighed,
)
from llava_lab.capture import Full, undisturbed, watch_attention
from llava_lab.errors import LabError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.replay import fill_pixels
from llava_lab.replay.alter import Pixels, open_altered
from llava_lab.replay.fills import inpaint
from llava_lab.replay.prefix import Prefix
from llava_lab.results import Run
from tests.support.closeness import TERMS, close, tolerance
from tests.support.games import Formula
from tests.support.planted import RED, planted_lab, red_picture, scripted_run

PATCH = 8


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.", fit="crop")


def _logprob(lab: Lab, run: Run, pixels: Tensor) -> Tensor:
    inputs = lab.inputs(run)
    with torch.no_grad():
        return lab.model(**{**inputs, "pixel_values": pixels}).logits[0].float().log_softmax(-1)


def _naive(lab: Lab, run: Run, block: int, stride: int, fill: Tensor) -> np.ndarray:
    """One forward at a time, whole logits, the definition of the score: answer, "blue", "blue" and not "green"."""
    tokens, pixels = run.token_ids, lab.inputs(run)["pixel_values"]
    start, stop = run.segments["answer"]
    word = run.word("blue")
    against = lab.tokenizer.encode(" green", add_special_tokens=False)[0]

    def scores(now: Tensor) -> np.ndarray:
        logprobs = _logprob(lab, run, now)
        odds = torch.logit(logprobs.double().exp())
        said = [float(sum(odds[i - 1, tokens[i]] for i in range(a, b))) for a, b in ((start, stop), (word.start, word.stop))]
        at = logprobs[word.start - 1]
        return np.array([*said, float(at[tokens[word.start]] - at[against])])

    total, count, whole = np.zeros((3, 4, 4)), np.zeros((4, 4)), scores(pixels)
    for y in sorted({*range(0, 4 - block + 1, stride), 4 - block}):
        for x in sorted({*range(0, 4 - block + 1, stride), 4 - block}):
            covered = pixels.clone()
            here = (..., slice(y * PATCH, (y + block) * PATCH), slice(x * PATCH, (x + block) * PATCH))
            covered[here] = fill[here]
            total[:, y : y + block, x : x + block] += (whole - scores(covered))[:, None, None]
            count[y : y + block, x : x + block] += 1
    return total / count


@pytest.mark.parametrize(
    ("block", "stride", "fill", "batch"),
    [(1, None, "grey", 8), (1, None, "mean", 1), (2, 1, "blur", 3), (3, 2, "grey", 5), (1, None, "noise", 4)],
)
def test_equals_covering_one_block_after_the_other(
    tiny_random: Lab, run: Run, block: int, stride: int | None, fill: str, batch: int
) -> None:
    target = ["answer", "blue", ("blue", "green")]
    rel = attribute(tiny_random, run, method="occlusion", target=target, block=block, stride=stride, fill=fill, batch=batch)
    pixels = fill_pixels(tiny_random, tiny_random.inputs(run)["pixel_values"], fill, run.map)
    want = _naive(tiny_random, run, block, stride or block, pixels)
    close(rel.values, want, of=rel.extras["score"], terms=TERMS)
    assert rel.passes["forward"] == len(blocks_of(4, 4, block, stride or block)) + 1


def test_score_is_the_log_probability_the_run_recorded(tiny_random: Lab, picture: np.ndarray) -> None:
    run = tiny_random.ask(picture, "What color is the car?", max_new_tokens=6)
    rel = attribute(tiny_random, run, method="occlusion", block=4, score="logprob")
    close(rel.extras["score"][0], float(run.logprobs.sum()), terms=TERMS)
    assert (rel.options["score"], rel.extras["unit"]) == ("logprob", "logprob")


class Redness(Pixels):
    """The score is how red the picture is; what is hidden is nothing."""

    def _make(self, fill: str) -> Tensor:
        return torch.zeros_like(self.values)

    def read(self, values: Tensor) -> Tensor:
        return (values[:, 0] - values[:, 1:].mean(1)).mean((1, 2))[:, None]


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize(("width", "height", "box"), [(60, 40, (25, 5, 35, 15)), (40, 60, (20, 30, 35, 50))])
def test_redness_itself_lights_up_where_the_red_is(
    tiny_random: Lab, fit: str, width: int, height: int, box: tuple[int, int, int, int]
) -> None:
    picture = red_picture(width, height, box)
    run = scripted_run(tiny_random, picture, "The car is blue.", fit=fit)
    altered = Redness(tiny_random, run, (run.target(),), at="pixels", fill="grey", batch=3)
    blocks = blocks_of(4, 4, 1, 1)
    scores = torch.cat([scores for _, scores in altered.sweep(masks_of(blocks, (4, 4)))])
    values = spread((altered.whole - scores).numpy(), blocks, (4, 4))[0]
    red = run.map.mask_to_patches((picture == np.array(RED)).all(-1))
    assert red.ravel()[values.argmax()] > 0.99 * red.max()
    assert values[red == 0].max() < 0.05 * values.max()
    painted = run.map.project(values)
    y, x = (box[1] + box[3]) // 2, (box[0] + box[2]) // 2
    assert painted[y, x] > 0.5 * np.nanmax(painted)


def test_padding_is_not_tried_and_said_so(tiny_random: Lab) -> None:
    wide = np.random.default_rng(0).integers(0, 255, (20, 80, 3), dtype=np.uint8)
    run = scripted_run(tiny_random, wide, "The car is blue.", fit="pad")
    rel = attribute(tiny_random, run, method="occlusion")
    outside = run.map.coverage() == 0
    assert outside.sum() == 8
    assert rel.passes["forward"] == 16 - 8 + 1
    assert (rel.values[0][outside] == 0).all()
    assert (rel.values[0][~outside] != 0).all()
    assert "8 patches hold only padding; they were not tried and are 0." in rel.notes


def test_ctrl_c_gives_the_finished_blocks(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attribute(tiny_random, run, method="occlusion", batch=4)
    calls = 0
    forward = tiny_random.model.forward

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:  # the picture itself, then two batches
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny_random.model, "forward", interrupted)
    part = attribute(tiny_random, run, method="occlusion", batch=4)
    close(part.values[0, :2], whole.values[0, :2], of=whole.extras["score"], terms=TERMS)
    assert (part.values[0, 2:] == 0).all()
    assert "Interrupted after 8 of 16 blocks; patches not reached are 0." in part.notes
    calls = 2
    with pytest.raises(KeyboardInterrupt):  # nothing finished, nothing to give
        attribute(tiny_random, run, method="occlusion", batch=4)


def test_progress_shows_only_when_it_takes_long(
    tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attribute(tiny_random, run, method="occlusion")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("llava_lab.checks.PATIENCE", 0.0)
    attribute(tiny_random, run, method="occlusion")
    shown = capsys.readouterr()
    assert "occlusion" in shown.err
    assert shown.out == ""


def test_neighbours_are_made_for_each_block_anew(tiny_random: Lab, run: Run) -> None:
    pixels = tiny_random.inputs(run)["pixel_values"]
    rel = attribute(tiny_random, run, method="occlusion", fill="neighbours", target="blue", batch=5)
    word = run.word("blue")

    def blue(now: Tensor) -> float:
        logprobs = _logprob(tiny_random, run, now)
        return float(sum(logprobs[i - 1, run.token_ids[i]] for i in range(word.start, word.stop)))

    for row, col in ((0, 0), (2, 1), (3, 3)):
        hidden = torch.zeros(1, 32, 32, dtype=torch.bool)
        hidden[0, row * PATCH : (row + 1) * PATCH, col * PATCH : (col + 1) * PATCH] = True
        assert rel.values[0, row, col] == pytest.approx(blue(pixels) - blue(inpaint(pixels, hidden)), abs=1e-5)


def test_blocks_cover_every_patch_and_stay_inside() -> None:
    for rows, cols, block, stride in ((5, 7, 2, 2), (4, 4, 3, 3), (6, 5, 4, 1), (3, 3, 3, 2)):
        count = np.zeros((rows, cols), int)
        for y, x in blocks_of(rows, cols, block, stride):
            assert count[y, x].shape == (block, block)
            count[y, x] += 1
        assert count.min() >= 1


# -- from coarse to fine -------------------------------------------------------------------


TARGETS = ["answer", "blue", ("blue", "green")]


@pytest.fixture(scope="module")
def planted() -> Lab:
    return planted_lab()


@pytest.mark.parametrize("at", ["pixels", "projector"])
def test_is_exact_where_it_is_fine_and_shared_out_where_it_is_not(tiny_random: Lab, run: Run, at: str) -> None:
    options: dict[str, Any] = {"at": at, "target": TARGETS}
    rough = attribute(tiny_random, run, method="occlusion_coarse", first=2, keep=2, **options)
    fine = attribute(tiny_random, run, method="occlusion", block=1, **options).values
    coarse = attribute(tiny_random, run, method="occlusion", block=2, **options).values / 4
    assert rough.extras["rounds"] == [4, 8]
    assert rough.passes["forward"] == 12 + 1 + (at == "projector")  # one more through the tower for the grey picture
    near = 2 * tolerance(rough.extras["score"], terms=TERMS)
    exact = np.isclose(rough.values, fine, atol=near).all(0)
    shared = np.isclose(rough.values, coarse, atol=near).all(0)
    assert exact.sum() == 8
    assert (exact | shared).all()


@pytest.mark.parametrize("seed", [3, 5])  # of 5, the largest change makes the answer likelier
def test_looks_closer_where_the_answer_changed_most_either_way(tiny_random: Lab, seed: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    run = scripted_run(tiny_random, picture, "The car is blue.", fit="crop")
    tokens = list(range(len(run.token_ids) - run.segments["answer"][0]))
    drops = attribute(tiny_random, run, method="occlusion", block=2, target=tokens).values[:, ::2, ::2]
    change = np.abs(drops).max(0)
    assert (change.argmax() == drops.max(0).argmax()) == (seed == 3)
    rel = attribute(tiny_random, run, method="occlusion_coarse", first=2, keep=1, target="blue")
    row, col = np.unravel_index(change.argmax(), change.shape)
    here = rel.values[0, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
    assert len(set(here.ravel().tolist())) == 4
    elsewhere = [rel.values[0, y : y + 2, x : x + 2] for y in (0, 2) for x in (0, 2) if (y, x) != (2 * row, 2 * col)]
    assert all(np.ptp(block) == 0 for block in elsewhere)


def test_sums_are_those_of_the_blocks(tiny_random: Lab, run: Run) -> None:
    rel = attribute(tiny_random, run, method="occlusion_coarse", first=4, keep=1, target="blue")
    whole = attribute(tiny_random, run, method="occlusion_coarse", first=4, keep=1, target="answer")
    assert rel.extras["rounds"] == whole.extras["rounds"] == [1, 4, 4]
    assert rel.extras["score"] != whole.extras["score"]
    one = attribute(tiny_random, run, method="occlusion", block=4, target="blue").values[0]
    alone = attribute(tiny_random, run, method="occlusion", block=2, target="blue").values[0]
    quarters = [rel.values[0, y : y + 2, x : x + 2].sum() for y in (0, 2) for x in (0, 2)]
    expected = [alone[y, x] for y in (0, 2) for x in (0, 2)]
    assert (
        sum(np.isclose(quarters, expected, atol=2 * tolerance(rel.extras["score"], terms=TERMS))) >= 3
    )  # the fourth was cut further
    assert np.ptp(one) == 0


@pytest.mark.parametrize("at", ["pixels", "projector"])
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_a_planted_cause_is_found_at_a_part_of_the_cost(planted: Lab, at: str, fit: str) -> None:
    picture = red_picture(96, 96, (12, 60, 24, 72))  # one patch of 8x8
    run = scripted_run(planted, picture, "The car is red.", fit=fit)
    rel = attribute(planted, run, method="occlusion_coarse", at=at, keep=1, target="red")
    covered = run.map.mask_to_patches((picture == np.array(RED)).all(-1))
    assert rel.values[0].argmax() == covered.argmax()
    assert rel.passes["forward"] <= 16 + 4 + 2


def test_coarse_padding_is_not_tried(planted: Lab) -> None:
    run = scripted_run(planted, red_picture(120, 40, (60, 10, 80, 30)), "The car is red.", fit="pad")
    rel = attribute(planted, run, method="occlusion_coarse", target="red")
    assert (rel.values[0][run.map.coverage() == 0] == 0).all()
    assert rel.extras["rounds"][0] < 16


@pytest.mark.parametrize(("grid", "side"), [((24, 24), 8), ((12, 12), 4), ((27, 27), 8), ((4, 4), 2), ((1, 1), 1), ((2, 2), 2)])
def test_the_first_blocks_are_about_a_quarter_of_the_grid(grid: tuple[int, int], side: int) -> None:
    assert first_side(grid) == side


def test_blocks_are_cut_without_gaps_or_overlap() -> None:
    for grid, side in (((5, 7), 3), ((12, 12), 4), ((3, 1), 2)):
        blocks = tiles(grid, side)
        for _ in range(4):
            count = np.zeros(grid, int)
            for block in blocks:
                count[block] += 1
            assert (count == 1).all()
            blocks = [part for block in blocks for part in cut(block)]
        assert len(blocks) == grid[0] * grid[1]


# -- RISE ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["grey", "noise"])
def test_equals_a_loop_over_its_masks(tiny_random: Lab, run: Run, fill: str) -> None:
    rel = attribute(tiny_random, run, method="rise", masks=7, cells=3, shown=0.6, seed=2, batch=3, fill=fill, target=TARGETS)
    inputs = tiny_random.inputs(run)
    pixels = inputs["pixel_values"]
    other = fill_pixels(tiny_random, pixels, fill, run.map, seed=2)
    masks = rise_masks(7, (32, 32), cells=3, shown=0.6, seed=2)(0, 7)
    word, (start, stop) = run.word("blue"), run.segments["answer"]
    against = tiny_random.tokenizer.encode(" green", add_special_tokens=False)[0]
    scores, shares = [], []
    for mask in masks:
        with torch.no_grad():
            seen = {**inputs, "pixel_values": mask * pixels + (1 - mask) * other}
            logprobs = tiny_random.model(**seen).logits[0].float().log_softmax(-1)
        said = [
            float(sum(logprobs[i - 1, run.token_ids[i]] for i in range(a, b)))
            for a, b in ((start, stop), (word.start, word.stop))
        ]
        at = logprobs[word.start - 1]
        scores.append([*said, float(at[run.token_ids[word.start]] - at[against])])
        shares.append(mask.reshape(4, 8, 4, 8).mean((1, 3)).numpy())
    table, weights = np.array(scores), np.array(shares)
    want = np.einsum("mn,myx->nyx", table - table.mean(0), weights) / weights.sum(0)
    close(rel.values, want, of=table.max(0), terms=TERMS)
    assert rel.passes["forward"] == 7


def test_a_sum_of_patches_gives_back_the_patches() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, -2.0], [0.0] * 4, [3.0, 0.0, 0.0, 0.0]])
    game = Formula((4, 4), lambda shown: (shown * weights).sum((1, 2))[:, None], batch=50)
    values, errors = weighed(*looks(game, rise_masks(3000, (4, 4), cells=4, shown=0.5, seed=0), 3000))
    assert values[0].argmax() == 12
    assert values[0].argmin() == 7
    # a patch that is shown half the time gains half its weight, here with the share of it that its cell covers
    assert values[0, 3, 0] == pytest.approx(1.5, abs=0.15)
    assert values[0, 1, 3] == pytest.approx(-1, abs=0.15)
    assert float((values[0] - 0.5 * weights).abs().max()) < 6 * float(errors.max())


def test_the_standard_error_is_the_spread_over_seeds() -> None:
    game = Formula((4, 4), lambda shown: (shown[:, 0, 0] + 2 * shown[:, 2, 2])[:, None], batch=50)
    each = [weighed(*looks(game, rise_masks(100, (4, 4), cells=4, shown=0.5, seed=seed), 100)) for seed in range(40)]
    spread = torch.stack([values for values, _ in each]).std(0).mean()
    said = torch.stack([errors for _, errors in each]).mean()
    assert float(said) == pytest.approx(float(spread), rel=0.2)


def test_masks_are_smooth_shares_with_the_chance_they_were_asked_for() -> None:
    masks = rise_masks(400, (24, 20), cells=5, shown=0.3, seed=0)
    every = torch.cat([masks(0, 150), masks(150, 400)])
    assert every.shape == (400, 24, 20)
    assert 0 <= float(every.min()) <= float(every.max()) <= 1
    assert float(every.mean()) == pytest.approx(0.3, abs=0.02)
    assert float((every.mean(0) - 0.3).abs().max()) < 0.12, "no place is favoured"
    torch.testing.assert_close(masks(3, 5), every[3:5])
    assert not torch.equal(rise_masks(2, (24, 20), cells=5, shown=0.3, seed=1)(0, 2), every[:2])


@pytest.mark.parametrize(("grid", "cells"), [((24, 24), 8), ((12, 12), 4), ((4, 4), 2), ((1, 1), 1), ((40, 40), 8)])
def test_cells_follow_the_grid(grid: tuple[int, int], cells: int) -> None:
    assert natural_cells(grid) == cells


@pytest.mark.parametrize("at", ["pixels", "vision", "projector"])
def test_rise_finds_a_planted_cause(at: str) -> None:
    lab = planted_lab()
    picture = red_picture(96, 96, (12, 60, 36, 84))
    run = scripted_run(lab, picture, "The car is red.", fit="pad")
    rel = attribute(lab, run, method="rise", masks=96, at=at, target=["red", ("red", "blue")])
    red = run.map.mask_to_patches((picture == np.array(RED)).all(-1)) > 0
    for values in rel.values:
        near = functional.max_pool2d(torch.from_numpy(red)[None, None].float(), 5, 1, 2)[0, 0].numpy() > 0  # cells are wide
        assert near.ravel()[values.argmax()]
        assert values[red].mean() > values[~near].mean() + 2 * values[~near].std()


# -- token knockout ------------------------------------------------------------------------


def _masked(run: Run, columns: list[int], first_row: int) -> Tensor:
    """An additive mask for the whole sequence: causal, and rows from `first_row` on may not see `columns`."""
    size = len(run.token_ids)
    hidden = torch.ones(size, size, dtype=torch.bool).triu(1)
    hidden[first_row:, columns] = True
    return torch.zeros(1, 1, size, size).masked_fill_(hidden, torch.finfo(torch.float32).min)


def _masked_score(lab: Lab, run: Run, mask: Tensor) -> np.ndarray:
    """Scores of `TARGETS` by one whole forward under `mask`."""
    inputs = {**lab.inputs(run), "attention_mask": mask}
    with torch.no_grad():
        logprobs = lab.model(**inputs).logits[0].float().log_softmax(-1)
    odds = torch.logit(logprobs.double().exp())
    start, stop = run.segments["answer"]
    word = run.word("blue")
    against = lab.tokenizer.encode(" green", add_special_tokens=False)[0]
    said = [float(sum(odds[i - 1, run.token_ids[i]] for i in range(a, b))) for a, b in ((start, stop), (word.start, word.stop))]
    at = logprobs[word.start - 1]
    return np.array([*said, float(at[run.token_ids[word.start]] - at[against])])


@contextmanager
def _attention(lab: Lab, implementation: str) -> Iterator[None]:
    lab.model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        lab.model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("rows", ["answer", "text"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equals_whole_forwards_under_a_mask(tiny_random: Lab, run: Run, rows: str, implementation: str) -> None:
    with _attention(tiny_random, implementation):
        rel = attribute(tiny_random, run, method="token_knockout", rows=rows, target=TARGETS)
    image = run.segments["image"]
    first = run.segments["answer"][0] - 1 if rows == "answer" else image[1]
    with _attention(tiny_random, "eager"):
        whole = _masked_score(tiny_random, run, _masked(run, [], first))
        drops = [whole - _masked_score(tiny_random, run, _masked(run, [column], first)) for column in range(*image)]
    close(rel.values.reshape(3, 16), np.stack(drops, 1), of=whole, terms=TERMS)
    assert np.abs(rel.values).max() > 0.01


def test_a_block_hides_all_of_its_tokens(tiny_random: Lab, run: Run) -> None:
    rel = attribute(tiny_random, run, method="token_knockout", block=2, target=TARGETS)
    image, first = run.segments["image"][0], run.segments["answer"][0] - 1
    columns = [image + 4 * row + col for row in (2, 3) for col in (0, 1)]
    drop = _masked_score(tiny_random, run, _masked(run, [], first)) - _masked_score(
        tiny_random, run, _masked(run, columns, first)
    )
    close(rel.values[:, 3, 1], drop, of=rel.extras["score"], terms=TERMS)
    assert (rel.values[:, 2, 0] == rel.values[:, 3, 1]).all()


def test_blocked_entries_are_zero_and_rows_still_sum_to_one(tiny_random: Lab, run: Run) -> None:
    model, start = tiny_random.model, run.segments["answer"][0] - 1
    image = run.segments["image"][0]
    with undisturbed(model):
        altered: Any = open_altered(tiny_random, run, (run.target(),), at="projector", fill="mean")
        prefix = Prefix(tiny_random, run, (run.target(),), tokens=altered.values.flatten(2).mT, room=start + 3 * 20)
        tails = prefix.sequence[:, start:].expand(2, -1, -1)
        blocked = torch.zeros(2, start, dtype=torch.bool)
        blocked[0, image + 3] = blocked[1, image + 8] = True
        layers = language_layers(model)
        with watch_attention(layers, Full()) as full:
            prefix.branch(tails, start, blocked)
    length = tails.shape[1]
    for layer in range(len(layers)):
        attention = full.attention[layer][0]  # H, both variants' rows, the shared beginning and both variants
        one, two = attention[:, -2 * length : -length], attention[:, -length:]
        assert (one[..., image + 3] == 0).all()
        assert (two[..., image + 8] == 0).all()
        assert (one[..., image + 8] > 0).all()
        assert (one[..., start + length :] == 0).all(), "the first variant sees the second"
        assert (two[..., start : start + length] == 0).all(), "the second variant sees the first"
        torch.testing.assert_close(attention.sum(-1)[:, -2 * length :], torch.ones(attention.shape[0], 2 * length))


def test_the_proof_is_reported(tiny_random: Lab, run: Run) -> None:
    extras = attribute(tiny_random, run, method="token_knockout").extras
    assert extras["blocked_change"] == 0
    assert extras["unblocked_change"] > 0.01


def test_a_mask_that_is_not_followed_is_refused(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault to fear: nothing is blocked, every drop is about zero, and it reads as "no patch matters"."""
    honest = Prefix._mask
    monkeypatch.setattr(
        Prefix, "_mask", lambda self, count, length, start, blocked, like: honest(self, count, length, start, None, like)
    )
    with pytest.raises(LabError, match="expected a blocked token to have no say, got a change of .*sdpa or eager"):
        attribute(tiny_random, run, method="token_knockout")


def test_the_poison_is_put_right_again(tiny_random: Lab, run: Run) -> None:
    start = run.segments["answer"][0] - 1
    with undisturbed(tiny_random.model):
        altered: Any = open_altered(tiny_random, run, (run.target(),), at="projector", fill="mean")
        prefix = Prefix(tiny_random, run, (run.target(),), tokens=altered.values.flatten(2).mT, room=start + 60)
        tail = prefix.sequence[:, start:]
        before = prefix.branch(tail, start)
        with prefix.poisoned(run.segments["image"][0]):
            assert not torch.allclose(prefix.branch(tail, start), before)
        torch.testing.assert_close(prefix.branch(tail, start), before, rtol=0, atol=0)
        with pytest.raises(AssertionError, match="a rest of another length"), prefix.poisoned(run.segments["image"][0]):
            prefix.branch(tail[:, 1:], start)
        torch.testing.assert_close(prefix.branch(tail, start), before, rtol=0, atol=0)


def test_all_patches_cost_a_few_passes(tiny_random: Lab, run: Run) -> None:
    rel = attribute(tiny_random, run, method="token_knockout")
    assert rel.passes["forward"] < 7
    assert rel.extras["positions"] < 5 * len(run.token_ids)


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("rows", ["answer", "text"])
def test_a_planted_cause_is_found(fit: str, rows: str) -> None:
    lab = planted_lab()
    picture = red_picture(80, 120, (10, 60, 30, 80))
    run = scripted_run(lab, picture, "The car is red.", fit=fit)
    covered = run.map.mask_to_patches((picture == np.array(RED)).all(-1))
    for target in ("red", ("red", "blue")):
        values = attribute(lab, run, method="token_knockout", rows=rows, target=target).values[0]
        assert covered.ravel()[values.argmax()] > 0.99 * covered.max()
        assert values[covered == 1].min() > values[covered == 0].max()


def test_ctrl_c_gives_the_finished_knockouts(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_lab.attribution.occlusion.ROWS", 20)
    whole = attribute(tiny_random, run, method="token_knockout")
    length = run.segments["answer"][1] - run.segments["answer"][0]
    done = 2 * (20 // length)
    calls, forward = 0, tiny_random.model.forward

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # the plain forward, the kept one, two passes of variants
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny_random.model, "forward", interrupted)
    part = attribute(tiny_random, run, method="token_knockout")
    assert 0 < done < 16
    close(part.values[0].ravel()[:done], whole.values[0].ravel()[:done], of=run.logprobs.sum(), terms=TERMS)
    assert (part.values[0].ravel()[done:] == 0).all()
    assert f"Interrupted after {done} of 16 blocks; patches not reached are 0." in part.notes
    calls = 2
    with pytest.raises(KeyboardInterrupt):
        attribute(tiny_random, run, method="token_knockout")
