"""From any picture a user has to the model's square input, and the exact map back.

    pixels = read_picture("car.jpg")  # uint8, height x width x 3
    lab.preprocessing.map(*pixels.shape[1::-1]).patch_box(0, 0)

What is read (`read_picture`, the only reader of pictures in the package):
- a path, a ``file:`` address, a ``data:`` address, or a picture's base64 text; addresses on the web are refused;
- encoded bytes, or a file object opened as binary (`BytesIO`, ``open(path, "rb")``), read from its beginning;
- a PIL image; a numpy array (height, width[, 1|3|4]) or what gives one; a torch tensor, channels first or last.

How. One rule per kind of picture:
- only formats that are decoded inside this process are opened (`FORMATS`): Pillow hands an EPS to another program;
- a file is read to its end, so a truncated one is noticed; an animated file gives its first frame (a PIL image gives the frame
  it stands on);
- EXIF rotation is applied; colour profiles are ignored (the vision tower was trained that way);
- transparency (RGBA, LA, a palette's transparent colour) is laid on white;
- grey becomes three equal channels; palette, CMYK, YCbCr and the like are converted by Pillow;
- whole numbers wider than 8 bits are taken as they are where they stay within 0..255 in 32 bits or more, else as 16 bits, scaled
  by 1/257; 16 bits that would come out next to black are refused, because they are hardly ever meant so;
- 16-bit colours in a file are decoded to 8 by Pillow, and refused the same way where nothing but black is left;
- floating point must lie in 0..1, half a step of 8 bits over at most, and is scaled by 255;
- above `MAX_PIXELS` a JPEG is decoded at a half, a quarter or an eighth of its size, and what is in memory is reduced; other
  files are refused before their pixels are decoded.

Making a square. Two ways, recorded with every run:
- ``pad``: LLaVA-1.5's own: the picture is set in the middle of a square of the mean colour, then resized;
- ``crop``: the hub's default: the short side is resized to the square's, the middle is cut out.
A processor that only squeezes pictures into the square (SigLIP's) is padded first, which keeps shapes. A panorama whose padded
square would be above `MAX_PIXELS` is made smaller by a whole number first; its map stays true to a tenth of a model pixel.

The pixels come from the checkpoint's own image processor; the map repeats its arithmetic, and a test holds the two together.
Sources: haotian-liu/LLaVA @ c121f04 ``llava/mm_utils.py`` (expand2square); transformers ``CLIPImageProcessor``,
``LlavaImageProcessor`` (``do_pad``).
"""

from __future__ import annotations

import base64
import io
import logging
import math
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageFile, ImageOps, JpegImagePlugin, UnidentifiedImageError
from torch import Tensor

from llava_lab.checks import array_of, held, reading, undoing, warnings_kept
from llava_lab.errors import CheckpointError, LabError, OptionError, PictureError, one_line
from llava_lab.geometry import MODES, Mode, PictureMap

logger = logging.getLogger(__name__)

MAX_PIXELS = 89_478_485  # Pillow's own warning limit (a 256 MB RGB picture); here nothing larger is kept
IN_MEMORY = 2 * MAX_PIXELS  # what is decoded already may have so many, to be reduced
SCALES = (2, 4, 8)  # at which a JPEG can be decoded smaller

PictureLike = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray | Tensor
# the picture of a question, or several, or none; lists of one kind of picture are no lists of any, so theirs is not said
Shown = PictureLike | list[Any] | tuple[PictureLike, ...] | None
KINDS = "a path, a file: or data: address, base64 text, bytes, a binary file object, a PIL image, an array or a tensor"

