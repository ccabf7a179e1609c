"""Clean and corrupted readings of one sequence: the pairs that patching, attribution patching and circuits start from.

A pair is a run, another picture, and what is scored: best the logit of what was said minus that of what would be said about the
other picture, at the first token where the two answers part. Everything else in the sequence is the same, so that what differs
between the readings is the picture alone.

    pairs = drawn_pairs(lab, "color", n=8)

Source of the form: minimal pairs of Zhang and Nanda 2023 (arXiv 2309.16042), there in text; MIB (Mueller et al. 2025, arXiv
2504.13151).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from torch import Tensor

from llava_lab.checks import Sweep
from llava_lab.errors import DataError
from llava_lab.results import Run, Target
from llava_lab.stats import same_answer
from llava_lab.worlds.twins import Twins, twins

if TYPE_CHECKING:
    from llava_lab.models import Lab

LONGEST = 24  # tokens of an answer
TRIED = 3  # pairs drawn for each that is wanted


@dataclass(frozen=True)
class Pair:
    """A run, the pixels of another picture, and the score."""

    run: Run
    pixels: Float[Tensor, "1 3 S S"]
    target: Target
    twins: Twins | None = None
    other: Run | None = None


def drawn_pairs(
    lab: Lab, variable: str = "color", *, n: int, split: str = "test", seed: int = 0, begin: int = 0, progress: bool = False
) -> list[Pair]:
    """`n` twins of the picture book (`llava_lab.worlds.twins`) that the model answers rightly, both of each.

    The target is the first token where its two answers part. Raises DataError where too few are answered so.
    """
    pairs: list[Pair] = []
    tried = 0
    with Sweep(f"pairs that differ in {variable}", total=n, unit="pair", show=progress, least=n) as sweep:
        for twin in twins(variable, n=TRIED * n, split=split, seed=seed, begin=begin):
            tried += 1
            run, other = (
                lab.ask(np.asarray(one.picture()), twin.question.text, max_new_tokens=LONGEST) for one in (twin.scene, twin.other)
            )
            right = same_answer(run.answer, twin.question.answer) and twin.other_short in other.answer
            if right and (target := parting(run, other)) is not None:
                pairs.append(Pair(run, lab.pixels(other.picture, run.map.mode), target, twin, other))
                sweep.step()
            if len(pairs) == n:
                return pairs
    raise DataError(f"of {tried} twins that differ in {variable} the model answers {len(pairs)} rightly, and {n} were asked for")


def parting(run: Run, other: Run) -> Target | None:
    """The first token where two answers to one question part, as a contrast; None where one is the other's beginning."""
    start, stop = run.segments["answer"]
    begin, end = other.segments["answer"]
    if start != begin:
        return None
    for at, (one, two) in enumerate(zip(run.token_ids[start:stop].tolist(), other.token_ids[begin:end].tolist(), strict=False)):
        if one != two:
            text = f"{run.tokens[start + at].strip()}, not {other.tokens[begin + at].strip()}"
            return Target("contrast", text, (start + at - 1,), (one,), (two,))
    return None
