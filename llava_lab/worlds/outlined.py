"""Photographs with the outlines of what is in them: exact truth about place, on natural pictures.

A folder holds photographs, beside each a text file with one object a line (class number, then a polygon x1 y1 x2 y2 ... in shares
of width and height, as COCO's annotations are often handed on), and ``classes.txt`` (number, tab, name).

    photo = read_outlined("masks")[0]
    photo.names, photo.masks().shape  # ('bowl', 'bowl', 'orange'), (3, 480, 640)

Source of the format: COCO (Lin et al. 2014, arXiv 1405.0312); polygons in shares of the sides as in YOLO's label files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from llava_lab.errors import DataError
from llava_lab.models.pictures import read_picture
from llava_lab.worlds.photo_names import SUFFIXES, everyday

# Other words for COCO's classes that no everyday category holds.
SAID = {
    "tv": ("television", "monitor", "screen"),
    "couch": ("sofa", "studio couch"),
    "cell phone": ("phone", "telephone", "mobile"),
    "potted plant": ("plant", "flowerpot", "flower pot", "pot"),
    "dining table": ("table",),
    "airplane": ("plane", "aircraft", "airliner", "jet"),
    "motorcycle": ("motorbike", "moped", "scooter"),
    "sports ball": ("ball",),
    "donut": ("doughnut",),
    "train": ("locomotive", "railcar"),
    "boat": ("ship", "canoe", "yacht", "catamaran"),
    "person": ("man", "woman", "child", "people"),
}


HOMONYMS = {"kite"}  # here a toy on a line; the category that accepts the word is of birds


@dataclass(frozen=True)
class Outlined:
    """A photograph and its objects: their names, and a polygon each, float (corners, 2) in shares of width and height."""

    path: Path
    names: tuple[str, ...]
    polygons: tuple[np.ndarray, ...]

    def picture(self) -> np.ndarray:
        """uint8 (height, width, 3)."""
        return read_picture(self.path)

    def masks(self) -> np.ndarray:
        """What each object covers of the picture, bool (objects, height, width)."""
        height, width = self.picture().shape[:2]
        masks = []
        for polygon in self.polygons:
            drawn = Image.new("1", (width, height))
            ImageDraw.Draw(drawn).polygon([(x * width, y * height) for x, y in polygon.tolist()], fill=1, outline=1)
            masks.append(np.asarray(drawn))
        return np.array(masks, bool).reshape(-1, height, width)


def accepted(name: str) -> tuple[str, ...]:
    """Every word that names a class: its own, those of the everyday category it is, and other words for it.

    >>> from llava_lab.worlds.outlined import accepted
    >>> "beagle" in accepted("dog")
    True
    """
    known = () if name in HOMONYMS else everyday().values()
    found = [category.accepted for category in known if name in (category.name, *category.accepted)]
    return tuple(dict.fromkeys((name, *(found[0] if found else ()), *SAID.get(name, ()))))


def read_outlined(folder: str | Path) -> list[Outlined]:
    """The photographs of a folder that have an object, in the order of their names.

    Raises DataError for a folder without ``classes.txt`` or without such a photograph, and for a line that is no object.
    """
    root = Path(folder).expanduser()
    table = root / "classes.txt"
    try:
        rows = [line.split("\t") for line in table.read_text("utf-8").splitlines() if line.strip()]
        classes = {int(number): name.strip() for number, name in rows}
    except FileNotFoundError:
        raise DataError(f"no {table}; expected a folder of photographs, a text file beside each, and classes.txt") from None
    except (OSError, ValueError):
        raise DataError(f"{table} must hold a number, a tab and a name on each line") from None
    found = []
    for path in sorted(path for path in root.iterdir() if path.suffix.lower() in SUFFIXES):
        beside = path.with_suffix(".txt")
        objects = [_object(line, classes, f"{beside} line {i}") for i, line in enumerate(_lines(beside), 1)]
        if objects:
            found.append(Outlined(path, tuple(name for name, _ in objects), tuple(polygon for _, polygon in objects)))
    if not found:
        raise DataError(f"{root} has no photograph with a text file of outlines beside it")
    return found


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text("utf-8").splitlines() if line.strip()] if path.is_file() else []


def _object(line: str, classes: dict[int, str], where: str) -> tuple[str, np.ndarray]:
    try:
        number, *corners = line.split()
        polygon = np.array(corners, float).reshape(-1, 2)
        name = classes[int(number)]
    except (ValueError, KeyError):
        raise DataError(f"{where} must be a class number of classes.txt and then pairs of x and y, got {line[:40]!r}") from None
    if len(polygon) < 3 or not np.isfinite(polygon).all() or polygon.min() < 0 or polygon.max() > 1:
        raise DataError(f"{where}: a polygon has three corners or more, each from 0 to 1")
    return name, polygon
