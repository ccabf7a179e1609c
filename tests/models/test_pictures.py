"""Every kind of picture becomes upright RGB by a stated rule, and every unsound one gives one line; the model's input equals
transformers' own processing to the pixel, and the map says truly where it went."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_lab.errors import CheckpointError, OptionError, PictureError
from llava_lab.geometry import PictureMap
from llava_lab.models import Lab
from llava_lab.models.pictures import MAX_PIXELS, WIDE_GREY, Preprocessing, pad_to_square, read_picture

RED, GREY = (220, 30, 30), (128, 128, 128)
SIZES = [(60, 40), (40, 60), (41, 83), (83, 41), (50, 50), (337, 500), (500, 337), (7, 90), (90, 7), (1, 1)]  # width, height
MEAN = (122, 116, 104)


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def png_claiming(width: int, height: int) -> bytes:
    """The head of a PNG that says it is this large, with next to no data."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 64)
    parts = [(b"IHDR", head), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def assert_one_line(error: pytest.ExceptionInfo[PictureError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 300
    for word in words:
        assert word in text


def test_path_pil_bytes_and_array_give_the_same_pixels(tmp_path: Path, picture: np.ndarray) -> None:
    path = saved(Image.fromarray(picture), tmp_path / "a.png")
    for source in (path, str(path), path.read_bytes(), Image.open(path), Image.fromarray(picture), picture):
        got = read_picture(source)
        assert got.dtype == np.uint8
        assert got.flags.c_contiguous
        assert np.array_equal(got, picture)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "LA", "PA", "RGBa", "RGBX", "F"])
def test_every_pillow_mode_becomes_rgb(mode: str) -> None:
    image = Image.new(mode, (5, 4))
    assert read_picture(image).shape == (4, 5, 3)


def test_colors_survive_palette_and_cmyk() -> None:
    plain = Image.new("RGB", (4, 4), RED)
    assert np.abs(read_picture(plain.convert("P", palette=Image.Palette.ADAPTIVE)).astype(int) - RED).max() <= 2
    assert np.abs(read_picture(plain.convert("CMYK")).astype(int) - RED).max() <= 2


def test_transparency_is_laid_on_white() -> None:
    half = Image.new("RGBA", (2, 1), (*RED, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    assert read_picture(half).tolist() == [[list(RED), [255, 255, 255]]]
    grey = Image.new("LA", (1, 1), (0, 51))
    assert read_picture(grey).tolist() == [[[204, 204, 204]]]
    assert read_picture(np.array([[[0, 0, 0, 0]]], np.uint8)).tolist() == [[[255, 255, 255]]]


def test_transparent_palette_color_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((1, 0), 1)
    path = saved(image, tmp_path / "a.png", transparency=0)
    assert read_picture(path).tolist() == [[[255, 255, 255], list(RED)]]


@pytest.mark.parametrize("mode", sorted(WIDE_GREY))
def test_16_bit_grey_is_scaled_not_clipped(mode: str) -> None:
    image = Image.new(mode, (3, 1))
    for x, value in enumerate((0, 257 * 100, 65535)):
        image.putpixel((x, 0), value)
    assert read_picture(image)[0, :, 0].tolist() == [0, 100, 255]


def test_16_bit_png_file_is_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 257 * 7, 65535]], np.uint16)
    path = saved(Image.fromarray(values), tmp_path / "a.png")
    assert read_picture(path)[0, :, 0].tolist() == [0, 7, 255]


