"""The positive control: where the right place is known, taking it away must change the answer far more often than chance.

Questions of the picture book (their deciding things are known) or pictures of `llava_lab.worlds.redcell`. Only questions
that the model answers rightly count; a wrong answer has no place that made it right.

    rates = positive_control(lab, n=50)

Source: Neo et al. 2024 (arXiv 2410.07149), object tokens with a buffer against equally many random tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch

from llava_lab.capture import undisturbed
from llava_lab.checks import Sweep, entry, one_of, whole_number
from llava_lab.errors import OptionError
from llava_lab.interventions.ablate import FILLS, Remove, remover, token_layer
from llava_lab.interventions.plan import answer_under, positions_of_patches
from llava_lab.models import Lab
from llava_lab.results import ControlRates, Run
from llava_lab.stats import exact_match, wilson
from llava_lab.worlds import picturebook, redcell

TASKS = ("picturebook", "redcell")
COVERED = 0.01  # of a patch: from there it belongs to the thing
MOST = 20  # questions tried for each one wanted


@dataclass(frozen=True)
class Asked:
    """A question and the pixels that decide it."""

    picture: np.ndarray
    question: str
    right: str
    deciding: np.ndarray  # bool (height, width)


@entry
def positive_control(
    lab: Lab,
    *,
    task: str = TASKS[0],
    n: int = 200,
    fill: str = FILLS[0],
    at: str | int = "projector",
    buffer: int = 0,
    split: str = "test",
    seed: int = 0,
) -> ControlRates:
    """How often the answer changes without the deciding patches, and without equally many random others, over `n` questions.

    `buffer` patches around the deciding ones are taken too. `fill`, `at` as in `ablate_tokens` (not ``other``). Questions
    the model answers wrongly are passed over, as are those whose deciding things leave too few other patches. Ctrl-C gives
    the questions that are done.

    Raises OptionError when no question can be used.

    >>> rates = ll.positive_control(lab, n=2, fill="zero")
    >>> rates.n, rates.changed.shape
    (2, (2, 2))
    """
    began = time.perf_counter()
    one_of("task", task, TASKS)
    one_of("fill", fill, [name for name in FILLS if name != "other"])
    n, buffer, seed = whole_number("n", n), whole_number("buffer", buffer), whole_number("seed", seed)
    layer, rng = token_layer(lab, at), np.random.default_rng((seed, 47))
    changed: list[tuple[bool, bool]] = []  # without the deciding patches, without others
    counts: list[int] = []  # of patches taken away
    asked = 0
    remove: Remove | None = None
    with undisturbed(lab.model), Sweep("positive control", total=n, unit="question") as sweep:
        for item in _items(lab, task, split, seed):
            if len(changed) >= n or asked >= MOST * max(n, 1):
                break
            asked += 1
            run = lab.ask(item.picture, item.question, max_new_tokens=48)
            places = places_of(run, item, buffer, rng) if exact_match(run.answer, item.right) else None
            if places is None:
                continue
            # the mean and zero are the same for every picture
            if remove is None or layer or fill not in ("mean", "zero"):
                remove = remover(lab, run, fill, layer, seed=seed)
            first, second = (
                answer_under(lab, run, partial(remove, positions_of_patches(run, place), None))[0] != run.answer
                for place in places
            )
            changed.append((first, second))
            counts.append(int(places[0].sum()))
            sweep.step()
    if not changed:
        raise OptionError(f"expected questions that {lab.name!r} answers rightly, got none of {asked}; try another task or split")
    deciding, random = (sum(column) for column in zip(*changed, strict=True))
    return ControlRates(
        task=task,
        options={"fill": fill, "at": at, "buffer": buffer, "split": split},
        n=len(changed),
        asked=asked,
        deciding=deciding / len(changed),
        random=random / len(changed),
        changed=np.array(changed, bool),
        deciding_interval=wilson(deciding, len(changed)),
        random_interval=wilson(random, len(changed)),
        patches=np.array(counts, np.int64),
        model=lab.name,
        fingerprint=lab.fingerprint,
        seed=seed,
        seconds=time.perf_counter() - began,
        interrupted=sweep.interrupted,
    )


def _items(lab: Lab, task: str, split: str, seed: int) -> Iterator[Asked]:
    side = lab.grid[0]
    # patches a cell: the smallest number that divides the grid and leaves at most 12 cells a side
    per_cell = next(number for number in range(1, side + 1) if side % number == 0 and side // number <= 12)
    for index in count():
        if task == "redcell":
            cells = redcell.scene(split, index, rows=side // per_cell, seed=seed)
            yield Asked(np.asarray(cells.picture()), cells.question, cells.answer, cells.mask()[0])
        else:
            drawn: Any = picturebook.scene(split, index, seed=seed)
            masks = drawn.masks()
            for question in picturebook.ask_about(drawn, np.random.default_rng((picturebook.SPLITS[split], seed, index, 5)), 4):
                if question.deciding:
                    mask = masks[list(question.deciding)].any(0)
                    yield Asked(np.asarray(drawn.picture()), question.text, question.answer, mask)


def places_of(run: Run, item: Asked, buffer: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
    """The deciding patches and as many others, bool (rows, cols); None where there are not enough others."""
    inside = run.map.mask_to_patches(item.deciding) > COVERED
    grid = torch.from_numpy(inside)[None, None].float()
    if buffer:
        inside = torch.nn.functional.max_pool2d(grid, 2 * buffer + 1, 1, buffer)[0, 0].numpy() > 0
    free = np.flatnonzero(~inside & (run.map.coverage() > 0))
    if not inside.any() or len(free) < inside.sum():
        return None
    other = np.zeros(inside.size, bool)
    other[rng.choice(free, int(inside.sum()), replace=False)] = True
    return inside, other.reshape(inside.shape)
