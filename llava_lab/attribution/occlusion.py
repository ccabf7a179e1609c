"""Hide parts of what the model is given, and see how much less likely its own answer becomes.

It touches what the model is given, so it can claim a cause; what it claims is about this fill, this block size and the
place where the patch is taken away. Patches that back each other up can each look unimportant.

- ``occlusion`` covers a block of patches after the other, at the pixels, at the vision tower's or at the connector's output
  (`replay.alter`). The value is the drop of the answer's log-odds, or with ``score="logprob"`` of its log-probability.
- ``occlusion_coarse`` covers large blocks first, and only those that mattered most are looked at closer: a few tens of
  passes stand in for one per patch. What is never looked at closer keeps its block's drop, shared out over the block's
  patches, so the map is exact where it is fine and a guess where it is coarse. Which blocks are divided is decided by the
  answer as a whole (the largest change among its tokens), so that several targets share the passes. Parts that matter
  only together with others far away, or that cancel inside a block, are not found.
- ``rise`` shows the picture through many random smooth masks. A patch's value is the mean score over masks, weighed by how
  much of the patch each mask showed, minus the plain mean. It hides much at once, so patches that stand in for one another
  are found; the price is noise, which is estimated and reported. Three things differ from the paper: the score is a
  log-probability; it is centred before it is weighed, which takes out the noise of unequal mask sums and leaves the
  ranking's limit as it is; and a mask is cut out of (cells + 1) x (cells + 1) cells of one cell's size, where the paper
  stretches cells x cells of them over that area, so that its cells are a little larger.
- ``token_knockout``: the answer may not look at one image token, in any layer; everything else stays as it was. Every
  other position still reads the token, so this is the *direct* way from the patch to the answer. With ``rows="text"`` the
  question may not look either, and what is left goes through other image tokens. Nothing is put in the token's place. All
  patches share one cache of the untouched sequence, so hundreds of patches cost a few forwards. A knockout that does not
  take effect looks like a patch that does not matter; therefore the strongest one is proved in each run: with absurd keys
  and values at the blocked token the score must stay the same to the last digits, and without the block it must not.

Sources: Zeiler & Fergus 2014 (arXiv 1311.2901), section 4.2; coarse to fine after the quadtree searches of image coding;
Petsiuk et al. 2018 (arXiv 1806.07421), sections 3.1 and 3.2; Geva et al. 2023 (arXiv 2304.14767) for attention knockout;
Zhang et al. 2024 (arXiv 2411.18620) for its use between image, question and answer.

    attribute(lab, run, method="occlusion", target="red", block=2, fill="mean")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from llava_lab.attribution.method import At, Count, Fill, Maps, Scored, Seed, SquareFill, at_least, method
from llava_lab.capture import undisturbed
from llava_lab.checks import Sweep
from llava_lab.errors import LabError, OptionError
from llava_lab.models import Lab
from llava_lab.replay.alter import Altered, Tokens, open_altered
from llava_lab.replay.fills import SQUARES
from llava_lab.replay.prefix import ROWS, Prefix, agree
from llava_lab.replay.targets import Targets
from llava_lab.results import Run

Block = tuple[slice, slice]  # rows and columns of the patch grid

FLOOR = 1e-6  # of a patch's total weight, for one that no mask ever showed
SAME = 1e-6  # what a blocked token may still change, relative above 1: it should be nothing at all


# -- occlusion -------------------------------------------------------------------------


@method(
    truth="How much less likely the target becomes when the patch is covered and nothing else is changed.",
    source="Zeiler & Fergus 2014, section 4.2",
    equation=r"s(x)-s(x_{\setminus j})",
    paper="https://arxiv.org/abs/1311.2901",
    cost="one forward per block, plus one; behind the vision tower about half a forward of the language model per block",
    blind_to="patches that stand in for one another, and what the fill itself says",
    reach="pixels",
    economy={"block": 3, "stride": 2},
)
def occlusion(
    lab: Lab,
    run: Run,
    targets: Targets,
    *,
    block: Count = 1,
    stride: Count | None = None,
    fill: Fill = "grey",
    batch: Count = 8,
    at: At = "pixels",
    score: Scored = "logodds",
    seed: Seed = 0,
) -> Maps:
    grid = run.map.rows, run.map.cols
    stride = block if stride is None else stride
    if block > min(grid) or stride > block:
        raise OptionError(f"expected stride <= block <= {min(grid)}, got block {block} and stride {stride}")
    covered = run.map.coverage() > 0
    every = blocks_of(*grid, block, stride)
    blocks = [place for place in every if covered[place].any()]
    altered = open_altered(lab, run, targets, at=at, fill=fill, seed=seed, batch=batch, score=score)
    whole = altered.whole
    drops: list[Tensor] = []
    order: list[int] = []
    with Sweep("occlusion", total=len(blocks), unit="block") as done:
        for which, scores in altered.sweep(masks_of(blocks, grid)):
            drops.append(whole - scores)
            order += which
            done.step(len(which))
    values = spread(torch.cat(drops).numpy(), [blocks[i] for i in order], grid) * covered
    notes = [says(altered, f"{block}x{block} patches")]
    if done.interrupted:
        notes.append(f"Interrupted after {done.count} of {len(blocks)} blocks; patches not reached are 0.")
    if len(blocks) < len(every):
        notes.append(f"{int((~covered).sum())} patches hold only padding; they were not tried and are 0.")
    extras: dict[str, Any] = {"score": whole.tolist(), "blocks": done.count, **told(altered)}
    if altered.positions is not None:
        extras |= {"positions": altered.positions, "positions_of_full_passes": (done.count + 1) * len(run.token_ids)}
    return Maps(values, {"forward": altered.passes}, tuple(notes), extras, interrupted=done.interrupted)


def says(altered: Altered, what: str) -> str:
    """What the number is, in a sentence for the reader of the map."""
    return f"Drop of the target's {altered.scored} when {what} are {altered.filled}; negative means the answer got likelier."


def told(altered: Altered, targets: int | None = None) -> dict[str, Any]:
    """The unit of the drops and the noise floor of each of the first `targets`, for `Relevance.extras`."""
    known = {} if altered.noise is None else {"noise_floor": altered.noise[:targets].tolist()}
    return {"unit": altered.score, **known}


def blocks_of(rows: int, cols: int, block: int, stride: int) -> list[Block]:
    """Blocks of ``block x block`` patches every `stride`, the last moved back inside, so that each patch is covered."""

    def starts(length: int) -> list[int]:
        last = max(length - block, 0)
        return sorted({*range(0, last + 1, stride), last})

    return [(slice(y, y + block), slice(x, x + block)) for y in starts(rows) for x in starts(cols)]


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


# -- from coarse to fine ---------------------------------------------------------------


@method(
    truth="How much less likely the target becomes when a block is covered, blocks getting finer where the answer changed most.",
    source="Zeiler & Fergus 2014, searched from coarse to fine",
    equation=r"s(x)-s(x_{\setminus B}),\ j\in B",
    paper="https://arxiv.org/abs/1311.2901",
    cost="some tens of forwards",
    blind_to="patches whose block did not stand out, patches that stand in for one another, and what the fill itself says",
    reach="tokens",
)
def occlusion_coarse(
    lab: Lab,
    run: Run,
    targets: Targets,
    *,
    first: Count | None = None,
    keep: Count = 4,
    fill: Fill = "grey",
    batch: Count = 8,
    at: At = "pixels",
    score: Scored = "logodds",
    seed: Seed = 0,
) -> Maps:
    grid = run.map.rows, run.map.cols
    side = first_side(grid) if first is None else first
    if side > min(grid):
        raise OptionError(f"first must be at most {min(grid)} for a grid of {grid[0]}x{grid[1]}, got {side}")
    covered = run.map.coverage() > 0
    start, stop = run.segments["answer"]
    deciding = tuple(run.target(i) for i in range(stop - start))
    altered = open_altered(lab, run, (*targets, *deciding), at=at, fill=fill, seed=seed, batch=batch, score=score)
    whole = altered.whole  # of the targets and of each answer token
    values = np.zeros((len(targets), *grid), np.float32)
    rounds: list[int] = []  # blocks in each
    blocks = [block for block in tiles(grid, side) if covered[block].any()]
    interrupted = False
    while blocks and not interrupted:
        changes: dict[int, float] = {}  # of the answer, by block
        # the first blocks must all come from somewhere; later ones only refine what is there
        with Sweep("occlusion", total=len(blocks), unit="block", least=0 if rounds else 1) as done:
            for which, scores in altered.sweep(masks_of(blocks, grid)):
                drops = whole - scores
                changes |= zip(which, drops[:, len(targets) :].abs().amax(1).tolist(), strict=True)
                for drop, i in zip(drops[:, : len(targets)].numpy(), which, strict=True):
                    values[:, *blocks[i]] = drop[:, None, None] / max(int(covered[blocks[i]].sum()), 1)
                done.step(len(which))
        interrupted = done.interrupted
        if changes:
            rounds.append(len(changes))
        strong = sorted(changes, key=lambda i: -changes[i])
        divisible = [blocks[i] for i in strong if len(cut(blocks[i])) > 1]
        blocks = [part for block in divisible[:keep] for part in cut(block) if covered[part].any()]
    notes = [says(altered, "blocks of patches") + " A block's drop is shared out over its patches."]
    notes.append(
        f"Blocks of {side}x{side} first, the {keep} that changed the answer most cut in four, and so on to single patches."
    )
    if interrupted:
        notes.append(f"Interrupted after {sum(rounds)} blocks; the map is as fine as it got.")
    extras = {"score": whole[: len(targets)].tolist(), "blocks": sum(rounds), "rounds": rounds, **told(altered, len(targets))}
    return Maps(values * covered, {"forward": altered.passes}, tuple(notes), extras, interrupted=interrupted)


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


# -- RISE ------------------------------------------------------------------------------


def shown_share(name: str, value: Any) -> float:
    """The option `shown`, checked."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < 1:
        raise OptionError(f"{name} is the share of the picture a mask shows, between 0 and 1; got {value!r}")
    return float(value)