@pytest.mark.parametrize("tag", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, tag: int) -> None:
    upright = np.full((16, 32, 3), 128, np.uint8)
    upright[:8, :8] = RED  # the red corner must come out top left
    turn = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 1, 7: 3, 8: 3}[tag]
    stored = np.rot90(upright, turn)
    if tag in (2, 4, 5, 7):
        stored = stored[:, ::-1] if tag in (2, 4) else np.rot90(upright, turn)[::-1]
    exif = Image.Exif()
    exif[0x0112] = tag
    path = saved(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_picture(path), upright)


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 5), color) for color in (RED, (0, 255, 0), (0, 0, 255))]
    for name in ("a.gif", "a.webp", "a.png"):
        path = saved(frames[0], tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert np.abs(read_picture(path).astype(int) - RED).max() <= 2, name


def test_arrays_may_be_grey_bool_float_or_16_bit() -> None:
    assert read_picture(np.full((2, 3), 7, np.uint8)).tolist() == np.full((2, 3, 3), 7).tolist()
    assert read_picture(np.full((2, 3, 1), 0.5)).max() == 128
    assert read_picture(np.array([[True, False]]))[0, :, 0].tolist() == [255, 0]
    assert read_picture(np.full((1, 1), 65535, np.uint16)).max() == 255
    assert read_picture(np.full((1, 1, 3), 9, np.int64)).max() == 9
    assert read_picture(np.full((1, 1, 3), 1.0, np.float16)).max() == 255


def test_the_given_array_and_image_are_left_alone(picture: np.ndarray) -> None:
    got = read_picture(picture)
    got[:] = 0
    assert picture.max() > 0
    image = Image.new("RGBA", (3, 3), (0, 0, 0, 0))
    read_picture(image)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 20, 20), np.uint8), ("3x20x20", "channels last")),
        (np.zeros((2, 2, 2, 3), np.uint8), ("2x2x2x3",)),
        (np.zeros((2, 2, 2), np.uint8), ("2x2x2",)),
        (np.zeros((0, 5, 3), np.uint8), ("empty",)),
        (np.full((2, 2, 3), 200.0), ("0..1", "255")),
        (np.full((2, 2, 3), np.nan), ("finite",)),
        (np.full((2, 2, 3), -1), ("0..255", "-1")),
        (np.full((2, 2, 3), 300), ("0..255", "300")),
        (np.full((2, 2, 3), "x"), ("uint8",)),
        (np.full((2, 2, 3), 1j), ("uint8",)),
    ],
)
def test_unsound_arrays_are_refused(array: np.ndarray, words: tuple[str, ...]) -> None:
    with pytest.raises(PictureError) as error:
        read_picture(array)
    assert_one_line(error, *words)


def test_missing_empty_folder_text_and_address_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture at all")
    for source, words in (
        (tmp_path / "none.png", ("no such picture",)),
        (tmp_path / "empty.png", ("empty", "0 bytes")),
        (tmp_path, ("folder",)),
        (tmp_path / "text.png", ("not a picture",)),
        ("https://example.org/a.png", ("download",)),
        (b"", ("empty",)),
        (3, ("int",)),
    ):
        with pytest.raises(PictureError) as error:
            read_picture(source)  # type: ignore[arg-type]
        assert_one_line(error, *words)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.bmp", "a.tiff"])
def test_truncated_files_are_refused(tmp_path: Path, picture: np.ndarray, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as other libraries leave it
    path = saved(Image.fromarray(picture).resize((300, 200)), tmp_path / name)
    whole = path.read_bytes()
    for source in (whole[: len(whole) * 2 // 3], whole[:60]):
        with pytest.raises(PictureError) as error:
            read_picture(source)
        assert_one_line(error)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_a_lazily_opened_damaged_image_is_refused(tmp_path: Path, picture: np.ndarray) -> None:
    path = saved(Image.fromarray(picture).resize((300, 200)), tmp_path / "a.jpg")
    image = Image.open(io.BytesIO(path.read_bytes()[:2000]))
    with pytest.raises(PictureError, match="damaged or cut short"):
        read_picture(image)


@pytest.mark.parametrize("width", [9_500, 40_000])  # Pillow warns at the first, raises at the second
def test_decompression_bombs_are_refused_before_decoding(tmp_path: Path, width: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_claiming(width, width))
    with pytest.raises(PictureError) as error:
        read_picture(path)
    assert_one_line(error, f"{MAX_PIXELS:,}")


def test_the_limit_holds_when_pillow_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(PictureError, match="pixels"):
        read_picture(png_claiming(20_000, 20_000))


def test_reading_leaves_the_warning_filters_alone(picture: np.ndarray) -> None:
    before = list(warnings.filters)
    read_picture(Image.fromarray(picture))
    assert warnings.filters == before


def test_out_of_range_wide_grey_and_float_images_are_refused() -> None:
    with pytest.raises(PictureError, match="16 bits"):
        read_picture(Image.new("I", (1, 1), 70_000))
    with pytest.raises(PictureError, match=r"0\.\.1"):
        read_picture(Image.new("F", (1, 1), 2.0))
    assert read_picture(Image.new("F", (1, 1), 1.0)).tolist() == [[[255, 255, 255]]]


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
