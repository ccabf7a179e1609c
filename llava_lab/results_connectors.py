"""What is found out about a connector, as frozen dataclasses over numpy arrays; each is one ``.npz`` file.

They load without torch and without the model. Every score stands beside its controls: the mean vector, shuffled tokens,
a random map of the same size, and the features themselves where the widths allow it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from llava_lab.errors import DataError, OptionError
from llava_lab.packing import Saved


@dataclass(frozen=True)
class Linearized(Saved):
    """The best linear stand-in for a connector, fitted on some pictures and scored on others.

    Scores are over the held-out pictures' tokens. R^2 is 1 - squared error / squared distance from the training mean:
    1 is perfect, 0 as good as the mean vector, below 0 worse.
    """

    KIND: ClassVar[str] = "linearized connector"

    weight: np.ndarray  # float32 (D, F), of rank `rank`; out = weight @ feature + bias
    bias: np.ndarray  # float32 (D,)
    full: np.ndarray  # float32 (D, F), the fit before it was cut to a rank
    directions: np.ndarray  # float32 (D, K), orthonormal; the outputs the fit varies along, most first
    feature_mean: np.ndarray  # float64 (F,), over the training tokens
    output_mean: np.ndarray  # float64 (D,)
    rank: int  # 1 .. K
    ranks: tuple[int, ...]  # where the curve was measured, rising; the last is K
    rank_r2: np.ndarray  # float64 (ranks,), R^2 of each rank
    r2: float  # of the full fit
    r2_interval: tuple[float, float]  # 95%, resampling held-out pictures
    token_r2: np.ndarray  # float32 (rows, cols), R^2 of the full fit at each place of the grid
    variants: tuple[str, ...]  # "linear" and the controls
    variant_r2: np.ndarray  # float64 (variants,)
    cosine: np.ndarray  # float64 (variants,), mean over tokens, -1 to 1
    norm_error: np.ndarray  # float64 (variants,), mean of | |fit| - |output| | / |output|
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
            kept = self.directions[:, :rank].astype(np.float64)
            weight = kept @ (kept.T @ self.full.astype(np.float64))
        bias = self.output_mean - weight @ self.feature_mean
        return replace(self, weight=weight.astype(np.float32), bias=bias.astype(np.float32), rank=rank)


@dataclass(frozen=True)
class LocalLinearity(Saved):
    """How far a connector is from a straight line where its inputs lie."""

    KIND: ClassVar[str] = "local linearity"

    cosine: np.ndarray  # float64 (tokens,), between the Jacobian and the fit as flat vectors, -1 to 1
    distance: np.ndarray  # float64 (tokens,), |Jacobian - fit| / |fit|, Frobenius
    random_cosine: np.ndarray  # float64 (tokens,), the same against a random map of the fit's size: the control
    units: int  # GELU units, 0 where there are none
    open_share: float  # of all units and tokens: slope within `tolerance` of 1
    shut_share: float  # slope within `tolerance` of 0
    bent_share: float  # neither: where the unit is not a line
    straight_units: float  # share of units whose output is a line of their input over all tokens, R^2 of 0.99 and more
    unit_r2: np.ndarray  # float32 (units,), that R^2; a unit that never moves counts as 1
    tolerance: float
    tokens: int  # tokens the GELU shares were counted on
    model: str
    fingerprint: str
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LinearEffect(Saved):
    """What plugging in a stand-in does to the answers, by question type; the first type is "all".

    Differences are stand-in minus original. Intervals are 95% and resample pictures; an answer is flipped when its text
    is another.
    """

    KIND: ClassVar[str] = "effect of a linear connector"

    variants: tuple[str, ...]  # V: "linear", "rank k", then controls
    types: tuple[str, ...]  # T, the first is "all"
    kl: np.ndarray  # float64 (V, T), nats, mean KL(original || variant) over the answer's tokens, 0 and up
    kl_interval: np.ndarray  # float64 (V, T, 2)
    flipped: np.ndarray  # float64 (V, T), share 0 to 1
    flipped_interval: np.ndarray  # float64 (V, T, 2)
    accuracy_change: np.ndarray  # float64 (V, T), -1 to 1, paired by question
    accuracy_interval: np.ndarray  # float64 (V, T, 2)
    original_accuracy: np.ndarray  # float64 (T,)
    questions: np.ndarray  # int64 (T,)
    pictures: int
    data: str
    split: str
    seed: int
    model: str
    fingerprint: str
    seconds: float
    notes: tuple[str, ...] = ()

    def row(self, variant: str, type: str = "all") -> dict[str, float | tuple[float, float]]:  # noqa: A002
        """One cell with its intervals. Raises OptionError for a variant or a type that was not measured."""
        if variant not in self.variants or type not in self.types:
            raise OptionError(
                f"expected one of {', '.join(self.variants)} and one of {', '.join(self.types)}, got {variant}, {type}"
            )
        at = self.variants.index(variant), self.types.index(type)
        found: dict[str, float | tuple[float, float]] = {}
        for name, interval in (
            ("kl", self.kl_interval),
            ("flipped", self.flipped_interval),
            ("accuracy_change", self.accuracy_interval),
        ):
            found[name] = float(getattr(self, name)[at])
            found[f"{name}_interval"] = (float(interval[at][0]), float(interval[at][1]))
        return found
