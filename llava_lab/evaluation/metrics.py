"""Scores and their intervals. Questions about one picture are not independent, so pictures are resampled.

Sources: Wilson, JASA 1927 (score interval); Field and Welsh, JRSS-B 2007 (cluster bootstrap).
"""

from __future__ import annotations

import math

import numpy as np

from llava_lab.errors import OptionError

RESAMPLES = 2000
LEVEL = 0.95
Z = 1.959963984540054  # two-sided 95% of the normal distribution


def exact_match(answer: str, expected: str) -> bool:
    """Equal after trimming outer white space; case and punctuation count."""
    return answer.strip() == expected.strip()


NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def normalised(answer: str) -> str:
    """Lower case, one space between words, no final full stop, no articles (a, an, the), numbers 0 to 10 as words, none is no."""
    words = answer.lower().strip().rstrip(".").split()
    named = [NUMBER_WORDS[int(word)] if word.isdecimal() and int(word) <= 10 else word for word in words]
    return " ".join("no" if word in ("zero", "none") else word for word in named if word not in ("a", "an", "the"))


def same_answer(answer: str, expected: str) -> bool:
    """Equal after `normalised`."""
    return normalised(answer) == normalised(expected)


def wilson(right: int, total: int) -> tuple[float, float]:
    """95% score interval of a proportion, sound also at 0 and 1."""
    if total < 1:
        raise OptionError(f"an interval needs at least one case, got {total}")
    share = right / total
    centre = (share + Z**2 / (2 * total)) / (1 + Z**2 / total)
    half = Z / (1 + Z**2 / total) * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def cluster_interval(right: np.ndarray, cluster: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of `right`, resampling whole clusters (pictures).

    right (n,) bool, cluster (n,) labels. Where all are right or all wrong the bootstrap has no
    spread; Wilson's interval over the number of clusters stands in.
    """
    if right.shape != cluster.shape or right.ndim != 1 or not len(right):
        raise OptionError(f"right and cluster must be equally long and not empty, got {right.shape} and {cluster.shape}")
    _, index = np.unique(cluster, return_inverse=True)
    n = int(index.max()) + 1
    if right.all() or not right.any():
        return wilson(n if right.all() else 0, n)
    hits = np.bincount(index, right.astype(float), n)
    sizes = np.bincount(index, minlength=n)
    drawn = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    means = hits[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
