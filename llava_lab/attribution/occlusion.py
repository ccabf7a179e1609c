"""Occlusion: cover a block of the picture, give the model its own answer again, see how much less likely it is.

The only method here that touches the model's input, so the only one that can claim a cause; what it
claims is about this fill and this block size. Patches that back each other up can each look unimportant.

Blocks are covered in the model's square, at the very pixels of its patches.

Source: Zeiler & Fergus 2014 (arXiv 1311.2901), section 4.2, on the log-probability of a given answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from llava_lab.attribution.base import Maps, Method, Targets, whole_number
from llava_lab.attribution.fills import FILLS, fill_pixels
from llava_lab.attribution.scoring import Score, target_score
from llava_lab.capture import undisturbed
from llava_lab.errors import OptionError
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

PATIENCE = 2.0  # seconds before a progress bar appears

Block = tuple[slice, slice]  # rows and columns of the patch grid


def blocks_of(rows: int, cols: int, block: int, stride: int) -> list[Block]:
    """Blocks of ``block x block`` patches every `stride`, the last moved back inside, so that each patch is covered."""

    def starts(length: int) -> list[int]:
        last = max(length - block, 0)
        return sorted({*range(0, last + 1, stride), last})

    return [(slice(y, y + block), slice(x, x + block)) for y in starts(rows) for x in starts(cols)]


def sweep(
    pixels: Float[Tensor, "1 3 Y X"],
    fill: Float[Tensor, "1 3 Y X"],
    blocks: Sequence[Block],
    score: Score,
    *,
    patch: float,
    batch: int = 8,
) -> tuple[Float[Tensor, "M N"], Float[Tensor, " N"]]:
    """Drop of each target's score when each block is filled, and the score of the whole picture.

    `patch` is the side of a patch in the model's pixels. Ctrl-C ends the sweep early, and fewer rows than blocks
    come back; before the first batch it is raised.
    """
    whole = score(pixels)[0]
    drops: list[Tensor] = []
    with tqdm(total=len(blocks), desc="occlusion", unit="block", delay=PATIENCE, leave=False) as progress:
        try:
            for start in range(0, len(blocks), batch):
                now = blocks[start : start + batch]
                covered = pixels.repeat(len(now), 1, 1, 1)
                for one, block in zip(covered, now, strict=True):
                    y, x = (slice(round(part.start * patch), round(part.stop * patch)) for part in block)
                    one[:, y, x] = fill[0, :, y, x]
                drops.append(whole - score(covered))
                progress.update(len(now))
        except KeyboardInterrupt:
            if not drops:
                raise
    return torch.cat(drops) if drops else whole.new_zeros(0, len(whole)), whole


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
    if block > min(grid) or stride > block:
        raise OptionError(f"expected stride <= block <= {min(grid)}, got block {block} and stride {stride}")
    covered = run.map.coverage() > 0
    every = blocks_of(*grid, block, stride)
    blocks = [one for one in every if covered[one].any()]
    with undisturbed(lab.model):
        pixels, score = target_score(lab, run, targets)
        fill = fill_pixels(lab, pixels, options["fill"], run.map)
        drops, whole = sweep(pixels, fill, blocks, score, patch=run.map.size / run.map.rows, batch=batch)
    done = len(drops)
    values = spread(drops.cpu().numpy(), blocks[:done], grid) * covered
    notes = [
        f"Drop of the target's log-probability (for a contrast: of the logit difference) when {block}x{block} patches "
        f"are filled with {options['fill']}; negative means the answer got likelier."
    ]
    if done < len(blocks):
        notes.append(f"Interrupted after {done} of {len(blocks)} blocks; patches not reached are 0.")
    if len(blocks) < len(every):
        notes.append(f"{int((~covered).sum())} patches hold only padding; they were not tried and are 0.")
    return Maps(values, {"forward": done + 1}, tuple(notes), {"score": whole.tolist(), "blocks": done})


OCCLUSION = Method(
    name="occlusion",
    truth="How much less likely the target becomes when the patch is covered and nothing else is changed.",
    source="Zeiler & Fergus 2014, section 4.2",
    cost="one forward per block, plus one",
    blind_to="patches that stand in for one another, and what the fill itself says",
    options={"block": 1, "stride": None, "fill": FILLS[0], "batch": 8},
    compute=_compute,
)
