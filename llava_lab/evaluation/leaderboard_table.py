"""From one record per picture to the leaderboard: means, intervals over pictures, differences from random.

Intervals are percentile bootstraps that resample pictures, the same resamples for every method, so that
methods are compared on equal terms. The difference from random is paired: taken picture by picture, from
what random maps score on that very picture. Faithfulness and ground truth stay in columns of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llava_lab.attribution.ground_truth import MEASURES as TRUTH
from llava_lab.evaluation.metrics import LEVEL, RESAMPLES, wilson
from llava_lab.scores import Comparison, Faithfulness, Leaderboard, area, mean_of_known
from llava_lab.worlds import picturebook

FAITHFUL = ("gain", "deletion", "insertion", "better", "object")  # better: share of pictures on which the map beats random
COST = ("forward", "backward", "seconds")
MEASURES = (*FAITHFUL, *TRUTH, *COST)
SHARES = ("better", "object", "pointing")  # yes or no on each picture
ASKED = ("asked", "wrong", "blind")  # questions: all, answered wrong, answered right without the picture
DIGITS = 5

Record = Mapping[str, Any]


def method_values(result: Comparison) -> dict[str, dict[str, float | None]]:
    """Every measure of every method on one example's first target."""
    found = {}
    for name in result.methods:
        score, rel = result.faithfulness[name], result.maps[name]
        values = {"gain": score.gain[0], "deletion": score.deletion_area[0], "insertion": score.insertion_area[0]}
        judged = not np.isnan(score.interval[0]).any()
        values |= {"better": float(score.beats_random[0]) if judged else np.nan, "object": score.hits[0]}
        if name in result.truth:
            values |= {measure: result.truth[name].value(measure) for measure in TRUTH}
        values |= {"forward": rel.passes["forward"], "backward": rel.passes["backward"], "seconds": rel.seconds}
        found[name] = {measure: _plain(value) for measure, value in values.items()}
    return found


def control_values(result: Comparison) -> dict[str, float | None]:
    """What random maps score on average on the same example."""
    score: Faithfulness = next(iter(result.faithfulness.values()))
    level = area(score.fractions, score.random[:, :, 0])  # (2, seeds, fills); reversed maps swap the two areas
    middle = float(mean_of_known(level.mean((0, 1))))
    values = {"gain": middle * 0, "deletion": middle, "insertion": middle, "object": score.random_hits[0]}
    if result.truth:
        truth = next(iter(result.truth.values()))
        values |= dict(zip(truth.measures, truth.expected, strict=True))
    return {measure: _plain(value) for measure, value in values.items()}


def tabulate(records: Sequence[Record], methods: tuple[str, ...], about: Mapping[str, Any]) -> Leaderboard:
    """The table of what is in `records`; pictures without a right answer only count among the asked."""
    told = [record for record in records if "methods" in record]
    values = np.array([[_values(record["methods"].get(name, {})) for name in methods] for record in told])
    control = np.array([_values(record["control"]) for record in told])
    types = np.array([record["type"] for record in told])
    names = ("all", *(name for name in picturebook.TYPES if name in types))
    cells = [_cells(values[rows], control[rows]) for rows in (types == name if name != "all" else types != "" for name in names)]
    mean, interval, against, against_interval, counts = (np.stack(part, 1) for part in zip(*cells, strict=True))
    refused = {name: reason for record in told for name, reason in record["refused"].items()}
    numbers = {"pictures": len(records), "explained": len(told)}
    numbers |= {name: sum(record[name] for record in records) for name in ASKED}
    return Leaderboard(
        methods=methods,
        types=names,
        measures=MEASURES,
        mean=mean,
        interval=interval,
        against=against,
        against_interval=against_interval,
        counts=counts,
        spearman=_agreement(told, methods),
        refused=refused,
        about={**about, **numbers},
    )


def as_data(board: Leaderboard) -> dict[str, Any]:
    """The object that ``llava-lab compare --data picturebook --json`` prints."""
    parts = {"faithfulness": FAITHFUL, "ground_truth": TRUTH, "cost": COST}
    rows = [
        {"method": name, "type": kind} | {part: _cell_data(board, name, kind, measures) for part, measures in parts.items()}
        for name in board.methods
        for kind in board.types
    ]
    agreement = {"methods": list(board.methods), "spearman": board.spearman.round(DIGITS)}
    return {"rows": rows, "agreement": agreement, "refused": board.refused, "about": board.about}


def _cell_data(board: Leaderboard, method: str, kind: str, measures: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for measure in measures:
        cell = board.at(method, measure, kind)
        shown = {"mean": cell["mean"], "interval": cell["interval"], "n": cell["n"]}
        if measure not in (*COST, "better"):
            shown |= {"against_random": cell["against"], "against_random_interval": cell["against_interval"]}
        found[measure] = {name: np.round(value, DIGITS).tolist() for name, value in shown.items()}
    return found


def _cells(values: np.ndarray, control: np.ndarray) -> tuple[np.ndarray, ...]:
    """values (pictures, methods, measures), control (pictures, measures) -> means and intervals (methods, measures, ...)."""
    share = np.array([measure in SHARES for measure in MEASURES])
    mean, interval = _bootstrap(values, share)
    against, against_interval = _bootstrap(values - control[:, None], np.zeros_like(share))
    constant = share & ~np.isnan(against) & ((mean == 0) | (mean == 1))  # all or none: as sure as the share itself, no more
    against_interval[constant] = interval[constant] - (mean - against)[constant][:, None]
    return mean, interval, against, against_interval, (~np.isnan(values)).sum(0)


def _bootstrap(values: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over pictures of what is known, and their intervals (..., 2); one picture alone has no interval."""
    pictures, *shape = values.shape
    flat = values.reshape(pictures, -1)
    known = ~np.isnan(flat)
    filled = np.where(known, flat, 0.0)
    mean = mean_of_known(flat.T)
    times = np.random.default_rng(pictures).multinomial(pictures, np.full(pictures, 1 / pictures), RESAMPLES).astype(float)
    counts = times @ known
    resampled = np.where(
        counts > 0, times @ filled / np.maximum(counts, 1), np.nan_to_num(mean)
    )  # a resample without any says nothing new
    interval = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T
    interval[known.sum(0) < 2] = np.nan
    for column in np.flatnonzero(np.tile(share, shape[0]) & (known.sum(0) > 1) & ((mean == 0) | (mean == 1))):
        n = int(known[:, column].sum())  # all or none: the bootstrap has no spread
        interval[column] = wilson(n if mean[column] == 1 else 0, n)
    return mean.reshape(shape), interval.reshape(*shape, 2)


def _agreement(told: Sequence[Record], methods: tuple[str, ...]) -> np.ndarray:
    """Mean rank correlation over pictures, (methods, methods); a method that refused a picture is missing there."""
    every = np.full((len(told), len(methods), len(methods)), np.nan)
    for number, record in enumerate(told):
        at = [methods.index(name) for name in record["methods"]]
        every[number][np.ix_(at, at)] = np.array(record["spearman"], float)
    return mean_of_known(every.transpose(1, 2, 0))


def _values(given: Mapping[str, Any]) -> list[float]:
    return [np.nan if given.get(measure) is None else float(given[measure]) for measure in MEASURES]


def _plain(value: Any) -> float | None:
    number = float(value)
    return None if np.isnan(number) else round(number, DIGITS)
