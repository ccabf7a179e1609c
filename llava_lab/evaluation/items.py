"""What is asked: pictures with questions and their expected answers, from a world or from LLaVA's JSON.

Pictures are made or opened only when asked for, so thousands of items cost nothing to list.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from llava_lab.errors import DataError
from llava_lab.models.pictures import read_picture
from llava_lab.worlds import easy_vqa, picturebook
from llava_lab.worlds.questions import SHORT

PER_PICTURE = 4  # questions asked about each drawn picture


@dataclass(frozen=True)
class Item:
    """One question about one picture."""

    picture: str  # its name; items with equal names share it
    draw: Callable[[], np.ndarray]  # uint8 (H, W, 3)
    question: str
    answer: str
    short: str
    type: str


def load_items(data: str, *, split: str = "test", n: int = 2000, seed: int = 0) -> list[Item]:
    """Items of `n` pictures: ``picturebook``, ``easy-vqa``, or a JSON file in LLaVA's format (each turn asked on its own).

    Raises DataError for an unknown name, an unknown split, or a file that is not in the format.

    >>> from llava_lab.evaluation import load_items
    >>> len(load_items("picturebook", n=2))
    8
    """
    if n < 1:
        raise DataError(f"n must be 1 or more, got {n}")
    if data in WORLDS:
        return WORLDS[data](split, n, seed)
    if Path(data).suffix == ".json":
        return _llava_json(Path(data), n)
    raise DataError(f"data must be {', '.join(WORLDS)} or a .json file in LLaVA's format, got {data!r}")


def _picturebook(split: str, n: int, seed: int) -> list[Item]:
    items = []
    for index in range(n):
        scene = picturebook.scene(split, index, seed=seed)
        rng = np.random.default_rng((picturebook.SPLITS[split], seed, index, 5))
        draw = partial(_draw, scene)  # one for all of its questions, so that it is drawn once
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


WORLDS = {"picturebook": _picturebook, "easy-vqa": _easy_vqa}


def _draw(scene: picturebook.Scene) -> np.ndarray:
    return np.asarray(scene.picture())


def _llava_json(path: Path, n: int) -> list[Item]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))[:n]
    except FileNotFoundError:
        raise DataError(f"no such data file: {path}") from None
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise DataError(f"{path} is not a JSON list of conversations ({error})") from None
    items = []
    for number, row in enumerate(rows):
        try:
            turns, image = row["conversations"], path.parent / row["image"]
            pairs = [(a["value"], b["value"]) for a, b in zip(turns[::2], turns[1::2], strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} row {number}: expected image and alternating conversations ({error!r})") from None
        for asked, answered in pairs:
            question = asked.replace("<image>", "").strip()
            items.append(Item(str(row["image"]), partial(read_picture, image), question, answered, answered, "all"))
    return items