@method(
    truth="How much likelier the target is on average under random masks that show the patch than under all of them.",
    source="Petsiuk et al. 2018, on centred log-probabilities, masks cut from (cells + 1)^2 cells",
    equation=r"\mathbb{E}\,[\,s(x\odot m)\mid m_j=1\,]-\mathbb{E}\,[\,s(x\odot m)\,]",
    paper="https://arxiv.org/abs/1806.07421",
    cost="one forward per mask",
    blind_to="anything finer than a mask's cells, and differences within its own noise",
    reach="pixels",
    economy={"masks": 64},
)
def rise(
    lab: Lab,
    run: Run,
    targets: Targets,
    *,
    masks: Annotated[int, at_least(2)] = 128,
    cells: Count | None = None,
    shown: Annotated[float, shown_share] = 0.5,
    fill: SquareFill = "grey",
    at: At = "pixels",
    batch: Count = 8,
    seed: Seed = 0,
) -> Maps:
    grid = run.map.rows, run.map.cols
    cells = natural_cells(grid) if cells is None else cells
    if cells > min(grid):
        raise OptionError(f"cells must be at most {min(grid)} for a grid of {grid[0]}x{grid[1]}, got {cells}")
    altered = open_altered(lab, run, targets, at=at, fill=fill, seed=seed, fills=SQUARES, batch=batch)
    drawn = rise_masks(masks, altered.frame, cells=cells, shown=shown, seed=seed)
    scores, shares = looks(altered, drawn, masks)
    values, errors = weighed(scores, shares)
    covered = run.map.coverage() > 0
    notes = [
        "Mean log-probability of the target (for a contrast: logit difference) over masks that show the patch, minus the mean "
        f"over all; what is hidden is {altered.filled}."
    ]
    if len(scores) < masks:
        notes.append(f"Interrupted after {len(scores)} of {masks} masks; the means are over these.")
    extras = {"masks": len(scores), "standard_error": errors[:, torch.from_numpy(covered)].mean(1).tolist()}
    return Maps(values.numpy() * covered, {"forward": altered.passes}, tuple(notes), extras, interrupted=len(scores) < masks)


