"""The best linear stand-in for a connector, in closed form, on any checkpoint: no training, one pass over pictures.

Ridge regression by its normal equations: the sums X'X and X'Y (float64) are all that is kept of the pictures, so memory does not
grow with their number; pictures are prepared when their turn comes and the language model does not run. The fit is scored on
pictures it never saw, beside controls that say what the numbers would be without it: `mean`, the training mean for every token
(R^2 about 0 by definition); `shuffle`, the connector's true outputs of the same picture at other places; `random`, a random map
with the fit's size; `identity`, the features. How much of the answer depends on what is left out: `llava_lab.linear_effect`.

    fit = ll.linearize(lab, pictures)
    with ll.connector(lab, fit):
        lab.ask(picture, "What color is the car?")

Is the connector a line where its inputs really lie? `local_linearity` sets its Jacobian against the fit, and counts its GELU
units' slopes. A unit far to the right passes its input on (slope 1), far to the left it is shut (slope 0); only between the two
is it bent. A unit may also move so little that a line describes it anywhere. Both are counted, on the tokens of real pictures,
because a connector is linear or not on a distribution, not in itself.

    ll.local_linearity(lab, fit, pictures).bent_share

Sources: Hoerl and Kennard 1970 (ridge); Izenman 1975 (reduced-rank regression: the rank-k fit that is best for the outputs keeps
the directions along which the fitted outputs vary most); GELU, Hendrycks and Gimpel 2016 (arXiv 1606.08415): slope = Phi(h) + h
phi(h).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.capture import hooked, undisturbed
from llava_lab.checks import Sweep, entry, made_by
from llava_lab.errors import DataError, OptionError
from llava_lab.models import Lab, connectors
from llava_lab.models.layout import connector_of, read_connector
from llava_lab.models.pictures import PictureLike, read_picture
from llava_lab.models.swap import trained_beside
from llava_lab.results import Linearized, LocalLinearity
from llava_lab.stats import cluster_bootstrap, percentiles

Drawn = PictureLike | Callable[[], Any]  # a picture, or what draws one when it is needed

FIT = "linear"
CONTROLS = ("mean", "shuffle", "random", "identity")
SMALL = 1e-12  # of the largest eigenvalue; what is below is rounding
TINY = 1e-12  # instead of a length or a spread of 0


@entry
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

    >>> fit = ll.linearize(lab, [run.picture] * 4)
    >>> fit.weight.shape == fit.full.shape
    True
    """
    began = time.perf_counter()
    if not 0 <= ridge < float("inf"):
        raise OptionError(f"ridge must be 0 or more, got {ridge!r}")
    train, test = split_pictures(pictures, held_out)
    sums = _summed(lab, pictures, train, batch)
    full, directions = sums.solve(ridge)
    limit = directions.shape[1]
    curve = _curve(limit, ranks)
    if rank is not None and not 1 <= rank <= limit:
        raise OptionError(f"rank must be None or from 1 to {limit}, got {rank!r}")
    scores = Scores(full, directions, sums, curve, lab.grid, seed=seed)
    for features, outputs in tokens_of(lab, pictures, test, batch=batch, label="scoring"):
        scores.add(features.double().cpu(), outputs.double().cpu())
    beside = trained_beside(lab.model)
    fit = Linearized(
        weight=full.float().numpy(),
        bias=(sums.output_mean - full @ sums.feature_mean).float().numpy(),
        full=full.float().numpy(),
        directions=directions.float().numpy(),
        feature_mean=sums.feature_mean.numpy(),
        output_mean=sums.output_mean.numpy(),
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
        **made_by(lab, began),
        notes=_notes(sums, scores),
    )
    return fit if rank is None else fit.at_rank(rank)


def _summed(lab: Lab, pictures: Sequence[Drawn], chosen: list[int], batch: int) -> Sums:
    """The normal equations over the chosen pictures' tokens."""
    sums = Sums()
    for features, outputs in tokens_of(lab, pictures, chosen, batch=batch, label="fitting"):
        if features.shape[:2] != outputs.shape[:2]:
            raise OptionError(
                f"expected a connector that makes one token of each patch, got {outputs.shape[1]} tokens of "
                f"{features.shape[1]} patches ({lab.card.connector}); it has no linear map from token to token"
            )
        sums.add(features.flatten(0, 1), outputs.flatten(0, 1))
    return sums


