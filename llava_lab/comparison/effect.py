"""What a linear stand-in for the connector does to the answers: the score that counts, by question type, with intervals.

A fit may explain nearly all of the connector's output and still flip answers, or miss a third of it and flip none.
Original and stand-in answer the same questions about the same pictures; differences are paired, pictures are resampled.
The controls (mean vector, shuffled tokens, random map, identity) say how bad it could be.

    effect = linear_effect(lab, linearize(lab, pictures), n=50)
    effect.row("random")["kl_interval"]
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from llava_lab.capture import undisturbed
from llava_lab.checks import PATIENCE, entry, made_by
from llava_lab.connectors.linearize import CONTROLS, FIT, random_map
from llava_lab.connectors.plug import connector, linear_connector, new_connector, shuffled_tokens
from llava_lab.errors import DataError, OptionError
from llava_lab.evaluation.items import Item, load_items
from llava_lab.evaluation.scoring import answer_all
from llava_lab.models import Lab
from llava_lab.replay.score import divergence
from llava_lab.replay.words import spelt_inside
from llava_lab.results import LinearEffect, Linearized
from llava_lab.stats import exact_match, resampled_means

ALL = "all"


@entry
def linear_effect(
    lab: Lab,
    fit: Linearized,
    *,
    data: str = "picturebook",
    split: str = "test",
    n: int = 50,
    ranks: Sequence[int] = (),
    controls: bool = True,
    seed: int = 0,
    prompt: str | None = None,
    progress: bool = True,
    pictures: str | os.PathLike | None = None,
) -> LinearEffect:
    """Answer the questions about `n` pictures with the connector and with `fit` in its place.

    `data`, `split` and `pictures` (the folder of named photographs that ``data="photos"`` asks about) are `evaluate`'s.
    `ranks` adds the fit cut to each rank. KL, in nats, is of the next-token distributions where the original's own
    answer and what comes after it are predicted, their mean; an answer is flipped when its text differs; accuracy is
    exact match, or an accepted word where the data has some. The lab is left as it was.
    Raises DataError for unknown data, OptionError for a rank the fit does not have.

    >>> from llava_lab.worlds import picturebook
    >>> fit = ll.linearize(lab, [picturebook.scene("train", i).picture() for i in range(8)])
    >>> effect = ll.linear_effect(lab, fit, n=1, controls=False, progress=False)
    >>> effect.variants, effect.pictures
    (('linear',), 1)
    """
    began = time.perf_counter()
    names = variants(fit, ranks, controls)
    items = load_items(data, split=split, n=n, seed=seed, pictures=pictures)
    if not items:
        raise DataError(f"{data} split {split} gave no questions; ask for more pictures")
    own_answers = answer_all(lab, items, prompt=prompt, label="original", progress=progress)
    finished = [_finished(lab, item, answer, prompt) for item, answer in zip(items, own_answers, strict=True)]
    own, right = _read(lab, items, finished, "original", progress), _right(items, own_answers)
    rows = []
    for name in names:
        with plugged(lab, fit, name, seed=seed):
            changed = _read(lab, items, finished, name, progress)
            answers = answer_all(lab, items, prompt=prompt, label=name, progress=progress)
        kl = np.array([float(divergence(a, b).mean()) for a, b in zip(own, changed, strict=True)])
        flipped = np.array([a != b for a, b in zip(answers, own_answers, strict=True)], float)
        rows.append((kl, flipped, _right(items, answers) - right))
    types = (ALL, *sorted({item.type for item in items} - {ALL}))
    masks = [np.array([type == ALL or item.type == type for item in items]) for type in types]  # noqa: A001
    return LinearEffect(
        variants=names,
        types=types,
        **_table(rows, masks, np.array([item.picture for item in items]), seed),
        original_accuracy=np.array([right[mask].mean() for mask in masks]),
        questions=np.array([int(mask.sum()) for mask in masks]),
        pictures=len({item.picture for item in items}),
        data=data,
        split=split,
        seed=seed,
        **made_by(lab, began),
        notes=("Intervals resample pictures; where no picture differs from another they have no width.",),
    )


def variants(fit: Linearized, ranks: Sequence[int], controls: bool) -> tuple[str, ...]:
    """What is plugged in, by name: the fit, its ranks, the controls that its widths allow.

    Raises OptionError for a rank the fit does not have.
    """
    wrong = [rank for rank in ranks if not 1 <= rank <= fit.limit]
    if wrong:
        raise OptionError(f"ranks must be from 1 to {fit.limit}, got {wrong}")
    square = fit.full.shape[0] == fit.full.shape[1]
    return (FIT, *(f"rank {rank}" for rank in ranks), *((CONTROLS if square else CONTROLS[:-1]) if controls else ()))


@contextmanager
def plugged(lab: Lab, fit: Linearized, name: str, *, seed: int = 0) -> Iterator[Lab]:
    """Inside the block `lab` works with the named stand-in: "linear", "rank k" or a control."""
    with shuffled_tokens(lab, seed=seed) if name == "shuffle" else connector(lab, _stand_in(lab, fit, name, seed)):
        yield lab


def _stand_in(lab: Lab, fit: Linearized, name: str, seed: int) -> Any:
    if name == FIT:
        return fit
    if name.startswith("rank "):
        return fit.at_rank(int(name.removeprefix("rank ")))
    if name == "identity":
        return new_connector(lab, "identity")
    full = torch.from_numpy(fit.full).double()
    weight = random_map(full, seed=seed) if name == "random" else torch.zeros_like(full)
    bias = torch.from_numpy(fit.output_mean) - weight @ torch.from_numpy(fit.feature_mean)
    return linear_connector(lab, weight.float(), bias.float(), trained_with=fit.beside)


def _finished(lab: Lab, item: Item, answer: str, prompt: str | None) -> tuple[np.ndarray, int]:
    """The prompt with the answer behind it, (T,) token ids, and how many positions predict the answer and its end."""
    ids = np.array(spelt_inside(lab.tokenizer, answer), np.int64)
    return np.concatenate([lab.sequence(item.question, prompt=prompt).token_ids, ids]), len(ids) + 1


def _read(
    lab: Lab, items: list[Item], finished: list[tuple[np.ndarray, int]], label: str, progress: bool
) -> list[Float[Tensor, "A V"]]:
    """Logits, float32, at the positions that predict each answer."""
    rows = []
    with undisturbed(lab.model):
        drawn: tuple[Any, Tensor] | None = None
        shown = tqdm(items, desc=f"{label}: distributions", unit="question", disable=not progress, delay=PATIENCE, leave=False)
        for item, (tokens, count) in zip(shown, finished, strict=True):
            if drawn is None or drawn[0] is not item.draw:
                drawn = item.draw, lab.pixels(item.draw())
            ids = torch.from_numpy(tokens)[None].to(lab.device)
            out = lab.model(input_ids=ids, pixel_values=drawn[1], use_cache=False, logits_to_keep=count)
            rows.append(out.logits[0].float().cpu())
    return rows


def _right(items: list[Item], answers: list[str]) -> np.ndarray:
    return np.array([item.right(answer, exact_match) for answer, item in zip(answers, items, strict=True)], float)


def _table(
    rows: Sequence[tuple[np.ndarray, ...]], masks: Sequence[np.ndarray], pictures: np.ndarray, seed: int
) -> dict[str, Any]:
    """Means and intervals of each measure, (variants, types) and (variants, types, 2)."""
    table = {}
    names = (("kl", "kl_interval"), ("flipped", "flipped_interval"), ("accuracy_change", "accuracy_interval"))
    for number, (mean, interval) in enumerate(names):
        values = np.stack([row[number] for row in rows])
        table[mean] = np.stack([values[:, mask].mean(1) for mask in masks], 1)
        intervals = [resampled_means(values[:, mask], pictures[mask], seed=seed, one_by_one=True)[0] for mask in masks]
        table[interval] = np.stack(intervals, 1)
    return table
