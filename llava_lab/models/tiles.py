"""A Lab for models that look at a picture several times: whole in one square, and enlarged in tiles (LLaVA-NeXT, OneVision).

    run = ll.load("llava-hf/llava-v1.6-vicuna-7b-hf").ask("street.jpg", "How many cars?")
    overview, tiles = run.views  # where every token stands in the sequence and on the picture

The pixels come from the checkpoint's own image processor and the numbers of rows and columns from transformers' own functions;
what is added here is where every token lies in the sequence and on the picture (`views`). `Run.map` and the patch grid are the
overview's. What cannot tell views apart asks for `inputs` or `pixels` as of a single square, and is refused in one line before
it starts: a map that mixed the views would be silently wrong.

OneVision draws the tiles' grid smaller where it has more cells than so many squares (``anyres_max_9``). Its squares of 384 px
hold 27 patches of 14 and 6 px that no patch sees; the tiles' map spreads the 27 evenly, which is wrong by less than half a patch.

Sources: transformers ``LlavaNextImageProcessor`` (get_image_patches), ``pack_image_features`` of both models;
haotian-liu/LLaVA @ c121f04 ``llava/mm_utils.py`` (process_anyres_image) and ``llava_arch.py`` (spatial_unpad).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.modeling_llava_next import unpad_image

from llava_lab.errors import CheckpointError, OptionError, PictureError
from llava_lab.geometry import PictureMap, View
from llava_lab.models import layout
from llava_lab.models.lab import Lab
from llava_lab.models.pictures import MAX_PIXELS, PictureLike, read_picture
from llava_lab.results import Run

MOST = 1.1  # times as many cells as allowed, along a side, before the grid is drawn smaller
LONGEST = 100  # times as long as wide; beyond, the enlarged picture has no whole row of cells


@dataclass(frozen=True)
class Tiling:
    """What the processor does to a picture, as plain numbers. It stands where a `Preprocessing` stands in other labs."""

    processor: Any  # the checkpoint's image processor
    size: int  # side of every square, pixels
    rows: int  # of one square
    cols: int
    patch: int
    pinpoints: tuple[tuple[int, int], ...]  # (height, width) an enlarged picture may have
    most: int | None = None  # squares' worth of cells that the tiles may have (OneVision); None: no limit
    own: str = "whole"  # the overview holds all of the picture, each axis scaled by itself

    @classmethod
    def of(
        cls,
        processor: Any,
        *,
        image_size: int,
        patch: int,
        grid: tuple[int, int],
        pinpoints: Any,
        most: int | None = None,
    ) -> Tiling:
        """Read an image processor's settings. Raises CheckpointError where they do not fit the model."""
        sides = {_side(processor.size), _side(processor.crop_size)} if processor.do_center_crop else {_side(processor.size)}
        if sides != {image_size}:
            raise CheckpointError(
                f"the image processor makes squares of {' and '.join(map(str, sorted(sides)))} px, the vision tower takes "
                f"{image_size} px in patches of {patch}; the two files of this checkpoint do not belong together"
            )
        shapes = tuple((int(height), int(width)) for height, width in pinpoints)
        own = tuple((int(height), int(width)) for height, width in processor.image_grid_pinpoints)
        if shapes != own:
            raise CheckpointError(f"config.json enlarges pictures to {shapes}, the image processor to {own}; expected the same")
        if not shapes or any(height % image_size or width % image_size for height, width in shapes):
            raise CheckpointError(f"image_grid_pinpoints must be multiples of {image_size} px, got {shapes}")
        return cls(processor, image_size, *grid, patch, shapes, most)

    def mode(self, fit: str | None) -> str:
        """The only way there is."""
        if fit not in (None, self.own):
            raise OptionError(f"fit must be None: this model takes all of the picture, whole and in tiles; got {fit!r}")
        return self.own

    def map(self, width: int, height: int, fit: str | None = None) -> PictureMap:
        """The way from picture pixels to the overview's patches."""
        self.mode(fit)
        scale_x, scale_y = self.size / width, self.size / height
        return PictureMap(width, height, self.rows * self.patch, self.rows, self.cols, "whole", scale_x, scale_y, 0.0, 0.0)

    def views(self, width: int, height: int, start: int = 0) -> tuple[View, View]:
        """Overview and tiles of a picture of ``width x height`` whose first token stands at `start`."""
        overview = View("overview", start, False, self.map(width, height))
        tall, wide = select_best_resolution((height, width), [list(shape) for shape in self.pinpoints])
        blank = np.broadcast_to(np.uint8(0), (3, height, width))
        new_height, new_width = get_patch_output_size(blank, (tall, wide), input_data_format=ChannelDimension.FIRST)
        whole = tall // self.size * self.rows, wide // self.size * self.cols  # cells of the enlarged picture with its padding
        rows, cols = unpad_image(torch.empty(0, *whole), (height, width)).shape[1:]
        if min(rows, cols) < 1:
            raise PictureError(f"a {width}x{height} picture leaves no row of tiles; cut it nearer to a square")
        across = _Axis(width, new_width, (wide - new_width) // 2, (whole[1] - cols) // 2, cols, self.size / self.cols)
        down = _Axis(height, new_height, (tall - new_height) // 2, (whole[0] - rows) // 2, rows, self.size / self.rows)
        shrunk = self._shrunk(rows, cols)
        return overview, View(
            "tiles",
            overview.stop,
            True,
            _grid_map(across, down, *shrunk),
            wide // self.size,
            down.tiles(shrunk[0], self.rows),
            across.tiles(shrunk[1], self.cols),
        )

    def _shrunk(self, rows: int, cols: int) -> tuple[int, int]:
        """The grid that is left of ``rows x cols`` cells."""
        ratio = math.sqrt(rows * cols / (self.most * self.rows**2)) if self.most else 0.0
        return (int(rows // ratio), int(cols // ratio)) if ratio > MOST else (rows, cols)

    def count(self, width: int, height: int) -> int:
        """How many image tokens stand in the sequence for a picture of ``width x height``."""
        return self.views(width, height)[-1].stop

    def inputs(self, picture: np.ndarray) -> dict[str, Tensor]:
        """``pixel_values`` float32 (1, squares, 3, S, S), the overview first; ``image_sizes`` int64 (1, 2), height, width."""
        height, width = picture.shape[:2]
        if max(height, width) > LONGEST * min(height, width) or height * width > MAX_PIXELS:
            raise PictureError(
                f"a {width}x{height} picture is too long or too large for tiles; expected at most {MAX_PIXELS:,} pixels and a "
                f"long side of at most {LONGEST} times the short one"
            )
        out = self.processor([picture], input_data_format="channels_last", return_tensors="np")
        pixels = torch.from_numpy(np.asarray(out["pixel_values"], np.float32))
        assert pixels.shape[2:] == (3, self.size, self.size), pixels.shape
        return {"pixel_values": pixels, "image_sizes": torch.from_numpy(np.asarray(out["image_sizes"], np.int64))}


@dataclass(frozen=True)
class _Axis:
    """One axis of the enlarged picture: where the picture is drawn on it, and which cells are kept."""

    picture: int  # pixels
    drawn: int  # pixels of the enlarged picture
    offset: int  # of the drawn picture
    cut: int  # cells of padding before the first that is kept
    cells: int  # that are kept
    cell: float  # pixels of the enlarged picture

    def tiles(self, count: int, side: int) -> tuple[int, ...]:
        """The tile of each of `count` cells that stand evenly for the kept ones, by its middle; `side` cells make a tile."""
        return tuple(int((self.cut + (i + 0.5) * self.cells / count) // side) for i in range(count))

    def onto(self, side: int) -> tuple[float, float]:
        """Scale and offset from the picture to a square of `side` that holds the kept cells."""
        stretch = side / (self.cells * self.cell)
        return self.drawn / self.picture * stretch, (self.offset - self.cut * self.cell) * stretch


def _grid_map(across: _Axis, down: _Axis, rows: int, cols: int) -> PictureMap:
    """The map of ``rows x cols`` cells. A PictureMap divides one square evenly, so each axis is scaled onto the same side."""
    side = math.lcm(rows, cols)
    (scale_x, left), (scale_y, top) = across.onto(side), down.onto(side)
    return PictureMap(across.picture, down.picture, side, rows, cols, "whole", scale_x, scale_y, left, top)


def _side(size: Any) -> int:
    edge = size.get("shortest_edge") or size.get("height")
    if size.get("width") not in (None, edge):
        raise CheckpointError(f"the image processor makes {size['width']}x{size['height']} pictures; expected a square")
    return int(edge)


class TiledLab(Lab):
    """A LLaVA-NeXT or LLaVA-OneVision with its processor. See `Lab`."""

    preprocessing: Any  # a Tiling
    one_square = False

    def measure(self) -> None:
        self.grid = layout.patch_grid(self.model)
        config: Any = self.model.config
        vision = config.vision_config
        self.preprocessing = Tiling.of(
            self.processor.image_processor,
            image_size=vision.image_size,
            patch=vision.patch_size,
            grid=self.grid,
            pinpoints=config.image_grid_pinpoints,
            most=_most(config),
        )

    def check_pictures(self, count: int) -> None:
        if count > 1:
            raise OptionError(
                f"{self.name!r} looks at a picture whole and in tiles, and a question to it takes one picture here, got {count}; "
                "ask about each, or set them side by side in one"
            )

    def pixels(self, picture: np.ndarray, fit: str | None = None) -> Tensor:
        raise OptionError(self._refusal())

    def inputs(self, run: Run, *, picture: np.ndarray | None = None, tiles: bool = False) -> dict[str, Tensor]:
        """As `Lab.inputs`, with ``image_sizes`` beside; `tiles` is the caller's word that it tells views apart."""
        if not tiles:
            raise OptionError(self._refusal())
        return super().inputs(run, picture=picture, tiles=tiles)

    def shown(self, picture: np.ndarray, fit: str | None = None) -> dict[str, Tensor]:
        self.preprocessing.mode(fit)
        inputs = self.preprocessing.inputs(picture)
        return {
            "pixel_values": inputs["pixel_values"].to(self.device, self.dtype),
            "image_sizes": inputs["image_sizes"].to(self.device),
        }

    def image_tokens(self, picture: PictureLike | None) -> int:
        if picture is None:
            raise OptionError(
                f"how many image tokens {self.name!r} makes depends on the picture's shape; give the picture, or ask first"
            )
        height, width = read_picture(picture).shape[:2]
        return self.preprocessing.count(width, height)

    def views(self, width: int, height: int, span: tuple[int, int]) -> tuple[View, ...]:
        views = self.preprocessing.views(width, height, span[0])
        if views[-1].stop != span[1]:
            raise CheckpointError(f"expected {span[1] - span[0]} image tokens in two views, found {views[-1].stop - span[0]}")
        return views

    def _refusal(self) -> str:
        return (
            f"{self.name!r} looks at a picture whole and in tiles, and this was made for one square of image tokens; "
            "with tiles work methods whose METHODS[name].reach is 'tokens' or 'pixels', and faithfulness and compare with these"
        )


def _most(config: Any) -> int | None:
    """How many squares' worth of cells OneVision's tiles may have, as ``anyres_max_9`` says; NeXT has no limit."""
    named = getattr(config, "vision_aspect_ratio", None)
    if named is None:
        return None
    number = str(named).removeprefix("anyres_max_")
    if not number.isdecimal() or int(number) < 1:
        raise CheckpointError(f"vision_aspect_ratio must be anyres_max_N, got {named!r}")
    return int(number)
