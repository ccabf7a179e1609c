"""Draws the pictures of the lessons, so that nobody has to trust a file.

    python tests/support/lesson_pictures.py    write them all to notebooks/images (same code, same pixels)

Square ones are scenes of the picture book's own split for lessons, which no training sees. The wide
one is put together from the same paper and things, to show what padding and cropping do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from llava_lab.worlds import picturebook
from llava_lab.worlds.drawing import background, sprite

IMAGES = Path(__file__).resolve().parents[2] / "notebooks" / "images"

SCENES = {
    "red-car-and-fish": 47,
    "blue-car-cup-and-moon": 25,
    "boats-house-and-flower": 28,
    "three-mushrooms": 21,
    "red-tree-and-flowers": 29,
}
WIDE = "wide-street"
WIDE_SIZE = (480, 288)
STREET = (  # kind, colour, side, left, top; the car stands outside the central square
    ("house", "blue", 124, 104, 112),
    ("tree", "green", 132, 242, 104),
    ("car", "red", 92, 384, 160),
)


def draw(name: str) -> Image.Image:
    """One picture of the lessons, RGB."""
    if name != WIDE:
        return picturebook.scene("lesson", SCENES[name]).picture()
    width, height = WIDE_SIZE
    street = background(np.random.default_rng(4), width).crop((0, 0, width, height))
    for kind, color, side, left, top in STREET:
        thing = sprite(kind, color, 1, side, mirrored=False)
        street.paste(thing, (left, top), thing)
    return street


NAMES = (*SCENES, WIDE)


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        path = IMAGES / f"{name}.png"
        draw(name).save(path, optimize=True)
        print(f"{path.name}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
