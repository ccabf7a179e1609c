"""What is asked: pictures with questions and their expected answers, from a world or from LLaVA's JSON.

Pictures are made or opened only when asked for, so thousands of items cost nothing to list.

    items = load_items("picturebook", split="test", n=100)
    items[0].question, items[0].answer, items[0].drawn()
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llava_lab.errors import DataError, one_line
from llava_lab.models.pictures import read_picture
from llava_lab.models.text import read_row
from llava_lab.worlds import easy_vqa, picturebook
from llava_lab.worlds.photo_names import Category, Photo, read_photos, with_article
from llava_lab.worlds.photo_scenes import QUARTERS, collage
from llava_lab.worlds.questions import SHORT

PER_PICTURE = 4  # questions asked about each drawn picture


@dataclass(frozen=True)
class Item:
    """One question about one picture, or about none."""

    picture: str  # its name; items with equal names share it
    draw: Callable[[], np.ndarray] | None  # uint8 (H, W, 3); None: the question is text alone
    question: str
    answer: str
    short: str
    type: str
    accepted: tuple[str, ...] = ()  # where not empty: words one of which makes the answer right
    begins: bool = False  # it must be the answer's first word (yes, no); else it may stand anywhere
    quarter: tuple[int, int] | None = None  # (row, column) of the quarter asked about, in a collage of four

    def drawn(self) -> np.ndarray:
        """The picture of an item that has one, uint8 (H, W, 3)."""
        assert self.draw is not None, f"{self.question!r} is asked without a picture"
        return self.draw()

    def right(self, answer: str, equal: Callable[[str, str], bool]) -> bool:
        """Whether an answer says an accepted word, where there are any; else what `equal` says of it and the expected one."""
        if not self.accepted:
            return equal(answer, self.answer)
        words = "|".join(re.escape(word) for word in self.accepted)
        pattern = rf"\W*({words})\b" if self.begins else rf".*\b({words})(s|es)?\b"
        return re.match(pattern, answer, re.IGNORECASE | re.DOTALL) is not None


def load_items(
    data: str, *, split: str = "test", n: int = 2000, seed: int = 0, pictures: str | os.PathLike | None = None
) -> list[Item]:
    """Items of `n` pictures: ``picturebook``, ``easy-vqa``, or rows of a file in LLaVA's format (each turn asked on its own).

    ``photos`` asks about the photographs in the folder `pictures`, named by what they show (`photo_items`).

    Raises DataError for an unknown name, an unknown split, or a file that is not in the format.

    >>> from llava_lab.evaluation import load_items
    >>> len(load_items("picturebook", n=2))
    8
    """
    if n < 1:
        raise DataError(f"n must be 1 or more, got {n}")
    if (data == PHOTOS) != (pictures is not None):
        raise DataError(f"pictures, a folder of named photographs, goes with data={PHOTOS!r} and with nothing else")
    if data == PHOTOS:
        return photo_items(read_photos(Path(pictures or "")), n, seed)
    if data in WORLDS:
        return WORLDS[data](split, n, seed)
    if Path(data).suffix in (".json", ".jsonl"):
        return _llava_file(Path(data), n)
    raise DataError(f"data must be {', '.join((*WORLDS, PHOTOS))} or a .json file in LLaVA's format (or .jsonl), got {data!r}")


Drawn = tuple[picturebook.Scene, Callable[[], np.ndarray], np.random.Generator]


def scenes(split: str, n: int, seed: int, salt: int) -> Iterator[Drawn]:
    """Scenes of the picture book, each with what draws it, the same for all of its questions, and random numbers of its own."""
    for index in range(n):
        scene = picturebook.scene(split, index, seed=seed)
        rng = np.random.default_rng((picturebook.SPLITS[split], seed, index, salt))
        yield scene, partial(_draw, scene), rng


def _picturebook(split: str, n: int, seed: int) -> list[Item]:
    items = []
    for scene, draw, rng in scenes(split, n, seed, 5):
        for q in picturebook.ask_about(scene, rng, PER_PICTURE):
            items.append(Item(scene.name, draw, q.text, q.answer, q.short, q.type))
    return items


def _easy_vqa(split: str, n: int, seed: int) -> list[Item]:
    """All questions of the first `n` pictures, each asked on its own for one word; the package's order, no seed."""
    draws: dict[Path, Callable[[], np.ndarray]] = {}
    items = []
    for q in easy_vqa.questions(split):
        if q.picture not in draws:
            if len(draws) == n:
                continue
            draws[q.picture] = partial(read_picture, q.picture)
        items.append(Item(q.picture.stem, draws[q.picture], f"{q.text}\n{SHORT}", q.answer, q.answer, q.type))
    return items