# What Pillow and its plugins decode in this process. Not EPS (Ghostscript), WMF, BUFR, GRIB, HDF5, MPEG (handlers of others),
# nor IPTC, which opens any format inside it.
FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JXL", "JPEG2000", "ICO", "CUR", "ICNS", "PPM"),
    *("TGA", "PCX", "DCX", "SGI", "QOI", "PSD", "DDS", "XBM", "XPM", "IM", "IMT", "MSP", "SUN", "PIXAR", "FLI", "FITS", "BLP"),
    *("FTEX", "GBR", "MCIDAS", "PCD", "SPIDER", "XVTHUMB"),
)
CHANNELS = (1, 3, 4)
WIDE_GREY = {"I", "I;16", "I;16L", "I;16B", "I;16N"}  # Pillow's modes for 16-bit (and 32-bit) grey
WIDE_COLOR = re.compile(r"(RGB|RGBA|RGBX|LA);16")  # how Pillow names the layout of 16-bit colours in a file
BLACK = 4096  # 16-bit values that stay below become 0 to 15 of 255
HAIR = 0.5 / 255  # what floating point may lie outside 0..1: less than 8 bits can show
ADDRESS = re.compile(r"\s*((data|file):|[a-z][a-z0-9+.-]+://)", re.IGNORECASE)  # one letter is a drive
JPEG = b"\xff\xd8\xff"  # how one begins
# How the base64 of PNG, JPEG, GIF, WebP, BMP, TIFF, AVIF begins; and the least that holds a picture.
BASE64 = (b"iVBORw0KGgo", b"/9j/", b"R0lGOD", b"UklGR", b"Qk", b"SUkq", b"TU0AK", b"AAAA")
SHORTEST = 40

_DECODING = threading.RLock()  # Pillow's switches and Python's warning filters belong to the whole process


def read_picture(source: PictureLike) -> np.ndarray:
    """Read anything that is a picture as uint8 (height, width, 3), upright RGB: see the list at the head of this file.

    Raises PictureError with one line on anything that is not a sound picture of a sensible size.

    >>> from llava_lab.models import read_picture
    >>> read_picture(run.picture).shape == run.picture.shape
    True
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, "the array")
    if isinstance(source, Tensor):
        return _from_tensor(source)
    if isinstance(source, Image.Image):
        return _from_image(source)
    if isinstance(source, str) and ADDRESS.match(source):
        return _from_address(source.strip())
    if isinstance(source, str | os.PathLike):
        return _from_path(_path_of(source))
    if isinstance(source, bytes | bytearray | memoryview):
        data = _held(source)
        return _from_bytes(_from_base64(data) or data, "the picture's bytes")
    if hasattr(source, "read"):
        data = _bytes_of(source)
        return _from_bytes(_from_base64(data) or data, "the file object's picture")
    if hasattr(source, "__array__"):
        name = f"the {type(source).__name__}"
        return _from_array(array_of(name, source, PictureError), name)
    raise PictureError(f"a picture is {KINDS}; got {type(source).__name__}")


def read_pictures(source: Shown) -> tuple[np.ndarray, ...]:
    """The pictures of one question: None is none, a list or tuple is several."""
    if source is None:
        return ()
    if not isinstance(source, list | tuple):
        return (read_picture(source),)
    if not source:
        raise PictureError("the list of pictures is empty; a question without a picture is asked with None")
    return tuple(read_picture(one) for one in source)


# -- where the bytes are ----------------------------------------------------------------


def _from_address(text: str) -> np.ndarray:
    scheme, _, rest = text.partition(":")
    if scheme.lower() == "data":
        head, comma, body = rest.partition(",")
        data: bytes | None = unquote_to_bytes(body.encode("utf-8", "replace"))
        if data and head.rstrip().lower().endswith(";base64"):
            data = _decoded(data)
        if not comma or data is None:
            raise PictureError(f"the data: address {_told(text)} cannot be decoded; expected data:image/png;base64,... whole")
        return _from_bytes(data, "the data: address's picture")
    if scheme.lower() != "file":
        raise PictureError(f"pictures are read from disk, got the address {_told(text)}; download it first and give the path")
    try:
        parts = urlsplit(text)
    except ValueError:
        raise PictureError(f"the address {_told(text)} is malformed; give the picture's path") from None
    if parts.netloc not in ("", "localhost"):
        raise PictureError(
            f"the address {_told(text)} names another machine, {_told(parts.netloc)}; expected file:///folder/name, or the path"
        )
    return _from_path(url2pathname(parts.path))


def _from_path(text: str) -> np.ndarray:
    name = _told(text)
    if not text.strip():
        raise PictureError("the picture's path is empty; give the path of a picture file")
    try:
        path = Path(text).expanduser()
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise PictureError(f"{name} is a folder; give the path of a picture in it")
        if not stat.S_ISREG(kind):
            raise PictureError(f"{name} is a pipe or a device; give the path of a picture file, or its bytes")
        with reading(path) as file:
            return _from_file(file, name, path.stat().st_size)
    except LabError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # also a NUL, half a surrogate, an unknown ~user, a name too long
        picture = _from_base64(text.encode("ascii", "replace"))
        if picture is not None:
            return _from_bytes(picture, "the base64 picture")
        if isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
            raise PictureError(f"no such picture: {name}") from None
        raise PictureError(f"the picture {name} cannot be read ({_reason(error)})") from None


def _path_of(source: str | os.PathLike) -> str:
    """A path as text; what stands for one may be of anybody's making."""
    try:
        return os.fsdecode(source)
    except Exception as error:
        raise PictureError(f"the {type(source).__name__} gives no path ({one_line(error)}); give the path as text") from None


