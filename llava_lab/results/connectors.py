"""What is measured of a connector: its linear stand-in, and connectors trained side by side.

Every score stands beside its controls: the mean vector, shuffled tokens, a random map of the same size, and the
features themselves where the widths allow it. In an `Ablation` an *arm* is a connector under one condition: a budget
(equal samples, or equal floating-point operations) with or without stage 1. All arms of a seed read the same data in
the same order and answer the same questions.

    result = Ablation.load("ablation.npz")
    print(result.table())
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from llava_lab.errors import DataError, OptionError
from llava_lab.results.save import Saved
from llava_lab.results.schema import filled, within
from llava_lab.results.table import Table, figure, percent, plain

ALL = "all"
WORDS = {1: "better", -1: "worse", 0: "not distinguishable"}
MANY = 10_000  # seeds or pictures beyond which a number says nothing


@dataclass(frozen=True)
class Linearized(Saved):
    """The best linear stand-in for a connector, fitted on some pictures and scored on others.

    Scores are over the held-out pictures' tokens. R^2 is 1 - squared error / squared distance from the training mean:
    1 is perfect, 0 as good as the mean vector, below 0 worse.
    """

    KIND: ClassVar[str] = "linearized connector"
    GAPS: ClassVar[tuple[str, ...]] = ("rank_r2", "token_r2", "variant_r2", "cosine", "norm_error")

    weight: Float32[np.ndarray, "width features"]  # of rank `rank`; out = weight @ feature + bias
    bias: Float32[np.ndarray, " width"]
    full: Float32[np.ndarray, "width features"]  # the fit before it was cut to a rank
    directions: Float32[np.ndarray, "width limit"]  # orthonormal; the outputs the fit varies along, most first
    feature_mean: Float64[np.ndarray, " features"]  # over the training tokens
    output_mean: Float64[np.ndarray, " width"]
    rank: int  # 1 .. K
    ranks: tuple[int, ...]  # where the curve was measured, rising; the last is K
    rank_r2: Float64[np.ndarray, " ranks"]  # R^2 of each rank
    r2: float  # of the full fit
    r2_interval: tuple[float, float]  # 95%, resampling held-out pictures
    token_r2: Float32[np.ndarray, "rows cols"]  # R^2 of the full fit at each place of the grid
    variants: tuple[str, ...]  # "linear" and the controls
    variant_r2: Float64[np.ndarray, " variants"]
    cosine: Float64[np.ndarray, " variants"]  # mean over tokens, -1 to 1
    norm_error: Float64[np.ndarray, " variants"]  # mean of | |fit| - |output| | / |output|
    train_r2: float  # on the pictures it was fitted to
    ridge: float  # penalty, times the mean feature variance
    pictures: tuple[int, int]  # training, held out
    tokens: tuple[int, int]
    connector: str
    language: str  # fingerprint of the language model it stands before
    vision: str  # fingerprint of the vision tower
    model: str
    fingerprint: str
    seconds: float
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.weight.shape != self.full.shape or self.bias.shape != self.weight.shape[:1]:
            raise DataError(f"expected weight (D, F) and bias (D,), got {self.weight.shape} and {self.bias.shape}")

    def check(self) -> None:
        within("rank", self.rank, 1, self.limit + 1)
        filled(variants=self.variants, ranks=self.ranks)

    @property
    def beside(self) -> dict[str, str]:
        """The models it was fitted between; `llava_lab.connector` warns where they are others."""
        return {"language": self.language, "vision": self.vision}

    @property
    def limit(self) -> int:
        """The largest rank there is."""
        return self.directions.shape[1]

    def at_rank(self, rank: int) -> Linearized:
        """The same fit cut to the `rank` output directions it varies along most (reduced-rank regression).

        Raises OptionError outside 1 .. `limit`.
        """
        if not 1 <= rank <= self.limit:
            raise OptionError(f"rank must be from 1 to {self.limit}, got {rank}")
        if rank == self.limit:
            weight = self.full.astype(np.float64)
        else:
            directions = self.directions[:, :rank].astype(np.float64)
            weight = directions @ (directions.T @ self.full.astype(np.float64))
        bias = self.output_mean - weight @ self.feature_mean
        return replace(self, weight=weight.astype(np.float32), bias=bias.astype(np.float32), rank=rank)

    def table(self) -> Table:
        """R^2, cosine and error of the length for the fit and its controls, then R^2 by rank."""
        rows = tuple(
            (name, figure(r2), figure(cosine), figure(error))
            for name, r2, cosine, error in zip(self.variants, self.variant_r2, self.cosine, self.norm_error, strict=True)
        )
        by_rank = tuple((str(rank), figure(r2)) for rank, r2 in zip(self.ranks, self.rank_r2.tolist(), strict=True))
        low, high = self.r2_interval
        title = f"{self.connector}: R^2 {self.r2:.3f} [{low:.3f}, {high:.3f}] on {self.pictures[1]} pictures it was not fitted to"
        names = ("stand-in", "R^2", "cosine", "error of the length")
        return Table(names, rows, title=title, below=(Table(("rank", "R^2"), by_rank, title=""),), notes=self.notes)


@dataclass(frozen=True)
class LocalLinearity(Saved):
    """How far a connector is from a straight line where its inputs lie."""

    KIND: ClassVar[str] = "local linearity"

    cosine: Float64[np.ndarray, " samples"]  # between the Jacobian and the fit as flat vectors, -1 to 1
    distance: Float64[np.ndarray, " samples"]  # |Jacobian - fit| / |fit|, Frobenius
    random_cosine: Float64[np.ndarray, " samples"]  # the same against a random map of the fit's size: the control
    units: int  # GELU units, 0 where there are none
    open_share: float  # of all units and tokens: slope within `tolerance` of 1
    shut_share: float  # slope within `tolerance` of 0
    bent_share: float  # neither: where the unit is not a line
    straight_units: float  # share of units whose output is a line of their input over all tokens, R^2 of 0.99 and more
    unit_r2: Float32[np.ndarray, " units"]  # that R^2; a unit that never moves counts as 1
    tolerance: float
    tokens: int  # tokens the GELU shares were counted on
    model: str
    fingerprint: str
    seconds: float
    notes: tuple[str, ...] = ()

    def table(self) -> Table:
        """Means over the tokens, then what the units do."""
        rows = (
            ("cosine of the Jacobian and the fit", f"{self.cosine.mean():z.3f}"),
            ("cosine of a random map", f"{self.random_cosine.mean():z.3f}"),
            ("distance from the fit, times its size", f"{self.distance.mean():.3f}"),
            ("units open, of all units and tokens", f"{self.open_share:.1%}"),
            ("units shut", f"{self.shut_share:.1%}"),
            ("units bent", f"{self.bent_share:.1%}"),
            ("units that are a line over all tokens", f"{self.straight_units:.1%}"),
        )
        return Table(("local linearity", "value"), rows, notes=self.notes)


@dataclass(frozen=True)
class LinearEffect(Saved):
    """What plugging in a stand-in does to the answers, by question type; the first type is "all".

    Differences are stand-in minus original. Intervals are 95% and resample pictures; an answer is flipped when its text
    is another.
    """

    KIND: ClassVar[str] = "effect of a linear connector"
    GAPS: ClassVar[tuple[str, ...]] = (
        *("kl", "kl_interval", "flipped", "flipped_interval"),
        *("accuracy_change", "accuracy_interval", "original_accuracy"),
    )

    variants: tuple[str, ...]  # V: "linear", "rank k", then controls
    types: tuple[str, ...]  # T, the first is "all"
    kl: Float64[np.ndarray, "variants types"]  # nats, mean KL(original || variant) over the answer's tokens, 0 and up
    kl_interval: Float64[np.ndarray, "variants types 2"]
    flipped: Float64[np.ndarray, "variants types"]  # share 0 to 1
    flipped_interval: Float64[np.ndarray, "variants types 2"]
    accuracy_change: Float64[np.ndarray, "variants types"]  # -1 to 1, paired by question
    accuracy_interval: Float64[np.ndarray, "variants types 2"]
    original_accuracy: Float64[np.ndarray, " types"]
    questions: Int64[np.ndarray, " types"]
    pictures: int
    data: str
    split: str
    seed: int
    model: str
    fingerprint: str
    seconds: float
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        if ALL not in self.types:
            raise DataError(f"types must have {ALL!r} among them, got {', '.join(self.types)}")

    def row(self, variant: str, type: str = "all") -> dict[str, float | tuple[float, float]]:  # noqa: A002
        """One cell with its intervals. Raises OptionError for a variant or a type that was not measured."""
        if variant not in self.variants or type not in self.types:
            raise OptionError(
                f"expected one of {', '.join(self.variants)} and one of {', '.join(self.types)}, got {variant}, {type}"
            )
        at = self.variants.index(variant), self.types.index(type)
        cell: dict[str, float | tuple[float, float]] = {}
        intervals = {"kl": self.kl_interval, "flipped": self.flipped_interval, "accuracy_change": self.accuracy_interval}
        for name, interval in intervals.items():
            cell[name] = float(getattr(self, name)[at])
            cell[f"{name}_interval"] = (float(interval[at][0]), float(interval[at][1]))
        return cell

    def table(self, type: str = ALL) -> Table:  # noqa: A002
        """A row per stand-in on one question type, with 95% intervals."""
        rows = []
        for variant in self.variants:
            row: dict[str, Any] = self.row(variant, type)
            low, high = row["kl_interval"]
            shares = (f"{row[name]:.1%} [{row[f'{name}_interval'][0]:.1%}, {row[f'{name}_interval'][1]:.1%}]"
                      for name in ("flipped", "accuracy_change"))  # fmt: skip
            rows.append((variant, f"{row['kl']:.3f} [{low:.3f}, {high:.3f}]", *shares))
        at = self.types.index(type)
        title = f"{self.data} {self.split}, {type}: {self.questions[at]} questions, {self.original_accuracy[at]:.1%} right before"
        names = ("stand-in", "KL in nats", "answers flipped", "change of accuracy")
        return Table(names, tuple(rows), title=title, notes=self.notes)


@dataclass(frozen=True)
class Ablation(Saved):
    """Connectors compared. A arms, S seeds, Q questions, N pairs of arms, X splits, T question types (the first is "all").

    Accuracies and differences are shares, 0 to 1 and -1 to 1; a difference is the second arm of a pair minus the first.
    Cells without questions are NaN.
    """

    KIND: ClassVar[str] = "connector ablation"
    GAPS: ClassVar[tuple[str, ...]] = (
        *("sweep_loss", "sweep_accuracy", "losses", "accuracy", "accuracy_sd", "accuracy_interval", "effect", "picture_interval"),
        *("seed_sd", "seed_interval", "p", "p_adjusted", "mcnemar_p", "seeds_needed", "pictures_needed", "detectable"),
    )

    # arms
    connectors: tuple[str, ...]  # (A,)
    budgets: tuple[str, ...]  # (A,), "samples" or "flops"
    stage1: Bool[np.ndarray, " connectors"]  # whether the connector was aligned first
    steps: Int64[np.ndarray, "connectors 2"]  # of alignment and of instruction tuning
    rate: Float64[np.ndarray, " connectors"]  # the connector's peak, chosen on validation
    parameters: Int64[np.ndarray, " connectors"]  # the connector's
    flops: Float64[np.ndarray, " connectors"]  # of one run, forward and backward, without the optimiser
    # the sweep that chose the rates; it never read a test question
    sweep_rates: Float64[np.ndarray, " rates"]
    sweep_loss: Float64[np.ndarray, "connectors rates"]  # validation, nats per labelled token
    sweep_accuracy: Float64[np.ndarray, "connectors rates"]  # validation
    # answers
    seeds: tuple[int, ...]  # (S,)
    splits: tuple[str, ...]  # (X,)
    types: tuple[str, ...]  # (T,)
    right: Bool[np.ndarray, "connectors seeds asked"]
    question_split: Int64[np.ndarray, " asked"]  # number of its split
    question_type: Int64[np.ndarray, " asked"]  # number of its type, from 1
    question_picture: Int64[np.ndarray, " asked"]  # number of its picture within the split
    losses: Float32[np.ndarray, "connectors seeds trained"]  # of training; NaN after an arm's last step
    accuracy: Float64[np.ndarray, "connectors splits types"]  # mean over seeds
    accuracy_sd: Float64[np.ndarray, "connectors splits types"]  # over seeds
    accuracy_interval: Float64[np.ndarray, "connectors splits types 2"]  # 95%, resampling pictures
    questions: Int64[np.ndarray, "splits types"]
    # pairs
    pairs: Int64[np.ndarray, "compared 2"]  # numbers of arms
    effect: Float64[np.ndarray, "compared splits types"]
    picture_interval: Float64[np.ndarray, "compared splits types 2"]  # 95%, resampling pictures; of these models
    seed_sd: Float64[np.ndarray, "compared splits types"]  # of the differences seed by seed
    seed_interval: Float64[np.ndarray, "compared splits types 2"]  # 95%, Student's t over seeds; of a repetition
    p: Float64[np.ndarray, "compared splits types"]  # two-sided, of that t test
    p_adjusted: Float64[np.ndarray, "compared splits types"]  # Holm over what is judged together
    gained: Int64[np.ndarray, "compared splits types"]  # answers that only the second has right, all seeds
    lost: Int64[np.ndarray, "compared splits types"]  # only the first
    mcnemar_p: Float64[np.ndarray, "compared splits types"]  # exact, on those; of these models
    # to find a true difference of `stated`, at 80% power and Holm's level
    seeds_needed: Float64[np.ndarray, "compared splits types"]
    pictures_needed: Float64[np.ndarray, "compared splits types"]  # the same for pictures' noise
    detectable: Float64[np.ndarray, "compared splits types"]  # smallest true difference that these seeds find at 80% power
    verdict: Int64[np.ndarray, "compared splits types"]  # 1 better, -1 worse, 0 not distinguishable
    # about
    data: str
    pictures: tuple[int, ...]  # training, validation, then each split's
    seed: int
    model: str
    start: dict[str, str]  # fingerprints of "vision", "language" and "head" that every run starts from
    recipe: dict[str, Any]
    seconds: float  # of all runs together
    notes: tuple[str, ...] = ()
    stated: float = 0.0  # the true difference that `seeds_needed` is for; 0 in older files, which took the observed one

    def __post_init__(self) -> None:
        expected = (len(self.connectors), len(self.seeds), len(self.question_split))
        if self.right.shape != expected:
            raise DataError(f"expected answers (arms, seeds, questions) of {expected}, got {self.right.shape}")

    def check(self) -> None:
        filled(seeds=self.seeds, splits=self.splits)
        if self.types[:1] != (ALL,) or len(self.budgets) != len(self.connectors):
            raise DataError(f"expected the types to begin with {ALL!r}, and a budget for each of {len(self.connectors)} arms")
        within("pairs", self.pairs, 0, len(self.connectors))
        within("verdict", self.verdict, min(WORDS), max(WORDS) + 1)
        within("question_split", self.question_split, 0, len(self.splits))
        within("question_type", self.question_type, 0, len(self.types))

    def arm(self, connector: str, *, budget: str | None = None, stage1: bool | None = None) -> int:
        """The number of an arm; what is not said is the first there is. Raises OptionError when there is none."""
        for number, name in enumerate(self.connectors):
            if (
                name == connector
                and budget in (None, self.budgets[number])
                and stage1 in (None, bool(self.stage1[number]))
            ):  # fmt: skip
                return number
        there = ", ".join(self.label(number) for number in range(len(self.connectors)))
        raise OptionError(f"no arm {connector!r} with budget {budget or 'any'} and stage1 {stage1}; there are {there}")

    def label(self, arm: int) -> str:
        """An arm in words."""
        return f"{self.connectors[arm]} ({self.budgets[arm]}, {'with' if self.stage1[arm] else 'without'} stage 1)"

    def row(
        self,
        second: str,
        first: str,
        *,
        budget: str | None = None,
        stage1: bool | None = None,
        split: str | None = None,
        type: str = ALL,  # noqa: A002
    ) -> dict[str, Any]:
        """One comparison, `second` minus `first`, with all that is known of it. Raises OptionError for what was not compared."""
        of_first = self.arm(first, budget=budget, stage1=stage1)
        of_second = self.arm(second, budget=self.budgets[of_first], stage1=bool(self.stage1[of_first]))
        x, y = self._place(split, type)
        for number, pair in enumerate(self.pairs.tolist()):
            if pair == [of_first, of_second]:
                return self._cell(number, x, y)
            if pair == [of_second, of_first]:
                return _turned(self._cell(number, x, y), self.label(of_first), self.label(of_second))
        raise OptionError(f"{self.label(of_first)} and {self.label(of_second)} were not compared")

    def rows(self, *, split: str | None = None, type: str = ALL) -> list[dict[str, Any]]:  # noqa: A002
        """Every pair on one split and question type."""
        x, y = self._place(split, type)
        return [self._cell(number, x, y) for number in range(len(self.pairs))]

    def scores(self, *, split: str | None = None) -> list[dict[str, Any]]:
        """Every arm on one split: accuracy with its interval and spread over seeds, and by question type."""
        x, _ = self._place(split, ALL)
        return [
            {
                "connector": name,
                "budget": self.budgets[arm],
                "stage1": bool(self.stage1[arm]),
                "parameters": int(self.parameters[arm]),
                "rate": float(self.rate[arm]),
                "steps": self.steps[arm].tolist(),
                "flops": float(self.flops[arm]),
                "accuracy": float(self.accuracy[arm, x, 0]),
                "interval": tuple(self.accuracy_interval[arm, x, 0].tolist()),
                "sd": float(self.accuracy_sd[arm, x, 0]),
                "by_type": dict(zip(self.types[1:], self.accuracy[arm, x, 1:].tolist(), strict=True)),
            }
            for arm, name in enumerate(self.connectors)
        ]

    def table(self) -> Table:
        """Scores, then every comparison in a sentence, split by split."""
        names = ("connector", "budget", "stage 1", "parameters", "rate", "steps", "accuracy (95%)", "over seeds")
        below = []
        for x, split in enumerate(self.splits):
            rows = tuple(
                (
                    row["connector"],
                    row["budget"],
                    "yes" if row["stage1"] else "no",
                    f"{row['parameters']:,}",
                    f"{row['rate']:g}",
                    "+".join(map(str, row["steps"])),
                    f"{percent(row['accuracy'])} [{percent(row['interval'][0])}, {percent(row['interval'][1])}]",
                    f"+-{percent(row['sd'])}",
                    *map(percent, row["by_type"].values()),
                )
                for row in self.scores(split=split)
            )
            sentences = (
                f"{row['text']}; McNemar on the pooled seeds: +{row['gained']} -{row['lost']}, p = {row['mcnemar_p']:.2g}"
                for row in self.rows(split=split)
            )
            title = f"\n{split}: {int(self.questions[x, 0]):,} questions"
            below.append(Table((*names, *self.types[1:]), rows, title=title, notes=("", *sentences)))
        title = f"{self.model}: {len(self.seeds)} seeds, rates chosen on validation, accuracies in percent"
        return Table(title=title, below=tuple(below), notes=("", *self.notes))

    def to_dict(self) -> dict[str, Any]:
        """What ``llava-lab ablate --json`` prints."""
        splits = {
            split: {
                "arms": self.scores(split=split),
                "comparisons": self.rows(split=split),
                "by_type": {type: self.rows(split=split, type=type) for type in self.types[1:]},  # noqa: A001
            }
            for split in self.splits
        }
        about: dict[str, Any] = {"model": self.model, "seeds": self.seeds, "splits": splits}
        about["sweep"] = {"rates": self.sweep_rates, "loss": self.sweep_loss, "accuracy": self.sweep_accuracy}
        return plain(about | {"start": self.start, "seconds": self.seconds, "notes": self.notes})

    def _place(self, split: str | None, type: str) -> tuple[int, int]:  # noqa: A002
        split = self.splits[0] if split is None else split
        if split not in self.splits or type not in self.types:
            raise OptionError(f"expected one of {', '.join(self.splits)} and one of {', '.join(self.types)}, got {split}, {type}")
        return self.splits.index(split), self.types.index(type)

    def _cell(self, pair: int, x: int, y: int) -> dict[str, Any]:
        first, second = self.pairs[pair].tolist()
        names = ("effect", "seed_sd", "p", "p_adjusted", "mcnemar_p", "seeds_needed", "pictures_needed", "detectable")
        cell: dict[str, Any] = {name: float(getattr(self, name)[pair, x, y]) for name in names}
        cell |= {name: int(getattr(self, name)[pair, x, y]) for name in ("gained", "lost")}
        cell |= {name: tuple(getattr(self, name)[pair, x, y].tolist()) for name in ("picture_interval", "seed_interval")}
        cell |= {"first": self.label(first), "second": self.label(second), "split": self.splits[x], "type": self.types[y]}
        cell |= {"verdict": WORDS[int(self.verdict[pair, x, y])], "seeds": len(self.seeds), "stated": self.stated}
        cell["pictures"] = int(self.pictures[2 + x])
        return cell | {"text": in_words(cell)}


def in_words(row: dict[str, Any]) -> str:
    """A comparison as one sentence: the verdict, the effect beside the spread, and what would tell."""
    low, high = row["seed_interval"]
    difference = (
        f"{100 * row['effect']:+z.2f} points [{100 * low:+z.2f}, {100 * high:+z.2f}], "
        f"spread of the difference over {row['seeds']} seeds {100 * row['seed_sd']:.2f}"
    )
    if row["verdict"] != WORDS[0]:
        return f"{row['second']} is {row['verdict']} than {row['first']}: {difference}"
    return f"{row['second']} is {WORDS[0]} from {row['first']}: {difference}; {_what_would_tell(row)}"


def _what_would_tell(row: dict[str, Any]) -> str:
    from llava_lab.stats import ALPHA  # it brings scipy

    parts = []
    low, high = row["picture_interval"]
    if row["p_adjusted"] < ALPHA:
        parts.append("its seeds agree, its pictures do not")
    elif row["p"] < ALPHA:
        parts.append(f"p = {row['p']:.2g} by itself is {row['p_adjusted']:.2g} among the pairs judged with it (Holm)")
    find = f"these {row['seeds']} seeds find a true difference of {100 * row['detectable']:.2f} points or more"
    if not row["stated"]:
        return "; ".join([*parts, find])
    stated = f"{100 * row['stated']:g} points"
    if row["seeds_needed"] <= row["seeds"]:
        parts.append(f"{find}, so {stated} too")
    else:
        parts.append(f"{find}, for {stated} it would take {_number(row['seeds_needed'])}")
    if low <= 0 <= high and row["pictures_needed"] > row["pictures"]:
        parts.append(f"against the noise of {row['pictures']} pictures it would take {_number(row['pictures_needed'])} of them")
    return "; ".join(parts)


def _number(value: float) -> str:
    return f"about {value:,.0f}" if math.isfinite(value) and value <= MANY else f"more than {MANY:,}"


def _turned(row: dict[str, Any], first: str, second: str) -> dict[str, Any]:
    """The same comparison seen from the other side."""
    turned = dict(row) | {"first": first, "second": second, "effect": -row["effect"]}
    turned |= {"gained": row["lost"], "lost": row["gained"]}
    for name in ("picture_interval", "seed_interval"):
        low, high = row[name]
        turned[name] = (-high, -low)
    turned["verdict"] = {WORDS[1]: WORDS[-1], WORDS[-1]: WORDS[1]}.get(row["verdict"], row["verdict"])
    return turned | {"text": in_words(turned)}
