"""Circuits: which few edges carry an answer from the picture to the word, and how faithfully they do it alone.

Edges of the language model (`llava_lab.interventions.edges`) are ranked by edge attribution patching on some pairs of pictures
that differ in one variable. Then only the best ones are kept, all others carrying the other picture's values, and on pairs that
were not ranked on it is measured how much of the score is left. Beside it: random circuits of equal size.

    found = circuit(lab, variable="color", n=6, held=6)
    found.cpr, found.cmd, found.random_cpr

As MIB scores circuits: f(k) is the circuit's score over the whole model's, both from the score with every edge cut; CPR is the
area under f over the share k of edges kept (1 is the whole model's from the start on, more is possible), CMD the area between f
and 1 (0 is best). MIB has text only; its weighting of edges is not used: an edge is an edge, at the image's positions or at the
text's. Edges are ranked by the size of their score, either sign.

Measured on `tiny` (colour, 2 pairs ranked, 2 judged, as in lesson 12): 1% of 6,628 edges keeps 0.66 of the difference of the
logits, 2% 0.87, 5% 0.96, and 20% at random 0.02; CPR 0.98 beside 0.41, CMD 0.02 beside 0.59 over the lesson's six sizes.

Sources: Mueller et al. 2025 (arXiv 2504.13151, MIB); Syed et al. 2023 (arXiv 2310.10348); Hanna et al. 2024 (arXiv 2403.17806).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.capture import undisturbed
from llava_lab.checks import Sweep, entry, is_list, whole_number
from llava_lab.errors import OptionError
from llava_lab.interventions.edges import GROUPS, Graph
from llava_lab.interventions.pairs import Pair, drawn_pairs
from llava_lab.interventions.patching import corrupted_pixels
from llava_lab.replay.targets import resolve_targets
from llava_lab.results import Circuit, Run
from llava_lab.stats import spearman

if TYPE_CHECKING:
    from llava_lab.models import Lab

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of edges, MIB's
TOLD = 40  # edges named


@entry
def circuit(
    lab: Lab,
    pairs: Any = None,
    *,
    variable: str = "color",
    n: int = 6,
    held: int = 6,
    steps: int = 0,
    shares: Sequence[float] = SHARES,
    draws: int = 3,
    checked: int = 0,
    split: str = "test",
    seed: int = 0,
    progress: bool = True,
) -> Circuit:
    """Edges ranked on `n` pairs, and the faithfulness of the best of them on `held` others.

    `pairs`: a list of (run, other picture or run, metric), ranked on its first `n`; None draws pairs of the picture book that
    differ in `variable` ("color", "kind", "place") and that the model answers rightly. `steps` 0 ranks by the slope at the clean
    reading (EAP), above 0 by its mean along the line from the other picture's tokens (EAP-IG). `shares` of all edges are kept.
    `draws` random circuits of each size. With `checked`, so many random edges are cut one at a time in the first pair, and the
    rank correlation of what is lost with the estimate is kept. Ctrl-C gives the pairs that are done.

    Raises OptionError for pairs or shares that cannot be, DataError where too few pairs are answered rightly, LabError for a
    model whose layers are not Llama's.

    >>> found = ll.circuit(lab, n=1, held=1, shares=(0.05, 1.0), draws=1, progress=False)
    >>> found.faithfulness.shape, bool(abs(found.faithfulness[-1, 0] - 1) < 1e-3)
    ((2, 1), True)
    """
    began = time.perf_counter()
    n, held, draws = whole_number("n", n, least=1), whole_number("held", held, least=1), whole_number("draws", draws)
    steps, checked = whole_number("steps", steps), whole_number("checked", checked)
    sizes = sorted({float(share) for share in shares})
    if not sizes or not all(0 < share <= 1 for share in sizes):
        raise OptionError(f"shares must be numbers above 0 and at most 1, got {list(shares)}")
    every = (
        drawn_pairs(lab, variable, n=n + held, split=split, seed=seed, progress=progress)
        if pairs is None
        else _given(lab, pairs, seed)
    )
    if len(every) <= n:
        raise OptionError(f"pairs must be more than the n={n} that edges are ranked on, got {len(every)}")
    ranked, judged = every[:n], every[n : n + held]
    rng = np.random.default_rng((seed, 91))
    faithful: list[list[float]] = []
    by_chance: list[list[list[float]]] = []
    lost, guessed = [], []
    with (
        undisturbed(lab.model),
        Sweep("circuit", total=len(ranked) + len(judged), unit="pair", show=progress, least=n + 1) as sweep,
    ):
        total = None
        for pair in ranked:
            graph = Graph(lab, pair)
            scores = graph.scores(steps)
            total = scores if total is None else total + scores
            if pair is ranked[0] and checked:
                live = np.flatnonzero(graph.shape.live)
                for edge in rng.choice(live, min(checked, len(live)), replace=False):
                    kept = np.ones(len(scores), bool)
                    kept[edge] = False
                    lost.append(graph.clean - graph.run(kept))
                    guessed.append(scores[edge])
            sweep.step()
        assert total is not None
        shape = graph.shape
        live = np.flatnonzero(shape.live)
        order = live[np.argsort(-np.abs(total[live]), kind="stable")]
        counts = [max(1, round(share * len(live))) for share in sizes]
        chance = [[rng.permutation(live)[:count] for count in counts] for _ in range(draws)]
        for pair in judged:
            graph = Graph(lab, pair)

            def share_of(edges: np.ndarray, graph: Graph = graph) -> float:
                kept = np.zeros(len(shape.live), bool)
                kept[edges] = True
                return (graph.run(kept) - graph.corrupt) / (graph.clean - graph.corrupt)

            own = [share_of(order[:count]) for count in counts]
            random = [[share_of(edges) for edges in drawn] for drawn in chance]
            faithful.append(own)
            by_chance.append(random)
            sweep.step()
    way = f"EAP-IG, {steps} steps" if steps else "EAP"
    notes = [f"Ranked on {len(ranked)} pairs by {way}, judged on {len(faithful)} others."]
    if sweep.interrupted:
        notes.append(f"Interrupted after {len(faithful)} of {len(judged)} pairs.")
    top = order[:TOLD]
    in_image = np.zeros(len(shape.live), bool)
    begin = 0
    for block in shape.blocks:
        size = int(np.prod(block))
        in_image[begin : begin + size].reshape(block)[..., GROUPS.index("image")] = True
        begin += size
    assert total is not None  # there is a pair
    return Circuit(
        shares=np.array(sizes),
        counts=np.array(counts, np.int64),
        faithfulness=np.array(faithful, np.float32).T,
        chance=np.array(by_chance, np.float32).transpose(1, 2, 0)
        if draws
        else np.zeros((0, len(sizes), len(faithful)), np.float32),
        image_share=np.array([in_image[order[:count]].mean() for count in counts], np.float32),
        edges=len(live),
        image_edges=int(in_image[live].sum()),
        names=tuple(shape.name(int(edge)) for edge in top),
        scores=(total[top] / len(ranked)).astype(np.float32),
        agreement=spearman(np.array(guessed), np.array(lost)) if len(lost) > 2 else 0.0,
        checked=len(lost),
        variable=variable if pairs is None else "given pairs",
        steps=steps,
        model=lab.name,
        fingerprint=lab.fingerprint,
        seconds=time.perf_counter() - began,
        interrupted=sweep.interrupted,
        notes=tuple(notes),
    )


def _given(lab: Lab, pairs: Any, seed: int) -> list[Pair]:
    """Pairs of the user's own."""
    if not is_list(pairs) or not all(isinstance(one, tuple) and len(one) == 3 and isinstance(one[0], Run) for one in pairs):
        raise OptionError("pairs must be a list of (run, other picture or run, metric), or None for drawn ones")
    made = []
    for run, other, metric in pairs:
        lab.inputs(run)
        made.append(Pair(run, corrupted_pixels(lab, run, other, seed)[0], resolve_targets(lab, run, metric)[0]))
    return made
