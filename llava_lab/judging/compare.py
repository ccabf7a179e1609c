"""Several methods on one example: their maps, how far they agree, what each scores, what each costs, who refused.

Every method is scored with the same fills, none of which any of them used, on the same steps and beside the
same random maps, so that their scores can be put side by side. Ctrl-C returns the methods that were done.

    result = compare(lab, run, ["rollout", "occlusion", "random"], target="red")
    result.faithfulness["occlusion"].gain, result.truth
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llava_lab.attribution.registry import METHODS, attribute
from llava_lab.checks import Sweep, entry, known, whole_number
from llava_lab.errors import LabError, OptionError
from llava_lab.judging.faithfulness import BATCH, FEWEST_FILLS, SCALES, SEEDS, STEPS, Judge, allowed_fills
from llava_lab.judging.ground_truth import deciding_share, ground_truth
from llava_lab.models import Lab
from llava_lab.replay.targets import Wanted, resolve_targets
from llava_lab.results import Comparison, Faithfulness, GroundTruth, Relevance, Run, mean_of_known
from llava_lab.stats import spearman, top_overlap

logger = logging.getLogger(__name__)

TOP_SHARE = 0.1  # of the patches, for the overlap of two maps

Options = Mapping[str, Mapping[str, Any]]


@entry
def compare(
    lab: Lab,
    run: Run,
    methods: str | Sequence[str] = "all",
    *,
    target: Wanted = None,
    options: Options | None = None,
    fills: Sequence[str] | None = None,
    steps: int = STEPS,
    seeds: int = SEEDS,
    seed: int = 0,
    scale: str = SCALES[0],
    things: np.ndarray | None = None,
    deciding: np.ndarray | None = None,
    top: int | None = None,
    batch: int = BATCH,
    progress: bool = True,
) -> Comparison:
    """Explain the same targets by every method, and score every map.

    `options` are per method, ``{"occlusion": {"block": 3}}``; `things` and `deciding` are masks, bool (things,
    height, width), of all objects and of those that decide the question (see `faithfulness`, `ground_truth`).
    `top` patches are compared for the overlap, by default a tenth. A method that cannot explain these targets is
    in ``refused`` with its reason.

    Raises OptionError (unknown method or option, no fair fills, nothing that any method could explain),
    TargetError, CheckpointError.

    >>> result = ll.compare(lab, run, ["attention", "random"], steps=2, seeds=2)
    >>> result.spearman.shape
    (2, 2)
    """
    start = time.perf_counter()
    # most methods look inside; a closed model says here what it can do instead
    assert lab.model is not None
    chosen = chosen_methods(methods, options or {}, seed)
    targets = resolve_targets(lab, run, target)
    wanted = allowed_fills(chosen.items(), fills)
    if deciding is not None:
        deciding_share(run, deciding)  # a mistake in the masks is said before the work, not after
    judge = Judge(lab, run, targets, wanted, steps=steps, seeds=seeds, seed=seed, scale=scale, things=things, batch=batch)
    patches = len(judge.patches)
    top = max(1, round(TOP_SHARE * patches)) if top is None else whole_number("top", top, least=1)
    if top > patches:
        raise OptionError(f"top must be at most {patches}, the patches of this picture, got {top}")
    judge.choose_fills(FEWEST_FILLS if fills is None else len(wanted))
    judge.measure_controls()
    maps: dict[str, Relevance] = {}
    scores: dict[str, Faithfulness] = {}
    truth: dict[str, GroundTruth] = {}
    refused: dict[str, str] = {}
    with Sweep("compare", total=len(chosen), unit="method", least=0, show=progress) as done:
        for name, method_options in chosen.items():
            try:
                relevance = attribute(lab, run, method=name, target=list(targets), **method_options)
            except LabError as error:
                refused[name] = " ".join(str(error).split())
                logger.info("%s refused: %s", name, error)
            else:
                if relevance.interrupted:
                    raise KeyboardInterrupt
                score = judge.score(relevance)
                if deciding is not None:
                    truth[name] = ground_truth(run, relevance, deciding, seed=seed)
                maps[name], scores[name] = relevance, score
            done.step()
    if not maps:
        if done.interrupted:
            raise KeyboardInterrupt
        name, reason = next(iter(refused.items()))
        raise OptionError(f"none of these methods can explain this; {name}: {reason}")
    notes = [f"The random maps and other controls took {judge.forwards} passes, once for all methods.", *judge.notes()]
    if done.interrupted:
        left = [name for name in chosen if name not in maps and name not in refused]
        notes.insert(0, f"Interrupted after {len(maps)} of {len(chosen)} methods; not reached: {', '.join(left)}.")
    return Comparison(
        maps=maps,
        faithfulness=scores,
        truth={name: truth[name] for name in maps if name in truth},
        **_agreement(maps, judge.patches, top),
        top=top,
        chance=top / patches,
        refused=refused,
        fingerprint=run.fingerprint,
        seconds=time.perf_counter() - start,
        interrupted=done.interrupted,
        notes=tuple(notes),
    )


def chosen_methods(methods: str | Sequence[str], options: Options, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Each method asked for with all its options, `seed` among them where it takes one. ``"all"`` is the whole registry."""
    wanted = list(METHODS) if methods == "all" else [methods] if isinstance(methods, str) else list(dict.fromkeys(methods))
    for name in (*wanted, *options):
        known("method", name, METHODS)
    if not wanted:
        raise OptionError(f"expected at least one method, got none; the methods are {', '.join(METHODS)}")
    chosen = {}
    for name in wanted:
        seeded = {"seed": seed} if "seed" in METHODS[name].options else {}
        chosen[name] = METHODS[name].with_defaults({**seeded, **options.get(name, {})})
    return chosen


def _agreement(maps: Mapping[str, Relevance], patches: np.ndarray, top: int) -> dict[str, np.ndarray]:
    """Rank correlation and overlap of every two maps, (methods, methods), mean over targets."""
    flat = [relevance.values.reshape(len(relevance.values), -1)[:, patches] for relevance in maps.values()]
    agreement = {"spearman": np.zeros((len(flat), len(flat))), "overlap": np.zeros((len(flat), len(flat)))}
    for i, first in enumerate(flat):
        for j, second in enumerate(flat[: i + 1]):
            pairs = list(zip(first, second, strict=True))
            values = {
                "spearman": [spearman(a, b) for a, b in pairs],
                "overlap": [1.0 if i == j else top_overlap(a, b, top) for a, b in pairs],
            }
            for kind, of_targets in values.items():
                agreement[kind][i, j] = agreement[kind][j, i] = float(mean_of_known(np.array(of_targets)))
    return agreement
