"""The model's input equals transformers' own processing to the pixel, and the map says truly where it went."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_lab.errors import CheckpointError, OptionError, PictureError
from llava_lab.geometry import PictureMap
from llava_lab.models import Lab
from llava_lab.models.pictures import Preprocessing, pad_to_square

SIZES = [(60, 40), (40, 60), (41, 83), (83, 41), (50, 50), (337, 500), (500, 337), (7, 90), (90, 7), (1, 1)]  # width, height
MEAN = (122, 116, 104)


def preprocessing(
    kind: str = "llava", *, side: int = 32, short: int | None = None, patch: int = 8, **options: Any
) -> Preprocessing:
    classes = {"llava": LlavaImageProcessorPil, "clip": CLIPImageProcessorPil}
    crop = {"height": side, "width": side}
    processor = classes[kind](size={"shortest_edge": short or side}, crop_size=crop, **options)
    return Preprocessing.of(processor, image_size=side, patch=patch, grid=(side // patch, side // patch))


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["llava", "clip"])
def test_pad_and_crop_equal_the_transformers_processor_exactly(size: tuple[int, int], kind: str) -> None:
    picture = noise(*size)
    ours = preprocessing(kind)
    llava = preprocessing("llava").processor
    image = Image.fromarray(picture)
    assert np.array_equal(ours.pixels(picture, "pad").numpy(), llava(image, do_pad=True, return_tensors="np")["pixel_values"])
    assert np.array_equal(ours.pixels(picture, "crop").numpy(), llava(image, do_pad=False, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("size", SIZES)
def test_pad_equals_llavas_own_expand2square_through_pil(size: tuple[int, int]) -> None:
    width, height = size
    picture = noise(width, height)
    side = max(size)
    square = Image.new("RGB", (side, side), MEAN)
    square.paste(Image.fromarray(picture), ((side - width) // 2, (side - height) // 2))
    assert np.array_equal(pad_to_square(picture, MEAN), np.array(square))


def test_the_padding_color_is_llavas() -> None:
    assert preprocessing("clip").color == MEAN


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("size", [(240, 160), (160, 240), (200, 333), (128, 128)])
@pytest.mark.parametrize("short", [64, 73])
def test_the_map_says_where_every_model_pixel_came_from(fit: str, size: tuple[int, int], short: int) -> None:
    """A picture whose red is x and whose green is y, read back from the processed pixels."""
    width, height = size
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.round(255 * np.arange(width) / (width - 1))[None, :]
    picture[..., 1] = np.round(255 * np.arange(height) / (height - 1))[:, None]
    picture[..., 2] = 255  # where blue is full, it is the picture and not the padding
    pre = preprocessing("clip", side=64, short=short)
    pixels = pre.pixels(picture, fit)[0].numpy()
    mean, std = (np.array(v)[:, None, None] for v in (pre.processor.image_mean, pre.processor.image_std))
    seen = (pixels * std + mean) * 255
    where = pre.map(width, height, fit)
    inside = [(y, x) for y in range(2, 62, 3) for x in range(2, 62, 3) if (seen[2, y - 2 : y + 3, x - 2 : x + 3] > 254).all()]
    assert len(inside) > 100
    for y, x in inside:
        px, py = where.to_picture(x + 0.5, y + 0.5)
        assert abs(seen[0, y, x] / 255 * (width - 1) + 0.5 - px) < 1.5, (x, y)
        assert abs(seen[1, y, x] / 255 * (height - 1) + 0.5 - py) < 1.5, (x, y)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_the_map_is_the_design_s_for_an_ordinary_processor(size: tuple[int, int], fit: Any) -> None:
    assert preprocessing().map(*size, fit) == PictureMap.make(*size, size=32, rows=4, cols=4, mode=fit)


def test_a_red_square_lights_up_the_patch_the_map_names() -> None:
    for fit, (width, height) in (("pad", (96, 48)), ("crop", (96, 48)), ("pad", (48, 96)), ("crop", (48, 96))):
        picture = np.full((height, width, 3), MEAN, np.uint8)
        x, y = width // 2 + 5, height // 2 - 15
        picture[y : y + 10, x : x + 10] = (255, 0, 0)
        pre = preprocessing()
        pixels = pre.pixels(picture, fit)[0].numpy()
        redness = (pixels[0] - pixels[2]).reshape(4, 8, 4, 8).mean((1, 3))
        mask = np.zeros((height, width), bool)
        mask[y : y + 10, x : x + 10] = True
        named = pre.map(width, height, fit).mask_to_patches(mask)
        assert np.unravel_index(redness.argmax(), (4, 4)) == np.unravel_index(named.argmax(), (4, 4)), fit


def test_a_siglip_processor_is_padded_and_its_unseen_rim_is_not_on_the_map() -> None:
    processor = SiglipImageProcessorPil(size={"height": 30, "width": 30})
    pre = Preprocessing.of(processor, image_size=30, patch=8, grid=(3, 3))
    assert (pre.own, pre.can_crop) == ("pad", False)
    picture = noise(60, 30)
    expected = processor(Image.fromarray(pad_to_square(picture, pre.color)), return_tensors="np")["pixel_values"]
    assert np.array_equal(pre.pixels(picture).numpy(), expected)
    where = pre.map(60, 60)
    assert where.size == 24  # three patches of 8; the last six pixels belong to none
    assert where.seen_box == (0, 0, 48, 48)
    with pytest.raises(OptionError, match="fit='pad'"):
        pre.mode("crop")


def test_an_unknown_fit_lists_the_choices() -> None:
    with pytest.raises(OptionError, match="pad, crop") as error:
        preprocessing().mode("square")
    assert "\n" not in str(error.value)


def test_a_processor_of_another_size_is_refused() -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    with pytest.raises(CheckpointError, match="224 px.*336 px"):
        Preprocessing.of(processor, image_size=336, patch=14, grid=(24, 24))
    odd = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 30})
    with pytest.raises(CheckpointError, match="square"):
        Preprocessing.of(odd, image_size=32, patch=8, grid=(4, 4))


@pytest.mark.parametrize(("fit", "shape"), [("pad", (1, 20_000, 3)), ("crop", (200_000, 1, 3))])
def test_a_ribbon_that_would_grow_beyond_memory_is_refused(fit: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(PictureError, match="grows to"):
        preprocessing().pixels(np.zeros(shape, np.uint8), fit)


def test_a_lab_records_the_fit_and_the_two_differ(tiny_random: Lab, picture: np.ndarray) -> None:
    own, pad, crop = (tiny_random.ask(picture, "What?", fit=fit, max_new_tokens=1) for fit in (None, "pad", "crop"))
    assert [run.map.mode for run in (own, pad, crop)] == ["pad", "pad", "crop"]
    assert [run.options["fit"] for run in (own, pad, crop)] == ["pad", "pad", "crop"]
    assert own.logprobs.tolist() == pad.logprobs.tolist() != crop.logprobs.tolist()
    pixels = tiny_random.pixels(picture, "crop")
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels.dtype == tiny_random.dtype
