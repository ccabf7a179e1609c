"""Every kind of picture becomes upright RGB by a stated rule, and every unsound one gives one line; the model's input equals
transformers' own processing to the pixel, and the map says truly where it went."""

from __future__ import annotations

import base64
import gzip
import io
import mmap
import os
import struct
import subprocess
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_lab.errors import CheckpointError, OptionError, PictureError
from llava_lab.geometry import PictureMap
from llava_lab.models import Lab, pictures
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


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def at_its_end(path: Path) -> io.BytesIO:
    buffer = io.BytesIO(path.read_bytes())
    buffer.seek(0, io.SEEK_END)
    return buffer


def channels_first(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


class AsBytes(os.PathLike):
    """A path whose name is bytes, as systems hold it; or whatever else."""

    def __init__(self, path: Any) -> None:
        self.name = os.fsencode(path) if isinstance(path, Path) else path

    def __fspath__(self) -> Any:
        return self.name


def released() -> memoryview:
    view = memoryview(b"x")
    view.release()
    return view


SOURCES: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "text": str,
    "file address": Path.as_uri,
    "file address of this machine": lambda path: path.as_uri().replace("file://", "FILE://localhost"),
    "data address": lambda path: f"data:image/png;base64,{encoded(path)}",
    "address after white space": lambda path: f"\n {path.as_uri()}\n",
    "text of numpy's": lambda path: np.str_(path),
    "path that is bytes": lambda path: AsBytes(path),
    "view of every second byte": lambda path: memoryview(bytes(b for byte in path.read_bytes() for b in (byte, 0)))[::2],
    "mapped into memory": lambda path: mmap.mmap(os.open(path, os.O_RDONLY), 0, access=mmap.ACCESS_READ),
    "unpacked on the way": lambda path: gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(path.read_bytes()))),
    "recarray": lambda path: np.array(Image.open(path)).view(np.recarray),
    "array by columns": lambda path: np.asfortranarray(Image.open(path)),
    "tensor of one byte order after another": lambda path: channels_first(path).contiguous(memory_format=torch.contiguous_format),
    "tensor, channels last in memory": lambda path: channels_first(path)[None].contiguous(memory_format=torch.channels_last)[0],
    "tensor, negative not yet carried out": lambda path: torch.complex(torch.zeros(()), channels_first(path) / -255).conj().imag,
    "parameter": lambda path: torch.nn.Parameter(channels_first(path) / 255),
    "data address, quoted": lambda path: f"DATA:;name=a.png;Base64,{encoded(path).replace('+', '%2B').replace('=', '%3D')}",
    "base64": encoded,
    "base64 in lines": lambda path: base64.encodebytes(path.read_bytes()).decode(),
    "base64 for addresses, not padded": lambda path: base64.urlsafe_b64encode(path.read_bytes()).decode().rstrip("="),
    "base64 bytes": lambda path: encoded(path).encode(),
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "BytesIO": at_its_end,
    "PIL, not decoded": Image.open,
    "PIL": lambda path: Image.open(path).copy(),
    "array": lambda path: np.array(Image.open(path)),
    "tensor, channels first": channels_first,
    "tensor, channels last": lambda path: channels_first(path).permute(1, 2, 0),
    "tensor, 0..1": lambda path: (channels_first(path) / 255).requires_grad_(),
    "tensor, a hair over 1": lambda path: channels_first(path).double() / 255 * (1 + 1e-7),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_way_to_give_a_picture_gives_the_same_pixels(tmp_path: Path, picture: np.ndarray, kind: str) -> None:
    path = saved(Image.fromarray(picture), tmp_path / "a b%20ü.png")
    got = read_picture(SOURCES[kind](path))
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    assert np.array_equal(got, picture)


def test_an_open_file_is_read_from_its_beginning(tmp_path: Path, picture: np.ndarray) -> None:
    with saved(Image.fromarray(picture), tmp_path / "a.png").open("rb") as file:
        assert np.array_equal(read_picture(file), picture)
        assert np.array_equal(read_picture(file), picture)


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


@pytest.mark.parametrize("kind", [np.int32, np.int16, np.int64, "I", "I;16 TIFF", "int32 TIFF"])
def test_wide_grey_within_8_bits_looks_the_same_however_it_is_given(tmp_path: Path, kind: Any) -> None:
    """As 16 bits, where 0..255 would be next to black, it is refused."""
    grey = np.array([[30, 200], [0, 255]])
    path = tmp_path / "a.tiff"
    if isinstance(kind, type):
        source: Any = grey.astype(kind)
    elif kind == "I;16 TIFF":
        source = saved(Image.fromarray(grey.astype(np.uint16)), path)
    else:
        image = Image.fromarray(grey.astype(np.int32))
        source = image if kind == "I" else saved(image, path)
    if kind == "I;16 TIFF":
        with pytest.raises(PictureError, match="next to black"):
            read_picture(source)
    else:
        assert np.array_equal(read_picture(source), np.repeat(grey[..., None], 3, 2))


