"""How much a model makes up, and what changes it: POPE and CHAIR under contrast decoding, knockout and steering.

Each change has a control that costs as much and is not what the claim is about, and the claim is the difference from it:

- *contrast: noised picture* takes off what the model would say before the same picture under diffusion noise (visual contrastive
  decoding). Control: another picture in the place of the noised one.
- *knockout: late layers* cuts the answer's attention to the picture in the last third of the layers. Control: as many edges, in
  the first third.
- *steering: toward no* adds the direction from "yes" to "no" where the answer is made. Control: a random direction as long.

Drawn pictures, whose truth is exact. What helps POPE by saying no more often shows in the yes ratio; what helps CHAIR by
naming less shows in the recall.

Source of the noise: DAMO-NLP-SG/VCD ``vcd_add_noise.py`` (1,000 steps, sigmoid schedule); of the decoding: `models.generation`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.checks import entry, number, whole_number
from llava_lab.errors import OptionError
from llava_lab.evaluation.benchmarks import Measure, load_questions
from llava_lab.evaluation.benchmarks.benchmark import interval, resampled, values_of
from llava_lab.evaluation.benchmarks.run import tabulate
from llava_lab.evaluation.benchmarks.twins import score_chair
from llava_lab.evaluation.benchmarks.yes_no import score_pope
from llava_lab.evaluation.scoring import BATCH, LONGEST, UNCHANGED, Change, answer_all
from llava_lab.interventions.knockout import Cut, cutting
from llava_lab.interventions.plan import Positions
from llava_lab.interventions.steering import find_direction, moving
from llava_lab.models.generation import Contrast
from llava_lab.models.layout import language_layers
from llava_lab.results import BenchmarkScores
from llava_lab.results.table import figure

if TYPE_CHECKING:
    from llava_lab.models import Lab

STEPS = 1000  # of the diffusion
SHOWN = ("F1", "CHAIRi kinds")  # of each change against its control, in the notes


@dataclass(frozen=True)
class Arm:
    """One change and its control."""

    name: str
    change: Change
    control: str
    controlled: Change


@entry
def hallucination(
    lab: Lab,
    *,
    n: int = 100,
    split: str = "test",
    seed: int = 0,
    alpha: float = 1.0,
    beta: float = 0.1,
    noise: int = 500,
    push: float = 0.1,
    batch: int = BATCH,
    progress: bool = True,
) -> BenchmarkScores:
    """POPE and CHAIR of `n` drawn pictures as the model is, and under each change and its control.

    `alpha`, `beta` and `noise` (a step up to 999) are contrast decoding's, as in its paper; `push` is how far steering goes, in
    units of each state's own length. The controls of the result are the changes and their controls; ``about["against"]`` has
    each change less its control, with an interval over pictures. Raises OptionError, DataError.

    >>> from llava_lab.evaluation.hallucination import hallucination
    >>> hallucination(lab, n=1, progress=False).controls[0]
    'contrast: noised picture'
    """
    began = time.perf_counter()
    pope, chair = (load_questions(name, n=n, split=split, seed=seed) for name in ("pope", "chair"))
    arms = _arms(lab, alpha=alpha, beta=beta, noise=noise, push=push, seed=seed)
    changes = {"as it is": UNCHANGED}
    for arm in arms:
        changes |= {arm.name: arm.change, arm.control: arm.controlled}
    measured: list[list[Measure]] = []
    for name, change in changes.items():
        options: dict[str, Any] = {
            "max_new_tokens": LONGEST,
            "batch": batch,
            "label": name,
            "progress": progress,
            "change": change,
        }
        said, told = (answer_all(lab, [one.item for one in asked], **options) for asked in (pope, chair))
        measured.append([*_pope_measures(pope, said), *score_chair(chair, told)])
    against, pictures, order = [], len(chair), list(changes)
    draws = resampled(measured, pictures, seed=seed)
    for arm in arms:
        one, other = order.index(arm.name), order.index(arm.control)
        difference = values_of(measured[one], pictures) - values_of(measured[other], pictures)
        for column, measure in enumerate(measured[0]):
            ends = interval(draws[one, :, column] - draws[other, :, column])
            row = {"change": arm.name, "control": arm.control, "measure": measure.name}
            against.append(row | {"difference": float(difference[column]), "interval": ends.tolist()})
    settings = {"alpha": alpha, "beta": beta, "noise": noise, "push": push}
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
        about=about | {"seed": seed, "settings": settings, "against": against},
        seconds=round(time.perf_counter() - began, 1),
        notes=tuple(_line(row) for row in against if row["measure"] in SHOWN),
    )


def noised(pixels: Float[Tensor, "N 3 S S"], step: int, *, seed: int = 0) -> Float[Tensor, "N 3 S S"]:
    """The pictures after `step` steps of diffusion: ``sqrt(a) x + sqrt(1 - a) e`` with e normal and a the share that is left."""
    betas = torch.linspace(-6, 6, STEPS).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    left = float((1 - betas).cumprod(0)[step])
    random = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed)).to(pixels)
    return left**0.5 * pixels + (1 - left) ** 0.5 * random


def _arms(lab: Lab, *, alpha: float, beta: float, noise: int, push: float, seed: int) -> list[Arm]:
    alpha, push = number("alpha", alpha), number("push", push)
    if not 0 < number("beta", beta) <= 1:
        raise OptionError(f"beta must be above 0 and at most 1, got {beta!r}")
    if whole_number("noise", noise) >= STEPS:
        raise OptionError(f"noise must be a step from 0 to {STEPS - 1}, got {noise}")
    layers = len(language_layers(lab.model))
    third = max(1, layers // 3)
    unit, _ = find_direction(lab, ("no", "yes"))
    random = torch.randn(unit.shape, generator=torch.Generator().manual_seed(seed)).to(unit)
    return [
        Arm(
            "contrast: noised picture",
            Change(contrast=lambda pixels: Contrast(noised(pixels, noise, seed=seed), alpha, beta)),
            "contrast: another picture",
            Change(contrast=lambda pixels: Contrast(pixels.roll(1, 0), alpha, beta)),
        ),
        Arm(
            "knockout: late layers",
            Change(around=partial(_blindfold, window=(layers - third, layers))),
            "knockout: early layers",
            Change(around=partial(_blindfold, window=(0, third))),
        ),
        Arm(
            "steering: toward no",
            Change(around=partial(_push, window=(0, layers), unit=unit, amount=push)),
            "steering: random direction",
            Change(around=partial(_push, window=(0, layers), unit=random / random.norm(), amount=push)),
        ),
    ]


def _answering(end: int) -> Positions:
    """Where answers are made: a batch's last column and everything after it, whatever stands before a shorter question."""
    return Positions("last", (end - 1,), end, open=True)


def _blindfold(lab: Lab, image: tuple[int, int], end: int, *, window: tuple[int, int]) -> AbstractContextManager[Any]:
    return cutting(lab, Cut(Positions("image", tuple(range(*image)), end), _answering(end)), window)


def _push(
    lab: Lab, image: tuple[int, int], end: int, *, window: tuple[int, int], unit: Tensor, amount: float
) -> AbstractContextManager[Any]:
    return moving(lab, _answering(end), window, "steer", unit, amount)


def _pope_measures(questions: Sequence[Any], answers: Sequence[str]) -> list[Measure]:
    kept = ("F1", "F1 adversarial", "accuracy adversarial", "yes ratio adversarial")
    return [one for one in score_pope(questions, answers) if one.name in kept]


def _line(row: dict[str, Any]) -> str:
    low, high = (figure(end, "+.1f") for end in row["interval"])
    difference = figure(row["difference"], "+.1f")
    return f"{row['measure']}: {row['change']} less {row['control']} is {difference} [{low}, {high}]."
