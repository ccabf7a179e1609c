"""Maps as rankings: the order of their patches, how far two orders agree, how well one finds a set. Numpy only.

Ties are never broken by position, which would favour the top left: an order shuffles them by a seed, and
the measures count them as half.
"""

from __future__ import annotations

import numpy as np


def best_first(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices of `values` (P,), highest first, ties in random order."""
    return np.lexsort((rng.permutation(len(values)), -values))


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each value, 1 the lowest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]


def spearman(one: np.ndarray, two: np.ndarray) -> float:
    """Rank correlation; NaN when a map is flat."""
    a, b = (average_ranks(values) - (len(values) + 1) / 2 for values in (one, two))
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else float("nan")


def top_overlap(one: np.ndarray, two: np.ndarray, k: int) -> float:
    """Share of the `k` highest in common. A patch tied at the edge counts by its chance of being among them."""
    return float(_membership(one, k) @ _membership(two, k)) / k


def roc_auc(values: np.ndarray, inside: np.ndarray) -> float:
    """Chance that a value inside (bool) is above one outside, ties half; NaN when one of the two is empty."""
    yes, no = int(inside.sum()), int((~inside).sum())
    if not yes or not no:
        return float("nan")
    return float(average_ranks(values)[inside].sum() - yes * (yes + 1) / 2) / (yes * no)


def iou(values: np.ndarray, inside: np.ndarray) -> float:
    """Intersection over union of `inside` (bool) and as many of the highest values; NaN when it is empty."""
    size = int(inside.sum())
    if not size:
        return float("nan")
    common = float(_membership(values, size)[inside].sum())
    return common / (2 * size - common)


def _membership(values: np.ndarray, k: int) -> np.ndarray:
    """Chance of each value to be among the `k` highest when ties are drawn by lot; sums to k."""
    edge = np.sort(values)[-k]
    above, tied = values > edge, values == edge
    return above + tied * ((k - above.sum()) / tied.sum())