def wide_png(kind: int, values: list[int]) -> bytes:
    """A PNG of one pixel with 16 bits a colour; `kind` 2 is RGB, 4 grey and opacity, 6 RGB and opacity."""
    data = zlib.compress(b"\0" + struct.pack(f">{len(values)}H", *values))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, kind, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


@pytest.mark.parametrize(
    ("kind", "values", "color"),
    [
        (2, [0, 257 * 100, 65535], [0, 100, 255]),
        (2, [4096, 0, 0], [16, 0, 0]),
        (6, [65535, 0, 0, 65535], [255, 0, 0]),
        (6, [0, 0, 0, 0], [255, 255, 255]),
        (4, [257 * 50, 65535], [50, 50, 50]),
        (4, [0, 0], [255, 255, 255]),
    ],
)
def test_16_bit_colours_are_scaled(kind: int, values: list[int], color: list[int]) -> None:
    assert read_picture(wide_png(kind, values)).tolist() == [[color]]


@pytest.mark.parametrize("values", [[255, 200, 30], [4095, 0, 0], [0, 0, 0], [1, 1, 1]])
@pytest.mark.parametrize("kind", ["RGB", "RGB and opacity", "PIL"])
def test_16_bit_colours_that_come_out_black_are_refused(kind: str, values: list[int]) -> None:
    data = wide_png(6, [*values, 65535]) if "opacity" in kind else wide_png(2, values)
    with pytest.raises(PictureError, match="16 bits a colour .* save it with 8 bits"):
        read_picture(Image.open(io.BytesIO(data)) if kind == "PIL" else data)


def test_the_transparent_value_of_16_bit_grey_is_laid_on_white(tmp_path: Path) -> None:
    values = np.array([[0, 257 * 7, 65535]], np.uint16)
    path = saved(Image.fromarray(values), tmp_path / "a.png", transparency=0)
    assert read_picture(path)[0, :, 0].tolist() == [255, 7, 255]


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
        (np.full((2, 2), 255, np.uint16), ("next to black", "0..65535")),
        (np.full((2, 2, 3), 1.01), ("0..1", "255")),
        (np.full((2, 2, 3), -2.1), ("0..1", "normalisation")),
        (torch.zeros(2, 3, 9, 9), ("2x3x9x9",)),
        (torch.zeros(1, 3, 9, 9), ("batch of one", "picture[0]")),
        (torch.zeros(3, 9, 3), ("first or last",)),
        (torch.empty(3, 9, 9, device="meta"), ("no plain values",)),
        (torch.zeros(3, 9, 9).to_sparse(), ("no plain values",)),
        (np.full((2, 2, 3), "x"), ("uint8",)),
        (np.full((2, 2, 3), 1j), ("uint8",)),
    ],
)
def test_unsound_arrays_are_refused(array: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(PictureError) as error:
        read_picture(array)
    assert_one_line(error, *words)


def closed(source: Any) -> Any:
    source.close()
    return source


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def holding(folder: Path, text: str) -> Path:
    (folder / "a.png").write_text(text)
    return folder / "a.png"


UNSOUND: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda folder: folder / "none.png", "no such picture"),
    "empty file": (lambda folder: holding(folder, ""), "0 bytes"),
    "folder": (lambda folder: folder, "folder"),
    "text": (lambda folder: holding(folder, "no picture at all"), "not a picture"),
    "pipe": (pipe, "pipe"),
    "no name": (lambda folder: " ", "path is empty"),
    "NUL": (lambda folder: "a\0b.png", "no such picture"),
    "half a surrogate": (lambda folder: "\ud800.png", "no such picture"),
    "lines in a name": (lambda folder: "a\nb\x1b[31m.png", "no such picture"),
    "long name": (lambda folder: "a" * 100_000, "cannot be read"),
    "nobody's home": (lambda folder: "~nobody-of-this-name/a.png", "cannot be read"),
    "web address": (lambda folder: "https://example.org/a.png", "download"),
    "store address": (lambda folder: "s3://bucket/a.png", "download"),
    "file address of another machine": (lambda folder: "file://other/a.png", "another machine"),
    "malformed address": (lambda folder: "file://[a/b.png", "malformed"),
    "data address without data": (lambda folder: "data:image/png;base64", "cannot be decoded"),
    "data address, not base64": (lambda folder: "data:image/png;base64,!!!", "cannot be decoded"),
    "data address of a drawing": (lambda folder: "data:image/svg+xml;utf8,<svg/>", "not a picture"),
    "base64 of no picture": (lambda folder: "abcdefgh" * 20, "no such picture"),
    "base64 cut short": (lambda folder: base64.b64encode(png_claiming(9, 9)).decode()[:80], "damaged or cut short"),
    "no bytes": (lambda folder: b"", "empty"),
    "empty file object": (lambda folder: io.BytesIO(), "empty"),
    "closed file object": (lambda folder: closed(io.BytesIO(b"x")), "closed"),
    "text file object": (lambda folder: io.StringIO("x"), "binary"),
    "closed PIL": (lambda folder: closed(Image.new("RGB", (3, 3))), "closed"),
    "number": (lambda folder: 3, "int"),
    "nothing": (lambda folder: None, "NoneType"),
    "dict": (lambda folder: {"bytes": b""}, "dict"),
    "path that is none": (lambda folder: AsBytes(5), "gives no path"),
    "released view": (lambda folder: released(), "cannot be read"),
    "nested tensor": (lambda folder: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "no plain values"),
    "span of time": (lambda folder: np.zeros((2, 2), "m8[s]"), "timedelta64"),
    "time": (lambda folder: np.zeros((2, 2), "M8[s]"), "datetime64"),
    "records": (lambda folder: np.zeros((2, 2), [("r", "u1")]), "floating point in 0..1"),
    "one value": (lambda folder: np.array(3), "got a single value"),
    "one value of torch's": (lambda folder: torch.tensor(3.0), "got a single value"),
    "web address after white space": (lambda folder: " https://example.org/a.png", "download"),
    "class": (lambda folder: Image.Image, "type"),
    "lists": (lambda folder: [[1, 2]], "list"),
    "packed": (lambda folder: gzip.compress(b"x"), "not a picture"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", UNSOUND)
def test_what_is_no_picture_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    make, words = UNSOUND[kind]
    with pytest.raises(PictureError) as error:
        read_picture(make(tmp_path))
    assert_one_line(error, words)


def test_no_other_program_is_started_to_decode_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Image.new("RGB", (9, 9)), tmp_path / "a.eps")
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("a program was started"))
    for source in (path, path.read_bytes(), Image.open(io.BytesIO(path.read_bytes())), path.rename(tmp_path / "b.png")):
        with pytest.raises(PictureError) as error:
            read_picture(source)
        assert_one_line(error)


