"""From any picture a user has to the model's square input, and the exact map back.

    pixels = read_picture("car.jpg")  # uint8, height x width x 3
    lab.preprocessing.map(*pixels.shape[1::-1]).patch_box(0, 0)

Reading. One rule per kind of picture:
- a file is read to its end, so a truncated one is noticed; an animated file gives its first frame (a PIL image gives the frame
  it stands on);
- EXIF rotation is applied; colour profiles are ignored (the vision tower was trained that way);
- transparency (RGBA, LA, a palette's transparent colour) is laid on white;
- grey becomes three equal channels; palette, CMYK, YCbCr and the like are converted by Pillow;
- 16-bit values are scaled by 1/257, floating point must lie in 0..1 and is scaled by 255;
- anything above `MAX_PIXELS` is refused before its pixels are decoded.

Making a square. Two ways, recorded with every run:
- ``pad``: LLaVA-1.5's own: the picture is set in the middle of a square of the mean colour, then resized;
- ``crop``: the hub's default: the short side is resized to the square's, the middle is cut out.
A processor that only squeezes pictures into the square (SigLIP's) is padded first, which keeps shapes.

The pixels come from the checkpoint's own image processor; the map repeats its arithmetic, and a test holds the two together.
Sources: haotian-liu/LLaVA @ c121f04 ``llava/mm_utils.py`` (expand2square); transformers ``CLIPImageProcessor``,
``LlavaImageProcessor`` (``do_pad``).
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from llava_lab.errors import CheckpointError, OptionError, PictureError, one_line
from llava_lab.geometry import MODES, Mode, PictureMap

MAX_PIXELS = 89_478_485  # Pillow's own warning limit (a 256 MB RGB picture); here it is an error

PictureLike = str | os.PathLike | bytes | Image.Image | np.ndarray

WIDE_GREY = {"I", "I;16", "I;16L", "I;16B", "I;16N"}  # Pillow's modes for 16-bit (and 32-bit) grey


def read_picture(source: PictureLike) -> np.ndarray:
    """Read a path, encoded bytes, a PIL image or a numpy array as uint8 (height, width, 3), upright RGB.

    Raises PictureError with one line on anything that is not a sound picture of a sensible size.

    >>> from llava_lab.models import read_picture
    >>> read_picture(run.picture).shape == run.picture.shape
    True
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        with _sound_decoding("the picture"):
            return _to_rgb(source.copy(), "the picture")
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_file(io.BytesIO(source), "the picture's bytes", len(source))
    if isinstance(source, str | os.PathLike):
        return _from_path(source)
    raise PictureError(f"a picture is a path, bytes, a PIL image or a numpy array, got {type(source).__name__}")


def _from_path(source: str | os.PathLike) -> np.ndarray:
    text = os.fspath(source)
    if isinstance(text, str) and text.startswith(("http://", "https://", "data:")):
        raise PictureError(f"pictures are read from disk, got the address {text[:60]!r}; download it first and give the path")
    path = Path(os.fsdecode(text)).expanduser()
    if path.is_dir():
        raise PictureError(f"{path} is a folder; give the path of a picture in it")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _from_file(file, str(path), size)
    except FileNotFoundError:
        raise PictureError(f"no such picture: {path}") from None
    except OSError as error:
        raise PictureError(f"{path} cannot be read ({one_line(error)})") from None


def _from_file(file: io.BufferedIOBase, name: str, size: int) -> np.ndarray:
    if size == 0:
        raise PictureError(f"{name} is empty (0 bytes); expected a picture file such as PNG or JPEG")
    with _sound_decoding(name), Image.open(file) as image:  # type: ignore[arg-type]
        return _to_rgb(image, name)


