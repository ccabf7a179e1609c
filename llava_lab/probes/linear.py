"""Linear probes: can a straight line read a label off image tokens, before the connector, after it, at each layer?

Ridge classification in closed form (`llava_lab.probes.ridge`). Folds are of pictures, never of patches: patches of one
picture are alike, and a probe that has seen some of them knows the others. Beside every score stand what always
saying the commonest label gives, the same probe on shuffled labels (selectivity), and the score at a width that all
stages share (principal components of the training rows), because a wider stage is easier to probe. Penalties are chosen
inside the training pictures.

A label that can be read need not be used, and one that cannot may be there in a form no straight line reads.

Sources: Alain and Bengio 2016 (arXiv 1610.01644); Hewitt and Liang 2019 (arXiv 1909.03368) for selectivity, there with
labels assigned to word types.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.std import tqdm

from llava_lab.attribution.base import whole_number
from llava_lab.errors import OptionError
from llava_lab.probes.features import QUESTION, Stage, read_stages, stage_name, stages, subset
from llava_lab.probes.ridge import held_out_classes
from llava_lab.results_probes import ProbeScores

if TYPE_CHECKING:
    from llava_lab.models import Lab

PLACES = ("row", "column")
LEFT_OUT = -1  # a patch label that is not asked


def linear_probe(
    lab: Lab,
    pictures: Sequence[Any],
    labels: Any,
    *,
    at: Any = None,
    question: str = QUESTION,
    folds: int = 5,
    per_picture: int | None = 32,
    shuffles: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> ProbeScores:
    """How well `labels` can be read at each stage, cross-validated by picture, with its controls.

    `labels`: one per picture (n,), read off the mean token; one per patch (n, rows, cols), whole numbers or text, with
    -1 for patches left out; or ``"row"`` / ``"column"``, where a patch stands. `at`: stages, ``"before"`` and
    ``"after"`` the connector or a layer number; None is all of them. `per_picture` patches are drawn at random.
    One forward per picture. Ctrl-C while reading probes the pictures read so far, if they fill the folds.

    Raises OptionError: labels that do not match the pictures, measured numbers, fewer than two classes, fewer pictures
    than folds, an unknown stage.
    """
    wanted = stages(lab, at)
    _check(len(pictures), folds, shuffles, per_picture)
    table, names = _classes(labels, len(pictures), lab.grid)
    per = "picture" if table.ndim == 1 else "patch"
    rows, chosen, interrupted = _features(lab, pictures, wanted, table, question, per_picture, seed, folds, progress)
    where = np.repeat(np.arange(len(chosen)), [len(one) for one in chosen])
    known = np.concatenate([np.atleast_1d(table[i]).ravel()[one] for i, one in enumerate(chosen)])
    if len(np.unique(known)) < 2:
        raise OptionError(f"expected at least two different labels among the pictures, got {len(np.unique(known))}")
    rng = np.random.default_rng((seed, 1))
    draws = np.stack([known, *(rng.permutation(known) for _ in range(shuffles))])
    fold_of = rng.permutation(np.arange(len(chosen)) % folds)
    matched = _matched_width(rows, where, fold_of)
    right, shuffled = [], []
    for stage in tqdm(wanted, desc="probe", unit="stage", disable=not progress):
        widths = (rows[stage].shape[1], matched)
        hit = held_out_classes(rows[stage], draws, where, fold_of, len(names), widths, seed) == draws
        right.append(_by_picture(hit[:, 0], where, len(chosen)))
        shuffled.append(hit[:, 1:].mean(-1))
    return ProbeScores(
        stages=tuple(map(stage_name, wanted)),
        right=np.stack(right).astype(np.float32),
        counts=np.bincount(where, minlength=len(chosen)).astype(np.int32),
        shuffled=np.stack(shuffled).astype(np.float32),
        majority=_majority(known, fold_of[where]),
        widths=np.array([(rows[stage].shape[1], matched) for stage in wanted], np.int32),
        classes=names,
        per=per,
        folds=folds,
        seed=seed,
        model=lab.name,
        fingerprint=lab.fingerprint,
        interrupted=interrupted,
        notes=_notes(per, folds, matched),
    )


def _check(pictures: int, folds: int, shuffles: int, per_picture: int | None) -> None:
    whole_number("folds", folds, least=2)
    whole_number("shuffles", shuffles, least=1)
    if per_picture is not None:
        whole_number("per_picture", per_picture, least=1)
    if pictures < folds:
        raise OptionError(f"expected at least one picture per fold, got {pictures} pictures for {folds} folds")


def _features(
    lab: Lab,
    pictures: Sequence[Any],
    wanted: tuple[Stage, ...],
    table: np.ndarray,
    question: str,
    most: int | None,
    seed: int,
    folds: int,
    progress: bool,
) -> tuple[dict[Stage, np.ndarray], list[np.ndarray], bool]:
    """Rows per stage (n, W), which labels of each picture they belong to, and whether it was stopped."""
    rng = np.random.default_rng((seed, 0))
    kept: dict[Stage, list[np.ndarray]] = {stage: [] for stage in wanted}
    chosen: list[np.ndarray] = []
    interrupted = False
    try:
        for index, picture in enumerate(tqdm(pictures, desc="tokens", unit="picture", disable=not progress)):
            found = read_stages(lab, picture, wanted, question=question)
            if table.ndim == 1:
                at = np.array([0])
                parts = {stage: found[stage].mean(0, keepdims=True) for stage in wanted}
            else:
                asked = np.flatnonzero(table[index].ravel() != LEFT_OUT)
                at = asked[subset(rng, len(asked), most)]
                parts = {stage: found[stage][at] for stage in wanted}
            for stage in wanted:
                kept[stage].append(parts[stage])
            chosen.append(at)
    except KeyboardInterrupt:
        interrupted = True
        if len(chosen) < folds:
            raise
    done = {stage: np.concatenate(rows[: len(chosen)]) for stage, rows in kept.items()}
    return done, chosen, interrupted


def _classes(labels: Any, count: int, grid: tuple[int, int]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as class numbers, (pictures,) or (pictures, rows, cols), and the classes' names."""
    rows, cols = grid
    if isinstance(labels, str):
        if labels not in PLACES:
            raise OptionError(f"labels must be an array, 'row' or 'column', got {labels!r}")
        place = np.indices(grid)[PLACES.index(labels)]
        return np.broadcast_to(place, (count, rows, cols)), tuple(str(i) for i in range(grid[PLACES.index(labels)]))
    given = np.asarray(labels)
    if given.shape not in ((count,), (count, rows, cols)):
        raise OptionError(
            f"expected labels ({count},), one per picture, or ({count}, {rows}, {cols}), one per patch; got {given.shape}"
        )
    if given.dtype.kind not in "iubUS":
        raise OptionError(f"labels must be whole numbers or text, got {given.dtype}; sort measured numbers into bins first")
    left_out = given == LEFT_OUT if given.dtype.kind == "i" else np.zeros(given.shape, bool)
    if given.ndim == 1 and left_out.any():
        raise OptionError("labels of pictures must be 0 or more; leave out the pictures that have none")
    names, numbers = np.unique(given[~left_out], return_inverse=True)
    if len(names) < 2:
        raise OptionError(f"expected at least two different labels, got {len(names)}")
    table = np.full(given.shape, LEFT_OUT)
    table[~left_out] = numbers
    return table, tuple(str(name) for name in names)


