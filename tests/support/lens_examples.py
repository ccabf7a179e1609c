"""Lenses made by hand for the widget tests: no model anywhere, so that what must light up is known.

In `example` the patch `SPOT` says "car" more and more surely; every other patch says "grass". The lens was asked for
"car" and "cup"; "sky" is a second word of the top row, "Red" is among the top words at one place only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from llava_lab.results import LogitLens, NearestWords, Run
from tests.support.widget_examples import make_run

STATES, TOP, VOCABULARY = 5, 4, 1000
SPOT, ONCE = 101, (3, 40)  # the car's patch; state and patch of "Red"
PIECES = ("\n", " car", " cup", " grass", " sky", " of", " Red", "sky")
CAR = (0.01, 0.05, 0.2, 0.5, 0.9)  # probability at SPOT, by state
NEAR = (" sky", " roof", " wheel")


def lens_of(run: Run, top_ids: np.ndarray, top_probs: np.ndarray, **fields: Any) -> LogitLens:
    """Top words (states, patches, top) as a lens of `run`; not asked for any word unless given."""
    states, patches, _ = top_ids.shape
    known = np.unique(top_ids).astype(np.int32)
    given: dict[str, Any] = {
        "states": tuple(range(states)),
        "entropy": np.full((states, patches), 2.0, np.float32),
        "words": (),
        "word_ids": (),
        "ranks": np.zeros((states, patches, 0), np.int32),
        "probs": np.zeros((states, patches, 0), np.float32),
        "piece_ids": known,
        "pieces": tuple(f" w{i}" for i in known),
        "vocabulary": VOCABULARY,
        "seconds": 0.1,
        "notes": ("Made by hand.",),
    }
    about = {"map": run.map, "model": run.model, "fingerprint": run.fingerprint}
    return LogitLens(top_ids=top_ids.astype(np.int32), top_probs=top_probs.astype(np.float32), **{**given, **about, **fields})


def example() -> tuple[Run, LogitLens, NearestWords]:
    run = make_run(picture=np.full((288, 288, 3), 200, np.uint8))  # one colour, so that what is lit can be told
    patches = run.map.rows * run.map.cols
    ids = np.tile(np.array([3, 4, 5, 0]), (STATES, patches, 1))  # grass, sky, of, newline
    probs = np.tile(np.array([0.4, 0.2, 0.1, 0.05]), (STATES, patches, 1))
    ids[:, SPOT] = [1, 3, 5, 7]  # car, grass, of, "sky" without its space
    probs[:, SPOT] = [[p, p / 4, p / 8, p / 16] for p in CAR]
    ids[ONCE[0], ONCE[1]] = [3, 6, 5, 0]
    car = np.full((STATES, patches), 0.002)
    car[:, SPOT] = CAR
    words = np.stack([car, np.full_like(car, 1e-6)], -1)
    ranks = np.where(words > 0.005, 1, 300)
    entropy = np.linspace(5, 1, STATES)[:, None] + np.linspace(0, 0.5, patches)[None]
    asked = {"words": ("car", "cup"), "word_ids": (1, 2), "probs": words.astype(np.float32), "ranks": ranks.astype(np.int32)}
    names = {"piece_ids": np.array([0, 1, 3, 4, 5, 6, 7], np.int32), "pieces": tuple(PIECES[i] for i in (0, 1, 3, 4, 5, 6, 7))}
    lens = lens_of(run, ids, probs, entropy=entropy.astype(np.float32), **asked, **names)
    return run, lens, near_of(run)


def three() -> tuple[Run, list[LogitLens], NearestWords]:
    """The example by three lenses: tuned is always as undecided as in the last state, Jacobian says "cup" at `SPOT`."""
    run, lens, near = example()
    tuned = replace(lens, lens="tuned", entropy=np.repeat(lens.entropy[-1:], STATES, 0))
    ids, probs = lens.top_ids.copy(), lens.top_probs.copy()
    ids[:, SPOT, 0], probs[:, SPOT, 0] = 2, 0.95
    pieces: dict[str, Any] = {"piece_ids": np.arange(8, dtype=np.int32), "pieces": PIECES}
    asked = np.full_like(lens.probs, 0.001)
    asked[:, SPOT] = 0.001, 0.95
    jacobian = replace(lens, lens="jacobian", top_ids=ids, top_probs=probs, probs=asked, **pieces, notes=("Led to the end.",))
    return run, [lens, tuned, jacobian], near


def near_of(run: Run) -> NearestWords:
    """Everything lies near "sky", but the car's patch near "wheel"; its token is the longest."""
    patches = run.map.rows * run.map.cols
    ids = np.tile(np.array([4, 20, 21]), (patches, 1))
    ids[SPOT] = [21, 20, 4]
    norms = np.linspace(1, 2, patches)
    norms[SPOT] = 9.0
    return NearestWords(
        top_ids=ids.astype(np.int32),
        cosines=np.tile(np.array([0.5, 0.25, -0.2], np.float32), (patches, 1)),
        piece_ids=np.array([4, 20, 21], np.int32),
        pieces=NEAR,
        norms=norms.astype(np.float32),
        readable=np.ones(patches, bool),
        random_shares=np.array([0.1], np.float32),
        random_cosines=np.array([0.1], np.float32),
        vocabulary_share=0.3,
        common_direction=0.1,
        space="input",
        centered=True,
        map=run.map,
        model=run.model,
        fingerprint=run.fingerprint,
        seconds=0.1,
    )


def big(states: int = 33, grid: int = 24, top: int = 5) -> tuple[Run, LogitLens]:
    """The measuring load: 7B's 33 states x 576 patches x 5 words of 32,064."""
    run, random = make_run(grid=grid, size=336), np.random.default_rng(0)
    shape = (states, grid * grid, top)
    probs = np.sort(random.random(shape) / top, -1)[..., ::-1]
    ids = random.integers(0, 32064, shape)
    entropy = random.random(shape[:2]) * np.log(32064)
    return run, lens_of(run, ids, probs, entropy=entropy.astype(np.float32), vocabulary=32064)
