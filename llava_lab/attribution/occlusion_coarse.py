"""Occlusion from coarse to fine: large blocks first, and only those that mattered most are looked at closer.

A few tens of passes stand in for one per patch. What is never looked at closer keeps its block's drop,
shared out over the block's patches, so the map is exact where it is fine and a guess where it is coarse.

Which blocks are divided is decided by the answer as a whole (the largest change among its tokens), not by
the target, so that several targets share the passes. Parts that matter only together with others far away,
or that cancel inside a block, are not found.

Source: a beam version of occlusion (Zeiler & Fergus 2014); after the quadtree searches of image coding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.attribution.base import Maps, Method, Targets, whole_number
from llava_lab.attribution.fills import FILLS
from llava_lab.attribution.occlusion import Block, masks_of, says, sweep
from llava_lab.attribution.occlusion_cached import sweep_tokens
from llava_lab.attribution.occlusion_levels import LEVELS, Level, open_level
from llava_lab.capture import undisturbed
from llava_lab.errors import OptionError
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab


@dataclass
class _Search:
    """What has been found so far: the finest block tried at each patch."""

    values: np.ndarray  # (targets, rows, cols), drop per patch
    whole: Float[Tensor, " N"] | None = None  # of the targets and of each answer token
    tried: int = 0
    rounds: list[int] = field(default_factory=list)  # blocks in each round
    interrupted: bool = False


def first_side(grid: tuple[int, int]) -> int:
    """Side of the first blocks: a power of two, about a quarter of the grid, at least 2 where the grid allows."""
    side = 1
    while side * 4 < max(grid):
        side *= 2
    return min(max(side, 2), min(grid))


def cut(block: Block) -> list[Block]:
    """The block in halves both ways; a side of one patch stays whole."""

    def halves(part: slice) -> list[slice]:
        middle = (part.start + part.stop + 1) // 2
        return [part] if part.stop - part.start == 1 else [slice(part.start, middle), slice(middle, part.stop)]

    return [(y, x) for y in halves(block[0]) for x in halves(block[1])]


def tiles(grid: tuple[int, int], side: int) -> list[Block]:
    """Blocks that cover the grid without overlap; those at the end may be smaller."""
    rows, cols = ([slice(i, min(i + side, length)) for i in range(0, length, side)] for length in grid)
    return [(y, x) for y in rows for x in cols]


def _compute(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    grid = run.map.rows, run.map.cols
    side = first_side(grid) if options["first"] is None else whole_number("first", options["first"], least=1)
    if side > min(grid):
        raise OptionError(f"first must be at most {min(grid)} for a grid of {grid[0]}x{grid[1]}, got {side}")
    keep = whole_number("keep", options["keep"], least=1)
    batch = whole_number("batch", options["batch"], least=1)
    seed = whole_number("seed", options["seed"])
    covered = run.map.coverage() > 0
    start, stop = run.segments["answer"]
    deciding = tuple(run.target(i) for i in range(stop - start))
    found = _Search(np.zeros((len(targets), *grid), np.float32))
    with undisturbed(lab.model):
        every = (*targets, *deciding)
        level = open_level(lab, run, every, at=options["at"], fill=options["fill"], seed=seed)
        blocks = [one for one in tiles(grid, side) if covered[one].any()]
        while blocks and not found.interrupted:
            strong = _round(lab, run, every, level, blocks, covered, found, batch)
            divisible = [blocks[i] for i in strong if _area(blocks[i]) > 1]
            blocks = [part for block in divisible[:keep] for part in cut(block) if covered[part].any()]
    assert found.whole is not None
    notes = [says(options["fill"], level.name, "blocks of patches") + " A block's drop is shared out over its patches."]
    notes.append(
        f"Blocks of {side}x{side} first, the {keep} that changed the answer most cut in four, and so on to single patches."
    )
    if found.interrupted:
        notes.append(f"Interrupted after {found.tried} blocks; the map is as fine as it got.")
    extras = {"score": found.whole[: len(targets)].tolist(), "blocks": found.tried, "rounds": found.rounds}
    return Maps(found.values * covered, {"forward": found.tried + 1 + level.passes}, tuple(notes), extras)


def _round(
    lab: Lab, run: Run, every: Targets, level: Level, blocks: list[Block], covered: np.ndarray, found: _Search, batch: int
) -> list[int]:
    """Try `blocks`, write them into the map, and return their numbers, the most telling first."""
    targets = len(found.values)
    try:
        if level.name == "pixels":
            known = found.whole
            drops, whole = sweep(level.whole, level.fill, blocks, level.score, patch=level.patch, batch=batch, whole=known)
            order = list(range(len(drops)))
        else:
            hidden = masks_of(blocks, level.grid).to(lab.device)
            drops, order, whole, _ = sweep_tokens(lab, run, every, level, hidden, batch=batch, whole=found.whole)
    except KeyboardInterrupt:
        if found.whole is None:
            raise
        found.interrupted = True
        return []
    found.whole = whole
    found.tried += len(drops)
    found.rounds.append(len(drops))
    found.interrupted = len(drops) < len(blocks)
    for drop, i in zip(drops[:, :targets].cpu().numpy(), order, strict=True):
        found.values[:, *blocks[i]] = drop[:, None, None] / max(int(covered[blocks[i]].sum()), 1)
    change = drops[:, targets:].abs().amax(1).cpu()
    return [order[int(i)] for i in torch.argsort(change, descending=True, stable=True)]


def _area(block: Block) -> int:
    return (block[0].stop - block[0].start) * (block[1].stop - block[1].start)


OCCLUSION_COARSE = Method(
    name="occlusion_coarse",
    truth="How much less likely the target becomes when a block is covered, blocks getting finer where the answer changed most.",
    source="Zeiler & Fergus 2014, searched from coarse to fine",
    cost="some tens of forwards",
    blind_to="patches whose block did not stand out, patches that stand in for one another, and what the fill itself says",
    options={"first": None, "keep": 4, "fill": FILLS[0], "batch": 8, "at": LEVELS[0], "seed": 0},
    compute=_compute,
)
