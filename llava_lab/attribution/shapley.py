"""Shapley values of superpixels: what each region adds, averaged over all orders in which regions could appear.

``shapley`` draws orders and walks through them; ``kernel_shap`` draws coalitions and fits a linear model
whose weights are the Shapley values in the limit. Captum does both; here is the game it plays (the regions
of `coalitions`, one forward per new coalition, all targets read together) and the fit's least squares, which
captum would leave to scikit-learn.

Efficiency holds: the values sum to the score of the whole picture minus that of the filled one, exactly for
every single order, and up to the weight of the end points for the fit. The gap is reported. A region's value
is shared out evenly over its patches, so the map has the same sum.

Sources: Castro et al. 2009 for sampling orders; Lundberg & Lee 2017 (arXiv 1705.07874) for KernelSHAP; captum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from llava_lab.attribution.base import Maps, Method, Targets, whole_number
from llava_lab.attribution.coalitions import OPTIONS, Game, open_game
from llava_lab.attribution.occlusion_levels import PATIENCE, PLACES
from llava_lab.capture import undisturbed
from llava_lab.errors import LabError
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab


def _shapley(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    orders = whole_number("orders", options["orders"], least=1)
    with undisturbed(lab.model):
        torch.manual_seed(whole_number("seed", options["seed"]))  # captum draws from the global generator; it is put back
        game = open_game(lab, run, targets, options)
        values = _walks(game, orders, options["batch"])
        done = len(values)
        notes = [_says(f"averaged over {done} random orders of {game.players} regions", options)]
        if done < orders:
            notes.append(f"Interrupted after {done} of {orders} orders; the values are the mean over these.")
        spread = values.std(0, correction=1) / done**0.5 if done > 1 else torch.full_like(values[0], torch.nan)
        extras = {"orders": done, "standard_error": spread.nan_to_num(0).tolist() if done > 1 else None}
        return _maps(game, values.mean(0), notes, extras)


def _kernel_shap(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    samples = whole_number("samples", options["samples"], least=3)
    with undisturbed(lab.model):
        game = open_game(lab, run, targets, options)
        values, done = _fit(game, samples, options["batch"], seed=options["seed"])
        notes = [_says(f"fitted to {done} coalitions of {game.players} regions", options)]
        if done < samples:
            notes.append(f"Interrupted after {done} of {samples} coalitions; the fit is to these.")
        if done < game.players + 1:
            notes.append("Fewer coalitions than regions: many fits are equally good, and this is the smallest.")
        return _maps(game, values, notes, {"samples": done})


def _says(how: str, options: dict[str, Any]) -> str:
    return (
        f"Shapley values of the target's log-probability (for a contrast: of the logit difference), {how}; "
        f"hidden regions are filled with {options['fill']} at {PLACES[options['at']]}. "
        "A region's value is shared out over its patches."
    )


def _maps(game: Game, values: Float[Tensor, "N n"], notes: list[str], extras: dict[str, Any]) -> Maps:
    full, empty = game.everyone(), game.nobody()
    extras |= {
        "full": full.tolist(),
        "empty": empty.tolist(),
        "sum": values.sum(1).tolist(),
        "efficiency_gap": (values.sum(1) - (full - empty)).tolist(),
        "regions": game.labels.tolist(),
    }
    return Maps(game.shared_out(values.cpu().numpy()), {"forward": game.forwards}, tuple(notes), extras)


def _walks(game: Game, orders: int, batch: int) -> Float[Tensor, "K N n"]:
    """Each region's gain in each of `orders` orders; fewer after Ctrl-C, which is raised before the first is done.

    One call of captum per order, so that an interrupt keeps what is finished; the draws are those of a single call.
    """
    attribution = _captum().ShapleyValueSampling(lambda shown: game.worth(shown > 0.5))
    everyone = torch.ones(1, game.players)
    found: list[Tensor] = []
    try:
        for _ in tqdm(range(orders), desc="shapley", unit="order", delay=PATIENCE, leave=False):
            found.append(attribution.attribute(everyone, n_samples=1, perturbations_per_eval=batch)[0])
    except KeyboardInterrupt:
        if not found:
            raise
    return torch.stack(found)


def _fit(game: Game, samples: int, batch: int, *, seed: int) -> tuple[Float[Tensor, "N n"], int]:
    """KernelSHAP's weights for each target, and the coalitions they were fitted to."""
    captum = _captum()
    if game.players < 2:  # nothing to fit: the one region has it all
        return (game.everyone() - game.nobody())[:, None], 2

    def fit(count: int, target: int, progress: Any = None) -> Tensor:
        def look(shown: Tensor) -> Tensor:
            scores = game.worth(shown > 0.5)[:, target]
            if progress is not None:
                progress.update(len(shown))
            return scores

        torch.manual_seed(seed)  # the same coalitions for every target
        attribution = captum.KernelShap(look)
        attribution.interpretable_model = LeastSquares()
        everyone = torch.ones(1, game.players)
        return attribution.attribute(everyone, n_samples=count, perturbations_per_eval=batch, return_input_shape=False)[0]

    targets = len(game.everyone())
    with tqdm(total=samples, desc="kernel_shap", unit="coalition", delay=PATIENCE, leave=False) as progress:
        try:
            fit(samples, 0, progress)
        except KeyboardInterrupt:
            if progress.n < 3:
                raise
            samples = int(progress.n)
    return torch.stack([fit(samples, target) for target in range(targets)]), samples  # every coalition is known by now


class LeastSquares:
    """A weighted linear fit with an intercept, in float64, in the place of captum's scikit-learn model."""

    def __init__(self) -> None:
        self._weights: Tensor | None = None

    def fit(self, data: Any, **kwargs: Any) -> dict[str, float]:
        """Take the coalitions, their scores and their weights from captum's loader."""
        shown, scores, weights = (torch.cat(part).double() for part in zip(*data, strict=True))
        root = weights.reshape(-1, 1).sqrt()
        design = torch.cat([shown, torch.ones(len(shown), 1, dtype=shown.dtype)], 1)
        found = np.linalg.lstsq((root * design).numpy(), (root[:, 0] * scores.reshape(-1)).numpy(), rcond=None)[0]
        self._weights = torch.from_numpy(found[:-1]).float()[None]
        return {}

    def representation(self) -> Float[Tensor, "1 n"]:
        assert self._weights is not None, "fit first"
        return self._weights


def _captum() -> Any:
    """Captum's attribution module, imported only where it is used: it takes seconds."""
    try:
        import captum.attr
    except ImportError:
        raise LabError("shapley and kernel_shap need captum, which is not installed; `pip install captum` brings it") from None
    return captum.attr


SHAPLEY = Method(
    name="shapley",
    truth="What the region adds to the target's log-probability, averaged over random orders of uncovering the picture.",
    source="Castro et al. 2009, captum's ShapleyValueSampling over superpixels",
    cost="one forward per region and order, at most",
    blind_to="anything finer than a region, and what the fill itself says",
    options={"orders": 8, **OPTIONS, "seed": 0},
    compute=_shapley,
)

KERNEL_SHAP = Method(
    name="kernel_shap",
    truth="What the region adds to the target's log-probability, from a linear fit over random coalitions of regions.",
    source="Lundberg & Lee 2017, captum's KernelShap over superpixels",
    cost="one forward per coalition, at most",
    blind_to="anything finer than a region, and what the fill itself says",
    options={"samples": 96, **OPTIONS, "seed": 0},
    compute=_kernel_shap,
)
