"""Linear probes: can a straight line read a label off image tokens, before the connector, after it, at each layer?

A stage is ``"before"`` (what the connector reads, the vision tower's width), ``"after"`` (what it gives) or a
whole number l (the stream after l language layers; 0 is what the first layer is given). One picture is one forward.

Folds are of pictures, never of patches: patches of one picture are alike, and a probe that has seen some of them knows the
others. Beside every score stand what always saying the commonest label gives, the same probe on shuffled labels
(selectivity), and the score at a width that all stages share (principal components of the training rows), because a wider
stage is easier to probe. Penalties are chosen inside the training pictures.

The probe is ridge classification in closed form, one decomposition for every penalty, width and labelling: labels are
one-hot and centred, features standardised by the training rows; the class of the largest value is said. With ``X = U S V'``
the coefficients at penalty c are ``V diag(s / (s^2 + c)) U' Y``; keeping the first k columns of V is ridge on k principal
components, which is how stages of different width are compared at one.

`patch_labels` makes labels of picture-book scenes without a model. A patch is labelled when one thing covers most of it, or
when nothing touches it; the rest, edges and corners, are left out.

A label that can be read need not be used, and one that cannot may be there in a form no straight line reads.

    scenes = [picturebook.scene("lesson", i) for i in range(20)]
    scores = linear_probe(lab, [scene.picture() for scene in scenes], patch_labels(lab, scenes, "color"))

Sources: Alain and Bengio 2016 (arXiv 1610.01644); Hewitt and Liang 2019 (arXiv 1909.03368) for selectivity, there with
labels assigned to word types.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from llava_lab.capture import hooked, undisturbed
from llava_lab.capture.residual import watch_stream
from llava_lab.checks import PATIENCE, Sweep, array_of, entry, is_list, number, one_of, whole_number
from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import connector_of, language_layers, require_patch_tokens
from llava_lab.models.pictures import read_picture
from llava_lab.results import ProbeScores
from llava_lab.worlds.scenes import COLOR_NAMES, KIND_NAMES, SIZE, Scene

QUESTION = "What is in the picture?"
BEFORE, AFTER = "before", "after"
PLACES = ("row", "column")
LEFT_OUT = -1  # a patch label that is not asked
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean squared singular value
SMALLEST = 1e-6  # of the largest singular value; what is below is rounding
INNER = 4  # one training picture in so many is kept back to choose the penalty
PATCH_LABELS: dict[str, tuple[str, ...]] = {  # what a patch may be asked, and what its numbers mean
    "object": ("background", "object"),
    "kind": KIND_NAMES,
    "color": COLOR_NAMES,
}

Stage = str | int


@entry
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
    than folds, fewer than two labels beside a fold, an unknown stage.

    >>> scores = ll.linear_probe(lab, [picture, picture], "row", at="after", folds=2, shuffles=1, per_picture=8, progress=False)
    >>> scores.stages, scores.counts.tolist()
    (('after',), [8, 8])
    """
    wanted = stages(lab, at)
    whole_number("folds", folds, least=2)
    whole_number("shuffles", shuffles, least=1)
    if len(pictures) < folds:
        raise OptionError(f"expected at least one picture per fold, got {len(pictures)} pictures for {folds} folds")
    table, names = _classes(labels, len(pictures), lab.grid)
    per = "picture" if table.ndim == 1 else "patch"
    rows, chosen, interrupted = _features(lab, pictures, wanted, table, question, per_picture, seed, folds, progress)
    where = np.repeat(np.arange(len(chosen)), [len(at) for at in chosen])
    known = np.concatenate([np.atleast_1d(table[i]).ravel()[at] for i, at in enumerate(chosen)])
    if len(np.unique(known)) < 2:
        raise OptionError(f"expected at least two different labels among the pictures, got {len(np.unique(known))}")
    rng = np.random.default_rng((seed, 1))
    draws = np.stack([known, *(rng.permutation(known) for _ in range(shuffles))])
    fold_of = rng.permutation(np.arange(len(chosen)) % folds)
    matched = _matched_width(rows, where, fold_of)
    right, shuffled = [], []
    for stage in tqdm(wanted, desc="probe", unit="stage", delay=PATIENCE, disable=not progress):
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
    rows: dict[Stage, list[np.ndarray]] = {stage: [] for stage in wanted}
    chosen: list[np.ndarray] = []
    # of two folds with one row a picture, one must leave two rows: one to learn from, one to choose the penalty by
    least = 4 if folds == 2 and (table.ndim == 1 or most == 1) else folds
    with Sweep("tokens", total=len(pictures), unit="picture", least=least, show=progress) as sweep:
        for index, picture in enumerate(pictures):
            tokens = read_stages(lab, picture, wanted, question=question)
            if table.ndim == 1:
                at = np.array([0])
                tokens = {stage: tokens[stage].mean(0, keepdims=True) for stage in wanted}
            else:
                labelled = np.flatnonzero(table[index].ravel() != LEFT_OUT)
                at = labelled[subset(rng, len(labelled), most)]
            for stage in wanted:
                rows[stage].append(tokens[stage][at])
            chosen.append(at)
            sweep.step()
    done = {stage: np.concatenate(parts[: len(chosen)]) for stage, parts in rows.items()}
    return done, chosen, sweep.interrupted


