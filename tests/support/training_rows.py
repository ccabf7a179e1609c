"""What the training tests train on: a small data set in LLaVA's format, and our recipe in a size of seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_lab.training import TINY, Architecture, Recipe

SMALL = Architecture(
    image=48,
    patch=8,
    vision_width=32,
    vision_layers=3,
    vision_heads=2,
    vision_mlp=64,
    hidden=32,
    layers=2,
    heads=2,
    mlp=64,
    vocabulary=700,
)
QUICK = Recipe(
    name="quick",
    pictures=120,
    architecture=SMALL,
    tower=replace(TINY.tower, steps=6, batch=8),
    language=replace(TINY.language, steps=11, batch=4, turns=3),
    align=replace(TINY.align, steps=6, batch=8),
    instruct=replace(TINY.instruct, steps=8, batch=4, turns=3),
)

COLORS = ("red", "blue", "green", "white")


def turn(asked: str, answered: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]


def write_rows(folder: Path, *, count: int = 16, pictures: int = 6, text_every: int = 4, name: str = "mix.json") -> Path:
    """`count` rows over `pictures` pictures; every `text_every`-th is text alone (0: none)."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(pictures):
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / f"images/{number}.png")
    rows: list[dict[str, Any]] = []
    for i in range(count):
        color = COLORS[i % 4]
        if text_every and i % text_every == text_every - 1:
            rows.append({"id": str(i), "conversations": turn("What color is the car?", f"The car is {color}.")})
        else:
            said = turn("<image>\nWhat color is the tree?", color) + turn("How many stars are there?", "three")
            rows.append({"id": str(i), "image": f"images/{i % pictures}.png", "conversations": said})
    return write_json(folder / name, rows)


def write_json(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path