def _matched_width(rows: dict[Stage, np.ndarray], where: np.ndarray, fold_of: np.ndarray) -> int:
    """The width that every stage can be brought to: the narrowest stage, or the fewest training rows less one."""
    smallest = min(int((fold_of[where] != fold).sum()) for fold in np.unique(fold_of))
    return max(1, min(*(one.shape[1] for one in rows.values()), smallest - 1))


def _by_picture(hit: np.ndarray, where: np.ndarray, count: int) -> np.ndarray:
    """Share right of each picture, (widths, pictures); 0 for one without labels, which counts nothing."""
    total = np.maximum(np.bincount(where, minlength=count), 1)
    return np.stack([np.bincount(where, weights=one, minlength=count) / total for one in hit])


def _majority(known: np.ndarray, folds: np.ndarray) -> float:
    """Accuracy of saying, in each fold, the commonest label of the others."""
    right = 0
    for fold in np.unique(folds):
        right += int((known[folds == fold] == np.bincount(known[folds != fold]).argmax()).sum())
    return right / len(known)


def _notes(per: str, folds: int, matched: int) -> tuple[str, ...]:
    what = "the mean image token of a picture" if per == "picture" else "single image tokens"
    return (
        f"Ridge classification of {what}, {folds} folds of whole pictures; matched width: {matched} principal components.",
        "That a label can be read off a stage does not show that the model uses it.",
    )
