"""The cloud of image tokens from stage to stage: how long, how wide, how far from text, what survives the connector.

Every number stands beside that of the same model with the values inside each weight of tower, connector and layers
put in random order: a random network also has norms, ranks and positions that can be read, and only the difference
says what training did. High-norm tokens (sinks) are found by their own picture's spread, never by constants.

    cloud = token_geometry(lab, pictures, at=("before", "after"))
    cloud.measure("effective rank"), cloud.measure("effective rank", control=True)

Sources: Roy and Vetterli 2007 (effective rank); Ethayarajh 2019 (arXiv 1909.00512, anisotropy); Kornblith et al. 2019
(arXiv 1905.00414, linear CKA); Liang et al. 2022 (arXiv 2203.02053, modality gap).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from statistics import NormalDist
from typing import Any

import numpy as np

from llava_lab.checks import Sweep, entry, whole_number
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import connector_of, language_layers, vision_tower
from llava_lab.models.weights import weights_put_back
from llava_lab.probes.linear import BEFORE, QUESTION, Stage, held_out_classes, read_stages, stage_name, stages, subset
from llava_lab.results import TokenGeometry

BY_CHANCE = 0.01  # outliers expected in a picture whose log norms are normally distributed
ROBUST = 1.4826  # median deviation to standard deviation, for a normal distribution
ROUNDING = 1e-3  # of a norm; less is no difference
FOLDS = 5  # at most, for reading positions
NOTES = (
    "Position: mean accuracy of reading a patch's row and its column with a straight line, held out by picture.",
    "Modality gap: between image tokens and the prompt's text tokens at the same stage; before the connector none.",
)

Tables = dict[str, np.ndarray]


@entry
def token_geometry(
    lab: Lab,
    pictures: Sequence[Any],
    *,
    at: Any = None,
    question: str = QUESTION,
    per_picture: int = 32,
    neighbours: int = 8,
    seed: int = 0,
    control: bool = True,
    progress: bool = True,
) -> TokenGeometry:
    """Norm, effective rank, anisotropy, modality gap and position at each stage; CKA and shared neighbours between stages.

    Norms, sinks and neighbours are of all patches; the rest of `per_picture` random ones of each picture. Two forwards
    per picture (one with `control=False`, which leaves the control not a number). The weights are put back bitwise.
    Ctrl-C gives what was read, its control missing. Raises OptionError: fewer than two pictures, an unknown stage.

    >>> cloud = ll.token_geometry(lab, [picture, picture], at="after", per_picture=8, control=False, progress=False)
    >>> cloud.stages, cloud.norms.shape
    (('after',), (1, 2, 144))
    """
    wanted = stages(lab, at)
    whole_number("per_picture", per_picture, least=2)
    patches = lab.grid[0] * lab.grid[1]
    whole_number("neighbours", neighbours, least=1)
    if len(pictures) < 2:
        raise OptionError(f"expected at least two pictures, got {len(pictures)}: one alone cannot be cross-validated")
    if neighbours >= patches:
        raise OptionError(f"neighbours must be fewer than the {patches} patches of a picture, got {neighbours}")
    most, prints = min(per_picture, patches), lab.fingerprint
    measure = partial(
        _measured, lab, pictures, wanted, question=question, most=most, neighbours=neighbours, seed=seed, progress=progress
    )
    tables, done, interrupted = measure(doing="tokens")
    other = {name: np.full_like(values, np.nan) for name, values in tables.items()}
    if control and not interrupted:
        # the weights are back when this block is left, also by Ctrl-C
        try:
            with weights_put_back(seed) as shuffle:
                parts = [*language_layers(lab.model), connector_of(lab.model), vision_tower(lab.model)]
                shuffle(parameter for part in parts for parameter in part.parameters())
                shuffled, _, interrupted = measure(doing="shuffled weights")
            other = other if interrupted else shuffled
        except KeyboardInterrupt:
            interrupted = True
    return TokenGeometry(
        stages=tuple(map(stage_name, wanted)),
        values=tables["table"],
        control=other["table"],
        cka=tables["cka"],
        control_cka=other["cka"],
        overlap=tables["overlap"],
        control_overlap=other["overlap"],
        norms=tables["norms"],
        sinks=np.apply_along_axis(outliers, -1, tables["norms"]),
        neighbours=neighbours,
        chance_overlap=neighbours / (patches - 1),
        chance_position=sum(1 / side for side in lab.grid) / 2,
        rows=lab.grid[0],
        cols=lab.grid[1],
        pictures=done,
        seed=seed,
        model=lab.name,
        fingerprint=prints,
        interrupted=interrupted,
        notes=NOTES,
    )


def _measured(
    lab: Lab,
    pictures: Sequence[Any],
    wanted: tuple[Stage, ...],
    *,
    question: str,
    most: int,
    neighbours: int,
    seed: int,
    progress: bool,
    doing: str,
) -> tuple[Tables, int, bool]:
    """The tables of the pictures read, how many those are, and whether Ctrl-C ended the reading."""
    rng = np.random.default_rng(seed)
    rows: dict[Stage, list[np.ndarray]] = {stage: [] for stage in wanted}
    texts: dict[Stage, list[np.ndarray]] = {stage: [] for stage in wanted}
    norms, shared, chosen = [], [], []
    with Sweep(doing, total=len(pictures), unit="picture", least=2, show=progress) as sweep:
        for picture in pictures:
            text: dict[Stage, np.ndarray] = {}
            clouds = read_stages(lab, picture, wanted, question=question, text=text)
            sets = np.stack([nearest_sets(clouds[stage], neighbours) for stage in wanted]).astype(np.float32)
            at = subset(rng, len(clouds[wanted[0]]), most)
            for stage in wanted:
                rows[stage].append(clouds[stage][at])
                texts[stage] += [text[stage]] if stage in text else []
            shared.append(np.einsum("spq,tpq->st", sets, sets) / sets[0].sum())
            norms.append(np.stack([np.linalg.norm(clouds[stage], axis=-1) for stage in wanted]))
            chosen.append(at)
            sweep.step()
    done = len(chosen)
    tokens = {stage: np.concatenate(rows[stage][:done]) for stage in wanted}
    size = np.stack(norms[:done], 1).astype(np.float32)
    table = [
        [
            float(np.median(size[number])),
            effective_rank(tokens[stage]),
            anisotropy(tokens[stage]),
            float("nan") if stage == BEFORE else gap(tokens[stage], np.concatenate(texts[stage][:done])),
            _position(tokens[stage], chosen, lab.grid, seed),
        ]
        for number, stage in enumerate(wanted)
    ]
    cka = [linear_cka(tokens[a], tokens[b]) for a, b in product(wanted, wanted)]
    tables = {"table": np.array(table, np.float32), "cka": np.array(cka, np.float32).reshape(len(wanted), -1)}
    return {**tables, "overlap": np.stack(shared[:done]).mean(0).astype(np.float32), "norms": size}, done, sweep.interrupted


def _position(rows: np.ndarray, chosen: list[np.ndarray], grid: tuple[int, int], seed: int) -> float:
    """Mean held-out accuracy of a patch's row and of its column."""
    where = np.repeat(np.arange(len(chosen)), [len(at) for at in chosen])
    fold_of = np.random.default_rng(seed).permutation(np.arange(len(chosen)) % min(FOLDS, len(chosen)))
    places = np.divmod(np.concatenate(chosen), grid[1])
    widest = (rows.shape[1],)
    hits = [
        (held_out_classes(rows, place[None], where, fold_of, count, widest, seed)[0, 0] == place).mean()
        for place, count in zip(places, grid, strict=True)
    ]
    return float(np.mean(hits))


