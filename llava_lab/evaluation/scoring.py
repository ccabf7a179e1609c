"""Exact-match scores of a model on a data set, each beside what a model that cannot see would score.

Three controls: *blind* (every picture grey), *shuffled* (every picture another one's), and
*majority* (the commonest short answer of each question type in the training split, scored on the
short answers). A score means something only by its distance from these.

Questions are answered in batches, greedily: the same tokens as `Lab.ask`, several at a time (`models.generation.generate_many`).
Only the answers and how sure they are is kept; for positions and every probability ask with `Lab.ask_many`.

    evaluate(lab, data="picturebook", n=200)["accuracy"]
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from llava_lab.checks import PATIENCE, entry
from llava_lab.errors import DataError
from llava_lab.evaluation.items import PHOTOS, WORLDS, Item, load_items
from llava_lab.models import Lab, layout
from llava_lab.models.generation import Contrast, generate_many
from llava_lab.models.text import group_words
from llava_lab.results.run import least_certain, word_probabilities
from llava_lab.stats import calibration, cluster_interval, exact_match, same_answer
from llava_lab.worlds.photo_names import classes

BATCH = 128
LONGEST = 48  # tokens an answer may take
GREY = (122, 116, 104)  # CLIP's mean colour: the emptiest picture there is
MAJORITY_PICTURES = 2000  # of the training split, to find the commonest answers


@dataclass(frozen=True)
class Change:
    """How answers are made otherwise than the model makes them."""

    # given the lab, where the image tokens stand and where the batch's prompts end: what holds while it is answered
    around: Callable[[Lab, tuple[int, int], int], AbstractContextManager[Any]] | None = None
    contrast: Callable[[torch.Tensor], Contrast] | None = None  # given the pictures as the vision tower takes them


UNCHANGED = Change()


@entry
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
    pictures: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Greedy exact match over `n` pictures, overall and by question type, with 95% intervals.

    With `normalise` answers are compared after `stats.normalised`, else as they are.
    ``data="photos"`` asks about the named photographs in the folder `pictures` (`items.photo_items`); a name is right when an
    accepted word stands in the answer, and `ceiling` says by type of question how often the tower's own classifier names such a
    word, from the whole picture's features or, in a collage, from those of the quarter asked about.
    Each score's `calibration` sets the model's confidence in its answers (`Run.confidence`) beside how often they are right
    (`stats.calibration`); a control's says how sure it is where it cannot know.
    Returns the object that ``llava-lab evaluate --json`` prints. Intervals resample pictures.
    Raises DataError for an unknown data set or split.

    >>> from llava_lab.evaluation import evaluate
    >>> evaluate(lab, n=2, controls=False, progress=False)["n"]
    8
    """
    began, prompt = time.perf_counter(), prompt or lab.prompt
    equal = same_answer if normalise else exact_match
    items = load_items(data, split=split, n=n, seed=seed, pictures=pictures)
    if not items:
        raise DataError(f"{data} split {split} gave no questions; ask for more pictures")
    result = _answered(lab, items, items, prompt, equal, f"{lab.name} on {split}", progress)
    if controls:
        result["controls"] = {
            "blind": _answered(lab, items, blinded(items), prompt, equal, "blind", progress),
            "shuffled": _answered(lab, items, shuffled(items, seed), prompt, equal, "shuffled", progress),
            "majority": scores_of(items, majority_of(items, data, seed)),
        }
    if data == PHOTOS and hasattr(layout.vision_tower(lab.model), "head"):
        named = [item for item in items if item.type == "naming" or item.quarter is not None]
        ceiling = scores_of(named, _tower_names(lab, named))["by_type"]
        result["ceiling"] = ceiling["naming"] | {"by_type": ceiling}
    about = {"model": lab.name, "data": data, "split": split, "seed": seed, "pictures": n, "prompt": prompt}
    about |= {"normalised": True} if normalise else {}
    return result | about | {"seconds": round(time.perf_counter() - began, 1)}


def answer_all(
    lab: Lab,
    items: Sequence[Item],
    *,
    prompt: str | None = None,
    max_new_tokens: int = LONGEST,
    batch: int = BATCH,
    label: str = "answering",
    progress: bool = True,
    change: Change = UNCHANGED,
) -> list[str]:
    """One answer per item, in order. Items in a row that share a picture have it drawn and prepared once.

    >>> from llava_lab.evaluation import answer_all, load_items
    >>> len(answer_all(lab, load_items("picturebook", n=1), progress=False))
    4
    """
    options: dict[str, Any] = {"limit": max_new_tokens, "batch": batch, "label": label, "progress": progress}
    return [text for text, _ in answers_and_confidence(lab, items, prompt=prompt, change=change, **options)]


def answers_and_confidence(
    lab: Lab,
    items: Sequence[Item],
    *,
    prompt: str | None,
    limit: int = LONGEST,
    batch: int = BATCH,
    label: str,
    progress: bool,
    change: Change = UNCHANGED,
) -> list[tuple[str, float]]:
    """(answer, the model's confidence in it) of each item, in order."""
    answers: list[tuple[str, float]] = []
    with tqdm(total=len(items), desc=label, unit="question", delay=PATIENCE, disable=not progress) as bar:
        for start in range(0, len(items), batch):
            chosen = items[start : start + batch]
            told: dict[int, tuple[str, float]] = {}
            for bare in (False, True):  # questions that are text alone have a prompt of their own
                rows = [number for number, item in enumerate(chosen) if (item.draw is None) == bare]
                given = _answers(lab, [chosen[number] for number in rows], prompt, limit, change)
                told |= dict(zip(rows, given, strict=True))
            answers += [told[number] for number in range(len(chosen))]
            bar.update(len(chosen))
    return answers


