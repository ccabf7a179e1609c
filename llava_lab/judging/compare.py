"""Several methods on one example: their maps, how far they agree, what each scores, what each costs, who refused.

Every method is scored with the same fills, none of which any of them used, on the same steps and beside the
same random maps, so that their scores can be put side by side. Ctrl-C returns the methods that were done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from llava_lab.attribution.registry import METHODS, attribute
from llava_lab.checks import whole_number
from llava_lab.errors import LabError, OptionError
from llava_lab.judging.faithfulness import BATCH, FEWEST_FILLS, SCALES, SEEDS, STEPS, Judge, allowed_fills
from llava_lab.judging.ground_truth import deciding_share, ground_truth
from llava_lab.replay.targets import Targets, Wanted, resolve_targets
from llava_lab.results import Comparison, Faithfulness, GroundTruth, Relevance, Run, mean_of_known
from llava_lab.stats import spearman, top_overlap

if TYPE_CHECKING:
    from llava_lab.models import Lab

logger = logging.getLogger(__name__)

PATIENCE = 2.0  # seconds before a progress bar appears
TOP_SHARE = 0.1  # of the patches, for the overlap of two maps
INTERRUPTED = "Interrupted"  # how the note of a sweep that Ctrl-C cut short begins

Options = Mapping[str, Mapping[str, Any]]


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
    """
    start = time.perf_counter()
    # most methods look inside; a closed model says here what it can do instead
    assert lab.model is not None
    chosen = chosen_methods(methods, options or {}, seed)
    targets = resolve_targets(lab, run, target)
    wanted = allowed_fills(list(chosen.values()), fills)
    if deciding is not None:
        deciding_share(run, deciding)  # a mistake in the masks is said before the work, not after
    judge = Judge(lab, run, targets, wanted, steps=steps, seeds=seeds, seed=seed, scale=scale, things=things, batch=batch)
    patches = len(judge.patches)
    top = max(1, round(TOP_SHARE * patches)) if top is None else whole_number("top", top, least=1)
    if top > patches:
        raise OptionError(f"top must be at most {patches}, the patches of this picture, got {top}")
    judge.choose_fills(FEWEST_FILLS if fills is None else len(wanted))
    judge.measure_controls()
    found = _Found()
    interrupted = _work_through(lab, run, targets, chosen, judge, deciding, found, progress)
    if not found.maps:
        name, reason = next(iter(found.refused.items()))
        raise OptionError(f"none of these methods can explain this; {name}: {reason}")
    return Comparison(
        maps=found.maps,
        faithfulness=found.faithfulness,
        truth=found.truth,
        **_agreement(found.maps, judge.patches, top),
        top=top,
        chance=top / patches,
        refused=found.refused,
        fingerprint=run.fingerprint,
        seconds=time.perf_counter() - start,
        interrupted=interrupted,
        notes=_notes(judge, chosen, found, interrupted),
    )


def chosen_methods(methods: str | Sequence[str], options: Options, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Each method asked for with all its options, `seed` among them where it takes one. ``"all"`` is the whole registry."""
    wanted = list(METHODS) if methods == "all" else [methods] if isinstance(methods, str) else list(dict.fromkeys(methods))
    for name in (*wanted, *options):
        if name not in METHODS:
            raise OptionError(f"no method {name!r}; the methods are {', '.join(METHODS)}")
    if not wanted:
        raise OptionError(f"expected at least one method, got none; the methods are {', '.join(METHODS)}")
    chosen = {}
    for name in wanted:
        seeded = {"seed": seed} if "seed" in METHODS[name].options else {}
        chosen[name] = METHODS[name].with_defaults({**seeded, **options.get(name, {})})
    return chosen


class _Found:
    """What is finished so far; it outlives an interrupt."""

    def __init__(self) -> None:
        self.maps: dict[str, Relevance] = {}
        self.faithfulness: dict[str, Faithfulness] = {}
        self.truth: dict[str, GroundTruth] = {}
        self.refused: dict[str, str] = {}


def _work_through(
    lab: Lab,
    run: Run,
    targets: Targets,
    chosen: Mapping[str, dict[str, Any]],
    judge: Judge,
    deciding: np.ndarray | None,
    found: _Found,
    progress: bool,
) -> bool:
    """Explain and score by one method after the other; True when Ctrl-C ended it. Raised on when nothing was done."""
    with tqdm(total=len(chosen), desc="compare", unit="method", delay=PATIENCE, leave=False, disable=not progress) as bar:
        try:
            for name, options in chosen.items():
                bar.set_postfix_str(name, refresh=False)
                try:
                    rel = attribute(lab, run, method=name, target=list(targets), **options)
                except LabError as error:
                    found.refused[name] = " ".join(str(error).split())
                    logger.info("%s refused: %s", name, error)
                else:
                    if any(note.startswith(INTERRUPTED) for note in rel.notes):  # the method kept what it had
                        raise KeyboardInterrupt
                    score = judge.score(rel)
                    truth = None if deciding is None else ground_truth(run, rel, deciding, seed=judge.seed)
                    found.maps[name], found.faithfulness[name] = rel, score
                    found.truth |= {} if truth is None else {name: truth}
                bar.update()
        except KeyboardInterrupt:
            if not found.maps:
                raise
            return True
    return False


def _agreement(maps: Mapping[str, Relevance], patches: np.ndarray, top: int) -> dict[str, np.ndarray]:
    """Rank correlation and overlap of every two maps, (methods, methods), mean over targets."""
    flat = [rel.values.reshape(len(rel.values), -1)[:, patches] for rel in maps.values()]
    found = {"spearman": np.zeros((len(flat), len(flat))), "overlap": np.zeros((len(flat), len(flat)))}
    for i, one in enumerate(flat):
        for j, two in enumerate(flat[: i + 1]):
            pairs = list(zip(one, two, strict=True))
            values = {
                "spearman": [spearman(a, b) for a, b in pairs],
                "overlap": [1.0 if i == j else top_overlap(a, b, top) for a, b in pairs],
            }
            for kind, several in values.items():
                found[kind][i, j] = found[kind][j, i] = float(mean_of_known(np.array(several)))
    return found


def _notes(judge: Judge, chosen: Mapping[str, Any], found: _Found, interrupted: bool) -> tuple[str, ...]:
    notes = [f"The random maps and other controls took {judge.forwards} passes, once for all methods.", *judge.notes()]
    if interrupted:
        left = [name for name in chosen if name not in found.maps and name not in found.refused]
        notes.insert(0, f"{INTERRUPTED} after {len(found.maps)} of {len(chosen)} methods; not reached: {', '.join(left)}.")
    return tuple(notes)
