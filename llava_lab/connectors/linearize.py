"""The best linear stand-in for a connector, in closed form, on any checkpoint: no training, one pass over pictures.

Ridge regression by its normal equations: the sums X'X and X'Y (float64) are all that is kept of the pictures, so memory
does not grow with their number. The fit is scored on pictures it never saw, beside controls that say what the numbers
would be without it. How much of the answer hangs on the rest is `llava_lab.linear_effect`'s question, not this one's.

Sources: Hoerl and Kennard 1970 (ridge); Izenman 1975 (reduced-rank regression: the rank-k fit that is best for the
outputs keeps the directions along which the fitted outputs vary most).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from llava_lab.connectors.scores import CONTROLS, Scores
from llava_lab.connectors.tokens import Drawn, halves, tokens_of
from llava_lab.errors import DataError, OptionError
from llava_lab.models.swapping import trained_beside
from llava_lab.results_connectors import Linearized

if TYPE_CHECKING:
    from llava_lab.models import Lab

PATIENCE = 2.0  # seconds before a progress bar appears
SMALL = 1e-12  # of the largest eigenvalue; what is below is rounding


def linearize(
    lab: Lab,
    pictures: Sequence[Drawn],
    *,
    ridge: float = 1e-4,
    rank: int | None = None,
    held_out: float = 0.25,
    ranks: Sequence[int] | None = None,
    batch: int = 8,
    seed: int = 0,
) -> Linearized:
    """Fit output = weight @ feature + bias over `pictures` and score it on the `held_out` share of them.

    `pictures` is a sequence of anything `lab.ask` takes, or of functions that draw one; each is read twice at most and
    none is kept. `ridge` is the penalty in units of the mean feature variance. `rank` None keeps every direction;
    `ranks` are the points of the rank curve (None: powers of two and the last). `seed` draws the controls.

    Plug the result in with ``llava_lab.connector(lab, fit)``. Raises DataError with too few pictures, OptionError for a
    connector that makes one token of several patches (it has no linear map from token to token).
    """
    began = time.perf_counter()
    if not 0 <= ridge < float("inf"):
        raise OptionError(f"ridge must be 0 or more, got {ridge!r}")
    train, test = halves(pictures, held_out)
    sums = _summed(lab, pictures, train, batch)
    full, directions = sums.solve(ridge)
    limit = directions.shape[1]
    curve = _curve(limit, ranks)
    if rank is not None and not 1 <= rank <= limit:
        raise OptionError(f"rank must be None or from 1 to {limit}, got {rank!r}")
    scores = Scores(full, directions, sums, curve, lab.grid, seed=seed)
    for features, outputs in _shown(tokens_of(lab, pictures, test, batch=batch), len(test), batch, "scoring"):
        scores.add(features.double().cpu(), outputs.double().cpu())
    beside = trained_beside(lab.model)
    fit = Linearized(
        **_arrays(sums, full, directions),
        rank=limit,
        ranks=curve,
        **scores.found(),
        train_r2=sums.r2(full),
        ridge=float(ridge),
        pictures=(len(train), len(test)),
        tokens=(sums.count, scores.tokens),
        connector=lab.card.connector,
        language=beside["language"],
        vision=beside["vision"],
        model=lab.name,
        fingerprint=lab.fingerprint,
        seconds=time.perf_counter() - began,
        notes=_notes(sums, scores),
    )
    return fit if rank is None else fit.at_rank(rank)


def _summed(lab: Lab, pictures: Sequence[Drawn], chosen: list[int], batch: int) -> Sums:
    """The normal equations over the chosen pictures' tokens."""
    sums = Sums()
    for features, outputs in _shown(tokens_of(lab, pictures, chosen, batch=batch), len(chosen), batch, "fitting"):
        if features.shape[:2] != outputs.shape[:2]:
            raise OptionError(
                f"expected a connector that makes one token of each patch, got {outputs.shape[1]} tokens of "
                f"{features.shape[1]} patches ({lab.card.connector}); it has no linear map from token to token"
            )
        sums.add(features.flatten(0, 1), outputs.flatten(0, 1))
    return sums


