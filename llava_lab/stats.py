"""Statistics that several rooms need: rankings, intervals over pictures, and verdicts on trained connectors.

Questions about one picture are not independent, so every interval here resamples whole pictures: `cluster_bootstrap`.
Ties of a map are never broken by position, which would favour the top left: an order shuffles them by a seed, and the
measures count them as half.

A comparison of trained connectors has two kinds of noise. Other pictures would give other scores: pictures are
resampled, the same ones for both sides. Another seed would give another model: Student's t on the differences seed by
seed says what a repetition of the training would give. A verdict needs both. McNemar's test on the pooled answers is
about these very models only, so it stands beside the verdict and does not decide it.

    right, picture = np.array([True, True, False]), np.array([0, 0, 1])
    low, high = cluster_interval(right, picture)

Sources: Wilson, JASA 1927 (score interval); Field and Welsh, JRSS-B 2007 (cluster bootstrap); McNemar, Psychometrika
1947, exact form; Holm, Scand. J. Statist. 1979; Guenther, Am. Statistician 1981 (sample size of a t test).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from llava_lab.errors import DataError, OptionError

RESAMPLES = 2000  # of pictures, for an interval
EDGES = (0.025, 0.975)  # of every interval here: 95%
ALPHA = 0.05
POWER = 0.8
STATED = 0.02  # the true difference that seeds and pictures are counted for where nothing else is said: 2 points

# -- maps as rankings -----------------------------------------------------------------------


def best_first(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices of `values` (P,), highest first, ties in random order."""
    return np.lexsort((rng.permutation(len(values)), -values))


def spearman(one: np.ndarray, two: np.ndarray) -> float:
    """Rank correlation of two vectors, equal values sharing their mean rank; NaN when one of them is flat."""
    first, second = (scipy.stats.rankdata(values) - (len(values) + 1) / 2 for values in (one, two))
    size = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / size if size else float("nan")


def top_overlap(one: np.ndarray, two: np.ndarray, k: int) -> float:
    """Share of the `k` highest in common. A patch tied at the edge counts by its chance of being among them."""
    return float(_membership(one, k) @ _membership(two, k)) / k


def roc_auc(values: np.ndarray, inside: np.ndarray) -> float:
    """Chance that a value inside (bool) is above one outside, ties half; NaN when one of the two is empty."""
    yes, no = int(inside.sum()), int((~inside).sum())
    if not yes or not no:
        return float("nan")
    return float(scipy.stats.rankdata(values)[inside].sum() - yes * (yes + 1) / 2) / (yes * no)


def iou(values: np.ndarray, inside: np.ndarray) -> float:
    """Intersection over union of `inside` (bool) and as many of the highest values; NaN when it is empty."""
    size = int(inside.sum())
    if not size:
        return float("nan")
    common = float(_membership(values, size)[inside].sum())
    return common / (2 * size - common)


def _membership(values: np.ndarray, k: int) -> np.ndarray:
    """Chance of each value to be among the `k` highest when ties are broken at random; sums to k."""
    edge = np.sort(values)[-k]
    above, tied = values > edge, values == edge
    return above + tied * ((k - above.sum()) / tied.sum())


# -- answers -------------------------------------------------------------------------------


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


# -- intervals over pictures ----------------------------------------------------------------


def calibration(confidence: np.ndarray, right: np.ndarray, *, bins: int = 10) -> dict[str, Any]:
    """How far a model's confidence (0 to 1) in its answers is from how often these are right.

    `error` is the expected calibration error over `bins` bins of equal width (Guo et al. 2017, arXiv 1706.04599), 0 is best;
    `auroc` the chance that a right answer is surer than a wrong one, 0.5 is blind, None where all are right or all wrong;
    `bins` holds (mean confidence, share right, answers) of every bin that is not empty. Answers without one are left out.

    >>> import numpy as np
    >>> from llava_lab.stats import calibration
    >>> calibration(np.array([0.9, 0.9, 0.1]), np.array([True, True, False]))["error"]
    0.1
    """
    known = ~np.isnan(confidence)
    confidence, right = confidence[known], right[known]
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    rows = [(confidence[place == i], right[place == i]) for i in range(bins)]
    table = [(round(float(sure.mean()), 4), round(float(true.mean()), 4), len(sure)) for sure, true in rows if len(sure)]
    error = sum(len(sure) * abs(float(sure.mean()) - float(true.mean())) for sure, true in rows if len(sure)) / max(len(right), 1)
    area = roc_auc(confidence, right)
    return {
        "confidence": round(float(confidence.mean()), 4) if len(confidence) else None,
        "error": round(error, 4),
        "auroc": None if math.isnan(area) else round(area, 4),
        "bins": table,
    }