def _held(source: bytes | bytearray | memoryview) -> bytes:
    try:
        return bytes(source)
    except ValueError as error:  # a view that was released
        raise PictureError(f"the {type(source).__name__} cannot be read ({one_line(error)}); give the picture's bytes") from None


def _bytes_of(source: Any) -> bytes:
    """All that a file object holds, from its beginning where it can go back."""
    try:
        if hasattr(source, "seekable") and source.seekable():
            source.seek(0)
        data = source.read()
    except Exception as error:  # a file object may be anybody's: closed, a broken connection, a reader of our own making
        raise PictureError(f"the file object cannot be read ({one_line(error)}); open it again, or give its bytes") from None
    if not isinstance(data, bytes | bytearray | memoryview):
        raise PictureError(f"the file object's read() gave {type(data).__name__}; open it as binary: open(path, 'rb')")
    return bytes(data)


def _from_base64(data: bytes) -> bytes | None:
    """The picture that base64 spells, or None for what is not the base64 of a picture."""
    begins = data[:SHORTEST].lstrip().startswith(BASE64) and len(data) >= SHORTEST
    return _decoded(data) if begins else None


def _decoded(text: bytes) -> bytes | None:
    """What base64 spells, also in lines, without padding, or with the letters of addresses; None where it is something else."""
    plain = text.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n").rstrip(b"=")
    try:
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except ValueError:
        return None


def _from_bytes(data: bytes, name: str) -> np.ndarray:
    return _from_file(io.BytesIO(data), name, len(data))


def _from_file(file: BinaryIO, name: str, size: int) -> np.ndarray:
    if size == 0:
        raise PictureError(f"{name} is empty (0 bytes); expected a picture file such as PNG or JPEG")
    with _sound_decoding(name), _opened(file, name) as image:
        return _to_rgb(image, name)


def _told(text: str) -> str:
    """A path or an address in a message: in one line and short."""
    short = text if len(text) <= 120 else f"{text[:60]}...{text[-30:]}"
    return short if short.isprintable() else repr(short)


def _reason(error: Exception) -> str:
    """Without the path once more, which may be megabytes long."""
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


# -- decoding ---------------------------------------------------------------------------


@contextmanager
def _sound_decoding(name: str) -> Iterator[None]:
    """Pillow's warnings and decoder errors become one PictureError; damage is never read over."""
    with held(_DECODING):
        lenient = ImageFile.LOAD_TRUNCATED_IMAGES  # other libraries switch this on for the whole process
        try:
            with undoing(lambda: setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)), warnings_kept():
                ImageFile.LOAD_TRUNCATED_IMAGES = False
                warnings.simplefilter("ignore")  # odd metadata (a phone's EXIF) does not make a picture unsound
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                yield
        except LabError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise PictureError(f"{name} unpacks to more than the limit of {MAX_PIXELS:,} pixels; give a smaller copy") from None
        except UnidentifiedImageError:
            raise PictureError(f"{name} is not a picture this reads; expected PNG, JPEG, GIF, WebP, TIFF or BMP") from None
        except Exception as error:  # decoders raise whatever they like: OSError, SyntaxError, struct.error, RuntimeError, ...
            raise PictureError(
                f"{name} is damaged or cut short, or was closed too early ({one_line(error)}); open or save it again"
            ) from None