PHOTOS = "photos"
WORLDS = {"picturebook": _picturebook, "easy-vqa": _easy_vqa}


def photo_items(photos: Sequence[Photo], n: int, seed: int) -> list[Item]:
    """What is asked of up to `n` photographs: a name, one presence with yes and one with no, and the same of collages of four.

    A name is right when one of the words accepted for the photograph's category stands in the answer. Half of the no's are near
    misses, categories of the same kind; people are never asked for, since they stand in many photographs of other things.
    """
    rng = np.random.default_rng((seed, 51))
    chosen = [photos[i] for i in sorted(rng.permutation(len(photos))[:n].tolist())]
    known = {photo.category.name: photo.category for photo in photos if photo.category.name != "person"}
    items = []
    for photo in chosen:
        draw, place, category = partial(read_picture, photo.path), str(photo.path.name), photo.category
        items.append(Item(place, draw, "What is in this picture?", category.name, category.name, "naming", category.accepted))
        items += _presence(place, draw, [category], known, rng, "presence")
    mixed = [chosen[int(i)] for i in rng.permutation(len(chosen))]
    for first in range(0, len(chosen) - 3, 4):
        four = [mixed[i] for i in range(first, first + 4)]
        draw, place = partial(_collage, tuple(four)), "collage of " + ", ".join(photo.path.name for photo in four)
        for number, (photo, where) in enumerate(zip(four, QUARTERS, strict=True)):
            word, quarter = photo.category, divmod(number, 2)
            asked = f"What is at the {where}?"
            items.append(Item(place, draw, asked, word.name, word.name, "collage: place", word.accepted, quarter=quarter))
        items += _presence(place, draw, [photo.category for photo in four], known, rng, "collage: presence")
    return items


def _presence(
    place: str,
    draw: Callable[[], np.ndarray],
    shown: list[Category],
    known: dict[str, Category],
    rng: np.random.Generator,
    kind: str,
) -> list[Item]:
    """One question whose answer is yes and one whose answer is no."""
    inside = shown[int(rng.integers(len(shown)))]
    words = {word for category in shown for word in category.accepted}
    absent = [category for category in known.values() if not words & set(category.accepted)]
    near = [category for category in absent if category.kind == inside.kind]
    pool = near if near and rng.random() < 0.5 else absent
    outside = pool[int(rng.integers(len(pool)))] if pool else None
    asked = [(inside, "yes")] + ([(outside, "no")] if outside else [])
    return [
        Item(place, draw, f"Is there {with_article(category.name)} in the picture?", word, word, kind, (word,), begins=True)
        for category, word in asked
    ]


def _collage(photos: tuple[Photo, ...]) -> np.ndarray:
    return np.asarray(collage(photos, "quarters").picture)


def _draw(scene: picturebook.Scene) -> np.ndarray:
    return np.asarray(scene.picture())


def _llava_file(path: Path, n: int) -> list[Item]:
    """The turns of the first `n` rows, read as training reads them (`models.text.read_row`); a row may have no picture."""
    items = []
    for number, row in enumerate(_rows(path)[:n]):
        try:
            messages, picture = read_row(row)
            if not all(message.text for message in messages):
                raise DataError("a question or an answer is empty")
        except DataError as error:
            raise DataError(f"{path} row {number}: {error}") from None
        draw = None if picture is None else partial(read_picture, path.parent / picture)
        for asked, answered in zip(messages[::2], messages[1::2], strict=True):
            items.append(Item(picture or f"row {number}", draw, asked.text, answered.text, answered.text, "all"))
    return items


def _rows(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = [json.loads(line) for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else json.loads(text)
    except FileNotFoundError:
        raise DataError(f"no such data file: {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON list of conversations ({one_line(error)})") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} is not a JSON list of conversations, it holds a {type(rows).__name__}")
    return rows