@pytest.mark.parametrize("name", ["a.avif", "a.webp", "a.png", "a.jpg", "a.tiff", "a.jp2", "a.ico"])
def test_a_damaged_file_gives_a_picture_or_our_error(tmp_path: Path, picture: np.ndarray, name: str) -> None:
    whole = saved(Image.fromarray(picture).resize((64, 48)), tmp_path / name).read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 40):
        broken = bytearray(whole)
        broken[place] ^= 0xFF
        with suppress(PictureError):
            assert read_picture(broken).ndim == 3


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


@pytest.mark.parametrize("kind", ["jpeg", "PIL", "array"])
def test_what_is_above_the_limit_is_read_smaller_where_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    for name, most in (("MAX_PIXELS", 4000), ("IN_MEMORY", 8000)):
        monkeypatch.setattr(pictures, name, most)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    wide = Image.new("RGB", (120, 60), RED)
    if kind == "jpeg":
        got = read_picture(saved(wide, tmp_path / "a.jpg"))
    else:
        got = read_picture(wide if kind == "PIL" else np.asarray(wide))
    assert got.shape == (30, 60, 3)
    assert np.abs(got.astype(int) - RED).max() <= 2
    assert "read as 60x30" in caplog.text
    for refused in (
        saved(wide, tmp_path / "a.png"),
        Image.new("RGB", (90, 90)),
        np.zeros((60, 120, 3)),
        Image.new("I", (120, 60)),
    ):
        with pytest.raises(PictureError, match="limit"):
            read_picture(refused)


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


def test_a_ribbon_that_would_grow_beyond_memory_is_refused() -> None:
    with pytest.raises(PictureError, match="grows to"):
        preprocessing().pixels(np.zeros((200_000, 1, 3), np.uint8), "crop")


def test_a_panorama_is_made_smaller_before_its_square_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pixels and its place on the map are those of the whole picture, to a fraction of a model pixel."""
    panorama = np.full((100, 400, 3), MEAN, np.uint8)
    panorama[60:90, 310:390] = (255, 0, 0)
    whole = preprocessing().pixels(panorama, "pad")
    monkeypatch.setattr(pictures, "MAX_PIXELS", 150 * 150)
    small = preprocessing().pixels(panorama, "pad")
    assert small.shape == whole.shape
    assert float((small - whole).abs().max()) < 0.15 * float(whole.max() - whole.min())
    redness = (small[0, 0] - small[0, 2]).numpy().reshape(4, 8, 4, 8).mean((1, 3))
    assert np.unravel_index(redness.argmax(), (4, 4)) == preprocessing().map(400, 100, "pad").patch_at(350, 75)


def test_a_lab_records_the_fit_and_the_two_differ(tiny_random: Lab, picture: np.ndarray) -> None:
    own, pad, crop = (tiny_random.ask(picture, "What?", fit=fit, max_new_tokens=1) for fit in (None, "pad", "crop"))
    assert [run.map.mode for run in (own, pad, crop)] == ["pad", "pad", "crop"]
    assert [run.options["fit"] for run in (own, pad, crop)] == ["pad", "pad", "crop"]
    assert own.logprobs.tolist() == pad.logprobs.tolist() != crop.logprobs.tolist()
    pixels = tiny_random.pixels(picture, "crop")
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels.dtype == tiny_random.dtype
