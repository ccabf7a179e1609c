"""Draws the things of the picture book: anti-aliased sprites with an exact mask.

Each kind is a small recipe of filled shapes in a unit square, main parts in the thing's colour
and details in neutral white and ink, so that the colour word stays true. A sprite is drawn
large and reduced, and kept in a cache, since the same few thousand serve every picture.

    sprite("car", "red", shade=1, side=96, mirrored=False)  # RGBA
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

OVERSAMPLE = 4  # sprites are drawn this much larger, then reduced: that is the anti-aliasing

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 45, 48),
    "orange": (243, 136, 28),
    "yellow": (248, 208, 44),
    "green": (52, 155, 72),
    "blue": (42, 104, 212),
    "purple": (126, 66, 178),
    "pink": (243, 134, 182),
    "brown": (126, 80, 46),
}
INK = (46, 48, 58)
WHITE = (252, 251, 247)
SHADES = (0.93, 1.0, 1.06)  # a thing's colour is one of these times its pure value

Point = tuple[float, float]


class Pen:
    """ImageDraw in unit coordinates, with an ink outline around every filled shape."""

    def __init__(self, side: int, color: tuple[int, int, int]) -> None:
        self.image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)
        self.side, self.color = side, color
        self.line = max(1, round(side * 0.028))
        dark = tuple(round(c * 0.62) for c in color)
        self.dark = (dark[0], dark[1], dark[2])

    def _xy(self, points: list[Point]) -> list[Point]:
        return [(x * (self.side - 1), y * (self.side - 1)) for x, y in points]

    def polygon(self, points: list[Point], fill: tuple[int, int, int] | None = None) -> None:
        xy = self._xy(points)
        self.draw.polygon(xy, fill=fill or self.color)
        self.draw.line([*xy, xy[0], xy[1]], fill=self.dark if fill is None else INK, width=self.line, joint="curve")

    def ellipse(self, box: tuple[float, float, float, float], fill: tuple[int, int, int] | None = None) -> None:
        (left, top), (right, bottom) = self._xy([(box[0], box[1]), (box[2], box[3])])
        outline = self.dark if fill is None else INK
        self.draw.ellipse((left, top, right, bottom), fill=fill or self.color, outline=outline, width=self.line)

    def rectangle(
        self, box: tuple[float, float, float, float], fill: tuple[int, int, int] | None = None, round_: float = 0
    ) -> None:
        (left, top), (right, bottom) = self._xy([(box[0], box[1]), (box[2], box[3])])
        outline, corner = self.dark if fill is None else INK, round_ * self.side
        self.draw.rounded_rectangle((left, top, right, bottom), corner, fill or self.color, outline, self.line)

    def stroke(self, points: list[Point], width: float, fill: tuple[int, int, int] = INK) -> None:
        self.draw.line(self._xy(points), fill=fill, width=max(1, round(width * self.side)), joint="curve")


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float, n: int = 40) -> list[Point]:
    """Points of an ellipse from `start` to `stop` degrees, clockwise on the screen from the right."""
    angles = np.radians(np.linspace(start, stop, n))
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def _house(p: Pen) -> None:
    p.rectangle((0.68, 0.10, 0.80, 0.42), INK)
    p.rectangle((0.14, 0.46, 0.86, 0.97))
    p.polygon([(0.5, 0.03), (0.99, 0.5), (0.01, 0.5)])
    p.rectangle((0.42, 0.66, 0.60, 0.97), INK)
    p.rectangle((0.22, 0.60, 0.36, 0.75), WHITE)
    p.rectangle((0.66, 0.60, 0.80, 0.75), WHITE)


def _tree(p: Pen) -> None:
    p.rectangle((0.43, 0.66, 0.57, 0.98), INK)
    p.polygon([(0.5, 0.28), (0.93, 0.78), (0.07, 0.78)])
    p.polygon([(0.5, 0.01), (0.83, 0.46), (0.17, 0.46)])


def _car(p: Pen) -> None:
    p.polygon([(0.20, 0.52), (0.32, 0.26), (0.68, 0.26), (0.84, 0.52)])
    p.rectangle((0.01, 0.48, 0.99, 0.76), round_=0.08)
    p.polygon([(0.29, 0.48), (0.36, 0.32), (0.48, 0.32), (0.48, 0.48)], WHITE)
    p.polygon([(0.54, 0.32), (0.65, 0.32), (0.74, 0.48), (0.54, 0.48)], WHITE)
    for x in (0.12, 0.62):
        p.ellipse((x, 0.62, x + 0.26, 0.88), INK)
        p.ellipse((x + 0.08, 0.70, x + 0.18, 0.80), WHITE)


def _fish(p: Pen) -> None:
    p.polygon([(0.66, 0.5), (0.99, 0.2), (0.99, 0.8)])
    p.polygon([(0.36, 0.34), (0.52, 0.12), (0.62, 0.36)])
    p.polygon(_arc(0.38, 0.5, 0.37, 0.27, 0, 360)[:-1])
    p.ellipse((0.12, 0.36, 0.26, 0.50), WHITE)
    p.ellipse((0.16, 0.40, 0.22, 0.46), INK)
    p.stroke(_arc(0.30, 0.5, 0.14, 0.18, -60, 60), 0.028, p.dark)


def _star(p: Pen) -> None:
    points = []
    for i in range(10):
        radius = 0.5 if i % 2 == 0 else 0.21
        angle = math.radians(-90 + 36 * i)
        points.append((0.5 + radius * math.cos(angle), 0.52 + radius * math.sin(angle)))
    p.polygon(points)


def _cup(p: Pen) -> None:
    p.draw.arc([c * p.side for c in (0.60, 0.34, 0.97, 0.72)], -100, 100, fill=p.color, width=round(0.09 * p.side))
    p.polygon([(0.06, 0.22), (0.74, 0.22), (0.66, 0.94), (0.14, 0.94)])
    p.ellipse((0.06, 0.13, 0.74, 0.31), WHITE)


def _flower(p: Pen) -> None:
    p.stroke([(0.5, 0.5), (0.5, 0.99)], 0.06)
    p.stroke([(0.5, 0.84), (0.72, 0.70)], 0.06)
    for i in range(6):
        angle = math.radians(60 * i)
        x, y = 0.5 + 0.22 * math.cos(angle), 0.35 + 0.22 * math.sin(angle)
        p.ellipse((x - 0.145, y - 0.145, x + 0.145, y + 0.145))
    p.ellipse((0.38, 0.23, 0.62, 0.47), WHITE)


def _boat(p: Pen) -> None:
    p.stroke([(0.46, 0.02), (0.46, 0.66)], 0.045)
    p.polygon([(0.51, 0.05), (0.90, 0.58), (0.51, 0.58)], WHITE)
    p.polygon([(0.41, 0.16), (0.41, 0.58), (0.10, 0.58)])
    p.polygon([(0.01, 0.66), (0.99, 0.66), (0.82, 0.96), (0.18, 0.96)])


def _moon(p: Pen) -> None:
    outer = _arc(0.56, 0.5, 0.48, 0.48, 55, 305)
    inner = _arc(0.76, 0.5, 0.42, 0.40, 290, 70)
    p.polygon(outer + inner)


def _heart(p: Pen) -> None:
    points = []
    for i in range(60):
        t = 2 * math.pi * i / 60
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((0.5 + x / 34, 0.46 - y / 32))
    p.polygon(points)


def _umbrella(p: Pen) -> None:
    p.stroke([(0.5, 0.3), (0.5, 0.88)], 0.055)
    p.stroke(_arc(0.60, 0.88, 0.10, 0.09, 180, 0), 0.055)
    scallops = [point for cx in (0.84, 0.5, 0.16) for point in _arc(cx, 0.56, 0.165, 0.09, 0, -180, 12)]
    p.polygon(_arc(0.5, 0.56, 0.49, 0.52, 180, 360) + scallops)
    p.stroke([(0.5, 0.02), (0.5, 0.08)], 0.05)


def _mushroom(p: Pen) -> None:
    p.rectangle((0.34, 0.48, 0.66, 0.97), WHITE, round_=0.1)
    p.polygon(_arc(0.5, 0.56, 0.49, 0.50, 180, 360))
    for x, y, r in ((0.30, 0.36, 0.08), (0.56, 0.22, 0.09), (0.74, 0.43, 0.07)):
        p.ellipse((x - r, y - r, x + r, y + r), WHITE)


KINDS: dict[str, Callable[[Pen], None]] = {
    "house": _house,
    "tree": _tree,
    "car": _car,
    "fish": _fish,
    "star": _star,
    "cup": _cup,
    "flower": _flower,
    "boat": _boat,
    "moon": _moon,
    "heart": _heart,
    "umbrella": _umbrella,
    "mushroom": _mushroom,
}


@lru_cache(maxsize=8192)
def sprite(kind: str, color: str, shade: int, side: int, mirrored: bool) -> Image.Image:
    """One thing on a clear ground, RGBA, ``side x side`` pixels. Do not write into it: it is cached."""
    red, green, blue = (min(255, round(c * SHADES[shade])) for c in COLORS[color])
    pen = Pen(side * OVERSAMPLE, (red, green, blue))
    KINDS[kind](pen)
    image = pen.image.resize((side, side), Image.Resampling.BOX)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


PAPERS = ((247, 243, 232), (232, 240, 247), (238, 246, 234), (250, 236, 232), (240, 236, 246), (253, 250, 244), (226, 233, 232))


def background(rng: np.random.Generator, size: int) -> Image.Image:
    """Pale paper: plain, a soft vertical wash, or soft clouds. Consumes a fixed number of draws."""
    base = np.array(PAPERS[rng.integers(len(PAPERS))], np.float32)
    style = rng.integers(3)
    wash = rng.uniform(-14, 8)
    clouds = rng.normal(0, 7, (5, 5)).astype(np.float32)
    if style == 0:
        return Image.new("RGB", (size, size), tuple(int(c) for c in base))
    if style == 1:
        column = np.linspace(0, wash, 32, dtype=np.float32)[:, None, None] + base
        pixels = np.broadcast_to(column, (32, 4, 3))
    else:
        pixels = base + clouds[:, :, None]
    small = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC)
