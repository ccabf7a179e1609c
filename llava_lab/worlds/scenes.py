"""Scenes of the picture book: which things stand where, drawn at any size, with exact masks.

A `Scene` is the ground truth: things with kind, colour, size and place on a unit square. The
same seed gives the same scene and the same bytes. Colour-kind pairs in `HELD_OUT` appear only in
the split ``compositions``; no other split draws, describes or asks about them.

    drawn = scene("test", 0)
    drawn.picture(), drawn.masks(), drawn.boxes()
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from llava_lab.errors import DataError
from llava_lab.geometry import Box
from llava_lab.worlds.drawing import COLORS, KINDS, SHADES, background, sprite

SIZE = 288  # pixels a side of the pictures we store and show
SMALL = tuple(range(54, 67, 3))  # sides in pixels of a 288-pixel picture
LARGE = tuple(range(93, 109, 3))
GAP = 5  # pixels kept clear between things
MAX_THINGS = 4
COUNTS = (0.16, 0.26, 0.29, 0.29)  # how often 1, 2, 3, 4 things

COLOR_NAMES = tuple(COLORS)
KIND_NAMES = tuple(KINDS)

HELD_OUT = frozenset((COLOR_NAMES[(3 * i + 1) % len(COLOR_NAMES)], kind) for i, kind in enumerate(KIND_NAMES))

SPLITS: dict[str, int] = {"train": 1, "validation": 2, "test": 3, "compositions": 4, "lesson": 5}


@dataclass(frozen=True)
class Thing:
    """One object; `x`, `y` are its centre and `side` its bounding square, as shares of the picture."""

    kind: str
    color: str
    size: str  # "small" | "large"
    x: float
    y: float
    side: float
    shade: int = 1
    mirrored: bool = False

    @property
    def held_out(self) -> bool:
        return (self.color, self.kind) in HELD_OUT

    def box(self, size: int = SIZE) -> Box:
        """Its square as left, top, right, bottom in pixels of a picture `size` a side."""
        half = self.side / 2
        return (self.x - half) * size, (self.y - half) * size, (self.x + half) * size, (self.y + half) * size


@dataclass(frozen=True)
class Scene:
    """One picture before it is drawn: things in no order that matters, and the paper's own seed."""

    split: str
    seed: int
    index: int
    things: tuple[Thing, ...]
    paper: tuple[int, ...]
    kinds: tuple[str, ...] = KIND_NAMES  # what questions may ask for in vain
    colors: tuple[str, ...] = COLOR_NAMES

    @property
    def name(self) -> str:
        return f"{self.split}-{self.seed}-{self.index:07d}"

    def picture(self, size: int = SIZE) -> Image.Image:
        """Draw it, RGB, ``size x size``."""
        image = background(np.random.default_rng(self.paper), size)
        for thing in self.things:
            drawn, corner = self._place(thing, size)
            image.paste(drawn, corner, drawn)
        return image

    def masks(self, size: int = SIZE) -> np.ndarray:
        """Pixels of each thing, bool (things, size, size)."""
        out = np.zeros((len(self.things), size, size), bool)
        for i, thing in enumerate(self.things):
            drawn, (left, top) = self._place(thing, size)
            alpha = np.asarray(drawn)[:, :, 3] > 127
            bottom, right = min(top + alpha.shape[0], size), min(left + alpha.shape[1], size)
            out[i, top:bottom, left:right] = alpha[: bottom - top, : right - left]
        return out

    def boxes(self, size: int = SIZE) -> list[Box]:
        return [thing.box(size) for thing in self.things]

    @cached_property
    def left_to_right(self) -> tuple[int, ...]:
        return tuple(int(i) for i in np.argsort([thing.x for thing in self.things], kind="stable"))

    @staticmethod
    def _place(thing: Thing, size: int) -> tuple[Image.Image, tuple[int, int]]:
        side = max(2, round(thing.side * size))
        drawn = sprite(thing.kind, thing.color, thing.shade, side, thing.mirrored)
        left, top, _, _ = thing.box(size)
        return drawn, (max(0, round(left)), max(0, round(top)))


def scene(split: str = "test", index: int = 0, *, seed: int = 0) -> Scene:
    """The `index`-th scene of a split. Splits never share a seed, so their pictures are disjoint.

    Raises DataError for an unknown split or a negative index.
    """
    if split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if index < 0 or seed < 0:
        raise DataError(f"index and seed must be 0 or more, got index {index}, seed {seed}")
    rng = np.random.default_rng((SPLITS[split], seed, index))
    while True:  # a crowded draw that does not fit is drawn anew, by the same generator
        things = _things(rng, compositions=split == "compositions")
        if things is not None:
            return Scene(split, seed, index, things, (SPLITS[split], seed, index, 77))


def _things(rng: np.random.Generator, *, compositions: bool) -> tuple[Thing, ...] | None:
    count = 1 + int(rng.choice(len(COUNTS), p=COUNTS))
    things: list[Thing] = []
    for i in range(count):
        held_out = compositions and (i == 0 or rng.random() < 0.6)
        color, kind = _pair(rng, things, held_out=held_out)
        small = rng.random() < 0.5
        side = int(rng.choice(SMALL if small else LARGE))
        shade, mirrored = int(rng.integers(len(SHADES))), bool(rng.random() < 0.5)
        spot = _free_spot(rng, things, side)
        if spot is None:
            return None
        x, y = spot
        things.append(Thing(kind, color, "small" if small else "large", x, y, side / SIZE, shade, mirrored))
    return tuple(things)


def _pair(rng: np.random.Generator, things: list[Thing], *, held_out: bool) -> tuple[str, str]:
    """Colour and kind of the next thing, now and then sharing one with an earlier thing.

    Shared kinds make counting and near misses; the pair is in `HELD_OUT` exactly as asked.
    """
    while True:
        color, kind = str(rng.choice(COLOR_NAMES)), str(rng.choice(KIND_NAMES))
        if things:
            other, roll = things[int(rng.integers(len(things)))], rng.random()
            if roll < 0.30:
                kind = other.kind
            elif roll < 0.50:
                color = other.color
        if ((color, kind) in HELD_OUT) == held_out:
            return color, kind


def _free_spot(rng: np.random.Generator, things: list[Thing], side: int) -> tuple[float, float] | None:
    """Centre of a square that touches no other thing and stays inside, in shares; None if 60 draws fail."""
    for _ in range(60):
        left, top = (int(v) for v in rng.integers(2, SIZE - side - 1, 2))
        x, y = (left + side / 2) / SIZE, (top + side / 2) / SIZE
        reach = [(t, (side / SIZE + t.side) / 2 + GAP / SIZE) for t in things]
        if all(abs(x - t.x) >= r or abs(y - t.y) >= r for t, r in reach):
            return x, y
    return None
