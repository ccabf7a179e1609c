"""What is asked: pictures with questions and their expected answers, from a world or from LLaVA's JSON.

Pictures are made or opened only when asked for, so thousands of items cost nothing to list.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llava_lab.errors import DataError, one_line
from llava_lab.models.pictures import read_picture
from llava_lab.models.text import read_row
from llava_lab.worlds import easy_vqa, picturebook
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


def load_items(data: str, *, split: str = "test", n: int = 2000, seed: int = 0) -> list[Item]:
    """Items of `n` pictures: ``picturebook``, ``easy-vqa``, or rows of a file in LLaVA's format (each turn asked on its own).

    Raises DataError for an unknown name, an unknown split, or a file that is not in the format.

    >>> from llava_lab.evaluation import load_items
    >>> len(load_items("picturebook", n=2))
    8
    """
    if n < 1:
        raise DataError(f"n must be 1 or more, got {n}")
    if data in WORLDS:
        return WORLDS[data](split, n, seed)
    if Path(data).suffix in (".json", ".jsonl"):
        return _llava_file(Path(data), n)
    raise DataError(f"data must be {', '.join(WORLDS)} or a .json file in LLaVA's format (or .jsonl), got {data!r}")


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
