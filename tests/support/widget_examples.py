"""Runs and maps made by hand for the widget tests: a red car and a blue house, no model anywhere.

`car` is square and answers "The car is red."; `crop` and `pad` are wide pictures under the two fits.
A map is a soft spot per word, so tests and eyes know where it must light up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from llava_lab.geometry import Mode, PictureMap
from llava_lab.results import Relevance, Run, Target, Word

FINGERPRINT = "0" * 16
CAR = (72.0, 206.0)  # centre of the car in picture pixels (x, y)
HOUSE = (196.0, 104.0)
PLACES = {"The": (150.0, 250.0), "car": CAR, "is": (40.0, 40.0), "red.": (86.0, 200.0), "house": HOUSE, "blue.": HOUSE}
PROBABILITIES = {"The": 0.992, "car": 0.94, "is": 0.998, "red.": 0.81}
LAYERS = 6


def car_picture(width: int = 288, height: int = 288) -> np.ndarray:
    """Sky, grass, a blue house, a red car; uint8 (height, width, 3)."""
    zoom = 4
    image = Image.new("RGB", (width * zoom, height * zoom), "#dfeaf4")
    pen = ImageDraw.Draw(image)

    def box(left: float, top: float, right: float, bottom: float, color: str, radius: float = 0) -> None:
        pen.rounded_rectangle([v * zoom for v in (left, top, right, bottom)], radius * zoom, fill=color)

    def disc(x: float, y: float, r: float, color: str) -> None:
        pen.ellipse([v * zoom for v in (x - r, y - r, x + r, y + r)], fill=color)

    box(0, 0.58 * height, width, height, "#b9d3a4")
    disc(48, 48, 22, "#f5d26b")
    box(150, 84, 244, 180, "#3465c4")
    pen.polygon([(138 * zoom, 88 * zoom), (197 * zoom, 38 * zoom), (256 * zoom, 88 * zoom)], fill="#27488c")
    box(186, 130, 212, 180, "#e9eef7")
    box(160, 100, 180, 120, "#e9eef7")
    box(216, 100, 236, 120, "#e9eef7")
    box(24, 196, 126, 226, "#cf2f2a", 9)
    box(48, 172, 104, 204, "#cf2f2a", 12)
    box(56, 178, 74, 198, "#e8eef4", 4)
    box(80, 178, 98, 198, "#e8eef4", 4)
    disc(50, 226, 14, "#22252b")
    disc(102, 226, 14, "#22252b")
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


def make_run(
    answer: str = "The car is red.",
    *,
    question: str = "What color is the car?",
    picture: np.ndarray | None = None,
    mode: Mode = "pad",
    grid: int = 12,
    size: int = 96,
    probabilities: Sequence[float] | None = None,
    model: str = "tiny",
) -> Run:
    """A Run with one token per word of the answer."""
    picture = car_picture() if picture is None else picture
    height, width = picture.shape[:2]
    said = answer.split()
    image = (4, 4 + grid * grid)
    start = image[1] + 6
    tokens = ["<s>", *["…"] * 3, *["<image>"] * (grid * grid), *["?"] * 6, *said]
    chances = [PROBABILITIES.get(word, 0.9) for word in said] if probabilities is None else list(probabilities)
    return Run(
        picture=picture,
        question=question,
        answer=answer,
        prompt=f"USER: <image>\n{question} ASSISTANT:",
        token_ids=np.arange(len(tokens)),
        tokens=tuple(tokens),
        segments={
            "system": (0, 4),
            "image": image,
            "question": (image[1], start - 2),
            "cue": (start - 2, start),
            "answer": (start, len(tokens)),
        },
        words=tuple(Word(word, start + i, start + i + 1) for i, word in enumerate(said)),
        logprobs=np.log(np.asarray(chances, np.float32)),
        map=PictureMap.make(width, height, size=size, rows=grid, cols=grid, mode=mode),
        model=model,
        fingerprint=FINGERPRINT,
    )


def make_relevance(run: Run, values: np.ndarray, targets: Sequence[Target] | None = None, **fields: object) -> Relevance:
    """Values (targets, rows, cols) as a Relevance of `run`; one target per word unless given."""
    given: dict = {"method": "rollout", "options": {"residual": 0.5, "fusion": "mean"}, "seconds": 0.21, "passes": {"forward": 1}}
    values = np.asarray(values, np.float32)
    chosen = run.word_targets() if targets is None else tuple(targets)
    return Relevance(values, chosen, map=run.map, model=run.model, fingerprint=run.fingerprint, **{**given, **fields})


def spots(run: Run, *, width: float = 34.0, seed: int = 0, noise: float = 0.12) -> np.ndarray:
    """A soft spot per word where the word's thing is, float (words, rows, cols), between 0 and about 1."""
    m, random = run.map, np.random.default_rng(seed)
    boxes = np.array([[m.patch_box(r, c) for c in range(m.cols)] for r in range(m.rows)])
    x, y = boxes[..., [0, 2]].mean(-1), boxes[..., [1, 3]].mean(-1)
    out = []
    for word in run.words:
        at = PLACES.get(word.text, (m.width / 2, m.height / 2))
        near = np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / (2 * width**2))
        out.append(near * (0.35 if word.text in ("The", "is") else 1.0) + noise * random.random(x.shape) ** 3)
    return np.array(out)


