"""The positive control: where the right place is known, taking it away must change the answer far more often than chance.

Questions of the picture book (their deciding things are known) or pictures of `llava_lab.worlds.redcell`. Only questions
that the model answers rightly count; a wrong answer has no place that made it right.

Source: Neo et al. 2024 (arXiv 2410.07149), object tokens with a buffer against equally many random tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from llava_lab.capture import undisturbed
from llava_lab.checks import one_of, whole_number
from llava_lab.errors import OptionError
from llava_lab.interventions.ablate import FILLS, _layer, _ways
from llava_lab.interventions.plan import answer_under, patch_spots
from llava_lab.replay.alter import PATIENCE
from llava_lab.results import ControlRates, Run
from llava_lab.stats import exact_match, wilson
from llava_lab.worlds import picturebook, redcell

if TYPE_CHECKING:
    from llava_lab.models import Lab

TASKS = ("picturebook", "redcell")
TOUCHED = 0.01  # of a patch: from there it belongs to the thing
MOST = 20  # questions tried for each one wanted


@dataclass(frozen=True)
class _Asked:
    picture: np.ndarray
    question: str
    right: str
    deciding: np.ndarray  # bool (height, width)


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
    """
    began = time.perf_counter()
    one_of("task", task, TASKS)
    one_of("fill", fill, [one for one in FILLS if one != "other"])
    n, buffer, seed = (whole_number(*one) for one in (("n", n), ("buffer", buffer), ("seed", seed)))
    layer, rng = _layer(lab, at), np.random.default_rng((seed, 47))
    rows: list[tuple[bool, bool, int]] = []
    asked = stopped = 0
    kept: list[Any] = []

    def touch(run: Run) -> Any:
        if not kept or layer or fill not in ("mean", "zero"):  # these two are the same for every picture
            kept[:] = [_ways(lab, run, fill, layer, None, None, seed)]
        return kept[0]

    with undisturbed(lab.model), tqdm(total=n, desc="positive control", unit="question", delay=PATIENCE, leave=False) as progress:
        try:
            for item in _items(lab, task, split, seed):
                if len(rows) >= n or asked >= MOST * max(n, 1):
                    break
                asked += 1
                found = _try(lab, item, touch, buffer, rng)
                if found is not None:
                    rows.append(found)
                    progress.update()
        except KeyboardInterrupt:
            stopped = 1
    if not rows:
        raise OptionError(f"expected questions that {lab.name!r} answers rightly, got none of {asked}; try another task or split")
    about: dict[str, Any] = {"fill": fill, "at": at, "buffer": buffer, "split": split}
    return ControlRates(
        task=task,
        options=about,
        n=len(rows),
        asked=asked,
        **_rates(rows),
        model=lab.name,
        fingerprint=lab.fingerprint,
        seed=seed,
        seconds=time.perf_counter() - began,
        interrupted=bool(stopped),
    )


def _rates(rows: list[tuple[bool, bool, int]]) -> dict[str, Any]:
    changed, count = np.array([row[:2] for row in rows], bool), len(rows)
    first, second = (int(one) for one in changed.sum(0))
    found: dict[str, Any] = {"deciding": first / count, "random": second / count, "changed": changed}
    found |= {"deciding_interval": wilson(first, count), "random_interval": wilson(second, count)}
    return found | {"patches": np.array([row[2] for row in rows], np.int64)}


def _try(
    lab: Lab, item: _Asked, touch: Callable[[Run], Any], buffer: int, rng: np.random.Generator
) -> tuple[bool, bool, int] | None:
    """Whether the answer changes without the deciding patches and without others, and how many; None for a useless question."""
    run = lab.ask(item.picture, item.question, max_new_tokens=48)
    places = _places(run, item, buffer, rng) if exact_match(run.answer, item.right) else None
    if places is None:
        return None
    taken = touch(run)
    said = [answer_under(lab, run, partial(taken, patch_spots(run, one), None))[0] for one in places]
    return said[0] != run.answer, said[1] != run.answer, int(places[0].sum())


def _items(lab: Lab, task: str, split: str, seed: int) -> Iterator[_Asked]:
    index = 0
    while True:
        if task == "redcell":
            one = redcell.scene(split, index, rows=lab.grid[0] // _divisor(lab.grid[0]), seed=seed)
            yield _Asked(np.asarray(one.picture()), one.question, one.answer, one.mask()[0])
        else:
            drawn: Any = picturebook.scene(split, index, seed=seed)
            masks = drawn.masks()
            for question in picturebook.ask_about(drawn, np.random.default_rng((picturebook.SPLITS[split], seed, index, 5)), 4):
                if question.deciding:
                    mask = masks[list(question.deciding)].any(0)
                    yield _Asked(np.asarray(drawn.picture()), question.text, question.answer, mask)
        index += 1


def _divisor(side: int) -> int:
    """Patches a cell: the smallest number that divides the grid and leaves at most 12 cells a side."""
    return next(one for one in range(1, side + 1) if side % one == 0 and side // one <= 12)


def _places(run: Run, item: _Asked, buffer: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
    """The deciding patches and as many others, bool (rows, cols); None where there are not enough others."""
    inside = run.map.mask_to_patches(item.deciding) > TOUCHED
    grid = torch.from_numpy(inside)[None, None].float()
    if buffer:
        inside = torch.nn.functional.max_pool2d(grid, 2 * buffer + 1, 1, buffer)[0, 0].numpy() > 0
    free = np.flatnonzero(~inside & (run.map.coverage() > 0))
    if not inside.any() or len(free) < inside.sum():
        return None
    other = np.zeros(inside.size, bool)
    other[rng.choice(free, int(inside.sum()), replace=False)] = True
    return inside, other.reshape(inside.shape)
