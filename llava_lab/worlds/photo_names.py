"""What photographs show: in words (a name, what one calls it in everyday speech, what kind of thing it is), and in outlines.

The table knows ImageNet's thousand classes and the two hundred everyday categories of its detection task; names and kinds are
read from WordNet 3.0 (free with notice, see the model card of `photo`). A photograph is named by its file or by the folder it
lies in, so that any collection will do; what the table does not know has a name and no kind.

    thing_named("n02099601_golden_retriever")  # Thing("golden retriever", basic="dog", kind="animal")

Outlines of what is in a photograph are exact truth about place, on natural pictures. A folder holds photographs, beside each a
text file with one object a line (class number, then a polygon x1 y1 x2 y2 ... in shares of width and height, as COCO's
annotations are often handed on), and ``classes.txt`` (number, tab, name).

    photo = read_outlined("masks")[0]
    photo.names, photo.masks().shape  # ('bowl', 'bowl', 'orange'), (3, 480, 640)

Source: Princeton WordNet 3.0 (hypernyms of each class); the classes of ILSVRC 2012 and the categories of ILSVRC 2013. Source of
the outlines' format: COCO (Lin et al. 2014, arXiv 1405.0312); polygons in shares of the sides as in YOLO's label files.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from llava_lab.errors import DataError
from llava_lab.models import folders
from llava_lab.models.pictures import read_picture

FILE = folders.ASSETS / "photo" / "names.json"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
MASS = {"broccoli", "cauliflower", "chain mail", "corn", "dough", "eggnog", "espresso", "guacamole", "hair spray", "hay"}
MASS |= {
    "mashed potato",
    "red wine",
    "velvet",
    "wool",
    "carbonara",
    "consomme",
    "face powder",
    "ice cream",
    "lotion",
    "sunscreen",
}
MASS |= {"toilet tissue", "sunglasses", "swimming trunks", "glasses", "bread", "wine", "coffee", "soup", "coral", "maillot"}


@dataclass(frozen=True)
class Thing:
    """What something is called; `basic` and `kind` are "" where nothing is known."""

    name: str
    basic: str = ""
    kind: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """Every word that is true of it, the most special first."""
        return tuple(dict.fromkeys(word for word in (self.name, self.basic, self.kind) if word and word != "thing"))


@dataclass(frozen=True)
class Category:
    """What a photograph is asked for: a name, every word accepted as naming it, and its kind."""

    name: str
    accepted: tuple[str, ...]
    kind: str = ""


@dataclass(frozen=True)
class Photo:
    """A photograph on disk, or a part of one, and what it shows; `box` is left, top, right, bottom as shares of its sides."""

    path: Path
    thing: Thing
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    @property
    def category(self) -> Category:
        """One of the everyday categories where its file name begins with such a WordNet id, else its own name."""
        wnid = self.path.name[:9]
        if wnid in everyday():
            return everyday()[wnid]
        others = classes()[wnid][1] if wnid in classes() else ()
        return Category(self.thing.basic or self.thing.name, tuple({*self.thing.words[:2], *others}), self.thing.kind)


@cache
def classes() -> dict[str, tuple[Thing, tuple[str, ...]]]:
    """WordNet id -> the thing, and its other names; in the order of the ids, which is the order of the tower's classes."""
    rows = json.loads(FILE.read_text("utf-8"))["classes"]
    return {wnid: (Thing(name, basic, kind), tuple(others)) for wnid, (name, basic, kind, others) in sorted(rows.items())}


@cache
def everyday() -> dict[str, Category]:
    """WordNet id -> an everyday category; its accepted words name it or any of the classes below it."""
    kinds = {word: thing.kind for thing, others in classes().values() for word in (*thing.words[:2], *others)}
    rows = json.loads(FILE.read_text("utf-8"))["everyday"]
    found = {}
    for wnid, (name, words) in rows.items():
        accepted = tuple(dict.fromkeys((name, *words)))
        found[wnid] = Category(name, accepted, next((kinds[word] for word in accepted if word in kinds), ""))
    return found


@cache
def _by_name() -> dict[str, Thing]:
    known: dict[str, Thing] = {}
    for thing, _ in classes().values():
        if thing.basic:
            known.setdefault(thing.basic, Thing(thing.basic, "", thing.kind))
    return known | {thing.name.lower(): thing for thing, _ in classes().values()}


def thing_named(text: str) -> Thing:
    """The thing a file's or folder's name stands for: a leading WordNet id and trailing numbers do not count.

    >>> from llava_lab.worlds.photo_names import thing_named
    >>> thing_named("golden_retriever-12").basic
    'dog'
    """
    if (wnid := re.match(r"n\d{8}", text)) and wnid[0] in classes():
        return classes()[wnid[0]][0]
    plain = re.sub(r"^n\d{8}[_ -]*|[\s_.-]*\(?\d*\)?$", "", text)
    name = " ".join(re.split(r"[_\s]+", plain)).strip()
    return _by_name().get(name.lower(), Thing(name))


def read_photos(folder: str | Path) -> list[Photo]:
    """The photographs of a folder, named by their files, and of its sub-folders, named by these; in the order of their paths.

    Raises DataError when there is no such folder, or no photograph with a name in it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"no folder {root}; expected one with photographs named by what they show")
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    photos = [Photo(path, thing_named(path.stem if path.parent == root else path.parent.name)) for path in files]
    photos = [photo for photo in photos if photo.thing.name]
    if not photos:
        raise DataError(f"{root} has no photograph named by what it shows, such as golden_retriever_1.jpg or dog/1.jpg")
    return photos


def with_article(word: str) -> str:
    """ "a dog", "an apple", "broccoli"."""
    if word.lower() in MASS or (word.endswith("s") and not word.endswith(("ss", "us", "bus"))):
        return word
    return ("an " if word[:1].lower() in "aeio" or word.lower().startswith(("umb", "unc", "hour")) else "a ") + word


# -- outlines -------------------------------------------------------------------------------

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

    >>> from llava_lab.worlds.photo_names import accepted
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
