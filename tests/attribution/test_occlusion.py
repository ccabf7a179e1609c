"""Occlusion: equal to covering patches one by one, honest about padding, fills and interruption."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llava_lab.attribution import attribute
from llava_lab.attribution.occlusion import blocks_of, masks_of, spread
from llava_lab.capture import undisturbed
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.replay import FILLS, fill_pixels, target_score
from llava_lab.replay.alter import Pixels
from llava_lab.replay.fills import inpaint
from llava_lab.results import Run
from tests.support.planted import RED, red_picture, scripted_run
from tests.support.rounding import in_dtype

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
        said = [float(sum(logprobs[i - 1, tokens[i]] for i in range(a, b))) for a, b in ((start, stop), (word.start, word.stop))]
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
    np.testing.assert_allclose(rel.values, want, atol=1e-5)
    assert rel.passes["forward"] == len(blocks_of(4, 4, block, stride or block)) + 1


def test_score_is_the_log_probability_the_run_recorded(tiny_random: Lab, picture: np.ndarray) -> None:
    run = tiny_random.ask(picture, "What color is the car?", max_new_tokens=6)
    rel = attribute(tiny_random, run, method="occlusion", block=4)
    assert rel.extras["score"][0] == pytest.approx(float(run.logprobs.sum()), abs=1e-4)


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


def test_ctrl_c_gives_the_finished_part(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
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
    np.testing.assert_allclose(part.values[0, :2], whole.values[0, :2], atol=1e-6)
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


def test_fills_are_what_they_say(tiny_random: Lab) -> None:
    picture = np.zeros((20, 80, 3), np.uint8)
    picture[..., 0] = 200
    run = scripted_run(tiny_random, picture, "The car is blue.", fit="pad")
    pixels = tiny_random.inputs(run)["pixel_values"]
    images = tiny_random.processor.image_processor
    mean, std = (torch.tensor(part)[:, None, None] for part in (images.image_mean, images.image_std))
    color = {fill: fill_pixels(tiny_random, pixels, fill, run.map)[0] * std + mean for fill in FILLS}
    torch.testing.assert_close(color["grey"], torch.full_like(pixels[0], 0.5))
    want = torch.tensor([200 / 255, 0, 0])[:, None, None].expand_as(pixels[0])
    torch.testing.assert_close(color["mean"], want, atol=0.02, rtol=0)  # the resize softens the padding's edge
    blur = color["blur"]
    assert blur.std() < (pixels[0] * std + mean).std()
    assert blur.mean() == pytest.approx(float((pixels[0] * std + mean).mean()), abs=0.02)


def test_blur_leaves_a_plain_picture_alone(tiny_random: Lab, run: Run) -> None:
    plain = torch.full((1, 3, 32, 32), 0.7)
    torch.testing.assert_close(fill_pixels(tiny_random, plain, "blur", run.map), plain)


def test_noise_has_the_picture_s_mean_and_spread_and_comes_from_its_seed(tiny_random: Lab, run: Run) -> None:
    pixels = tiny_random.inputs(run)["pixel_values"]
    one, same, other = (fill_pixels(tiny_random, pixels, "noise", run.map, seed=seed) for seed in (0, 0, 1))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.equal(one, other)
    torch.testing.assert_close(one.mean((2, 3)), pixels.mean((2, 3)), atol=0.15, rtol=0)
    torch.testing.assert_close(one.std((2, 3)), pixels.std((2, 3)), atol=0.15, rtol=0)
    plain = attribute(tiny_random, run, method="occlusion", fill="noise", seed=1).values
    assert not np.allclose(plain, attribute(tiny_random, run, method="occlusion", fill="noise").values)


def test_neighbours_fill_a_hole_from_around_it_and_never_from_within() -> None:
    values = torch.linspace(0, 1, 8).expand(1, 2, 8, 8).clone()  # brighter to the right
    hidden = torch.zeros(1, 8, 8, dtype=torch.bool)
    hidden[0, 2:4, 4:6] = True
    filled = inpaint(values, hidden)
    torch.testing.assert_close(filled[~hidden.expand(2, 8, 8)[None]], values[~hidden.expand(2, 8, 8)[None]])
    inside = filled[0, 0, 2:4, 4:6]
    assert (inside > values[0, 0, 0, 2]).all()
    assert (inside < values[0, 0, 0, 7]).all()
    torch.testing.assert_close(inside.mean(), values[0, 0, 2:4, 4:6].mean(), atol=0.1, rtol=0)
    torch.testing.assert_close(inpaint(torch.where(hidden, 99.0, values), hidden), filled)


def test_neighbours_leave_a_plain_picture_alone_and_know_what_to_do_without_any() -> None:
    plain = torch.full((1, 3, 7, 5), 0.7)
    hidden = torch.stack([torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) < share for share in (0.5, 0.9, 1.1)])
    torch.testing.assert_close(inpaint(plain, hidden), plain.expand(3, -1, -1, -1))
    ramp = torch.arange(4.0).view(1, 1, 2, 2)
    torch.testing.assert_close(inpaint(ramp, torch.ones(1, 2, 2, dtype=torch.bool)), torch.full((1, 1, 2, 2), 1.5))


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fill": "red"}, "fill must be one of 'grey', 'mean', 'blur', 'noise', 'neighbours', got 'red'"),
        ({"at": "tower"}, "at must be one of 'pixels', 'vision', 'projector', got 'tower'"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"block": 0}, "block must be a whole number of at least 1, got 0"),
        ({"block": 5}, "stride <= block <= 4, got block 5"),
        ({"block": 2, "stride": 3}, "got block 2 and stride 3"),
        ({"batch": 1.5}, "batch must be a whole number"),
    ],
)
def test_options_out_of_range_are_refused(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        attribute(tiny_random, run, method="occlusion", **options)


def test_bfloat16_agrees_with_float32(tiny_random: Lab, run: Run) -> None:
    with undisturbed(tiny_random.model):
        pixels, score = target_score(tiny_random, run, (run.target("blue"),))
        exact = score(pixels)
        with in_dtype(tiny_random.model, torch.bfloat16):
            rough = score(pixels.bfloat16())
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.3, rtol=0.05)  # random weights, 8 bits of mantissa through 7 layers
