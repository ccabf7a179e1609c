"""Measures of a cloud of vectors, numpy only: how wide, how narrow a cone, how alike two clouds are, who stands out.

Sources: Roy and Vetterli 2007 (effective rank); Ethayarajh 2019 (arXiv 1909.00512, anisotropy); Kornblith et al. 2019
(arXiv 1905.00414, linear CKA); Liang et al. 2022 (arXiv 2203.02053, modality gap).
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

BY_CHANCE = 0.01  # outliers expected in a picture whose log norms are normally distributed
ROBUST = 1.4826  # median deviation to standard deviation, for a normal distribution
ROUNDING = 1e-3  # of a norm; less is no difference


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
    found = np.zeros(likeness.shape, bool)
    np.put_along_axis(found, np.argsort(-likeness, axis=1, kind="stable")[:, :count], True, axis=1)
    return found


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