@contextmanager
def _sound_decoding(name: str) -> Iterator[None]:
    """Pillow's warnings and decoder errors become one PictureError; damage is never read over."""
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES  # other libraries switch this on for the whole process
    try:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata (a phone's EXIF) does not make a picture unsound
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PictureError(f"{name} unpacks to more than the limit of {MAX_PIXELS:,} pixels; give a smaller copy") from None
    except UnidentifiedImageError:
        raise PictureError(f"{name} is not a picture Pillow can read; expected PNG, JPEG, GIF, WebP, TIFF or BMP") from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, struct.error) as error:  # what Pillow's decoders raise
        raise PictureError(f"{name} is damaged or cut short ({one_line(error)}); save it again") from None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    _check_size(image.width, image.height, name)
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode in WIDE_GREY:
        return _grey_to_rgb(_from_16_bit(np.asarray(upright), name)[..., None])
    if upright.mode == "F":
        return _grey_to_rgb(_from_float(np.asarray(upright), name)[..., None])
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return np.array(upright.convert("RGB"), np.uint8)


def _from_array(array: np.ndarray) -> np.ndarray:
    shape = "x".join(map(str, array.shape))
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        hint = "; move the channels last" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise PictureError(f"an array picture is (height, width) or (height, width, 1|3|4), got {shape}{hint}")
    _check_size(array.shape[1], array.shape[0], "the array")
    pixels = _to_8_bit(array, "the array")
    if pixels.shape[2] == 4:
        return _to_rgb(Image.fromarray(pixels, "RGBA"), "the array")
    return _grey_to_rgb(pixels) if pixels.shape[2] == 1 else np.ascontiguousarray(pixels)


