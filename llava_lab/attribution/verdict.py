"""Whether one map on one picture did better than random maps: the steps, and the statistics. Numpy only.

Steps lie densely at both ends, where a good map shows, and symmetrically, so that the pictures of a deletion
curve read backwards are the insertion curve of the map upside down. A random map upside down is a random
map too: each ranking serves twice, and the mean gain of random maps is exactly 0.

In simulations (score additive over 144 patches, 4 to 144 of which count, two fills, 10 rankings) one or two of a
hundred random maps beat random, and a perfect map nearly always; where one or two patches decide, hardly ever.
"""

from __future__ import annotations

import numpy as np

from llava_lab.scores import area, trapezoid

FEWEST_FILLS = 2
SIGMAS = 2.5  # spreads of random maps that a map must lie above them
RESAMPLES, TAIL = 1000, 0.025


def step_counts(patches: int, steps: int) -> np.ndarray:
    """How many of `patches` are changed at each step, int (about steps + 1,): 0 first, all last, the same backwards."""
    half = (1 - np.cos(np.pi * np.arange(steps // 2 + 1) / steps)) / 2
    counts = np.floor(half * patches + 0.5).astype(int)
    return np.unique(np.concatenate([counts, patches - counts]))


def verdict(
    fractions: np.ndarray, deletion: np.ndarray, insertion: np.ndarray, random: np.ndarray, seed: int = 0
) -> tuple[tuple[float, float], bool]:
    """The 95% interval of this map's gain minus one random map's, and whether the map beats random.

    deletion, insertion (fills, steps) of one target, NaN where a fill tells nothing; random (2, seeds, fills, steps).
    """
    known = ~np.isnan(deletion).any(1)
    if known.sum() < FEWEST_FILLS:
        return (float("nan"), float("nan")), False
    lead = (insertion - deletion)[known].astype(np.float64)
    forth = (random[1] - random[0])[:, known].astype(np.float64)
    others = np.concatenate([forth, -forth[..., ::-1]])  # maps, fills, steps
    gains, scatter = area(fractions, lead), area(fractions, others)
    above = (gains > scatter.max(0)) & (gains > SIGMAS * np.sqrt((scatter**2).mean(0)))
    interval = _interval(trapezoid(fractions)[1:-1], (lead.mean(0) - others.mean(1))[:, 1:-1], seed)
    return interval, bool(above.all() and interval[0] > 0)


def told_apart(fractions: np.ndarray, random: np.ndarray) -> bool:
    """Whether a perfect map could be told from random ones under some fill; random (2, seeds, fills, steps), one target."""
    gains = area(fractions, random[1] - random[0])
    spread = np.sqrt((gains[:, ~np.isnan(gains).any(0)] ** 2).mean(0))
    return bool((SIGMAS * spread < trapezoid(fractions)[1:-1].sum()).any())


def _interval(weights: np.ndarray, ahead: np.ndarray, seed: int) -> tuple[float, float]:
    """Bootstrap over random maps and steps: weights (S,), ahead (maps, S) the map's lead over each random map at each step."""
    rng = np.random.default_rng((seed, 19))
    which = rng.integers(len(ahead), size=RESAMPLES)
    times = rng.multinomial(len(weights), np.full(len(weights), 1 / len(weights)), RESAMPLES) * weights
    means = (ahead[which] * times).sum(1) / times.sum(1) * weights.sum()
    low, high = np.quantile(means, [TAIL, 1 - TAIL])
    return float(low), float(high)