def wilson(right: int, total: int) -> tuple[float, float]:
    """95% score interval of a proportion, sound also at 0 and 1."""
    if total < 1:
        raise OptionError(f"an interval needs at least one case, got {total}")
    low, high = scipy.stats.binomtest(right, total).proportion_ci(EDGES[1] - EDGES[0], method="wilson")
    return float(low), float(high)


def cluster_bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    clusters: int,
    *,
    seed: int | np.random.Generator = 0,
    resamples: int = RESAMPLES,
    one_by_one: bool = False,
) -> np.ndarray:
    """Values of `statistic` with whole clusters (pictures) resampled, (resamples, ...).

    `statistic` takes weights, float64 (resamples, clusters): how often each cluster was drawn; it gives (resamples, ...).
    `one_by_one` draws the clusters singly instead of counting them at once: the same distribution from another stream
    of random numbers, by which stored intervals of some results were made.

        sums, sizes = np.array([3.0, 1.0]), np.array([4, 4])  # of each picture: right answers, questions
        draws = cluster_bootstrap(lambda weights: weights @ sums / (weights @ sizes), len(sums))
        low, high = percentiles(draws)
    """
    rng = np.random.default_rng(seed)
    if one_by_one:
        weights = np.stack([np.bincount(rng.integers(0, clusters, clusters), minlength=clusters) for _ in range(resamples)])
    else:
        weights = rng.multinomial(clusters, np.full(clusters, 1 / clusters), resamples)
    return statistic(weights.astype(float))


def percentiles(draws: np.ndarray) -> np.ndarray:
    """The 95% percentile interval of bootstrap draws (resamples, ...), (..., 2)."""
    return np.moveaxis(np.quantile(draws, EDGES, axis=0), 0, -1)