def _opened(file: BinaryIO, name: str) -> Image.Image:
    """The picture, its pixels not decoded yet; a JPEG above the limit set to be decoded smaller."""
    Image.init()
    try:
        image: Image.Image = Image.open(file, formats=[each for each in FORMATS if each in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        file.seek(0)
        if file.read(len(JPEG)) != JPEG:
            raise
        file.seek(0)
        image = JpegImagePlugin.jpeg_factory(file)
    width, height = image.size
    # a progressive one is held whole while it is decoded, whatever comes out
    most = IN_MEMORY if "progressive" in image.info else MAX_PIXELS * SCALES[-1] ** 2
    if isinstance(image, JpegImagePlugin.JpegImageFile) and MAX_PIXELS < width * height <= most:
        scale = next(scale for scale in SCALES if width * height <= MAX_PIXELS * scale**2)
        image.draft(None, (width // scale, height // scale))
        _say_smaller(name, (width, height), image.size)
    return image


def _from_image(image: Image.Image) -> np.ndarray:
    waits = isinstance(image, ImageFile.ImageFile) and bool(getattr(image, "tile", None))  # not decoded yet
    if isinstance(image, ImageFile.StubImageFile) or (waits and image.format not in FORMATS):
        raise PictureError(f"a picture in {image.format} is decoded by another program; save it as PNG and give that")
    with _sound_decoding("the picture"):
        return _to_rgb(image, "the picture", most=IN_MEMORY)


def _to_rgb(image: Image.Image, name: str, *, most: int | None = None) -> np.ndarray:
    _check_size(image.width, image.height, name, most)
    wide_color = WIDE_COLOR.search(str(getattr(image, "tile", "")))  # known before it is decoded, to 8 bits, and not after
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode in WIDE_GREY or upright.mode == "F":
        _check_size(image.width, image.height, name)
        values = np.asarray(upright)
        grey = _to_8_bit(values, name)
        if isinstance(clear := upright.info.get("transparency"), int):
            grey[values == clear] = 255
        return _grey_to_rgb(grey[..., None])
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    plain = upright.convert("RGB")
    if wide_color and np.asarray(plain).max() < BLACK // 256:
        raise PictureError(
            f"{name} has 16 bits a colour and is black, or next to it; if its values are meant as 0..255, save it with 8 bits"
        )
    if plain.width * plain.height > MAX_PIXELS:
        plain = plain.reduce(math.ceil(math.sqrt(plain.width * plain.height / MAX_PIXELS)))
        _say_smaller(name, upright.size, plain.size)
    return np.array(plain, np.uint8)


def _say_smaller(name: str, before: tuple[int, int], after: tuple[int, int]) -> None:
    sizes = (*before, f"{MAX_PIXELS:,}", *after)
    logger.warning("%s has %dx%d pixels, more than the limit of %s; it is read as %dx%d", name, *sizes)


# -- numbers ----------------------------------------------------------------------------


def _from_tensor(tensor: Tensor) -> np.ndarray:
    """Channels first, as torchvision has them, or last."""
    array = array_of("the Tensor", tensor, PictureError)
    shape = "x".join(map(str, array.shape))
    if array.ndim == 4 and len(array) == 1:
        raise PictureError(f"the tensor is a batch of one picture, {shape}; give picture[0]")
    if array.ndim == 3 and array.shape[0] in CHANNELS:
        if array.shape[2] in CHANNELS:
            raise PictureError(
                f"a tensor of {shape} may have its channels first or last; give it as a numpy array, channels last"
            )
        array = array.transpose(1, 2, 0)
    return _from_array(array, "the tensor")


def _from_array(array: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(array)  # without a mask or a class of its own
    shape = "x".join(map(str, array.shape)) or "a single value"
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in CHANNELS:
        hint = "; move the channels last" if array.ndim == 3 and array.shape[0] in CHANNELS else ""
        raise PictureError(f"an array picture is (height, width) or (height, width, 1|3|4), got {shape}{hint}")
    plain = array.dtype == np.uint8
    _check_size(array.shape[1], array.shape[0], name, IN_MEMORY if plain else None)
    pixels = _to_8_bit(array, name)
    if pixels.shape[2] == 4 or pixels.shape[0] * pixels.shape[1] > MAX_PIXELS:
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        return _to_rgb(image, name, most=IN_MEMORY)
    return _grey_to_rgb(pixels) if pixels.shape[2] == 1 else np.ascontiguousarray(pixels)


def _to_8_bit(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype == np.uint8:
        return values.copy()
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if np.issubdtype(values.dtype, np.floating):
        return _from_float(values, name)
    if values.dtype.kind in "iu":  # numpy counts a span of time among the whole numbers
        return _from_whole(values, name)
    raise PictureError(f"{name} must be uint8, uint16 or floating point in 0..1, got {values.dtype}")


def _from_whole(values: np.ndarray, name: str) -> np.ndarray:
    """Whole numbers of another width than 8 bits."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise PictureError(f"{name} has values {low}..{high}; expected 0..255, or 16 bits, 0..65535")
    if high <= 255 and values.dtype != np.uint16:
        return values.astype(np.uint8)
    if 0 < high < BLACK:
        raise PictureError(
            f"{name} has values {low}..{high}, next to black if they are 16 bits; scale them to the range 0..65535, "
            "or give 8 bits, 0..255"
        )
    return np.round(values.astype(np.float64) / 257).astype(np.uint8)


def _from_float(values: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise PictureError(f"{name} has values that are not finite; floating point pictures lie in 0..1")
    low, high = float(values.min()), float(values.max())
    if low < -HAIR or high > 1 + HAIR:
        hint = "undo its normalisation, or cut it to the range" if low < -HAIR else "divide by 255?"
        raise PictureError(f"{name} has values {low:g}..{high:g}; floating point pictures lie in 0..1 ({hint})")
    return np.round(values.astype(np.float64).clip(0, 1) * 255).astype(np.uint8)


def _grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey, 3, axis=2)


def _check_size(width: int, height: int, name: str, most: int | None = None) -> None:
    if width < 1 or height < 1:
        raise PictureError(f"{name} is empty ({width}x{height} pixels)")
    if width * height > (most or MAX_PIXELS):
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
        if mode == "pad":
            picture = pad_to_square(_for_padding(picture), self.color)
        else:
            self._check_crop(picture)
        options = {"do_pad": False} if hasattr(self.processor, "do_pad") else {}
        out = self.processor([picture], input_data_format="channels_last", return_tensors="np", **options)
        pixels = torch.from_numpy(np.asarray(out["pixel_values"], np.float32))
        assert pixels.shape == (1, 3, self.size, self.size), pixels.shape
        return pixels

    def _check_crop(self, picture: np.ndarray) -> None:
        height, width = picture.shape[:2]
        grown = self.resized * self.resized * max(width, height) / min(width, height)
        if grown > MAX_PIXELS:
            raise PictureError(
                f"a {width}x{height} picture grows to {grown:,.0f} pixels under fit='crop', more than {MAX_PIXELS:,}; "
                "cut it nearer to a square, or use fit='pad'"
            )


def _for_padding(picture: np.ndarray) -> np.ndarray:
    """The picture, made smaller by a whole number where the square around it would be above the limit."""
    times = math.ceil(max(picture.shape[:2]) / math.isqrt(MAX_PIXELS))
    return picture if times == 1 else np.asarray(Image.fromarray(picture).reduce(times))


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
