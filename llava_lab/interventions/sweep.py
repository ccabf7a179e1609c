"""The knockout sweep: which way information flows, by layer. A window of layers is moved up the model for each flow.

Source: Zhang et al. 2024 (arXiv 2411.18620), three flows and a window of nine layers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from llava_lab.attribution.base import Targets, whole_number
from llava_lab.attribution.occlusion_levels import PATIENCE
from llava_lab.attribution.targets import Wanted, resolve_targets
from llava_lab.capture import undisturbed
from llava_lab.errors import OptionError
from llava_lab.interventions.cut import Cut, cutting, proving, windows_around
from llava_lab.interventions.places import spots
from llava_lab.interventions.tail import Tail
from llava_lab.models.layout import language_layers
from llava_lab.results import Run
from llava_lab.results_interventions import FlowSweep

if TYPE_CHECKING:
    from llava_lab.models import Lab

FLOWS = (("image", "question"), ("question", "last"), ("image", "last"))
WIDTH = 9  # layers of the paper's 32- and 40-layer models


def knockout_sweep(
    lab: Lab,
    run: Run,
    *,
    flows: Sequence[tuple[Any, Any]] = FLOWS,
    width: int | None = None,
    step: int = 1,
    metric: Wanted = None,
) -> FlowSweep:
    """Cut each flow (source, target) in a window of `width` layers around every `step`-th layer.

    `width`: None is the paper's nine of thirty-two, in proportion, and at least one. Windows are cut off at the ends.
    The part of the sequence before the first target is computed once for each flow. Every cell is proved as in
    `knockout`. Ctrl-C gives the cells that are done, the others NaN.

    Raises OptionError, TargetError, CheckpointError and LabError as `knockout` does.
    """
    began = time.perf_counter()
    count = len(language_layers(lab.model))
    width = max(1, round(WIDTH * count / 32)) if width is None else whole_number("width", width, least=1)
    step = whole_number("step", step, least=1)
    if width > count:
        raise OptionError(f"width must be at most {count}, the model's layers, got {width}")
    cuts = [Cut(spots(run, source, option="source"), spots(run, target, option="target")) for source, target in _pairs(flows)]
    targets = resolve_targets(lab, run, metric)
    lab.inputs(run)
    for cut in cuts:
        cut.check()
    centres = list(range(0, count, step))
    windows = windows_around(count, width, centres)
    before, after, proof, passes, stopped = _measure(lab, run, targets, cuts, windows)
    notes: tuple[str, ...] = (f"A cell cuts {width} layers around its centre; change: the log-probability, after less before.",)
    if stopped:
        notes += (f"Interrupted after {int((~np.isnan(after[..., 0])).sum())} of {after[..., 0].size} cells; the rest is NaN.",)
    return FlowSweep(
        flows=tuple(f"{cut.source.name} -> {cut.target.name}" for cut in cuts),
        windows=np.array(windows, np.int64),
        centres=np.array(centres, np.int64),
        targets=targets,
        before=before,
        after=after,
        proof=proof,
        model=run.model,
        fingerprint=run.fingerprint,
        passes={"forward": passes},
        seconds=time.perf_counter() - began,
        interrupted=stopped,
        notes=notes,
    )


def _measure(
    lab: Lab, run: Run, targets: Targets, cuts: list[Cut], windows: list[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray, dict[str, float], int, bool]:
    """Scores before (targets,) and after (flows, windows, targets), the proof, forwards, and whether Ctrl-C ended it."""
    after = np.full((len(cuts), len(windows), len(targets)), np.nan, np.float32)
    before = np.full(len(targets), np.nan, np.float32)
    proof: dict[str, float] = {}
    passes, stopped = 0, False
    with undisturbed(lab.model), tqdm(total=after[..., 0].size, desc="knockout sweep", delay=PATIENCE, leave=False) as progress:
        try:
            for i, cut in enumerate(cuts):
                tail = Tail(lab, run, targets, min(cut.target.positions))
                before = tail.score().cpu().numpy()
                for j, window in enumerate(windows):
                    with cutting(lab, cut, window), proving(lab, cut, window, proof):
                        after[i, j] = tail.score().cpu().numpy()
                    progress.update()
                passes += tail.passes + 1
        except KeyboardInterrupt:
            stopped = True
            if np.isnan(after).all():
                raise
    return before, after, proof, passes, stopped


def _pairs(flows: Any) -> list[tuple[Any, Any]]:
    pairs = list(flows) if isinstance(flows, Sequence) and not isinstance(flows, str) else []
    if not pairs or not all(isinstance(one, Sequence) and not isinstance(one, str) and len(one) == 2 for one in pairs):
        raise OptionError(f"flows must be pairs (source, target) such as {FLOWS[0]!r}, got {flows!r}")
    return [(one[0], one[1]) for one in pairs]
