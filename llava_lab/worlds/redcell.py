"""The red-cell task: a grid of equal cells with one odd one, aligned with the model's patches. The right place is known.

Whatever says where an answer comes from must point at the odd cell; whatever takes that cell away must change the
answer. Same arguments, same bytes. The task is that of "which colour is the odd one out" pictures used to test circuit
finders; drawing and wording are ours.

    odd = scene("test", 3, rows=6)
    lab.ask(np.asarray(odd.picture()), odd.question)  # must rest on odd.patches(*lab.grid)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from llava_lab.errors import DataError
from llava_lab.worlds.drawing import COLORS
from llava_lab.worlds.scenes import SPLITS

QUESTION = "Which color is the odd one out?"
NAMES = tuple(COLORS)
CELL = 12  # pixels a side of a stored cell


@dataclass(frozen=True)
class RedCell:
    """One picture: `color` at (`row`, `col`), `others` everywhere else."""

    split: str
    seed: int
    index: int
    rows: int
    cols: int
    row: int
    col: int
    color: str
    others: str
    question: str = QUESTION

    @property
    def name(self) -> str:
        return f"redcell-{self.split}-{self.seed}-{self.index:07d}"

    @property
    def short(self) -> str:
        return self.color

    @property
    def answer(self) -> str:
        """The only right answer, as a sentence."""
        return f"The odd one is {self.color}."

    def cells(self) -> np.ndarray:
        """Which cell is odd, bool (rows, cols)."""
        cells = np.zeros((self.rows, self.cols), bool)
        cells[self.row, self.col] = True
        return cells

    def patches(self, rows: int, cols: int) -> list[tuple[int, int]]:
        """The odd cell's patches (row, col) in a model's grid. Raises DataError unless cells and patches are aligned."""
        if rows % self.rows or cols % self.cols:
            raise DataError(
                f"expected a patch grid that {self.rows}x{self.cols} cells divide, got {rows}x{cols}; draw other cells"
            )
        high, wide = rows // self.rows, cols // self.cols
        return [(self.row * high + i, self.col * wide + j) for i in range(high) for j in range(wide)]

    def picture(self, cell: int = CELL) -> Image.Image:
        """Draw it, RGB, ``cols * cell`` by ``rows * cell``."""
        pixels = np.empty((self.rows, self.cols, 3), np.uint8)
        pixels[:] = COLORS[self.others]
        pixels[self.row, self.col] = COLORS[self.color]
        return Image.fromarray(pixels.repeat(cell, 0).repeat(cell, 1))

    def mask(self, cell: int = CELL) -> np.ndarray:
        """Pixels of the odd cell, bool (1, height, width), as `ground_truth` wants them."""
        return self.cells().repeat(cell, 0).repeat(cell, 1)[None]


def scene(
    split: str = "test", index: int = 0, *, rows: int = 6, cols: int | None = None, seed: int = 0, color: str | None = None
) -> RedCell:
    """The `index`-th picture of a split, `rows` by `cols` cells (None: as many as rows). `color` fixes the odd one's.

    Raises DataError for an unknown split or colour, a negative index, or fewer than four cells.
    """
    cols = rows if cols is None else cols
    if split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if index < 0 or seed < 0 or min(rows, cols) < 2:
        raise DataError(f"expected index and seed of 0 or more and at least 2x2 cells, got {index}, {seed} and {rows}x{cols}")
    if color is not None and color not in NAMES:
        raise DataError(f"color must be one of {', '.join(NAMES)}, got {color!r}")
    rng = np.random.default_rng((SPLITS[split], seed, index, 101))
    first, second = (NAMES[int(i)] for i in rng.choice(len(NAMES), 2, replace=False))
    odd = color or first
    others = first if second == odd else second
    row, col = int(rng.integers(rows)), int(rng.integers(cols))
    return RedCell(split, seed, index, rows, cols, row, col, odd, others)


def corrupted(one: RedCell, color: str) -> RedCell:
    """The same grid with the odd cell in another colour: the corrupt picture of activation patching."""
    if color not in NAMES or color in (one.color, one.others):
        raise DataError(f"color must be one of {', '.join(NAMES)} other than {one.color} and {one.others}, got {color!r}")
    return RedCell(one.split, one.seed, one.index, one.rows, one.cols, one.row, one.col, color, one.others)