def _arrays(sums: Sums, full: Tensor, directions: Tensor) -> dict[str, Any]:
    """The fields of `Linearized` that are the map itself."""
    return {
        "weight": full.float().numpy(),
        "bias": (sums.output_mean - full @ sums.feature_mean).float().numpy(),
        "full": full.float().numpy(),
        "directions": directions.float().numpy(),
        "feature_mean": sums.feature_mean.numpy(),
        "output_mean": sums.output_mean.numpy(),
    }


@dataclass
class Sums:
    """Normal equations as they grow; (F, F) and (F, D) numbers whatever the number of tokens.

    Everything is measured from the first token's values, so that a large mean does not eat the digits.
    """

    count: int = 0

    def add(self, features: Tensor, outputs: Tensor) -> None:
        """Take tokens in: features (N, F), outputs (N, D)."""
        x, y = features.double().cpu(), outputs.double().cpu()
        if not self.count:
            self.origin_x, self.origin_y = x[0].clone(), y[0].clone()
            width, made = x.shape[1], y.shape[1]
            self.x, self.y = torch.zeros(width).double(), torch.zeros(made).double()
            self.xx, self.xy, self.yy = torch.zeros(width, width).double(), torch.zeros(width, made).double(), self.y.clone()
        x, y = x - self.origin_x, y - self.origin_y
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy += (y**2).sum(0)

    @property
    def feature_mean(self) -> Tensor:
        return self.origin_x + self.x / self.count

    @property
    def output_mean(self) -> Tensor:
        return self.origin_y + self.y / self.count

    @property
    def output_spread(self) -> float:
        """Root mean squared distance of an output from the mean output."""
        return float(self._yy().sum() / self.count) ** 0.5

    @property
    def feature_spread(self) -> float:
        return float(self._xx().trace() / self.count) ** 0.5

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """The map (D, F) and the orthonormal output directions (D, K) along which it varies, most first."""
        xx, xy = self._xx(), self._xy()
        scale = float(xx.trace()) / len(xx)
        if scale <= 0:
            raise DataError("all features are the same; give pictures that differ")
        values, vectors = torch.linalg.eigh(xx)
        values = values.clamp_min(0)
        kept = values > SMALL * values.max()  # without a penalty, directions the features never take get no weight
        values, vectors = values[kept], vectors[:, kept]
        turned = (vectors.T @ xy) / (values + ridge * scale)[:, None]  # the map in the eigenbasis of the features
        full = (vectors @ turned).T
        left, _, _ = torch.linalg.svd((values.sqrt()[:, None] * turned).T, full_matrices=False)
        return full, left

    def r2(self, full: Tensor) -> float:
        """R^2 on the very tokens summed here, from the sums alone."""
        error = self._yy().sum() - 2 * (full.T * self._xy()).sum() + ((full @ self._xx()) * full).sum()
        return float(1 - error / self._yy().sum().clamp_min(1e-300))

    def _xx(self) -> Tensor:
        return self.xx - torch.outer(self.x, self.x) / self.count

    def _xy(self) -> Tensor:
        return self.xy - torch.outer(self.x, self.y) / self.count

    def _yy(self) -> Tensor:
        return (self.yy - self.y**2 / self.count).clamp_min(0)


def _curve(limit: int, ranks: Sequence[int] | None) -> tuple[int, ...]:
    if ranks is None:
        return tuple(sorted({*(2**power for power in range(limit.bit_length()) if 2**power < limit), limit}))
    wrong = [rank for rank in ranks if not 1 <= rank <= limit]
    if wrong:
        raise OptionError(f"ranks must be from 1 to {limit}, got {wrong}")
    return tuple(sorted({*ranks, limit}))


def _notes(sums: Sums, scores: Scores) -> tuple[str, ...]:
    width = len(sums.feature_mean)
    notes = ["Fitted and scored without training; a good fit of the outputs need not give the same answers."]
    if sums.count < 4 * width:
        notes.append(f"{sums.count} tokens for {width} features: few; more pictures would raise the held-out score.")
    if CONTROLS[-1] not in scores.names:
        notes.append("No identity control: the two widths differ.")
    return tuple(notes)


def _shown(pairs: Iterator[tuple[Tensor, Tensor]], count: int, batch: int, label: str) -> Iterator[tuple[Tensor, Tensor]]:
    return iter(tqdm(pairs, total=-(-count // batch), desc=label, unit="batch", delay=PATIENCE, leave=False))
