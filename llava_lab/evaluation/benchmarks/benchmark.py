"""What every benchmark has in common: its card, its questions, and measures that know their intervals.

A benchmark is data: how its authors' files are read into `Question`s worded as LLaVA-1.5 was asked, how answers become
`Measure`s, what is sent to its server. A measure is a function of how often each picture was drawn, so the value, the
interval and the difference from a control come from one definition: the published formula.

    tally = Tally(questions)
    tally.share("accuracy", [True, False, True])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llava_lab.evaluation.items import Item
from llava_lab.stats import cluster_bootstrap, percentiles, wilson

SW = "Answer the question using a single word or phrase."
MC = "Answer with the option's letter from the given choices directly."
DRAWS = 2000  # resamples of pictures
ROOM = 4_000_000  # weights held at once


@dataclass(frozen=True)
class Question:
    """One question as LLaVA-1.5 was asked it; `item.question` is the whole text after the picture."""

    id: str
    item: Item
    accepted: tuple[str, ...] = ()  # what the authors' file says is right; empty where it is kept back
    kind: str = ""  # subtask, split or category
    group: str = ""  # questions with one name count together
    options: tuple[str, ...] = ()  # to choose from, in order
    extra: dict[str, Any] = field(default_factory=dict)  # what only this benchmark's scorer or submission needs


def question(
    key: str, picture: str, draw: Callable[[], np.ndarray], text: str, accepted: Sequence[str] = (), **more: Any
) -> Question:
    """A `Question` from its parts."""
    first = accepted[0] if accepted else ""
    return Question(key, Item(picture, draw, text, first, first, more.get("kind", "")), tuple(accepted), **more)


@dataclass(frozen=True)
class Judge:
    """Who grades free answers: any model that reads text. `ask` takes the system's text, the user's, temperature and tokens."""

    name: str
    ask: Callable[[str, str, float, int], str]
    about: dict[str, Any] = field(default_factory=dict)  # address, version, settings: kept with the scores


@dataclass(frozen=True)
class Measure:
    """One number over weighted pictures."""

    name: str
    of: Callable[[np.ndarray], np.ndarray]  # how often each picture counts, float64 (R, pictures) -> (R,)
    count: int  # questions behind it
    pictures: int  # pictures behind it
    whole: float = 100.0  # its value where all is right


Score = Callable[[Sequence[Question], Sequence[Any]], list[Measure]]  # answers, or grades where there is a judge


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: where its questions come from and how answers are scored."""

    name: str
    title: str
    asks: str  # what is asked and how it is scored, in a line
    files: str  # what --data must hold
    source: str
    score: Score
    limit: int = 128  # new tokens
    read: Callable[[Path], list[Question]] | None = None
    twin: Callable[[str, int, int], list[Question]] | None = None  # split, pictures, seed: the same on a drawn world
    grade: Callable[[Judge, Question, str], tuple[float, ...]] | None = None
    submit: Callable[[Sequence[Question], Sequence[str], Path], None] | None = None
    server: bool = False  # official numbers come from a server: what is scored here is another split


class Tally:
    """Questions by picture: sums that can be resampled."""

    def __init__(self, questions: Sequence[Question]) -> None:
        names, self.index = np.unique([question.item.picture for question in questions], return_inverse=True)
        self.pictures = len(names)

    def sums(self, values: Any) -> np.ndarray:
        """Sum of `values` (Q,) for each picture, float64 (pictures,)."""
        return np.bincount(self.index, np.asarray(values, float), self.pictures)

    def share(self, name: str, values: Any, among: Any = None) -> Measure:
        """100 times the mean of `values` (Q,) over the questions `among` (bool, Q)."""
        inside = np.ones(len(self.index), bool) if among is None else np.asarray(among, bool)
        top, bottom = self.sums(np.asarray(values, float) * inside), self.sums(inside)
        return self.ratio(name, top, bottom, count=int(inside.sum()))

    def ratio(self, name: str, top: np.ndarray, bottom: np.ndarray, *, count: int, whole: float = 100.0) -> Measure:
        """100 times a ratio of sums, given for each picture; `whole` is NaN where it is no share."""

        def of(weights: np.ndarray) -> np.ndarray:
            return 100 * divide(weights @ top, weights @ bottom)

        return Measure(name, of, count, int((bottom > 0).sum()), whole)


def in_groups(questions: Sequence[Question], right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which question is the first of its group, and of these in which all are right: bool (Q,) each."""
    _, starts, group = np.unique([one.group for one in questions], return_index=True, return_inverse=True)
    first, every = np.zeros(len(right), bool), np.zeros(len(right), bool)
    first[starts], every[starts] = True, np.bincount(group, right) == np.bincount(group)
    return first, every


def added(name: str, parts: Sequence[Measure], *, count: int, mean: bool = False) -> Measure:
    """The sum of several measures, or their mean, over `count` questions."""
    scale = 1 / len(parts) if mean else 1.0

    def of(weights: np.ndarray) -> np.ndarray:
        return scale * np.sum([part.of(weights) for part in parts], axis=0)

    whole = scale * sum(part.whole for part in parts)
    return Measure(name, of, count, max(part.pictures for part in parts), whole)


def divide(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """`top` over `bottom`, NaN where there is nothing to divide by."""
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom > 0)


def resampled(scored: Sequence[Sequence[Measure]], pictures: int, *, seed: int) -> np.ndarray:
    """Every measure of several sides on the same resampled pictures, (sides, draws, measures)."""
    rng, step = np.random.default_rng(seed), max(1, ROOM // pictures)
    blocks = []
    for start in range(0, DRAWS, step):
        of = lambda weights: np.stack([[m.of(weights) for m in side] for side in scored]).transpose(2, 0, 1)
        blocks.append(cluster_bootstrap(of, pictures, seed=rng, resamples=min(step, DRAWS - start)))
    return np.concatenate(blocks).transpose(1, 0, 2)


def values_of(measures: Sequence[Measure], pictures: int) -> np.ndarray:
    """Each measure on all pictures once, (measures,)."""
    return np.array([float(measure.of(np.ones((1, pictures)))[0]) for measure in measures])


def interval(draws: np.ndarray, measure: Measure | None = None, value: float = np.nan) -> np.ndarray:
    """The 95% interval of draws (R,), (2,). All or nothing has no spread: Wilson's over the pictures stands in."""
    known = draws[np.isfinite(draws)]
    if measure is not None and len(known) and not np.ptp(known) and value in (0.0, measure.whole):
        ends = wilson(measure.pictures if value else 0, measure.pictures)
        return measure.whole * np.array(ends)
    return percentiles(known) if len(known) else np.full(2, np.nan)
