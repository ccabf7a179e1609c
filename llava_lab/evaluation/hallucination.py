"""How much a model makes up, and what changes it: POPE and CHAIR under contrast decoding, knockout and steering.

Each change has a control that costs as much and is not what the claim is about, and the claim is the difference from it:

- *contrast: noised picture* takes off what the model would say before the same picture under diffusion noise (visual contrastive
  decoding). Control: another picture in the place of the noised one, each time another.
- *knockout: late layers* cuts the answer's attention to the picture in the last third of the layers. Control: as many edges, in
  the first third.
- *steering: toward no* adds the direction from "yes" to "no" where the answer is made. Control: random directions as long.
- *steering: toward clear* adds the direction from what the model is about to say of grainy training pictures to what it is about
  to say of the same ones clear, the mean over `SEEN` of them. Control: the same random directions.

Drawn pictures, whose truth is exact. What helps POPE by saying no more often shows in the yes ratio; what helps CHAIR by
naming less shows in the recall. On clear pictures of its own world a model may make up nothing, and then nothing can be
changed; `grain` shows them as through a bad camera, and what it cannot see it has to deny or to invent.

    print(hallucination(lab, n=100, grain=0.5).table())

Source of the noise: DAMO-NLP-SG/VCD ``vcd_add_noise.py`` (1,000 steps, sigmoid schedule); of the decoding: `models.generation`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.checks import entry, number, whole_number
from llava_lab.errors import OptionError
from llava_lab.evaluation.benchmarks import Measure, load_questions
from llava_lab.evaluation.benchmarks.benchmark import added, interval, resampled, values_of
from llava_lab.evaluation.benchmarks.choice import score_pope
from llava_lab.evaluation.benchmarks.run import tabulate
from llava_lab.evaluation.benchmarks.twins import score_chair
from llava_lab.evaluation.items import Item
from llava_lab.evaluation.scoring import BATCH, LONGEST, UNCHANGED, Change, answer_all
from llava_lab.interventions.knockout import Cut, cutting
from llava_lab.interventions.plan import Positions
from llava_lab.interventions.steering import find_direction, mean_difference, moving
from llava_lab.models import Lab
from llava_lab.models.generation import Contrast
from llava_lab.models.layout import language_layers
from llava_lab.results import BenchmarkScores
from llava_lab.results.table import figure

STEPS = 1000  # of the diffusion
SEEN = 12  # training pictures, clear and under grain
GRAIN = 120.0  # grey levels; on clear pictures of its own world a model makes up next to nothing, and nothing can be changed
ASKED = "adversarial"  # of POPE's three samplings
POPE = ("F1", *(f"{name} {ASKED}" for name in ("precision", "recall", "yes ratio")))  # its measures that are kept
SHOWN = ("F1", "CHAIRi kinds")  # of each change against its control, in the notes


@dataclass(frozen=True)
class Arm:
    """One change and its control, several of it where it is drawn by lot."""

    name: str
    change: Change
    control: str
    controlled: tuple[Change, ...]


@entry
def hallucination(
    lab: Lab,
    *,
    n: int = 100,
    split: str = "test",
    seed: int = 0,
    grain: float = 0.0,
    alpha: float = 1.0,
    beta: float = 0.1,
    noise: int = 500,
    push: float = 0.1,
    draws: int = 3,
    batch: int = BATCH,
    progress: bool = True,
) -> BenchmarkScores:
    """POPE (adversarial) and CHAIR of `n` drawn pictures as the model is, and under each change and its control.

    `grain`: the pictures are shown under normal noise of this standard deviation, in grey levels (of 255). `alpha`, `beta` and
    `noise` (a step up to 999) are contrast decoding's, as in its paper; `push` is how far steering goes, in
    units of each state's own length. The controls of the result are the changes and their controls, of those by lot the mean
    of `draws`; ``about["against"]`` has each change less its control, with an interval over pictures and each draw's own
    difference, and ``about["answers"]`` the descriptions. Raises DataError, OptionError.

    >>> from llava_lab.evaluation.hallucination import hallucination
    >>> hallucination(lab, n=1, draws=1, progress=False).controls[0]
    'contrast: noised picture'
    """
    began = time.perf_counter()
    draws = whole_number("draws", draws, least=1)
    _check(alpha, beta, noise, push)
    pope, chair = (load_questions(name, n=n, split=split, seed=seed) for name in ("pope", "chair"))
    pope = [one for one in pope if one.kind == ASKED]
    shown = [grained([one.item for one in asked], grain, seed=seed) for asked in (pope, chair)]
    clear = _toward_clear(lab, grain or GRAIN, seed=seed)
    arms = arms_of(lab, clear, alpha=alpha, beta=beta, noise=noise, push=push, seed=seed, draws=draws)
    changes: dict[str, tuple[Change, ...]] = {"as it is": (UNCHANGED,)}
    for arm in arms:
        changes |= {arm.name: (arm.change,), arm.control: arm.controlled}
    drawn: list[list[list[Measure]]] = []  # of each change, of each draw
    described: dict[str, list[str]] = {}
    for name, several in changes.items():
        drawn.append([])
        for change in several:
            options: dict[str, Any] = {"max_new_tokens": LONGEST, "batch": batch, "label": name, "progress": progress}
            said, told = (answer_all(lab, items, change=change, **options) for items in shown)
            of_pope = [one for one in score_pope(pope, said) if one.name in POPE]
            drawn[-1].append([*of_pope, *score_chair(chair, told)])
            described.setdefault(name, told)
    measured = [_mean(sides) for sides in drawn]
    against, pictures, order = [], len(chair), list(changes)
    resamples = resampled(measured, pictures, seed=seed)
    for arm in arms:
        one, other = order.index(arm.name), order.index(arm.control)
        value = values_of(measured[one], pictures)
        difference = value - values_of(measured[other], pictures)
        each = [value - values_of(side, pictures) for side in drawn[other]]
        for column, measure in enumerate(measured[0]):
            ends = interval(resamples[one, :, column] - resamples[other, :, column])
            row: dict[str, Any] = {"change": arm.name, "control": arm.control, "measure": measure.name}
            row |= {"difference": float(difference[column]), "interval": ends.tolist()}
            against.append(row | {"each": [float(values[column]) for values in each]})
    settings = {"grain": grain, "alpha": alpha, "beta": beta, "noise": noise, "push": push, "draws": draws}
    about: dict[str, Any] = {"data": "picturebook", "split": split, "pictures": pictures, "questions": len(pope) + len(chair)}
    return tabulate(
        "hallucination",
        measured,
        tuple(order[1:]),
        pictures,
        seed=seed,
        published={},
        model=lab.name,
        fingerprint=lab.fingerprint,
        about=about | {"seed": seed, "settings": settings, "against": against, "answers": described},
        seconds=round(time.perf_counter() - began, 1),
        notes=tuple(_line(row) for row in against if row["measure"] in SHOWN),
    )


def grained(items: Sequence[Item], amount: float, *, seed: int = 0) -> list[Item]:
    """The same questions before their pictures under normal noise of standard deviation `amount`, in grey levels.

    >>> from llava_lab.evaluation import grained, load_items
    >>> grained(load_items("picturebook", n=1), 120)[0].draw().shape
    (96, 96, 3)
    """
    if not number("grain", amount):
        return list(items)
    draws: dict[str, Any] = {}  # one a picture, so that it is drawn and prepared once
    for item in items:
        if item.draw is not None:
            draws.setdefault(item.picture, partial(_under_grain, item.draw, amount, (seed, len(draws))))
    return [item if item.draw is None else replace(item, draw=draws[item.picture]) for item in items]


def _under_grain(draw: Any, amount: float, seed: tuple[int, int]) -> np.ndarray:
    picture = draw()
    noise = np.random.default_rng(seed).normal(scale=amount, size=picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def noised(pixels: Float[Tensor, "N 3 S S"], step: int, *, seed: int = 0) -> Float[Tensor, "N 3 S S"]:
    """The pictures after `step` steps of diffusion: ``sqrt(a) x + sqrt(1 - a) e`` with e normal and a the share that is left."""
    betas = torch.linspace(-6, 6, STEPS).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    left = float((1 - betas).cumprod(0)[step])
    random = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed)).to(pixels)
    return left**0.5 * pixels + (1 - left) ** 0.5 * random


def arms_of(lab: Lab, clear: Tensor, *, alpha: float, beta: float, noise: int, push: float, seed: int, draws: int) -> list[Arm]:
    def another(step: int, pixels: Tensor) -> Contrast:
        return Contrast(pixels.roll(step, 0), alpha, beta)

    layers = len(language_layers(lab.model))
    third = max(1, layers // 3)
    unit, _ = find_direction(lab, ("no", "yes"))
    steered = partial(pushing, window=(0, layers), amount=push)
    random = tuple(Change(around=partial(steered, unit=_random_like(unit, seed + draw))) for draw in range(draws))
    return [
        Arm(
            "contrast: noised picture",
            Change(contrast=lambda pixels: Contrast(noised(pixels, noise, seed=seed), alpha, beta)),
            "contrast: another picture",
            tuple(Change(contrast=partial(another, step + 1)) for step in range(draws)),
        ),
        Arm(
            "knockout: late layers",
            Change(around=partial(blindfold, window=(layers - third, layers))),
            "knockout: early layers",
            (Change(around=partial(blindfold, window=(0, third))),),
        ),
        Arm("steering: toward no", Change(around=partial(steered, unit=unit)), "steering: random direction", random),
        Arm("steering: toward clear", Change(around=partial(steered, unit=clear)), "steering: random direction", random),
    ]


def _check(alpha: float, beta: float, noise: int, push: float) -> None:
    """Before anything is drawn or asked."""
    number("alpha", alpha)
    number("push", push)
    if not 0 < number("beta", beta) <= 1:
        raise OptionError(f"beta must be above 0 and at most 1, got {beta!r}")
    if whole_number("noise", noise) >= STEPS:
        raise OptionError(f"noise must be a step from 0 to {STEPS - 1}, got {noise}")


def _toward_clear(lab: Lab, grain: float, *, seed: int) -> Tensor:
    """From grainy to clear pictures of the training split, where a description begins, in a third of the layers; length 1."""
    items = [one.item for one in load_questions("chair", n=SEEN, split="train", seed=seed)]
    clear, grainy = (
        [lab.ask(item.drawn(), item.question, max_new_tokens=1) for item in side]
        for side in (items, grained(items, grain, seed=seed))
    )
    direction = mean_difference(lab, clear, grainy, layer=max(1, len(language_layers(lab.model)) // 3))
    return torch.from_numpy(direction / np.linalg.norm(direction)).to(next(lab.model.parameters()).device)


def _random_like(unit: Tensor, seed: int) -> Tensor:
    random = torch.randn(unit.shape, generator=torch.Generator().manual_seed(seed)).to(unit)
    return random / random.norm()


def _answering(end: int) -> Positions:
    """Where answers are made: a batch's last column and everything after it, whatever stands before a shorter question."""
    return Positions("last", (end - 1,), end, open=True)


def blindfold(lab: Lab, image: tuple[int, int], end: int, *, window: tuple[int, int]) -> AbstractContextManager[Any]:
    return cutting(lab, Cut(Positions("image", tuple(range(*image)), end), _answering(end)), window)


def pushing(
    lab: Lab, image: tuple[int, int], end: int, *, window: tuple[int, int], unit: Tensor, amount: float
) -> AbstractContextManager[Any]:
    return moving(lab, _answering(end), window, "steer", unit, amount)


def _mean(draws: Sequence[Sequence[Measure]]) -> list[Measure]:
    return [added(same[0].name, same, count=same[0].count, mean=True) for same in zip(*draws, strict=True)]


def _line(row: dict[str, Any]) -> str:
    low, high = (figure(end, "+.1f") for end in row["interval"])
    difference = figure(row["difference"], "+.1f")
    return f"{row['measure']}: {row['change']} less {row['control']} is {difference} [{low}, {high}]."
