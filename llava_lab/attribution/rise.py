"""RISE: show the picture through many random smooth masks; a patch matters where showing it went with a likelier answer.

The value of a patch is the mean score over masks, weighed by how much of the patch each mask showed, minus
the plain mean. Unlike occlusion it hides much at once, so patches that stand in for one another are found;
the price is noise, which is estimated and reported.

Two things differ from the paper: the score is a log-probability, as everywhere here, and it is centred before
it is weighed, which takes out the noise of unequal mask sums and leaves the ranking's limit as it is.

Source: Petsiuk et al. 2018 (arXiv 1806.07421), sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from llava_lab.attribution.base import Maps, Method, Targets, whole_number
from llava_lab.attribution.fills import SQUARES
from llava_lab.attribution.occlusion_levels import LEVELS, PATIENCE, PLACES, Level, open_level
from llava_lab.capture import undisturbed
from llava_lab.errors import OptionError
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

FLOOR = 1e-6  # of a patch's total weight, for one that no mask ever showed


Masks = Callable[[int, int], Tensor]  # from one number up to another -> (M, Y, X)


def rise_masks(count: int, side: tuple[int, int], *, cells: int, shown: float, seed: int) -> Masks:
    """Random masks from 0 (hidden) to 1: `cells` a side, each shown with probability `shown`, smoothly enlarged, shifted.

    They are enlarged when asked for, by number: all of them at once would be gigabytes.
    """
    random = torch.Generator().manual_seed(seed)
    height, width = side
    step_y, step_x = -(-height // cells), -(-width // cells)
    coarse = (torch.rand(count, 1, cells + 1, cells + 1, generator=random) < shown).float()
    size = ((cells + 1) * step_y, (cells + 1) * step_x)
    down = torch.randint(0, step_y, (count,), generator=random).tolist()
    right = torch.randint(0, step_x, (count,), generator=random).tolist()

    def masks(start: int, stop: int) -> Tensor:
        large = functional.interpolate(coarse[start:stop], size=size, mode="bilinear", align_corners=False)[:, 0]
        corners = zip(large, down[start:stop], right[start:stop], strict=True)
        return torch.stack([one[y : y + height, x : x + width] for one, y, x in corners])

    return masks


def weighed(
    scores: Float[Tensor, "M N"], masks: Float[Tensor, "M rows cols"]
) -> tuple[Float[Tensor, "N rows cols"], Float[Tensor, "N rows cols"]]:
    """Each patch's mean score weighed by how much of it was shown, minus the plain mean; and its standard error."""
    centred = (scores - scores.mean(0)).double()
    weights = masks.double().flatten(1)  # M P
    total = weights.sum(0).clamp_min(FLOOR)
    value = centred.T @ weights / total  # N P
    share = weights * len(weights) / total  # M P, 1 on average; a mask's say in the weighed mean beside the plain one
    influence = share * (centred.T[:, :, None] - value[:, None]) - centred.T[:, :, None]  # N M P
    error = (influence**2).sum(1).sqrt() / len(weights)
    shape = (-1, *masks.shape[1:])
    return value.float().reshape(shape), error.float().reshape(shape)


def natural_cells(grid: tuple[int, int]) -> int:
    """Cells a side when none are asked for: about three patches each, 2 to 8 (the paper's 7 is for whole photographs)."""
    return min(max(min(grid) // 3, 2), 8, min(grid))


def _compute(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    grid = run.map.rows, run.map.cols
    count = whole_number("masks", options["masks"], least=2)
    cells = natural_cells(grid) if options["cells"] is None else whole_number("cells", options["cells"], least=1)
    batch = whole_number("batch", options["batch"], least=1)
    seed = whole_number("seed", options["seed"])
    shown = options["shown"]
    if isinstance(shown, bool) or not isinstance(shown, Real) or not 0 < float(shown) < 1:
        raise OptionError(f"shown is the share of the picture a mask shows, between 0 and 1; got {shown!r}")
    if cells > min(grid):
        raise OptionError(f"cells must be at most {min(grid)} for a grid of {grid[0]}x{grid[1]}, got {cells}")
    with undisturbed(lab.model):
        level = open_level(lab, run, targets, at=options["at"], fill=options["fill"], seed=seed, fills=SQUARES)
        scores, masks = _looks(level, count, batch, cells=cells, shown=float(shown), seed=seed)
    done = len(scores)
    values, errors = weighed(scores.float().cpu(), masks)
    covered = run.map.coverage() > 0
    notes = [
        "Mean log-probability of the target (for a contrast: logit difference) over masks that show the patch, minus the mean "
        f"over all; what is hidden is filled with {options['fill']} at {PLACES[level.name]}."
    ]
    if done < count:
        notes.append(f"Interrupted after {done} of {count} masks; the means are over these.")
    extras = {"masks": done, "standard_error": errors[:, torch.from_numpy(covered)].mean(1).tolist()}
    return Maps(values.numpy() * covered, {"forward": done + level.passes}, tuple(notes), extras)


def _looks(
    level: Level, count: int, batch: int, *, cells: int, shown: float, seed: int
) -> tuple[Float[Tensor, "m N"], Float[Tensor, "m rows cols"]]:
    """Scores through each mask and how much of each patch it shows; fewer after Ctrl-C, raised while there are not two."""
    side = (level.whole.shape[-2], level.whole.shape[-1])
    masks = rise_masks(count, side, cells=cells, shown=shown, seed=seed)
    rows, cols = (length * level.patch for length in level.grid)
    scores: list[Tensor] = []
    seen: list[Tensor] = []
    with tqdm(total=count, desc="rise", unit="mask", delay=PATIENCE, leave=False) as progress:
        try:
            for start in range(0, count, batch):
                now = masks(start, min(start + batch, count))
                scores.append(level.score(level.blend(now.to(level.whole.device))))
                seen.append(functional.avg_pool2d(now[:, None, :rows, :cols], level.patch)[:, 0])
                progress.update(len(now))
        except KeyboardInterrupt:
            if sum(map(len, seen)) < 2:
                raise
    return torch.cat(scores[: len(seen)]), torch.cat(seen)


RISE = Method(
    name="rise",
    truth="How much likelier the target is on average under random masks that show the patch than under all of them.",
    source="Petsiuk et al. 2018",
    cost="one forward per mask",
    blind_to="anything finer than a mask's cells, and differences within its own noise",
    options={"masks": 128, "cells": None, "shown": 0.5, "fill": SQUARES[0], "at": LEVELS[0], "batch": 8, "seed": 0},
    compute=_compute,
)