def split_pictures(pictures: Any, held_out: float) -> tuple[list[int], list[int]]:
    """Numbers of the training and the held-out pictures, spread evenly. Raises DataError where there are too few."""
    if not 0 < held_out < 1:
        raise OptionError(f"held_out must lie between 0 and 1, got {held_out}")
    if not hasattr(pictures, "__len__") or not hasattr(pictures, "__getitem__"):
        raise DataError(
            f"pictures must be a sequence that can be read twice, got {type(pictures).__name__}; make a list of paths"
        )
    count = len(pictures)
    test = [i for i in range(count) if int((i + 1) * held_out) > int(i * held_out)]
    train = sorted(set(range(count)) - set(test))
    if not test or not train:
        raise DataError(
            f"{count} pictures with held_out={held_out} leave {len(train)} to fit and {len(test)} to score; give more"
        )
    return train, test


def tokens_of(
    lab: Lab, pictures: Sequence[Drawn], chosen: Sequence[int], *, batch: int = 8, label: str = "pictures"
) -> Iterator[tuple[Float[Tensor, "B P F"], Float[Tensor, "B Q D"]]]:
    """(features, outputs) of the connector for the chosen pictures, in the model's own type, with a progress bar `label`."""
    groups = [chosen[start : start + batch] for start in range(0, len(chosen), batch)]
    with Sweep(label, total=len(groups), unit="batch", least=len(groups)) as done:
        for group in groups:
            chosen_pictures: list[Any] = [pictures[i] for i in group]
            drawn = (picture() if callable(picture) else picture for picture in chosen_pictures)
            pixels = torch.cat([lab.pixels(read_picture(picture)) for picture in drawn])
            with undisturbed(lab.model):
                pair = read_connector(lab.model, pixels)
            done.step()
            yield pair


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

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """The map (D, F) and the orthonormal output directions (D, K) along which it varies, most first."""
        xx, xy = self._xx(), self._xy()
        scale = float(xx.trace()) / len(xx)
        if scale <= 0:
            raise DataError("all features are the same; give pictures that differ")
        values, vectors = torch.linalg.eigh(xx)
        values = values.clamp_min(0)
        # without a penalty, directions that the features never take would get any weight
        used = values > SMALL * values.max()
        values, vectors = values[used], vectors[:, used]
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
        error, spread = np.array(self._picture).T
        total = max(float(spread.sum()), TINY)

        def r2_of(weights: np.ndarray) -> np.ndarray:
            return 1 - weights @ error / np.maximum(weights @ spread, TINY)

        low, high = percentiles(cluster_bootstrap(r2_of, len(error), seed=self._seed, one_by_one=True))
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


# -- how linear a connector is around a token ---------------------------------------------

ROWS = 256  # outputs whose gradients are taken together
STRAIGHT = 0.99  # R^2 from which a unit counts as a line


@entry
def local_linearity(
    lab: Lab,
    fit: Linearized,
    pictures: Sequence[Drawn],
    *,
    tokens: int = 16,
    tolerance: float = 0.05,
    held_out: float = 0.25,
    batch: int = 8,
    seed: int = 0,
) -> LocalLinearity:
    """Compare the connector's Jacobian at `tokens` random tokens with `fit`, and count GELU slopes over all tokens.

    The pictures are the held-out share of `pictures`, the same that `llava_lab.linearize` scores with the same
    `held_out`. `tolerance` is how near a slope must be to 1 (open) or 0 (shut). Raises OptionError for a fit of another
    lab's widths or a connector that mixes patches.

    >>> pictures = [run.picture] * 4
    >>> ll.local_linearity(lab, ll.linearize(lab, pictures), pictures, tokens=2).cosine.shape
    (2,)
    """
    began = time.perf_counter()
    if not 0 < tolerance < 0.5 or tokens < 1:
        raise OptionError(f"expected tolerance between 0 and 0.5 and tokens from 1, got {tolerance} and {tokens}")
    _, test = split_pictures(pictures, held_out)
    slopes = Slopes(tolerance)
    with slopes.watched(connector_of(lab.model)):
        chosen, seen = _sample(tokens_of(lab, pictures, test, batch=batch), fit, tokens, np.random.default_rng(seed))
    weight = torch.from_numpy(fit.weight).double()
    control = random_map(weight, seed=seed)
    compared = [_against(jacobian(lab, token), weight, control) for token in chosen]
    cosine, distance, random = (np.array(column) for column in zip(*compared, strict=True))
    notes = () if slopes.units else ("No GELU in this connector; the slopes' shares are 0.",)
    return LocalLinearity(
        cosine=cosine,
        distance=distance,
        random_cosine=random,
        **slopes.found(),
        tolerance=tolerance,
        tokens=seen,
        **made_by(lab, began),
        notes=notes,
    )


