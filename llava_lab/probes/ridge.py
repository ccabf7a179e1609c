"""Ridge classification in closed form, numpy only: one decomposition serves every penalty, width and labelling.

Labels are one-hot and centred, features standardised by the training rows; the class of the largest value is said.
With ``X = U S V'`` the coefficients at penalty c are ``V diag(s / (s^2 + c)) U' Y``; keeping the first k columns of V is
ridge on k principal components, which is how stages of different width are compared at one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean squared singular value
SMALLEST = 1e-6  # of the largest singular value; what is below is rounding
INNER = 4  # one training picture in so many is kept back to choose the penalty


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
    said = np.zeros((len(widths), *labels.shape), np.int64)
    folds = fold_of[pictures]
    for fold in np.unique(folds):
        test = folds == fold
        train = ~test
        back = _kept_back(pictures[train], np.random.default_rng((seed, int(fold))))
        inner, outer = Ridge(rows[train][~back]), Ridge(rows[train])
        learnt, asked, tried = labels[:, train][:, ~back], labels[:, train][:, back], rows[train][back]
        for number, width in enumerate(widths):
            scores = np.stack([(inner.predict(learnt, classes, tried, width, c) == asked).mean(1) for c in PENALTIES])
            best = len(PENALTIES) - 1 - scores[::-1].argmax(0)  # of equals the strongest penalty
            for choice in np.unique(best):
                draws = best == choice
                found = outer.predict(labels[draws][:, train], classes, rows[test], width, PENALTIES[choice])
                said[number][np.ix_(draws, test)] = found
    return said


def _kept_back(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows of about a quarter of the pictures, at least one and never all (with one picture: every other row)."""
    names = rng.permutation(np.unique(pictures))
    if len(names) < 2:
        return np.arange(len(pictures)) % 2 == 0
    return np.isin(pictures, names[: max(1, len(names) // INNER)])