def _to_8_bit(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array.copy()
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return _from_16_bit(array, name)
    if np.issubdtype(array.dtype, np.floating):
        return _from_float(array, name)
    if np.issubdtype(array.dtype, np.integer):
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > 255:
            raise PictureError(f"{name} of {array.dtype} must lie in 0..255, got {low}..{high}")
        return array.astype(np.uint8)
    raise PictureError(f"{name} must be uint8, uint16 or floating point in 0..1, got {array.dtype}")


def _from_16_bit(values: np.ndarray, name: str) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise PictureError(f"{name} has grey values {low}..{high}; expected 16 bits, 0..65535")
    return np.round(values.astype(np.float64) / 257).astype(np.uint8)


def _from_float(values: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise PictureError(f"{name} has values that are not finite; floating point pictures lie in 0..1")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise PictureError(f"{name} has values {low:g}..{high:g}; floating point pictures lie in 0..1 (divide by 255?)")
    return np.round(values.astype(np.float64) * 255).astype(np.uint8)


def _grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey, 3, axis=2)


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise PictureError(f"{name} is empty ({width}x{height} pixels)")
    if width * height > MAX_PIXELS:
        raise PictureError(f"{name} has {width}x{height} pixels, more than the limit of {MAX_PIXELS:,}; give a smaller copy")


@dataclass(frozen=True)
class Preprocessing:
    """What an image processor does to a picture, as plain numbers."""

    processor: Any  # the checkpoint's image processor
    resized: int  # side the (short) edge is resized to, pixels
    size: int  # side of the model's square input, pixels
    rows: int
    cols: int
    patch: int
    own: Mode  # the checkpoint's own way
    can_crop: bool  # whether the processor itself crops; without it only `pad` keeps shapes
    color: tuple[int, int, int]  # of the padding

    @classmethod
    def of(cls, processor: Any, *, image_size: int, patch: int, grid: tuple[int, int]) -> Preprocessing:
        """Read an image processor's settings. Raises CheckpointError where they do not fit the model."""
        short = _side(processor.size)
        crops = bool(getattr(processor, "do_center_crop", False))
        size = _side(processor.crop_size) if crops else short
        if not getattr(processor, "do_resize", True) or size != image_size or short < size:
            raise CheckpointError(
                f"the image processor makes {size} px squares (resize {short}), the vision tower takes {image_size} px; "
                "the two files of this checkpoint do not belong together"
            )
        own: Mode = "pad" if getattr(processor, "do_pad", False) or not crops else "crop"
        mean = processor.image_mean or (0.0, 0.0, 0.0)
        red, green, blue = (int(value * 255) for value in mean)  # LLaVA truncates: (122, 116, 104) for CLIP
        return cls(processor, short, size, *grid, patch, own, crops, (red, green, blue))

    def mode(self, fit: str | None) -> Mode:
        """The chosen way, None being the checkpoint's own."""
        if fit is None:
            return self.own
        if fit not in MODES:
            raise OptionError(f"fit must be None (the checkpoint's own, {self.own}) or one of {', '.join(MODES)}, got {fit!r}")
        if fit == "crop" and not self.can_crop:
            raise OptionError("fit='crop' is not possible: this checkpoint's image processor does not crop; use fit='pad'")
        return fit

    def map(self, width: int, height: int, fit: str | None = None) -> PictureMap:
        """The way from picture pixels to patches, for a picture of ``width x height``."""
        plain = PictureMap.make(width, height, size=self.resized, rows=self.rows, cols=self.cols, mode=self.mode(fit))
        cut = (self.resized - self.size) // 2  # a processor may resize to more than it keeps
        if plain.mode == "crop":
            left, top = _crop_offsets(width, height, self.resized, self.size)
        else:
            left, top = plain.offset_x - cut, plain.offset_y - cut
        # a patch size that does not divide the square leaves its last pixels unseen (SigLIP 384/14)
        return replace(plain, size=self.rows * self.patch, offset_x=left, offset_y=top)

    def pixels(self, picture: np.ndarray, fit: str | None = None) -> Float[Tensor, "1 3 S S"]:
        """The model's input, float32, through the checkpoint's own processor."""
        mode = self.mode(fit)
        self._check_shape(picture, mode)
        if mode == "pad":
            picture = pad_to_square(picture, self.color)
        options = {"do_pad": False} if hasattr(self.processor, "do_pad") else {}
        out = self.processor([picture], input_data_format="channels_last", return_tensors="np", **options)
        pixels = torch.from_numpy(np.asarray(out["pixel_values"], np.float32))
        assert pixels.shape == (1, 3, self.size, self.size), pixels.shape
        return pixels

    def _check_shape(self, picture: np.ndarray, mode: Mode) -> None:
        height, width = picture.shape[:2]
        short, long = min(width, height), max(width, height)
        grown = long * long if mode == "pad" else self.resized * self.resized * long / short
        if grown > MAX_PIXELS:
            raise PictureError(
                f"a {width}x{height} picture grows to {grown:,.0f} pixels under fit={mode!r}, more than {MAX_PIXELS:,}; "
                "cut it nearer to a square or give a smaller copy"
            )


def pad_to_square(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """The picture in the middle of a square of `color` (LLaVA's expand2square)."""
    height, width = picture.shape[:2]
    side = max(height, width)
    if height == width:
        return picture
    square = np.empty((side, side, 3), np.uint8)
    square[:] = color
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = picture
    return square


def _crop_offsets(width: int, height: int, resized: int, size: int) -> tuple[float, float]:
    """Where the centre crop puts the resized picture's corner; transformers rounds both down."""
    long = int(resized * max(width, height) / min(width, height))
    new_width, new_height = (resized, long) if width <= height else (long, resized)
    return -float((new_width - size) // 2), -float((new_height - size) // 2)


def _side(size: Any) -> int:
    """The square side behind a processor's size entry: {'shortest_edge': s} or {'height': s, 'width': s}."""
    edge = size.get("shortest_edge") if hasattr(size, "get") else getattr(size, "shortest_edge", None)
    height, width = (edge, edge) if edge else (size["height"], size["width"])
    if height != width:
        raise CheckpointError(f"the image processor makes {width}x{height} pictures; expected a square")
    return int(height)