def _sample(
    pairs: Iterator[tuple[Tensor, Tensor]], fit: Linearized, count: int, rng: np.random.Generator
) -> tuple[list[Tensor], int]:
    """At most `count` features by reservoir, so that every token of every picture has the same chance; and how many passed."""
    chosen: list[Tensor] = []
    seen = 0
    for features, outputs in pairs:
        if features.shape[:2] != outputs.shape[:2] or (outputs.shape[-1], features.shape[-1]) != fit.full.shape:
            raise OptionError(
                f"expected a connector from one token to one, {fit.full.shape[1]} to {fit.full.shape[0]} numbers, "
                f"got {tuple(features.shape[1:])} to {tuple(outputs.shape[1:])}"
            )
        for token in features.flatten(0, 1):
            seen += 1
            if len(chosen) < count:
                chosen.append(token)
            elif (place := int(rng.integers(seen))) < count:
                chosen[place] = token
    return chosen, seen


def jacobian(lab: Lab, feature: Float[Tensor, " F"]) -> Float[Tensor, "D F"]:
    """d output / d feature of the connector at one token, float64 on the CPU; the model is left as it was."""
    connector, width = connector_of(lab.model), connectors.sizes_of(lab.model.config).language
    rows = []
    with undisturbed(lab.model), torch.enable_grad():
        for start in range(0, width, ROWS):
            # as many copies of the token as rows; each copy gives the gradient of one output
            copies = feature.detach().repeat(min(ROWS, width - start), 1).requires_grad_()
            asked = connector(copies[None])[0][:, start : start + ROWS].diagonal().sum()
            rows.append(torch.autograd.grad(asked, copies)[0])
    return torch.cat(rows).double().cpu()


def gelu_slope(h: Tensor) -> Tensor:
    """The exact GELU's derivative."""
    return 0.5 * (1 + torch.erf(h / math.sqrt(2))) + h * torch.exp(-(h**2) / 2) / math.sqrt(2 * math.pi)


class Slopes:
    """Counts over every GELU unit of a connector while it runs; memory is a few numbers per unit."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self._counts = np.zeros(3)  # open, shut, all
        self._sums: dict[nn.Module, Tensor] = {}  # 6 x units: n, h, g, hh, gg, hg

    @contextmanager
    def watched(self, connector: nn.Module) -> Iterator[Slopes]:
        """Count while the connector runs inside the block; no hook is left."""
        gelus = [part for part in connector.modules() if type(part).__name__.upper().startswith("GELU")]
        with hooked(*gelus, after=self._count):
            yield self

    def _count(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        h = args[0].detach().flatten(0, -2).double().cpu()
        g = output.detach().flatten(0, -2).double().cpu()
        slope = gelu_slope(h)
        self._counts += [
            float(((slope - 1).abs() <= self.tolerance).sum()),
            float((slope.abs() <= self.tolerance).sum()),
            h.numel(),
        ]
        sums = torch.stack([torch.full(h.shape[1:], float(len(h))).double(), h.sum(0), g.sum(0),
                            (h * h).sum(0), (g * g).sum(0), (h * g).sum(0)])  # fmt: skip
        self._sums[module] = self._sums[module] + sums if module in self._sums else sums

    @property
    def units(self) -> int:
        return sum(sums.shape[1] for sums in self._sums.values())

    def found(self) -> dict[str, Any]:
        """The fields of `LocalLinearity` about GELU units."""
        r2 = torch.cat([_line_r2(sums) for sums in self._sums.values()]) if self._sums else torch.zeros(0)
        opened, shut, all_of = self._counts
        total = max(float(all_of), 1.0)
        return {
            "units": self.units,
            "open_share": float(opened) / total,
            "shut_share": float(shut) / total,
            "bent_share": float(all_of - opened - shut) / total,
            "straight_units": float((r2 >= STRAIGHT).double().mean()) if len(r2) else 0.0,
            "unit_r2": r2.float().numpy(),
        }


def _line_r2(sums: Tensor) -> Tensor:
    """R^2 of g on h per unit, from sums; a unit whose output does not move is a line."""
    n, h, g, hh, gg, hg = sums
    spread_h, spread_g, both = hh - h * h / n, gg - g * g / n, hg - h * g / n
    still = (spread_g <= 1e-12 * gg.clamp_min(1e-300)) | (spread_h <= 0)
    return torch.where(still, 1.0, both**2 / (spread_h * spread_g).clamp_min(1e-300)).clamp(0, 1)


def _against(jacobian: Tensor, weight: Tensor, control: Tensor) -> tuple[float, float, float]:
    size = float(jacobian.norm().clamp_min(1e-300))
    cosine = float((jacobian * weight).sum() / (size * weight.norm().clamp_min(1e-300)))
    against = float((jacobian * control).sum() / (size * control.norm().clamp_min(1e-300)))
    return cosine, float((jacobian - weight).norm() / weight.norm().clamp_min(1e-300)), against
