"""Exact-match scores of a model on a data set, each beside what a model that cannot see would score.

Three controls: *blind* (every picture grey), *shuffled* (every picture another one's), and
*majority* (the commonest short answer of each question type in the training split, scored on the
short answers). A score means something only by its distance from these.

Questions are answered in batches, greedily: the same tokens as `Lab.ask`, several at a time. What a prompt says up to and
with its picture is the same for all questions about that picture, so it runs once per picture; the questions go on from
its cache. Padding stands before each question and is masked, so it changes no answer (tested). Only the answers are
kept; for probabilities and positions ask with `Lab.ask`.

    evaluate(lab, data="picturebook", n=200)["accuracy"]
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Cache

from llava_lab.capture import evaluating
from llava_lab.checks import PATIENCE, entry
from llava_lab.errors import DataError
from llava_lab.evaluation.items import WORLDS, Item, load_items
from llava_lab.models import Lab
from llava_lab.stats import cluster_interval, exact_match, same_answer

BATCH = 128
LONGEST = 48  # tokens an answer may take
GREY = (122, 116, 104)  # CLIP's mean colour: the emptiest picture there is
MAJORITY_PICTURES = 2000  # of the training split, to find the commonest answers


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
) -> dict[str, Any]:
    """Greedy exact match over `n` pictures, overall and by question type, with 95% intervals.

    With `normalise` answers are compared after `stats.normalised`, else as they are.
    Returns the object that ``llava-lab evaluate --json`` prints. Intervals resample pictures.
    Raises DataError for an unknown data set or split.

    >>> from llava_lab.evaluation import evaluate
    >>> evaluate(lab, n=2, controls=False, progress=False)["n"]
    8
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


def answer_all(
    lab: Lab,
    items: Sequence[Item],
    *,
    prompt: str | None = None,
    max_new_tokens: int = LONGEST,
    batch: int = BATCH,
    label: str = "answering",
    progress: bool = True,
) -> list[str]:
    """One answer per item, in order. Items in a row that share a picture have it drawn and prepared once.

    >>> from llava_lab.evaluation import answer_all, load_items
    >>> len(answer_all(lab, load_items("picturebook", n=1), progress=False))
    4
    """
    answers: list[str] = []
    with tqdm(total=len(items), desc=label, unit="question", delay=PATIENCE, disable=not progress) as bar:
        for start in range(0, len(items), batch):
            chosen = items[start : start + batch]
            if bare := next((item for item in chosen if item.draw is None), None):
                raise DataError(f"{bare.question!r} is asked without a picture, which is not scored yet; leave its row out")
            sequences = [lab.sequence(item.question, prompt=prompt).token_ids for item in chosen]
            draws = [draw for draw in dict.fromkeys(item.draw for item in chosen) if draw is not None]
            pixels = torch.cat([lab.pixels(draw(), None) for draw in draws])
            answers += _answer(lab, sequences, pixels, [draws.index(item.draw) for item in chosen], max_new_tokens)
            bar.update(len(chosen))
    return answers


@torch.inference_mode()
def _answer(lab: Lab, sequences: list[np.ndarray], pixels: Float[Tensor, "N 3 S S"], owner: list[int], limit: int) -> list[str]:
    """Greedy answers; sequence i is about picture ``owner[i]``."""
    cut = int(np.flatnonzero(sequences[0] == lab.image_id)[-1]) + 1
    assert all((ids[:cut] == sequences[0][:cut]).all() for ids in sequences), "prompts differ before their picture"
    prefix = torch.from_numpy(sequences[0][:cut]).expand(len(pixels), -1).to(lab.device)
    with evaluating(lab.model):
        cache = lab.model(input_ids=prefix, pixel_values=pixels, use_cache=True, logits_to_keep=1).past_key_values
        cache.reorder_cache(torch.tensor(owner, device=lab.device))
        ids, mask = _padded([row[cut:] for row in sequences], cut)
        new = _continue(lab, cache, ids.to(lab.device), mask.to(lab.device), limit)
    return [text.strip() for text in lab.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _padded(rows: list[np.ndarray], prefix: int) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B K"]]:
    """Questions pushed to the right, and the mask over the `prefix` positions before them and over themselves."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.ones(len(rows), prefix + longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.from_numpy(row)
        mask[i, prefix : prefix + longest - len(row)] = 0
    return ids, mask


def _continue(lab: Lab, cache: Cache, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B K"], limit: int) -> list[list[int]]:
    """The likeliest tokens behind each row, up to its end or `limit` of them."""
    answers: list[list[int]] = [[] for _ in ids]
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    ends = torch.tensor(sorted(lab.eos_ids), device=ids.device)
    for _ in range(limit):
        at = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        out = lab.model(
            input_ids=ids, attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits = out.logits[:, -1].float()
        logits[:, lab.image_id] = -torch.inf
        ids = logits.argmax(-1, keepdim=True)
        done |= torch.isin(ids[:, 0], ends)
        if done.all():
            break
        for row, token in zip((~done).nonzero()[:, 0].tolist(), ids[~done, 0].tolist(), strict=True):
            answers[row].append(token)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return answers


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
    shapes = (item.draw().shape for item in items if item.draw is not None)
    grey = np.broadcast_to(np.array(GREY, np.uint8), next(shapes, (1, 1, 3)))
    draw = partial(np.copy, grey)
    return [item if item.draw is None else replace(item, draw=draw) for item in items]


def _shuffled(items: list[Item], seed: int) -> list[Item]:
    """Each question before another one's picture: pictures in a random circle, each moved on by one."""
    draw = {item.picture: item.draw for item in items if item.draw is not None}
    names = list(draw)
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    follower = dict(zip(order, order[1:] + order[:1], strict=True))
    return [item if item.draw is None else replace(item, draw=draw[follower[item.picture]]) for item in items]


def _majority(items: list[Item], data: str, seed: int) -> np.ndarray:
    source = load_items(data, split="train", n=MAJORITY_PICTURES, seed=seed) if data in WORLDS else items
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item in source:
        counts[item.type][item.short] += 1
    common = {name: counter.most_common(1)[0][0] for name, counter in counts.items()}
    return np.array([item.short == common.get(item.type) for item in items])