# -- measures of a cloud of vectors (n, W), numpy only ----------------------------------------


def effective_rank(rows: np.ndarray) -> float:
    """Exponential of the entropy of the singular values' shares, rows centred; from 1 to min(n - 1, W). NaN for one point."""
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    total = float(values.sum())
    if total <= 1e-6 * max(float(np.abs(rows).sum()), 1e-30):
        return float("nan")
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def anisotropy(rows: np.ndarray) -> float:
    """Mean cosine of two different rows (n, W): 0 for a ball, 1 when all point one way."""
    unit = _unit(rows)
    total = unit.sum(0)
    return float((total @ total - (unit * unit).sum()) / (len(rows) * (len(rows) - 1)))


def gap(first: np.ndarray, second: np.ndarray) -> float:
    """Distance between the mean unit vectors of two clouds of one width, 0 to 2."""
    return float(np.linalg.norm(_unit(first).mean(0) - _unit(second).mean(0)))


def linear_cka(first: np.ndarray, second: np.ndarray) -> float:
    """Likeness of two clouds of the same n points, whatever their widths, turned or scaled: 0 to 1; NaN when one is flat."""
    a, b = (rows - rows.mean(0) for rows in (first.astype(np.float64), second.astype(np.float64)))
    own = np.linalg.norm(_gram(a)) * np.linalg.norm(_gram(b))
    return float((np.linalg.norm(a.T @ b) ** 2) / own) if own > 0 else float("nan")


def nearest_sets(rows: np.ndarray, count: int) -> np.ndarray:
    """For each row the `count` others of highest cosine, bool (n, n)."""
    unit = _unit(rows)
    likeness = unit @ unit.T
    np.fill_diagonal(likeness, -np.inf)
    nearest = np.zeros(likeness.shape, bool)
    np.put_along_axis(nearest, np.argsort(-likeness, axis=1, kind="stable")[:, :count], True, axis=1)
    return nearest


def outliers(norms: np.ndarray) -> np.ndarray:
    """Which norms (n,) stand far above their own median, bool (n,): judged on logarithms, by their own spread.

    The limit is what the largest of n normal draws passes once in a hundred pictures; no constant of any model.
    """
    logs = np.log(np.maximum(norms.astype(np.float64), 1e-30))
    middle = np.median(logs)
    spread = ROBUST * float(np.median(np.abs(logs - middle)))
    limit = NormalDist().inv_cdf(1 - BY_CHANCE / len(norms)) * spread
    return logs > middle + max(limit, ROUNDING)


def _gram(rows: np.ndarray) -> np.ndarray:
    return rows.T @ rows if rows.shape[1] <= rows.shape[0] else rows @ rows.T


def _unit(rows: np.ndarray) -> np.ndarray:
    size = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows.astype(np.float64) / np.where(size > 0, size, 1.0)
