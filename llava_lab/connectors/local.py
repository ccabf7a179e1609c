"""Is the connector a line where its inputs really lie? Its Jacobian against the linear fit, and its GELU units' slopes.

A GELU unit far to the right passes its input on (slope 1), far to the left it is shut (slope 0); only between the two is
it bent. A unit may also move so little that a line describes it anywhere. Both are counted, on the tokens of real
pictures, because a connector is linear or not on a distribution, not in itself.

    fit = ll.linearize(lab, pictures)
    ll.local_linearity(lab, fit, pictures).bent_share

Source: GELU, Hendrycks and Gimpel 2016 (arXiv 1606.08415): slope = Phi(h) + h phi(h).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.capture import hooked, undisturbed
from llava_lab.checks import entry
from llava_lab.connectors.linearize import Drawn, random_map, split_pictures, tokens_of
from llava_lab.errors import OptionError
from llava_lab.models import Lab, connectors
from llava_lab.models.layout import connector_of
from llava_lab.results import Linearized, LocalLinearity

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
        model=lab.name,
        fingerprint=lab.fingerprint,
        seconds=time.perf_counter() - began,
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