def _classes(labels: Any, count: int, grid: tuple[int, int]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as class numbers, (pictures,) or (pictures, rows, cols), and the classes' names."""
    rows, cols = grid
    if isinstance(labels, str):
        if labels not in PLACES:
            raise OptionError(f"labels must be an array, 'row' or 'column', got {labels!r}")
        place = np.indices(grid)[PLACES.index(labels)]
        return np.broadcast_to(place, (count, rows, cols)), tuple(str(i) for i in range(grid[PLACES.index(labels)]))
    array = array_of("labels", labels)
    if array.shape not in ((count,), (count, rows, cols)):
        raise OptionError(
            f"expected labels ({count},), one per picture, or ({count}, {rows}, {cols}), one per patch; got {array.shape}"
        )
    if array.dtype.kind not in "iubUS":
        raise OptionError(f"labels must be whole numbers or text, got {array.dtype}; sort measured numbers into bins first")
    left_out = array == LEFT_OUT if array.dtype.kind == "i" else np.zeros(array.shape, bool)
    if array.ndim == 1 and left_out.any():
        raise OptionError("labels of pictures must be 0 or more; leave out the pictures that have none")
    names, numbers = np.unique(array[~left_out], return_inverse=True)
    if len(names) < 2:
        raise OptionError(f"expected at least two different labels, got {len(names)}")
    table = np.full(array.shape, LEFT_OUT)
    table[~left_out] = numbers
    return table, tuple(str(name) for name in names)


def _matched_width(rows: dict[Stage, np.ndarray], where: np.ndarray, fold_of: np.ndarray) -> int:
    """The width that every stage can be brought to: the narrowest stage, or the fewest training rows less one."""
    smallest = min(int((fold_of[where] != fold).sum()) for fold in np.unique(fold_of))
    return max(1, min(*(tokens.shape[1] for tokens in rows.values()), smallest - 1))


def _by_picture(hit: np.ndarray, where: np.ndarray, count: int) -> np.ndarray:
    """Share right of each picture, (widths, pictures); 0 for one without labels, which counts nothing."""
    total = np.maximum(np.bincount(where, minlength=count), 1)
    return np.stack([np.bincount(where, weights=right, minlength=count) / total for right in hit])


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


# -- labels of patches ------------------------------------------------------------------------


@entry
def patch_labels(lab: Lab, scenes: Sequence[Scene], what: str = "object", *, most: float = 0.5) -> np.ndarray:
    """Labels of every patch, int32 (scenes, rows, cols): positions in ``PATCH_LABELS[what]``, or -1 for left out.

    "kind" and "color" label the patches that one thing covers by more than `most`, a share from 0.5 to below 1; "object"
    calls those 1 and the patches that no thing touches 0. The scenes must be shown as `Scene.picture` draws them.
    Raises OptionError: another `what`, a share out of range, no scenes.

    >>> from llava_lab.worlds import picturebook
    >>> ll.patch_labels(lab, [picturebook.scene("lesson", 0)], "color").shape
    (1, 12, 12)
    """
    one_of("what", what, tuple(PATCH_LABELS))
    if not 0.5 <= number("most", most) < 1:
        raise OptionError(f"most must be a share from 0.5 to below 1, so that one thing covers most of a patch; got {most}")
    if not len(scenes):
        raise OptionError("expected scenes to label, got none")
    way = lab.preprocessing.map(SIZE, SIZE)
    labels = np.full((len(scenes), *lab.grid), LEFT_OUT, np.int32)
    for grid, scene in zip(labels, scenes, strict=True):
        touched = np.zeros(lab.grid, bool)
        for thing, mask in zip(scene.things, scene.masks(), strict=True):
            covered = way.mask_to_patches(mask)
            touched |= covered > 0
            grid[covered > most] = 1 if what == "object" else PATCH_LABELS[what].index(getattr(thing, what))
        if what == "object":
            grid[~touched] = 0
    return labels


# -- tokens of a picture at each stage --------------------------------------------------------


def stages(lab: Lab, at: Any) -> tuple[Stage, ...]:
    """The stages `at` names, checked; None is before, after and after every layer."""
    count = len(language_layers(lab.model))
    if at is None:
        at = BEFORE, AFTER, *range(1, count + 1)
    wanted = tuple(at) if is_list(at) else (at,)
    for stage in wanted:
        layer = isinstance(stage, Integral) and not isinstance(stage, bool) and 0 <= int(stage) <= count
        if not layer and not (isinstance(stage, str) and stage in (BEFORE, AFTER)):
            raise OptionError(f"a stage is 'before', 'after' or a layer from 0 to {count}, got {stage!r}")
    if not wanted or len(set(wanted)) != len(wanted):
        raise OptionError(f"expected stages, each once, got {at!r}")
    if BEFORE in wanted:
        require_patch_tokens(lab.model, "stage 'before'")
    return wanted


def stage_name(stage: Stage) -> str:
    return stage if isinstance(stage, str) else f"layer {stage}"


def read_stages(
    lab: Lab, picture: Any, wanted: Sequence[Stage], *, question: str = QUESTION, text: dict[Stage, np.ndarray] | None = None
) -> dict[Stage, np.ndarray]:
    """The picture's image tokens at each stage, float32 (patches, width), row-major; the model is left as it was.

    `text` is filled with the prompt's other tokens at the same stages, (tokens, width), where they exist.
    """
    sequence = lab.sequence(question)
    image = slice(*sequence.segments["image"])
    ids = torch.from_numpy(sequence.token_ids)[None].to(lab.device)
    patches = lab.grid[0] * lab.grid[1]
    tokens: dict[Stage, np.ndarray] = {}

    def keep(stage: Stage, rows: Tensor) -> None:
        if stage in wanted:
            tokens[stage] = rows.detach().float().cpu().numpy()

    def around_connector(module: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        read = args[0] if args else next(iter(kwargs.values()))
        for stage, rows in ((BEFORE, read.reshape(-1, read.shape[-1])), (AFTER, output.reshape(-1, output.shape[-1]))):
            if len(rows) != patches:
                raise CheckpointError(f"expected {patches} tokens {stage} the connector, one per patch, got {len(rows)}")
            keep(stage, rows)

    def after_layers(number: int, state: Tensor) -> None:
        keep(number, state[0, image])
        stage: Stage = AFTER if number == 0 and AFTER in wanted else number
        if text is not None and stage in wanted:
            other = torch.cat([state[0, : image.start], state[0, image.stop :]])
            text[stage] = other.detach().float().cpu().numpy()

    connector = hooked(connector_of(lab.model), after=around_connector, with_kwargs=True)
    with undisturbed(lab.model), connector, watch_stream(language_layers(lab.model), after_layers):
        pixels = lab.pixels(read_picture(picture))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        lab.model(**inputs, use_cache=False, logits_to_keep=1)
    return tokens


def subset(rng: np.random.Generator, count: int, most: int | None) -> np.ndarray:
    """At most `most` of 0 .. count-1 at random, sorted; None is all."""
    return np.arange(count) if most is None or most >= count else np.sort(rng.choice(count, most, replace=False))


# -- ridge classification ---------------------------------------------------------------------


class Ridge:
    """Training rows decomposed once; `predict` then answers for any labels, penalty and width."""

    def __init__(self, rows: np.ndarray) -> None:
        """`rows` (n, W): the training rows."""
        self.mean, scale = rows.mean(0), rows.std(0)
        self.scale = np.where(scale > SMALLEST * max(float(scale.max(initial=0)), 1e-30), scale, 1.0)
        left, values, right = np.linalg.svd(self._standard(rows), full_matrices=False)
        keep = values > SMALLEST * max(float(values.max(initial=0)), 1e-30)
        self.left, self.values, self.right = left[:, keep], values[keep], right[keep]

    @property
    def width(self) -> int:
        return len(self.values)

    def predict(self, labels: np.ndarray, classes: int, rows: np.ndarray, width: int, penalty: float) -> np.ndarray:
        """Class numbers (draws, m) for `rows` (m, W), learnt from `labels` (draws, n)."""
        k = min(width, self.width)
        values = self.values[:k]
        shrink = values / (values**2 + penalty * float((self.values**2).mean() if self.width else 1.0))
        coded = np.eye(classes, dtype=np.float64)[labels]  # draws, n, C
        mean = coded.mean(1, keepdims=True)
        seen = (self._standard(rows) @ self.right[:k].T) * shrink  # m, k
        return (seen @ (self.left[:, :k].T @ (coded - mean)) + mean).argmax(-1)

    def _standard(self, rows: np.ndarray) -> np.ndarray:
        return (rows.astype(np.float64) - self.mean) / self.scale


def held_out_classes(
    rows: np.ndarray,
    labels: np.ndarray,
    pictures: np.ndarray,
    fold_of: np.ndarray,
    classes: int,
    widths: Sequence[int],
    seed: int,
) -> np.ndarray:
    """The class said of every row by a probe that saw none of that row's picture, int (widths, draws, n).

    `labels` (draws, n), `pictures` (n,) the picture of each row, `fold_of` (pictures,). The penalty is chosen per
    fold, width and labelling on training pictures kept back, then all training rows are fitted.
    """
    classes_of = np.zeros((len(widths), *labels.shape), np.int64)
    folds = fold_of[pictures]
    for fold in np.unique(folds):
        test = folds == fold
        train = ~test
        back = _kept_back(pictures[train], np.random.default_rng((seed, int(fold))))
        if back.all():
            raise OptionError(
                f"expected at least two labels to learn from beside each fold, got {len(back)}; give more pictures or more folds"
            )
        inner, outer = Ridge(rows[train][~back]), Ridge(rows[train])
        learnt, expected, tried = labels[:, train][:, ~back], labels[:, train][:, back], rows[train][back]
        for column, width in enumerate(widths):
            scores = np.stack([(inner.predict(learnt, classes, tried, width, c) == expected).mean(1) for c in PENALTIES])
            best = len(PENALTIES) - 1 - scores[::-1].argmax(0)  # of equals the strongest penalty
            for choice in np.unique(best):
                draws = best == choice
                predicted = outer.predict(labels[draws][:, train], classes, rows[test], width, PENALTIES[choice])
                classes_of[column][np.ix_(draws, test)] = predicted
    return classes_of


def _kept_back(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows of about a quarter of the pictures, at least one and never all (with one picture: every other row)."""
    names = rng.permutation(np.unique(pictures))
    if len(names) < 2:
        return np.arange(len(pictures)) % 2 == 0
    return np.isin(pictures, names[: max(1, len(names) // INNER)])
