"""What is put in a hidden patch's place is what its name says, and scores in bfloat16 agree with float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llava_lab.attribution import METHODS, attribute
from llava_lab.capture import undisturbed
from llava_lab.models import Lab
from llava_lab.replay import FILLS, fill_pixels, target_score
from llava_lab.replay.fills import inpaint
from llava_lab.results import Run
from tests.support.planted import scripted_run
from tests.support.rounding import in_dtype


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.", fit="crop")


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


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("shape", [(10, 3000), (3000, 10), (1, 700), (700, 1), (3, 64), (1, 1)])
def test_a_picture_thinner_than_a_pixel_has_a_mean(tiny_random: Lab, shape: tuple[int, int], fit: str) -> None:
    picture = np.full((*shape, 3), (200, 0, 90), np.uint8)
    run = scripted_run(tiny_random, picture, "The car is blue.", fit=fit)
    pixels = tiny_random.inputs(run)["pixel_values"]
    for fill in (*FILLS, "noise"):
        assert torch.isfinite(fill_pixels(tiny_random, pixels, fill, run.map)).all()
    for method in ("occlusion", "shapley", "rise"):
        assert np.isfinite(attribute(tiny_random, run, method=method, fill="mean", **METHODS[method].economy).values).all()


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


def test_bfloat16_agrees_with_float32(tiny_random: Lab, run: Run) -> None:
    with undisturbed(tiny_random.model):
        pixels, score = target_score(tiny_random, run, (run.target("blue"),))
        exact = score(pixels)
        with in_dtype(tiny_random.model, torch.bfloat16):
            rough = score(pixels.bfloat16())
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.3, rtol=0.05)  # random weights, 8 bits of mantissa through 7 layers
