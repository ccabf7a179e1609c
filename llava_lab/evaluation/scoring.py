"""Exact-match scores of a model on a data set, each beside what a model that cannot see would score.

Three controls: *blind* (every picture grey), *shuffled* (every picture another one's), and
*majority* (the commonest short answer of each question type in the training split, scored on the
short answers). A score means something only by its distance from these.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from llava_lab.errors import DataError
from llava_lab.evaluation.answering import answer_all
from llava_lab.evaluation.items import WORLDS, Item, load_items
from llava_lab.evaluation.metrics import cluster_interval, exact_match, same_answer
from llava_lab.models import Lab

GREY = (122, 116, 104)  # CLIP's mean colour: the emptiest picture there is
MAJORITY_PICTURES = 2000  # of the training split, to find the commonest answers


def evaluate(
    lab: Lab,
    *,
    data: str = "picturebook",
    split: str = "test",
    n: int = 2000,
    seed: int = 0,
    prompt: str | None = None,
    normalise: bool = False,
    controls: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Greedy exact match over `n` pictures, overall and by question type, with 95% intervals.

    With `normalise` answers are compared after `metrics.normalised`, else as they are.
    Returns the object that ``llava-lab evaluate --json`` prints. Intervals resample pictures.
    Raises DataError for an unknown data set or split.
    """
    began, prompt = time.perf_counter(), prompt or lab.prompt
    equal = same_answer if normalise else exact_match
    items = load_items(data, split=split, n=n, seed=seed)
    if not items:
        raise DataError(f"{data} split {split} gave no questions; ask for more pictures")
    result = _answered(lab, items, items, prompt, equal, f"{lab.name} on {split}", progress)
    if controls:
        result["controls"] = {
            "blind": _answered(lab, items, _blind(items), prompt, equal, "blind", progress),
            "shuffled": _answered(lab, items, _shuffled(items, seed), prompt, equal, "shuffled", progress),
            "majority": _scores(items, _majority(items, data, seed)),
        }
    about = {"model": lab.name, "data": data, "split": split, "seed": seed, "pictures": n, "prompt": prompt}
    about |= {"normalised": True} if normalise else {}
    return result | about | {"seconds": round(time.perf_counter() - began, 1)}


def _answered(
    lab: Lab, items: list[Item], shown: list[Item], prompt: str, equal: Callable[[str, str], bool], label: str, progress: bool
) -> dict[str, Any]:
    """Scores of the answers given to `shown`, against what `items` expect."""
    answers = answer_all(lab, shown, prompt=prompt, label=label, progress=progress)
    return _scores(items, np.array([equal(a, item.answer) for a, item in zip(answers, items, strict=True)]))


def _scores(items: list[Item], right: np.ndarray) -> dict[str, Any]:
    cluster = np.array([item.picture for item in items])
    by_type = defaultdict(list)
    for i, item in enumerate(items):
        by_type[item.type].append(i)
    table = {name: _score(right[rows], cluster[rows]) for name, rows in sorted(by_type.items())}
    return _score(right, cluster) | {"by_type": table}


def _score(right: np.ndarray, cluster: np.ndarray) -> dict[str, Any]:
    interval = [round(v, 4) for v in cluster_interval(right, cluster)]
    return {"accuracy": round(float(right.mean()), 4), "interval": interval, "n": len(right)}


def _blind(items: list[Item]) -> list[Item]:
    """The same questions before a grey picture of the first one's size."""
    grey = np.broadcast_to(np.array(GREY, np.uint8), items[0].draw().shape)
    draw = partial(np.copy, grey)
    return [replace(item, draw=draw) for item in items]


def _shuffled(items: list[Item], seed: int) -> list[Item]:
    """Each question before another one's picture: pictures in a random circle, each moved on by one."""
    draw = {item.picture: item.draw for item in items}
    names = list(draw)
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    follower = dict(zip(order, order[1:] + order[:1], strict=True))
    return [replace(item, draw=draw[follower[item.picture]]) for item in items]


def _majority(items: list[Item], data: str, seed: int) -> np.ndarray:
    source = load_items(data, split="train", n=MAJORITY_PICTURES, seed=seed) if data in WORLDS else items
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item in source:
        counts[item.type][item.short] += 1
    common = {name: counter.most_common(1)[0][0] for name, counter in counts.items()}
    return np.array([item.short == common.get(item.type) for item in items])
