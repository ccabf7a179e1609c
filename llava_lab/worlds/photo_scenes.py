"""Pictures with known contents, made of photographs: one alone, two or four side by side, several laid on a plain ground.

Where each lies is exact, so place, presence, number and relation can be asked about natural texture. Everything random comes
from the generator given.

    draw_scene(photos, np.random.default_rng(0)).picture  # a PIL picture; .items says what is where
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from llava_lab.worlds.photo_names import Photo, Thing

SIDE = 480  # pixels of a collage; a photograph alone keeps its shape
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
FORMS = ("alone", "quarters", "beside", "stacked", "laid")
SHARES = (0.1, 0.5, 0.12, 0.1, 0.18)  # of the forms
BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Item:
    """One thing in a picture: its box in pixels (left, top, right, bottom) and, in a collage, its place in words."""

    thing: Thing
    box: tuple[int, int, int, int]
    place: str = ""


@dataclass(frozen=True)
class PhotoScene:
    """A picture, how it was put together, and what is in it."""

    picture: Image.Image
    form: str
    items: tuple[Item, ...]


def draw_scene(photos: Sequence[Photo], rng: np.random.Generator, *, form: str | None = None) -> PhotoScene:
    """A scene of one of `FORMS` from photographs chosen by `rng`, each cut, mirrored and lit a little differently."""
    form = form or str(rng.choice(FORMS, p=SHARES))
    if form == "alone":
        photo = photos[int(rng.integers(len(photos)))]
        picture = _varied(photo, rng, smallest=0.45)
        return PhotoScene(picture, form, (Item(photo.thing, (0, 0, *picture.size)),))
    if form == "laid":
        return _laid(photos, rng)
    return collage(_chosen(photos, 4 if form == "quarters" else 2, rng), form, rng)


def collage(photos: Sequence[Photo], form: str, rng: np.random.Generator | None = None, *, side: int = SIDE) -> PhotoScene:
    """Photographs in a grid, each cut to its cell: "quarters" (4), "beside" (2) or "stacked" (2); `rng` None cuts the middle."""
    half = side // 2
    boxes = {
        "quarters": [(0, 0, half, half), (half, 0, side, half), (0, half, half, side), (half, half, side, side)],
        "beside": [(0, 0, half, half), (half, 0, side, half)],
        "stacked": [(0, 0, half, half), (0, half, half, side)],
    }[form]
    places = {"quarters": QUARTERS, "beside": ("left", "right"), "stacked": ("top", "bottom")}[form]
    canvas = Image.new("RGB", (max(b[2] for b in boxes), max(b[3] for b in boxes)))
    items = []
    for photo, box, place in zip(photos, boxes, places, strict=True):
        cell = opened(photo) if rng is None else _varied(photo, rng, smallest=0.7)
        canvas.paste(ImageOps.fit(cell, (box[2] - box[0], box[3] - box[1]), BICUBIC), box[:2])
        items.append(Item(photo.thing, box, place))
    return PhotoScene(canvas, form, tuple(items))


def _laid(photos: Sequence[Photo], rng: np.random.Generator) -> PhotoScene:
    """One to three photographs on a plain ground, not over each other: each in its own third or half of the width."""
    chosen = _chosen(photos, int(rng.integers(1, 4)), rng)
    canvas = Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in rng.integers(40, 220, 3)))
    strip = SIDE // len(chosen)
    items = []
    for number, photo in enumerate(chosen):
        cut = _varied(photo, rng, smallest=0.7)
        width = int(strip * rng.uniform(0.7, 0.95))
        cut = cut.resize((width, max(16, round(cut.height * width / cut.width))), BICUBIC)
        cut = cut.crop((0, 0, width, min(cut.height, SIDE)))
        left = number * strip + int(rng.integers(0, strip - width + 1))
        top = int(rng.integers(0, SIDE - cut.height + 1))
        canvas.paste(cut, (left, top))
        items.append(Item(photo.thing, (left, top, left + width, top + cut.height)))
    if len(chosen) == 2:
        items = [Item(item.thing, item.box, place) for item, place in zip(items, ("left", "right"), strict=True)]
    return PhotoScene(canvas, "laid", tuple(items))


def _chosen(photos: Sequence[Photo], count: int, rng: np.random.Generator) -> list[Photo]:
    """Photographs of different things; now and then two of one kind, so that something can be counted."""
    chosen: list[Photo] = []
    while len(chosen) < count:
        photo = photos[int(rng.integers(len(photos)))]
        if all(photo.thing.name != other.thing.name for other in chosen) or len({p.thing.name for p in photos}) < count:
            chosen.append(photo)
    return chosen


def opened(photo: Photo) -> Image.Image:
    with Image.open(photo.path) as file:
        across, down = (part[1] - part[0] for part in (photo.box[::2], photo.box[1::2]))
        file.draft("RGB", (round(SIDE / across), round(SIDE / down)))
        picture = ImageOps.exif_transpose(file).convert("RGB")
    left, top, right, bottom = (round(share * side) for share, side in zip(photo.box, picture.size * 2, strict=True))
    return picture.crop((left, top, right, bottom))


def _varied(photo: Photo, rng: np.random.Generator, *, smallest: float) -> Image.Image:
    """A cut of at least `smallest` of the area, perhaps mirrored, in slightly other light."""
    picture = opened(photo)
    share = rng.uniform(smallest, 1.0) if rng.random() < 0.8 else 1.0
    stretch = np.exp(rng.uniform(-0.15, 0.15))
    width = min(picture.width, round(picture.width * np.sqrt(share) * stretch))
    height = min(picture.height, round(picture.height * np.sqrt(share) / stretch))
    left, top = (int(rng.integers(0, whole - part + 1)) for whole, part in ((picture.width, width), (picture.height, height)))
    picture = picture.crop((left, top, left + width, top + height))
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    if rng.random() < 0.6:
        picture = ImageEnhance.Brightness(picture).enhance(float(rng.uniform(0.75, 1.25)))
        picture = ImageEnhance.Color(picture).enhance(float(rng.uniform(0.6, 1.3)))
    return picture
