"""From the original picture to the model's square to its patch grid, and back.

LLaVA-1.5 shows the model either a padded square (its own training, ``pad``) or the central
crop (the hub's default, ``crop``). Every map we draw must travel back through the very same
transform, or it sits beside what it explains. `PictureMap` is that transform as plain numbers.

It holds no pixels; `llava_lab.models.pictures` builds it from what the image processor really did.

    where = PictureMap.make(640, 480, size=336, rows=24, cols=24, mode="pad")
    where.patch_box(12, 12)  # left, top, right, bottom in picture pixels

Sources: haotian-liu/LLaVA @ c121f04 ``llava/mm_utils.py`` (expand2square);
transformers ``CLIPImageProcessor`` (resize shortest edge, centre crop).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from llava_lab.errors import DataError, OptionError

Mode = Literal["pad", "crop", "whole"]
MODES: tuple[Mode, ...] = ("pad", "crop")  # what an image processor can do; "whole" is for models we cannot look into

LARGEST = 100_000_000  # pixels of a picture, and cells times pixels, that a map is for

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class PictureMap:
    """Affine map between an upright RGB picture and a ``rows x cols`` patch grid.

    ``model = picture * scale + offset`` per axis, in pixels, with (0, 0) the top left corner
    of the top left pixel. Patches lie from 0 to `size`; the grid divides that evenly. Where patches do not tile the model's
    square, `size` is what they cover of it, and the square goes on.
    """

    width: int  # picture, pixels
    height: int
    size: int  # side of the part of the model's square input that patches cover, pixels
    rows: int
    cols: int
    mode: Mode
    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float

    @classmethod
    def make(cls, width: int, height: int, *, size: int, rows: int, cols: int, mode: Mode) -> PictureMap:
        """The map LLaVA's preprocessing implies for a picture of ``width x height``."""
        if mode not in MODES:
            raise OptionError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if min(width, height, size, rows, cols) < 1:
            raise OptionError(f"sizes must be at least 1, got picture {width}x{height}, square {size}, grid {rows}x{cols}")
        if mode == "pad":
            side = max(width, height)
            scale = size / side
            left, top = (side - width) // 2, (side - height) // 2
            return cls(width, height, size, rows, cols, mode, scale, scale, left * scale, top * scale)
        # transformers: the short side becomes `size`, the long side int(size * long / short), then centre crop
        short, long = min(width, height), max(width, height)
        new_long = int(size * long / short)
        new_w, new_h = (size, new_long) if width <= height else (new_long, size)
        left, top = (new_w - size) // 2, (new_h - size) // 2
        return cls(width, height, size, rows, cols, mode, new_w / width, new_h / height, -float(left), -float(top))

    @classmethod
    def whole(cls, width: int, height: int, *, rows: int, cols: int) -> PictureMap:
        """A grid laid over all of the picture, for a model whose own way with pictures is not known.

        Each axis is stretched to the same square, so that every cell lies on the picture and none on padding.
        """
        if min(width, height, rows, cols) < 1:
            raise OptionError(f"sizes must be at least 1, got picture {width}x{height}, grid {rows}x{cols}")
        step = math.lcm(rows, cols)
        size = -(-max(width, height) // step) * step
        return cls(width, height, size, rows, cols, "whole", size / width, size / height, 0.0, 0.0)

    @classmethod
    def nowhere(cls) -> PictureMap:
        """The map of a question without a picture: no pixels, no cells."""
        return cls(0, 0, 0, 0, 0, "whole", 1.0, 1.0, 0.0, 0.0)

    def check(self) -> None:
        """Refuse numbers that no picture and no grid can have. Raises DataError; asked of what was read from a file."""
        if self == PictureMap.nowhere():
            return
        counts = (self.width, self.height, self.size, self.rows, self.cols)
        # what `coverage` and `mask_to_patches` make of them must fit into memory
        areas = (self.width * self.height, self.rows * self.height, self.cols * self.width)
        if min(counts) < 1 or max(areas) > LARGEST or max(counts) > LARGEST:
            raise DataError(f"a map cannot be of {self.width}x{self.height} pixels in {self.rows}x{self.cols} patches")
        scales, offsets = (self.scale_x, self.scale_y), (self.offset_x, self.offset_y)
        if not (1 / LARGEST < min(scales) <= max(scales) < LARGEST and max(map(abs, offsets)) < LARGEST):
            raise DataError(f"a map cannot have the scales {scales} and offsets {offsets}")
        left, top, right, bottom = self.seen_box
        if not (left < right and top < bottom):
            raise DataError("a map must see some of its picture")

    # -- the one way between pixels and patches ---------------------------------------------

    @property
    def patch(self) -> int:
        """Side of a patch in the model's square, pixels: patch (r, c) sees rows [r patch, (r + 1) patch) and columns likewise.

        Pixels beyond the last patch (6 of a square of 384 with patches of 14) are in the square and in no patch.
        """
        side, left = divmod(self.size, max(self.rows, self.cols))
        assert self.rows == self.cols, f"a grid of {self.rows}x{self.cols} has no square patches"
        assert not left, f"patches of a {self.rows}x{self.cols} grid do not tile {self.size} px"
        return side

    def places(self, shape: tuple[int, int], grid: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """For each row and each column of the picture drawn `shape` large, the row or column of `grid` it lies in, int64.

        `grid` is the patches', or a finer division of what they see. -1 where no patch sees the pixel's middle.
        """
        (height, width), (rows, cols) = shape, grid or (self.rows, self.cols)
        y = (np.arange(height) + 0.5) * (self.height / height) * self.scale_y + self.offset_y
        x = (np.arange(width) + 0.5) * (self.width / width) * self.scale_x + self.offset_x
        return _cells(y * rows / self.size, rows), _cells(x * cols / self.size, cols)

    # -- points and boxes -------------------------------------------------------------------

    def to_model(self, x: float, y: float) -> tuple[float, float]:
        """Picture pixel coordinates -> model square coordinates."""
        return x * self.scale_x + self.offset_x, y * self.scale_y + self.offset_y

    def to_picture(self, x: float, y: float) -> tuple[float, float]:
        """Model square coordinates -> picture pixel coordinates (may lie outside the picture)."""
        return (x - self.offset_x) / self.scale_x, (y - self.offset_y) / self.scale_y

    def patch_box(self, row: int, col: int) -> Box:
        """A patch's box in picture pixels; it may reach outside the picture where the input was padded."""
        if not (0 <= row < self.rows and 0 <= col < self.cols):
            raise OptionError(f"patch must lie in a {self.rows}x{self.cols} grid, got row {row}, column {col}")
        step_x, step_y = self.size / self.cols, self.size / self.rows
        left, top = self.to_picture(col * step_x, row * step_y)
        right, bottom = self.to_picture((col + 1) * step_x, (row + 1) * step_y)
        return left, top, right, bottom

    def patch_at(self, x: float, y: float) -> tuple[int, int] | None:
        """The (row, col) that sees picture point (x, y), or None where the model never looked."""
        mx, my = self.to_model(x, y)
        if not (0 <= mx < self.size and 0 <= my < self.size and 0 <= x < self.width and 0 <= y < self.height):
            return None
        return int(my * self.rows / self.size), int(mx * self.cols / self.size)

    def patches(
        self, *, box: Box | None = None, mask: np.ndarray | None = None, points: Sequence[tuple[float, float]] | None = None
    ) -> list[tuple[int, int]]:
        """The patches (row, col) that a place on the picture lies in, by rows; none where the model never looked.

        One of `box` (left, top, right, bottom in picture pixels), `mask` (bool, (height, width)), or `points` [(x, y), ...]. Of a
        box or a mask those patches count which it covers by half or more, or the one it covers most where it covers none so.
        Raises OptionError for none or several of them, an empty or reversed box, or a mask of another size.

        >>> PictureMap.make(96, 96, size=96, rows=4, cols=4, mode="pad").patches(box=(0, 0, 48, 24))
        [(0, 0), (0, 1)]
        """
        if sum(given is not None for given in (box, mask, points)) != 1:
            raise OptionError("expected one of box=, mask= and points=")
        if points is not None:
            return sorted({patch for x, y in points if (patch := self.patch_at(x, y)) is not None})
        if box is not None:
            left, top, right, bottom = box
            if not (left < right and top < bottom):
                raise OptionError(f"box must be (left, top, right, bottom) with left < right and top < bottom, got {box}")
            x, y = np.arange(self.width) + 0.5, np.arange(self.height) + 0.5
            mask = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
        assert mask is not None
        covered = self.mask_to_patches(mask)
        chosen = covered >= min(0.5, float(covered.max())) if covered.max() > 0 else np.zeros_like(covered, bool)
        return [(int(row), int(col)) for row, col in np.argwhere(chosen)]

    @property
    def seen_box(self) -> Box:
        """The part of the picture the model saw, in picture pixels."""
        left, top = self.to_picture(0, 0)
        right, bottom = self.to_picture(self.size, self.size)
        return max(left, 0.0), max(top, 0.0), min(right, float(self.width)), min(bottom, float(self.height))

    # -- grids ------------------------------------------------------------------------------

    def coverage(self) -> np.ndarray:
        """Share of each patch that lies on the picture, float32 (rows, cols) in 0..1; 0 is all padding."""
        return self.mask_to_patches(np.ones((self.height, self.width), bool))

    def mask_to_patches(self, mask: np.ndarray) -> np.ndarray:
        """Share of each patch covered by a picture-sized mask, float32 (rows, cols) in 0..1.

        Exact area integration: fractional pixel overlaps count by their area.
        """
        if mask.shape != (self.height, self.width):
            raise OptionError(f"mask must be {self.height}x{self.width} like the picture, got {mask.shape}")
        rows = self._overlap(self.rows, self.height, self.scale_y, self.offset_y)  # rows x height
        cols = self._overlap(self.cols, self.width, self.scale_x, self.offset_x)  # cols x width
        return (rows @ mask.astype(np.float64) @ cols.T).astype(np.float32)

    def project(self, values: np.ndarray, *, smooth: bool = False, shape: tuple[int, int] | None = None) -> np.ndarray:
        """Paint grid values on the picture: float32 (height, width), NaN where the model never looked.

        ``smooth=False`` is nearest, the honest grid; True is bilinear between patch centres. `shape` (height, width) is
        that of an enlarged or reduced picture to paint on; by default it is the picture's own.
        """
        if values.shape != (self.rows, self.cols):
            raise OptionError(f"values must be {self.rows}x{self.cols} like the grid, got {values.shape}")
        height, width = shape or (self.height, self.width)
        iy, ix = self.places((height, width))
        grid = np.asarray(values, np.float32)
        if smooth:
            my = (np.arange(height) + 0.5) * (self.height / height) * self.scale_y + self.offset_y
            mx = (np.arange(width) + 0.5) * (self.width / width) * self.scale_x + self.offset_x
            painted = _bilinear(grid, my * self.rows / self.size - 0.5, mx * self.cols / self.size - 0.5)
        else:
            painted = grid[iy][:, ix]
        seen = (iy >= 0)[:, None] & (ix >= 0)[None, :]
        return np.where(seen, painted, np.float32(np.nan)).astype(np.float32)

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return asdict(self)

    def _overlap(self, cells: int, pixels: int, scale: float, offset: float) -> np.ndarray:
        """(cells, pixels): share of each cell's length covered by each picture pixel."""
        step = self.size / cells
        lo = (np.arange(pixels) * scale + offset)[None, :]
        hi = lo + scale
        cell_lo = (np.arange(cells) * step)[:, None]
        covered = np.minimum(hi, cell_lo + step) - np.maximum(lo, cell_lo)
        return np.clip(covered, 0, None) / step


@dataclass(frozen=True)
class View:
    """One grid of image tokens in the sequence, where there are several: one for each of several pictures, or where a model
    looks at a picture several times (LLaVA-NeXT, LLaVA-OneVision).

    The overview is the whole picture in one square. The tiles are the picture enlarged and cut into squares; their
    tokens stand in the sequence as one large grid, row by row, a newline token after each row, padding cut away.
    """

    name: str  # "overview" | "tiles" | "picture 1", "picture 2", ...
    start: int  # position in the sequence of its first token
    newline: bool  # whether a token that is no patch ends every row
    map: PictureMap  # from picture pixels to this grid
    across: int = 1  # tiles side by side in the enlarged picture
    tile_rows: tuple[int, ...] = ()  # for each row of cells, the row of tiles it was seen in; none: one square
    tile_cols: tuple[int, ...] = ()

    def check(self) -> None:
        """Refuse tiles that do not fit the grid. Raises DataError; asked of what was read from a file."""
        sizes = len(self.tile_rows), len(self.tile_cols)
        if (
            sizes not in ((0, 0), (self.map.rows, self.map.cols))
            or min((self.start, self.across - 1, *self.tile_rows, *self.tile_cols)) < 0
        ):
            raise DataError(f"the view {self.name!r} must have a tile for every row and column of its grid, counted from 0")

    @property
    def stop(self) -> int:
        """One past the last position."""
        return self.start + self.map.rows * (self.map.cols + self.newline)

    @property
    def positions(self) -> np.ndarray:
        """Position of every cell's token in the sequence, int64 (rows, cols)."""
        return self._rows[:, : self.map.cols]

    @property
    def newlines(self) -> np.ndarray:
        """Positions of the tokens that end the rows, int64 (rows,), or none."""
        return self._rows[:, self.map.cols :].ravel()

    @property
    def tiles(self) -> np.ndarray:
        """Which square the model saw each cell in, int64 (rows, cols): 0 the overview, 1, 2, ... the tiles by rows."""
        if not self.tile_rows:
            return np.zeros((self.map.rows, self.map.cols), np.int64)
        return np.array(self.tile_rows)[:, None] * self.across + np.array(self.tile_cols) + 1

    @property
    def _rows(self) -> np.ndarray:
        return np.arange(self.start, self.stop).reshape(self.map.rows, -1)


def _cells(at: np.ndarray, count: int) -> np.ndarray:
    """The cell of each place, given in cells from the first one's beginning; -1 before the first and after the last."""
    cell = np.floor(at + 1e-9)  # a place on an edge belongs to the cell it begins, however its last bit was rounded
    return np.where((cell >= 0) & (cell < count), cell, -1).astype(np.int64)


def _bilinear(grid: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Separable bilinear sampling of `grid` at row coordinates y and column coordinates x, edges held."""

    def weights(at: np.ndarray, n: int) -> np.ndarray:  # (len(at), n)
        at = np.clip(at, 0, n - 1)
        lo = np.minimum(np.floor(at).astype(int), max(n - 2, 0))
        out = np.zeros((len(at), n))
        frac = at - lo
        out[np.arange(len(at)), lo] += 1 - frac
        if n > 1:
            out[np.arange(len(at)), lo + 1] += frac
        return out

    return weights(y, grid.shape[0]) @ grid @ weights(x, grid.shape[1]).T