def _answers(
    lab: Lab, items: Sequence[Item], prompt: str | None, limit: int, change: Change = UNCHANGED
) -> list[tuple[str, float]]:
    """Answers to questions that are all about one picture each, or all about none."""
    if not items:
        return []
    draws = [draw for draw in dict.fromkeys(item.draw for item in items) if draw is not None]
    asked = [lab.sequence(item.question, prompt=prompt, pictures=min(len(draws), 1)) for item in items]
    sequences = [one.token_ids for one in asked]
    pixels = torch.cat([lab.pixels(draw(), None) for draw in draws]) if draws else None
    owner = [draws.index(item.draw) for item in items if item.draw is not None]
    limits, ends = [max(1, min(limit, lab.context - len(ids))) for ids in sequences], lab.eos_ids
    contrast = change.contrast(pixels) if change.contrast and pixels is not None else None
    image, end = asked[0].segments["image"], max(map(len, sequences))
    with change.around(lab, (image[0], image[1]), end) if change.around else nullcontext():
        given = generate_many(
            lab.model, sequences, pixels, owner, limits=limits, eos=ends, image_id=lab.image_id, contrast=contrast
        )
    texts = lab.tokenizer.batch_decode([answer.token_ids.tolist() for answer in given], skip_special_tokens=True)
    words = [group_words(lab.tokenizer, answer.token_ids.tolist()) for answer in given]
    sure = [least_certain(said, word_probabilities(said, answer.logprobs, 0)) for said, answer in zip(words, given, strict=True)]
    return [(text.strip(), chance) for text, chance in zip(texts, sure, strict=True)]


def _answered(
    lab: Lab, items: list[Item], shown: list[Item], prompt: str, equal: Callable[[str, str], bool], label: str, progress: bool
) -> dict[str, Any]:
    """Scores of the answers given to `shown`, against what `items` expect, and how sure the model was of them."""
    given = answers_and_confidence(lab, shown, prompt=prompt, label=label, progress=progress)
    right = np.array([item.right(answer, equal) for (answer, _), item in zip(given, items, strict=True)])
    scores = scores_of(items, right)
    sure = np.array([chance for _, chance in given])
    for name, row in {"": scores, **scores["by_type"]}.items():
        rows = np.array([not name or item.type == name for item in items])
        row["calibration"] = calibration(sure[rows], right[rows])
    return scores


@torch.inference_mode()
def _tower_names(lab: Lab, items: list[Item]) -> np.ndarray:
    """Whether the likeliest class of the tower's own classifier is called by an accepted word: what a connector can pass on."""
    tower, named = layout.vision_tower(lab.model), list(classes().values())
    right = []
    for item in items:
        features = tower(lab.pixels(item.drawn(), None)).last_hidden_state
        side = math.isqrt(features.shape[1])
        grid = features.reshape(side, side, -1)
        if item.quarter is not None:
            row, column = item.quarter
            grid = grid.chunk(2, 0)[row].chunk(2, 1)[column]
        thing, others = named[int(tower.classes(grid.flatten(0, 1).mean(0, keepdim=True)).argmax())]
        right.append(item.right(", ".join((*thing.words[:2], *others)), exact_match))
    return np.array(right)


def scores_of(items: list[Item], right: np.ndarray) -> dict[str, Any]:
    cluster = np.array([item.picture for item in items])
    by_type = defaultdict(list)
    for i, item in enumerate(items):
        by_type[item.type].append(i)
    table = {name: _score(right[rows], cluster[rows]) for name, rows in sorted(by_type.items())}
    return _score(right, cluster) | {"by_type": table}


def _score(right: np.ndarray, cluster: np.ndarray) -> dict[str, Any]:
    interval = [round(v, 4) for v in cluster_interval(right, cluster)]
    return {"accuracy": round(float(right.mean()), 4), "interval": interval, "n": len(right)}


def blinded(items: list[Item]) -> list[Item]:
    """The same questions before a grey picture of the first one's size."""
    shapes = (item.draw().shape for item in items if item.draw is not None)
    grey = np.broadcast_to(np.array(GREY, np.uint8), next(shapes, (1, 1, 3)))
    draw = partial(np.copy, grey)
    return [item if item.draw is None else replace(item, draw=draw) for item in items]


def shuffled(items: list[Item], seed: int) -> list[Item]:
    """Each question before another one's picture: pictures in a random circle, each moved on by one."""
    draw = {item.picture: item.draw for item in items if item.draw is not None}
    names = list(draw)
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    follower = dict(zip(order, order[1:] + order[:1], strict=True))
    return [item if item.draw is None else replace(item, draw=draw[follower[item.picture]]) for item in items]


def majority_of(items: list[Item], data: str, seed: int) -> np.ndarray:
    common = _trained_on(data, seed, MAJORITY_PICTURES) if data in WORLDS else _commonest(items)
    return np.array([item.short == common.get(item.type) for item in items])


@cache
def _trained_on(data: str, seed: int, pictures: int) -> Mapping[str, str]:
    """The commonest answers of a drawn world's training split, which thousands of scenes are made for."""
    return _commonest(load_items(data, split="train", n=pictures, seed=seed))


def _commonest(items: list[Item]) -> dict[str, str]:
    """The commonest short answer to each type of question."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        counts[item.type][item.short] += 1
    return {name: counter.most_common(1)[0][0] for name, counter in counts.items()}
