"""From a picture to the model's square input, and the exact map back.

Two ways, recorded with every run:
- ``pad``: LLaVA-1.5's own: the picture is set in the middle of a square of the mean colour, then resized;
- ``crop``: the hub's default: the short side is resized to the square's, the middle is cut out.
A processor that only squeezes pictures into the square (SigLIP's) is padded first, which keeps shapes.

The pixels come from the checkpoint's own image processor; the map repeats its arithmetic, and a test
holds the two together. Sources: haotian-liu/LLaVA @ c121f04 ``llava/mm_utils.py`` (expand2square);
transformers ``CLIPImageProcessor``, ``LlavaImageProcessor`` (``do_pad``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.errors import CheckpointError, OptionError, PictureError
from llava_lab.geometry import MODES, Mode, PictureMap
from llava_lab.models.pictures import MAX_PIXELS


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
