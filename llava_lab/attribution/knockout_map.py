"""Token knockout: the answer may not look at one image token, in any layer; everything else stays as it was.

Every other position still reads the token, so what the question's words had gathered from it remains: this
is the *direct* way from the patch to the answer. With ``rows="text"`` the question may not look either, and
what is left goes through other image tokens. Nothing is put in the token's place, so there is no fill.

All patches share one cache of the untouched sequence; a variant is only the few positions that may not
look, so hundreds of patches cost a few forwards. A knockout that does not take effect looks like a patch
that does not matter; therefore the strongest one is proved in each run: with absurd keys and values at the
blocked token the score must stay the same to the last digits, and without the block it must not.

Sources: Geva et al. 2023 (arXiv 2304.14767) for attention knockout; Zhang et al. 2024 (arXiv 2411.18620)
for its use between image, question and answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from llava_lab.attribution.base import Maps, Method, Targets, choose, whole_number
from llava_lab.attribution.occlusion import Block, blocks_of, masks_of, spread
from llava_lab.attribution.occlusion_cached import ROWS, Branches, agree
from llava_lab.attribution.occlusion_levels import PATIENCE, open_level
from llava_lab.capture import undisturbed
from llava_lab.errors import LabError, OptionError
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

BLOCKED_ROWS = ("answer", "text")
SAME = 1e-6  # what a blocked token may still change, relative above 1: it should be nothing at all


def _compute(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    grid = run.map.rows, run.map.cols
    block = whole_number("block", options["block"], least=1)
    if block > min(grid):
        raise OptionError(f"block must be at most {min(grid)} for a grid of {grid[0]}x{grid[1]}, got {block}")
    rows = choose("rows", options["rows"], BLOCKED_ROWS)
    blocks = blocks_of(*grid, block, block)  # padding too: its tokens are read like any other
    start = run.segments["answer"][0] - 1 if rows == "answer" else run.segments["image"][1]
    every = (*targets, run.target())  # the whole answer, so that passes do not depend on what is explained
    with undisturbed(lab.model):
        level = open_level(lab, run, every, at="projector", fill="mean")
        whole = level.score(level.whole)[0]
        length = run.segments["answer"][1] - 1 - start
        size = max(ROWS // length, 1)  # variants in one pass
        branches = Branches(lab, run, every, level.tokens(level.whole), room=start + (size + 1) * length)
        agree(branches.whole, whole, branches.sequence.dtype)
        drops = _sweep(branches, run, blocks, grid, start, size, whole)
        strongest = int(drops[:, -1].abs().argmax())
        proof = _prove(branches, run, blocks[strongest], grid, start)
    done, wanted = len(drops), len(targets)
    values = spread(drops[:, :wanted].cpu().numpy(), blocks[:done], grid)
    who = "the positions that predict the answer" if rows == "answer" else "the question and the answer"
    notes = [
        f"Drop of the target's log-probability (for a contrast: of the logit difference) when {who} may not attend to "
        f"{block}x{block} image tokens in any layer; nothing is put in their place."
    ]
    if done < len(blocks):
        notes.append(f"Interrupted after {done} of {len(blocks)} blocks; patches not reached are 0.")
    passes = 2 + -(-done // size) + 3  # plain, kept, the variants, the proof
    extras = {
        "score": whole[:wanted].tolist(),
        "blocks": done,
        "positions": branches.rows,
        "blocked_change": proof[0],
        "unblocked_change": proof[1],
    }
    return Maps(values, {"forward": passes}, tuple(notes), extras)


def _sweep(
    branches: Branches,
    run: Run,
    blocks: list[Block],
    grid: tuple[int, int],
    start: int,
    size: int,
    whole: Float[Tensor, " N"],
) -> Float[Tensor, "m N"]:
    """Drop of each target's score for each block; fewer after Ctrl-C, which is raised before the first pass."""
    drops: list[Tensor] = []
    with tqdm(total=len(blocks), desc="token knockout", unit="block", delay=PATIENCE, leave=False) as progress:
        try:
            for first in range(0, len(blocks), size):
                now = blocks[first : first + size]
                tails = branches.sequence[:, start:].expand(len(now), -1, -1)
                drops.append(whole - branches.score(tails, start, _columns(run, now, grid, start, tails.device)))
                progress.update(len(now))
        except KeyboardInterrupt:
            if not drops:
                raise
    return torch.cat(drops)


def _columns(run: Run, blocks: list[Block], grid: tuple[int, int], start: int, device: torch.device) -> Tensor:
    """Which positions before `start` each variant may not look at."""
    first, last = run.segments["image"]
    columns = torch.zeros(len(blocks), start, dtype=torch.bool)
    columns[:, first:last] = masks_of(blocks, grid).flatten(1)
    return columns.to(device)


def _prove(branches: Branches, run: Run, block: Block, grid: tuple[int, int], start: int) -> tuple[float, float]:
    """How much absurd keys and values at one blocked token change, with the block and without it; refuses a block that leaks."""
    tail = branches.sequence[:, start:]
    columns = _columns(run, [block], grid, start, tail.device)
    position = int(np.flatnonzero(columns[0].cpu().numpy())[0])
    quiet = branches.score(tail, start, columns)[0]
    with branches.poisoned(position):
        behind = branches.score(tail, start, columns)[0]
        beside = branches.score(tail, start)[0]
    leak, change = (float(((one - quiet).abs() / quiet.abs().clamp_min(1)).max()) for one in (behind, beside))
    if not leak <= SAME:  # a score that is not a number is a leak too
        raise LabError(
            f"expected a blocked token to have no say, got a change of {leak:.2g} through it; this attention implementation "
            "does not follow the mask: load the model with sdpa or eager attention"
        )
    return leak, change


TOKEN_KNOCKOUT = Method(
    name="token_knockout",
    truth="How much less likely the target becomes when the answer may not attend to the image token, in any layer.",
    source="attention knockout, Geva et al. 2023; all patches in one shared cache added here",
    cost="about five forwards for all patches",
    blind_to="what reached the answer through the question's words or other image tokens, and tokens that replace each other",
    options={"rows": BLOCKED_ROWS[0], "block": 1},
    compute=_compute,
)
