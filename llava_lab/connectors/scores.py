"""Scores of a linear fit on held-out tokens, in one streaming pass, each beside its controls.

The controls: `mean`, the training mean for every token (R^2 about 0 by definition); `shuffle`, the connector's true
outputs of the same picture at other places; `random`, a random map with the fit's size; `identity`, the features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from llava_lab.connectors.linearize import Sums

FIT = "linear"
CONTROLS = ("mean", "shuffle", "random", "identity")
RESAMPLES = 2000
TINY = 1e-12


def random_map(full: Float[Tensor, "D F"], *, seed: int = 0) -> Float[Tensor, "D F"]:
    """A map of normal numbers with the Frobenius norm of `full`."""
    drawn = torch.randn(full.shape, generator=torch.Generator().manual_seed(seed), dtype=full.dtype)
    return drawn * (full.norm() / drawn.norm())


class Scores:
    """Sums over held-out tokens from which every score follows; `add` takes pictures, `found` gives the fields."""

    def __init__(
        self, full: Tensor, directions: Tensor, sums: Sums, ranks: tuple[int, ...], grid: tuple[int, int], *, seed: int
    ) -> None:
        self._full, self._directions, self._ranks, self._grid = full, directions, ranks, grid
        self._x, self._y = sums.feature_mean, sums.output_mean
        self._random = random_map(full, seed=seed)
        self._order = torch.randperm(grid[0] * grid[1], generator=torch.Generator().manual_seed(seed))
        self._seed = seed
        same = full.shape[0] == full.shape[1]
        self.names = (FIT, *(CONTROLS if same else CONTROLS[:-1]))
        self.tokens = 0
        self._error = dict.fromkeys(self.names, 0.0)
        self._cosine = dict(self._error)
        self._norm = dict(self._error)
        self._rank_error = torch.zeros(len(ranks)).double()
        self._place = torch.zeros(2, grid[0] * grid[1]).double()  # squared error and squared distance from the mean
        self._picture: list[tuple[float, float]] = []

    def add(self, features: Float[Tensor, "B P F"], outputs: Float[Tensor, "B P D"]) -> None:
        """Take pictures in, float64 on the CPU."""
        centred = features - self._x
        moved = centred @ self._full.T
        fitted = {FIT: self._y + moved, "mean": self._y.expand_as(outputs), "shuffle": outputs[:, self._order]}
        fitted["random"] = self._y + centred @ self._random.T
        if CONTROLS[-1] in self.names:
            fitted["identity"] = features
        self.tokens += outputs.shape[0] * outputs.shape[1]
        length = outputs.norm(dim=-1).clamp_min(TINY)
        for name in self.names:
            guess = fitted[name]
            self._error[name] += float(((outputs - guess) ** 2).sum())
            own = guess.norm(dim=-1)
            self._cosine[name] += float(((outputs * guess).sum(-1) / (length * own.clamp_min(TINY))).sum())
            self._norm[name] += float(((own - length).abs() / length).sum())
        error, spread = ((outputs - fitted[FIT]) ** 2).sum(-1), ((outputs - self._y) ** 2).sum(-1)
        self._place += torch.stack([error.sum(0), spread.sum(0)])
        self._picture += list(zip(error.sum(1).tolist(), spread.sum(1).tolist(), strict=True))
        self._add_ranks(moved.flatten(0, 1), (outputs - self._y).flatten(0, 1))

    def _add_ranks(self, moved: Float[Tensor, "N D"], wanted: Float[Tensor, "N D"]) -> None:
        """Squared error of each rank: the full fit's directions are orthonormal, so each adds its own share."""
        guess, truth = moved @ self._directions, wanted @ self._directions
        gain = (2 * guess * truth - guess**2).sum(0).cumsum(0)
        self._rank_error += (wanted**2).sum() - gain[torch.tensor(self._ranks) - 1]

    def found(self) -> dict[str, Any]:
        """The fields of `Linearized` that are scores."""
        pictures = np.array(self._picture)
        total = max(float(pictures[:, 1].sum()), TINY)
        drawn = np.random.default_rng(self._seed).integers(0, len(pictures), (RESAMPLES, len(pictures)))
        means = pictures[drawn].sum(1)
        low, high = np.quantile(1 - means[:, 0] / np.maximum(means[:, 1], TINY), [0.025, 0.975])
        r2 = np.array([1 - self._error[name] / total for name in self.names])
        place = 1 - self._place[0] / self._place[1].clamp_min(TINY)
        return {
            "rank_r2": (1 - self._rank_error / total).numpy(),
            "r2": float(r2[0]),
            "r2_interval": (float(low), float(high)),
            "token_r2": place.reshape(self._grid).float().numpy(),
            "variants": self.names,
            "variant_r2": r2,
            "cosine": np.array([self._cosine[name] / self.tokens for name in self.names]),
            "norm_error": np.array([self._norm[name] / self.tokens for name in self.names]),
        }