def example(run: Run | None = None) -> tuple[Run, dict]:
    """The run and its maps: rollout with layers, occlusion (signed, with a whole-answer map), a random control."""
    run = make_run() if run is None else run
    base, answer = spots(run), run.target(None)
    layers = [
        (f"layer {i}", make_relevance(run, 0.021 * (spots(run, width=90 - 10 * i, seed=i) * (0.4 + 0.12 * i))))
        for i in range(LAYERS)
    ]
    drop = 2.4 * (spots(run, width=26, seed=9) - 0.1)
    occlusion = make_relevance(
        run,
        np.concatenate([drop[1:2], drop[3:4], drop.mean(0, keepdims=True)]) if len(run.words) > 3 else drop,
        [run.target(run.words[1]), run.target(run.words[3]), answer] if len(run.words) > 3 else None,
        method="occlusion",
        options={"fill": "mean", "block": 1},
        seconds=3.4,
        passes={"forward": 145},
        notes=("Fill is the picture's mean colour; another fill gives another map.",),
    )
    noise = np.random.default_rng(3).random(base.shape) * 0.02
    return run, {
        "rollout": layers,
        "occlusion": occlusion,
        "random": make_relevance(run, noise, method="random", options={"seed": 0}),
    }


def single_cell(run: Run, cells: Sequence[int], value: float = 1.0) -> Relevance:
    """One map per word, zero but for one patch each: pixels must change there and nowhere else."""
    values = np.zeros((len(run.words), run.map.rows * run.map.cols), np.float32)
    values[np.arange(len(cells)), list(cells)] = value
    return make_relevance(run, values.reshape(len(run.words), run.map.rows, run.map.cols))


def many(words: int = 64, layers: int = 32, grid: int = 24) -> tuple[Run, dict]:
    """The measuring load: 64 words, 32 layers, 24x24 patches."""
    run = make_run(" ".join(f"w{i}" for i in range(words)), grid=grid, size=336)
    random = np.random.default_rng(0)
    maps = [(f"layer {i}", make_relevance(run, random.random((words, grid, grid)))) for i in range(layers)]
    return run, {"rollout": maps}


def with_answer(run: Run, answer: str) -> Run:
    """The same run with other words in the same places (one per word of the old answer)."""
    said = answer.split(" ", len(run.words) - 1)
    return replace(run, answer=answer, words=tuple(replace(word, text=text) for word, text in zip(run.words, said, strict=True)))