def natural_cells(grid: tuple[int, int]) -> int:
    """Cells a side when none are asked for: about three patches each, 2 to 8 (the paper's 7 is for whole photographs)."""
    return min(max(min(grid) // 3, 2), 8, min(grid))


def looks(altered: Altered, masks: Masks, count: int) -> tuple[Float[Tensor, "m N"], Float[Tensor, "m rows cols"]]:
    """Scores through each mask and how much of each patch it shows; fewer after Ctrl-C, raised while there are not two."""
    rows, cols = (length * altered.patch for length in altered.grid)
    scores: list[Tensor] = []
    shares: list[Tensor] = []
    with Sweep("rise", total=count, unit="mask", least=2) as done:
        for start in range(0, count, altered.batch):
            now = masks(start, min(start + altered.batch, count))
            scores.append(altered.scores(now))
            shares.append(functional.avg_pool2d(now[:, None, :rows, :cols], altered.patch)[:, 0])
            done.step(len(now))
    return torch.cat(scores[: len(shares)]), torch.cat(shares)


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


# -- token knockout --------------------------------------------------------------------


@method(
    truth="How much less likely the target becomes when the answer may not attend to the image token, in any layer.",
    source="attention knockout, Geva et al. 2023; all patches in one shared cache added here",
    equation=r"s-s_{\,A^{lh}_{pj}=0\ \mathrm{for\ all}\ l,h}",
    paper="https://arxiv.org/abs/2304.14767",
    cost="about five forwards for all patches",
    blind_to="what reached the answer through the question's words or other image tokens, and tokens that replace each other",
)
def token_knockout(
    lab: Lab,
    run: Run,
    targets: Targets,
    *,
    rows: Literal["answer", "text"] = "answer",
    block: Count = 1,
    score: Scored = "logodds",
) -> Maps:
    grid = run.map.rows, run.map.cols
    if block > min(grid):
        raise OptionError(f"block must be at most {min(grid)} for a grid of {grid[0]}x{grid[1]}, got {block}")
    blocks = blocks_of(*grid, block, block)  # padding too: its tokens are read like any other
    start = run.segments["answer"][0] - 1 if rows == "answer" else run.segments["image"][1]
    every = (*targets, run.target())  # the whole answer, so that passes do not depend on what is explained
    altered = open_altered(lab, run, every, at="projector", fill="mean", score=score)
    assert isinstance(altered, Tokens), "only the pixels are no tokens"
    with undisturbed(lab.model):
        whole = altered.read(altered.values)[0]
        altered.noise = altered.reader.floors[0]
        length = run.segments["answer"][1] - 1 - start
        size = max(ROWS // length, 1)  # variants in one pass
        prefix = Prefix(lab, run, every, tokens=altered.tokens(altered.values), room=start + (size + 1) * length, score=score)
        agree(prefix.whole, whole, altered.noise)
        parts: list[Tensor] = []
        with Sweep("token knockout", total=len(blocks), unit="block") as done:
            for first in range(0, len(blocks), size):
                now = blocks[first : first + size]
                rests = prefix.sequence[:, start:].expand(len(now), -1, -1)
                parts.append(whole - prefix.branch(rests, start, _columns(run, now, grid, start, rests.device)))
                done.step(len(now))
        drops = torch.cat(parts)
        strongest = int(drops[:, -1].abs().argmax())
        leak, change = _prove(prefix, run, blocks[strongest], grid, start)
    wanted = len(targets)
    values = spread(drops[:, :wanted].cpu().numpy(), blocks[: len(drops)], grid)
    who = "the positions that predict the answer" if rows == "answer" else "the question and the answer"
    notes = [
        f"Drop of the target's {altered.scored} when {who} may not attend to "
        f"{block}x{block} image tokens in any layer; nothing is put in their place."
    ]
    if done.interrupted:
        notes.append(f"Interrupted after {done.count} of {len(blocks)} blocks; patches not reached are 0.")
    passes = 2 + len(parts) + 3  # plain, kept, the variants, the proof
    extras = {
        "score": whole[:wanted].tolist(),
        "blocks": done.count,
        "positions": prefix.positions,
        "blocked_change": leak,
        "unblocked_change": change,
        **told(altered, wanted),
    }
    return Maps(values, {"forward": passes}, tuple(notes), extras, interrupted=done.interrupted)


def _columns(run: Run, blocks: list[Block], grid: tuple[int, int], start: int, device: torch.device) -> Tensor:
    """Which positions before `start` each variant may not look at."""
    first, last = run.segments["image"]
    columns = torch.zeros(len(blocks), start, dtype=torch.bool)
    columns[:, first:last] = masks_of(blocks, grid).flatten(1)
    return columns.to(device)


def _prove(prefix: Prefix, run: Run, block: Block, grid: tuple[int, int], start: int) -> tuple[float, float]:
    """How much absurd keys and values at one blocked token change, with the block and without it; refuses a block that leaks."""
    rest = prefix.sequence[:, start:]
    columns = _columns(run, [block], grid, start, rest.device)
    position = int(np.flatnonzero(columns[0].cpu().numpy())[0])
    quiet = prefix.branch(rest, start, columns)[0]
    with prefix.poisoned(position):
        behind = prefix.branch(rest, start, columns)[0]
        beside = prefix.branch(rest, start)[0]
    leak, change = (float(((one - quiet).abs() / quiet.abs().clamp_min(1)).max()) for one in (behind, beside))
    if not leak <= SAME:  # a score that is not a number is a leak too
        raise LabError(
            f"expected a blocked token to have no say, got a change of {leak:.2g} through it; this attention implementation "
            "does not follow the mask: load the model with sdpa or eager attention"
        )
    return leak, change
