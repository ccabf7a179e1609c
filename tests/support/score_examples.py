"""Scores put together by hand, for the tests of saving and drawing them: no model, known numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from llava_lab.geometry import PictureMap
from llava_lab.results import BenchmarkScores, Comparison, Faithfulness, GroundTruth, Leaderboard, Relevance, Sanity, Target

RED = Target("word", "red", (7,), (11,))
SURE = Target("contrast", "yes, not no", (8,), (12,), (13,))
TARGETS = (RED, SURE)
FRACTIONS = np.array([0, 0.25, 0.75, 1])
WHERE = PictureMap.make(40, 40, size=32, rows=4, cols=4, mode="pad")


def example_map(method: str = "rollout", seed: int = 0) -> Relevance:
    values = np.random.default_rng(seed).random((2, 4, 4)).astype(np.float32)
    options = {"layers": [0, 2], "fill": "grey"}
    return Relevance(values, TARGETS, method, options, WHERE, "m", "f", 0.5, {"forward": 3, "backward": 1}, ("a note",), {"x": 1})


def example_score(method: str = "rollout", *, good: bool = True, **changes: Any) -> Faithfulness:
    """Deletion falls and insertion rises at once (or, not good, at the end); the second target's second fill tells nothing."""
    early, late = [1, 0.2, 0.1, 0], [1, 0.9, 0.8, 0]
    down, up = (early, late[::-1]) if good else (late, early[::-1])
    deletion = np.broadcast_to(np.array(down, np.float32), (2, 2, 4)).copy()
    insertion = np.broadcast_to(np.array(up, np.float32), (2, 2, 4)).copy()
    deletion[1, 1] = insertion[1, 1] = np.nan
    random = np.broadcast_to(np.array([1, 0.6, 0.4, 0], np.float32), (2, 3, 2, 2, 4)).copy()
    random[1] = random[1, ..., ::-1]
    fields: dict[str, Any] = {
        "method": method,
        "options": {"layers": None},
        "targets": TARGETS,
        "fills": ("mean", "blur"),
        "fractions": FRACTIONS,
        "deletion": deletion,
        "insertion": insertion,
        "random": random,
        "center": random[:, 0],
        "whole": np.array([0.9, 0.8]),
        "filled": np.array([[0.1, 0.2], [0.1, 0.79]]),
        "interval": np.array([[0.2, 0.6], [np.nan, np.nan]]),
        "beats_random": np.array([good, False]),
        "effects": np.array([[[0.9, 0.1], [0.8, 0.2]], [[0.1, 0.5], [np.nan, np.nan]]], np.float32),
        "claims": np.array([[2.0, 1.0], [2.0, 1.0]], np.float32),
        "random_claims": np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]], np.float32),
        "scale": "probability",
        "fingerprint": "f",
        "passes": {"forward": 12, "backward": 0},
        "seconds": 1.5,
        "notes": ("read me",),
    }
    return Faithfulness(**{**fields, **changes})


def example_truth(method: str = "rollout") -> GroundTruth:
    measures = ("pointing", "mass", "auc", "iou")
    values = np.array([[1, 0.5, 0.9, 0.4], [0, 0.25, np.nan, 0.1]])
    chance = np.array([[0.0, 0.1, 0.5, 0.1], [1.0, 0.3, 0.7, 0.2]])
    share = np.zeros((4, 4), np.float32)
    share[1, 2] = 1
    return GroundTruth(method, {}, TARGETS, measures, values, chance, chance[0], share, "f", ("a note",))


def example_comparison() -> Comparison:
    maps = {name: example_map(name, i) for i, name in enumerate(("rollout", "random"))}
    scores = {name: example_score(name, good=name == "rollout") for name in maps}
    spearman = np.array([[1, 0.25], [0.25, 1]])
    overlap = np.array([[1, 0.5], [0.5, 1]])
    refused = {"attention": "cannot tell"}
    truth = {name: example_truth(name) for name in maps}
    return Comparison(maps, scores, truth, spearman, overlap, 2, 0.125, refused, "f", 3.5, False, ("note",))


def example_board() -> Leaderboard:
    """Two methods, two kinds of question, three measures: rollout is told from random, attention is not."""
    mean = np.array([[[0.5, 0.8, 2.0], [0.6, 1.0, 2.0]], [[0.1, 0.4, 0.1], [0.0, np.nan, 0.1]]])
    interval = np.stack([mean - 0.1, mean + 0.1], -1)
    against = np.array([[[0.5, 0.6, np.nan], [0.6, 0.8, np.nan]], [[0.1, 0.2, np.nan], [0.0, np.nan, np.nan]]])
    reach = np.array([[[0.1]], [[0.3]]])
    around = np.stack([against - reach, against + reach], -1)
    counts = np.where(np.isnan(mean), 0, 40)
    names, kinds = ("rollout", "attention"), ("all", "color")
    about = {
        "model": "tiny",
        "data": "picturebook",
        "split": "test",
        "explained": 40,
        "pictures": 50,
        "asked": 60,
        "wrong": 9,
        "blind": 1,
    }
    agreement = np.array([[1, 0.3], [0.3, 1]])
    measures = ("gain", "pointing", "seconds")
    return Leaderboard(names, kinds, measures, mean, interval, against, around, counts, agreement, {}, about)


def example_benchmark(**changes: Any) -> BenchmarkScores:
    """Two measures, one control, one published model; the second measure had nothing to divide by in the control."""
    values, control = np.array([85.0, 50.0]), np.array([[66.0, np.nan]])
    fields: dict[str, Any] = {
        "benchmark": "pope",
        "measures": ("F1", "yes ratio"),
        "values": values,
        "intervals": np.stack([values - 2, values + 2], -1),
        "counts": np.array([12, 12]),
        "controls": ("blind",),
        "control_values": control,
        "control_intervals": np.stack([control - 3, control + 3], -1),
        "gap_intervals": np.stack([values - control - 4, values - control + 4], -1),
        "published": {"LLaVA-1.5 7B": {"F1": 85.9}},
        "model": "m",
        "fingerprint": "f",
        "about": {"data": "picturebook", "pictures": 4, "questions": 12},
        "seconds": 2.5,
        "notes": ("read me",),
    }
    return BenchmarkScores(**{**fields, **changes})


def example_sanity(method: str = "rollout", *, dull: bool = False, **changes: Any) -> Sanity:
    """Two steps, one question, one target; a dull map stays what it was."""
    first = np.arange(16, dtype=np.float32).reshape(1, 4, 4)
    after = np.array([[1.0], [1.0]] if dull else [[0.6], [0.1]], np.float32)
    asked = np.array([[1.0 if dull else 0.5]], np.float32)
    draws = np.linspace(-0.4, 0.4, 41, dtype=np.float32)[:, None]
    fields: dict[str, Any] = {
        "options": {},
        "targets": (RED,),
        "steps": ("layer 1", "layer 0"),
        "questions": ("Who took this picture?",),
        "original": first,
        "maps": np.stack([first + 1, first + 2]),
        "question_maps": first[None] + 3,
        "spearman": after,
        "overlap": after,
        "ssim": np.zeros((0, 0), np.float32),
        "question_spearman": asked,
        "question_overlap": asked,
        "question_ssim": np.zeros((0, 0), np.float32),
        "random_spearman": draws / 2,
        "moved_spearman": draws,
        "top": 2,
        "chance": 0.125,
    }
    about: dict[str, Any] = {"map": WHERE, "model": "m", "fingerprint": "f", "seed": 0, "passes": {"forward": 4, "backward": 0}}
    return Sanity(method, **{**fields, **about, "seconds": 1.0, **changes})