def resampled_means(
    values: np.ndarray, pictures: np.ndarray, *, seed: int = 0, one_by_one: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """95% intervals (..., 2) and standard errors (...) of means over the last axis, resampling pictures (labels, (Q,))."""
    _, index = np.unique(pictures, return_inverse=True)
    sizes = np.bincount(index)
    rows = values.reshape(-1, values.shape[-1])
    sums = np.stack([np.bincount(index, row, len(sizes)) for row in rows], 1)

    def means(weights: np.ndarray) -> np.ndarray:
        return weights @ sums / (weights @ sizes)[:, None]

    draws = cluster_bootstrap(means, len(sizes), seed=seed, one_by_one=one_by_one)
    return percentiles(draws).reshape(*values.shape[:-1], 2), draws.std(0, ddof=1).reshape(values.shape[:-1])


def cluster_interval(right: np.ndarray, cluster: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of `right`, resampling whole clusters (pictures).

    right (n,) bool, cluster (n,) labels. Where all are right or all wrong the bootstrap has no
    spread; Wilson's interval over the number of clusters stands in.
    """
    if right.shape != cluster.shape or right.ndim != 1 or not len(right):
        raise OptionError(f"right and cluster must be equally long and not empty, got {right.shape} and {cluster.shape}")
    if right.all() or not right.any():
        count = len(np.unique(cluster))
        return wilson(count if right.all() else 0, count)
    low, high = resampled_means(right.astype(float), cluster, seed=seed, one_by_one=True)[0]
    return float(low), float(high)


# -- verdicts on trained connectors ---------------------------------------------------------

FIELDS = ("effect", "picture_interval", "seed_sd", "seed_interval", "p", "p_adjusted", "gained", "lost", "mcnemar_p",
          "seeds_needed", "pictures_needed", "detectable")  # fmt: skip


@dataclass(frozen=True)
class Questions:
    """Where each of Q questions belongs."""

    split: np.ndarray  # int64 (Q,), 0 .. splits - 1
    kind: np.ndarray  # int64 (Q,), 1 .. types - 1; type 0 is all of them
    pictures: np.ndarray  # int64 (Q,), labels within the split
    splits: int
    types: int

    def cells(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """(split, type, which questions) wherever there are any."""
        for x in range(self.splits):
            for y in range(self.types):
                asked = (self.split == x) & ((self.kind == y) | (y == 0))
                if asked.any():
                    yield x, y, asked


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p of answers that one side alone has right: (only second, only first). 1 when there are none."""
    if min(gained, lost) < 0:
        raise DataError(f"counts of answers must be 0 or more, got {gained} and {lost}")
    return 1.0 if gained + lost == 0 else float(scipy.stats.binomtest(gained, gained + lost, 0.5).pvalue)


def seeds_needed(effect: float, sd: float, level: float = ALPHA) -> float:
    """The fewest seeds, 2 at least, with which `detectable` is no more than a true difference of `effect`; infinite for 0.

    The effect is one that is *stated*, what would be worth telling. The observed one would only say its own p value again
    (Hoenig and Heisey 2001, The American Statistician 55).

    >>> from llava_lab.stats import seeds_needed
    >>> seeds_needed(0.02, 0.0127), seeds_needed(0.02, 0.0127, 0.05 / 6)
    (6.0, 9.0)
    """
    if not math.isfinite(effect) or not math.isfinite(sd):
        return math.nan
    effect = abs(effect)
    if effect == 0:
        return math.inf
    edge = scipy.stats.norm.ppf(1 - level / 2)
    # the normal approximation, at most a few seeds off
    count = max(2, math.ceil(((edge + scipy.stats.norm.ppf(POWER)) * sd / effect) ** 2 + edge**2 / 2))
    while count > 2 and detectable(sd, count - 1, level) <= effect:
        count -= 1
    while detectable(sd, count, level) > effect:
        count += 1
    return float(count)


def detectable(sd: float, seeds: int, level: float = ALPHA) -> float:
    """The smallest true difference that so many seeds find at `level` four times of five, given the spread of the differences."""
    return float((scipy.stats.t.ppf(1 - level / 2, seeds - 1) + scipy.stats.t.ppf(POWER, seeds - 1)) * sd / math.sqrt(seeds))


def paired_t(differences: np.ndarray) -> tuple[float, tuple[float, float]]:
    """(two-sided p, 95% interval of the mean) of one difference per seed, (S,) with S of 2 or more."""
    count, mean, sd = len(differences), float(differences.mean()), float(differences.std(ddof=1))
    if sd < 1e-12:  # every seed says the same: no spread to go by, so the sign test
        return (1.0 if abs(mean) < 1e-12 else 2 * 0.5**count), (mean, mean)
    error = sd / math.sqrt(count)
    half = float(scipy.stats.t.ppf(1 - ALPHA / 2, count - 1)) * error
    return float(2 * scipy.stats.t.sf(abs(mean) / error, count - 1)), (mean - half, mean + half)


def holm(p: np.ndarray) -> np.ndarray:
    """p values of one family, adjusted so that the chance of any false finding stays at its level."""
    order = np.argsort(p, kind="stable")
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, raised)
    return adjusted


def holm_levels(p: np.ndarray) -> np.ndarray:
    """The level that each p of one family is held against: 5% over how many are left when its turn comes."""
    levels = np.empty(len(p))
    levels[np.argsort(p, kind="stable")] = ALPHA / np.arange(len(p), 0, -1)
    return levels


def compare(
    right: np.ndarray, pairs: Sequence[tuple[int, int]], pictures: np.ndarray, *, stated: float = STATED, seed: int = 0
) -> dict[str, np.ndarray]:
    """Second minus first of each pair of arms, on one set of questions; p and levels not yet adjusted and no verdict.

    right (A, S, Q) bool, pictures (Q,) labels. Gives arrays over pairs (N,) and intervals (N, 2).
    """
    answers = right.astype(float)
    change = np.stack([answers[second] - answers[first] for first, second in pairs])  # N, S, Q
    by_seed, effect = change.mean(2), change.mean((1, 2))
    intervals, errors = resampled_means(change.mean(1), pictures, seed=seed)
    sd = by_seed.std(1, ddof=1)
    tests = [paired_t(row) for row in by_seed]
    gained, lost = (change > 0).sum((1, 2)), (change < 0).sum((1, 2))
    count, both = len(np.unique(pictures)), float(scipy.stats.norm.ppf(1 - ALPHA / 2) + scipy.stats.norm.ppf(POWER))
    return {
        "effect": effect,
        "picture_interval": intervals,
        "seed_sd": sd,
        "seed_interval": np.array([interval for _, interval in tests]),
        "p": np.array([p for p, _ in tests]),
        "gained": gained,
        "lost": lost,
        "mcnemar_p": np.array([mcnemar(int(a), int(b)) for a, b in zip(gained, lost, strict=True)]),
        "seeds_needed": np.array([seeds_needed(stated, float(s)) for s in sd]),
        "pictures_needed": np.maximum(1, np.ceil(count * (both * errors / stated) ** 2)),
        "detectable": np.array([detectable(float(s), right.shape[1]) for s in sd]),
    }


def table(
    right: np.ndarray,
    pairs: Sequence[tuple[int, int]],
    families: np.ndarray,
    questions: Questions,
    *,
    stated: float = STATED,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Every pair on every split and question type, (N, X, T): type 0 is all questions. Cells without questions are NaN.

    right (A, S, Q), families (N,) labels of pairs that are judged together. p is adjusted (Holm) within a family and
    split: over its pairs for type 0, over pairs and types for the rest. A verdict is 1 (better), -1 (worse) or 0: it
    needs an adjusted p below 5% and pictures' interval on the same side of 0. The seeds it would take to find
    a true difference of `stated`, and the difference that these seeds find, are for the level that the pair is held against.
    """
    shape = (len(pairs), questions.splits, questions.types)
    cells = {name: np.full((*shape, 2) if name.endswith("interval") else shape, np.nan) for name in FIELDS}
    cells["level"] = np.full(shape, np.nan)
    for x, y, asked in questions.cells():
        for name, values in compare(right[:, :, asked], pairs, questions.pictures[asked], stated=stated, seed=seed).items():
            cells[name][:, x, y] = values
    for x in range(questions.splits):
        for family in np.unique(families):
            for columns in (slice(0, 1), slice(1, None)):
                block = cells["p"][families == family, x, columns]
                known = ~np.isnan(block)
                levels = np.full(block.shape, np.nan)
                levels[known], block[known] = holm_levels(block[known]), holm(block[known])
                cells["p_adjusted"][families == family, x, columns] = block
                cells["level"][families == family, x, columns] = levels
    level = cells.pop("level")
    for place in zip(*np.nonzero(~np.isnan(level)), strict=True):
        cells["seeds_needed"][place] = seeds_needed(stated, cells["seed_sd"][place], level[place])
        cells["detectable"][place] = detectable(cells["seed_sd"][place], right.shape[1], level[place])
    low, high = cells["picture_interval"][..., 0], cells["picture_interval"][..., 1]
    sure = cells["p_adjusted"] < ALPHA
    cells["verdict"] = (sure & (low > 0)).astype(np.int64) - (sure & (high < 0)).astype(np.int64)
    for name in ("gained", "lost"):
        cells[name] = np.nan_to_num(cells[name]).astype(np.int64)
    return cells


def accuracies(right: np.ndarray, questions: Questions, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Each arm's accuracy (A, X, T), its spread over seeds (A, X, T), pictures' interval (A, X, T, 2); questions (X, T)."""
    shape = (len(right), questions.splits, questions.types)
    cells = {"accuracy": np.full(shape, np.nan), "accuracy_sd": np.full(shape, np.nan)}
    cells |= {"accuracy_interval": np.full((*shape, 2), np.nan), "questions": np.zeros(shape[1:], np.int64)}
    for x, y, asked in questions.cells():
        part = right[:, :, asked].astype(float)
        cells["questions"][x, y] = asked.sum()
        cells["accuracy"][:, x, y] = part.mean((1, 2))
        cells["accuracy_sd"][:, x, y] = part.mean(2).std(1, ddof=1)
        cells["accuracy_interval"][:, x, y] = resampled_means(part.mean(1), questions.pictures[asked], seed=seed)[0]
    return cells
