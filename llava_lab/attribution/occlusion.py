"""Occlusion: cover a block of patches, give the model its own answer again, see how much less likely it is.

It touches what the model is given, so it can claim a cause; what it claims is about this fill, this block
size and the place where the patch is taken away. Patches that back each other up can each look unimportant.

At the pixels, blocks are covered in the model's square, at the very pixels of its patches. At the vision
tower's or the projector's output, tokens are replaced instead; the tower then runs once, and each variant
computes only what comes after its first changed token (`occlusion_cached`), with the same numbers.

Source: Zeiler & Fergus 2014 (arXiv 1311.2901), section 4.2, on the log-probability of a given answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from llava_lab.attribution.base import Maps, Method, Targets, whole_number
from llava_lab.attribution.fills import FILLS, inpaint
from llava_lab.attribution.occlusion_cached import sweep_tokens
from llava_lab.attribution.occlusion_levels import LEVELS, PATIENCE, PLACES, open_level
from llava_lab.attribution.scoring import Score
from llava_lab.capture import undisturbed
from llava_lab.errors import OptionError
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

Block = tuple[slice, slice]  # rows and columns of the patch grid


def blocks_of(rows: int, cols: int, block: int, stride: int) -> list[Block]:
    """Blocks of ``block x block`` patches every `stride`, the last moved back inside, so that each patch is covered."""

    def starts(length: int) -> list[int]:
        last = max(length - block, 0)
        return sorted({*range(0, last + 1, stride), last})

    return [(slice(y, y + block), slice(x, x + block)) for y in starts(rows) for x in starts(cols)]


def sweep(
    pixels: Float[Tensor, "1 3 Y X"],
    fill: Float[Tensor, "1 3 Y X"] | None,
    blocks: Sequence[Block],
    score: Score,
    *,
    patch: float,
    batch: int = 8,
    whole: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, "M N"], Float[Tensor, " N"]]:
    """Drop of each target's score when each block is filled, and the score of the whole picture.

    `fill` None fills each block from what surrounds it; `patch` is the side of a patch in the model's pixels, `whole`
    the whole picture's score where it is known already. Ctrl-C ends the sweep early, and fewer rows than blocks come
    back; before the first batch it is raised.
    """
    whole = score(pixels)[0] if whole is None else whole
    drops: list[Tensor] = []
    with tqdm(total=len(blocks), desc="occlusion", unit="block", delay=PATIENCE, leave=False) as progress:
        try:
            for start in range(0, len(blocks), batch):
                now = blocks[start : start + batch]
                hidden = torch.zeros(len(now), *pixels.shape[2:], dtype=torch.bool, device=pixels.device)
                for one, block in zip(hidden, now, strict=True):
                    y, x = (slice(round(part.start * patch), round(part.stop * patch)) for part in block)
                    one[y, x] = True
                filled = inpaint(pixels, hidden) if fill is None else fill
                drops.append(whole - score(torch.where(hidden[:, None], filled, pixels)))
                progress.update(len(now))
        except KeyboardInterrupt:
            if not drops:
                raise
    return torch.cat(drops) if drops else whole.new_zeros(0, len(whole)), whole


def masks_of(blocks: Sequence[Block], grid: tuple[int, int]) -> Bool[Tensor, "M rows cols"]:
    """Each block as a mask over the patch grid."""
    hidden = torch.zeros(len(blocks), *grid, dtype=torch.bool)
    for one, (y, x) in zip(hidden, blocks, strict=True):
        one[y, x] = True
    return hidden


def spread(drops: np.ndarray, blocks: Sequence[Block], grid: tuple[int, int]) -> np.ndarray:
    """Each patch gets the mean drop of the blocks that cover it, float32 (targets, rows, cols); 0 where none does."""
    total = np.zeros((drops.shape[1], *grid))
    count = np.zeros(grid)
    for drop, (y, x) in zip(drops, blocks, strict=True):
        total[:, y, x] += drop[:, None, None]
        count[y, x] += 1
    return (total / np.maximum(count, 1)).astype(np.float32)


def _compute(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    grid = run.map.rows, run.map.cols
    block = whole_number("block", options["block"], least=1)
    stride = block if options["stride"] is None else whole_number("stride", options["stride"], least=1)
    batch = whole_number("batch", options["batch"], least=1)
    seed = whole_number("seed", options["seed"])
    if block > min(grid) or stride > block:
        raise OptionError(f"expected stride <= block <= {min(grid)}, got block {block} and stride {stride}")
    covered = run.map.coverage() > 0
    every = blocks_of(*grid, block, stride)
    blocks = [one for one in every if covered[one].any()]
    with undisturbed(lab.model):
        level = open_level(lab, run, targets, at=options["at"], fill=options["fill"], seed=seed)
        if level.name == "pixels":
            drops, whole = sweep(level.whole, level.fill, blocks, level.score, patch=level.patch, batch=batch)
            order, work = list(range(len(drops))), {}
        else:
            hidden = masks_of(blocks, grid).to(lab.device)
            drops, order, whole, rows = sweep_tokens(lab, run, targets, level, hidden, batch=batch)
            work = {"positions": rows, "positions_of_full_passes": (len(drops) + 1) * len(run.token_ids)}
    done = len(drops)
    values = spread(drops.cpu().numpy(), [blocks[i] for i in order], grid) * covered
    notes = [says(options["fill"], level.name, f"{block}x{block} patches")]
    if done < len(blocks):
        notes.append(f"Interrupted after {done} of {len(blocks)} blocks; patches not reached are 0.")
    if len(blocks) < len(every):
        notes.append(f"{int((~covered).sum())} patches hold only padding; they were not tried and are 0.")
    extras = {"score": whole.tolist(), "blocks": done, **work}
    return Maps(values, {"forward": done + 1 + level.passes}, tuple(notes), extras)


def says(fill: str, at: str, what: str) -> str:
    """What the number is, in a sentence for the reader of the map."""
    return (
        f"Drop of the target's log-probability (for a contrast: of the logit difference) when {what} "
        f"are filled with {fill} at {PLACES[at]}; negative means the answer got likelier."
    )


OCCLUSION = Method(
    name="occlusion",
    truth="How much less likely the target becomes when the patch is covered and nothing else is changed.",
    source="Zeiler & Fergus 2014, section 4.2",
    cost="one forward per block, plus one; behind the vision tower about half a forward of the language model per block",
    blind_to="patches that stand in for one another, and what the fill itself says",
    options={"block": 1, "stride": None, "fill": FILLS[0], "batch": 8, "at": LEVELS[0], "seed": 0},
    compute=_compute,
)
