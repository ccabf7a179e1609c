"""Knockout: some positions may not attend to others, in a window of layers.

The order is always (source, target): *target attends to source* is what is cut. Published code often says it the
other way round. Everything else stays; what a position had gathered in other layers remains.

Sources: Geva et al. 2023 (arXiv 2304.14767); Zhang et al. 2024 (arXiv 2411.18620) for image, question and last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.attribution.base import layer_window, whole_number
from llava_lab.attribution.targets import Wanted, resolve_targets
from llava_lab.interventions.base import DRAWS, Plan, carry_out
from llava_lab.interventions.cut import Cut, cutting, proving
from llava_lab.interventions.places import Spots, is_patches, spots
from llava_lab.models.layout import language_layers
from llava_lab.results import Run
from llava_lab.results_interventions import Effect

if TYPE_CHECKING:
    from llava_lab.models import Lab


@contextmanager
def knocked_out(
    lab: Lab, run: Run, *, source: Any, target: Any, layers: Sequence[int] | None = None, keep_self: bool = True
) -> Iterator[Lab]:
    """The model with those attention edges cut, for every forward inside the block and for `lab.ask` with the same prompt.

    Positions are those of `run`. Raises OptionError as `knockout` does.
    """
    lab.inputs(run)
    cut, window = _cut(lab, run, source, target, layers, keep_self)
    with cutting(lab, cut, window):
        yield lab


def knockout(
    lab: Lab,
    run: Run,
    *,
    source: Any,
    target: Any,
    layers: Sequence[int] | None = None,
    metric: Wanted = None,
    keep_self: bool = True,
    draws: int = DRAWS,
    seed: int = 0,
    answer: bool = True,
) -> Effect:
    """What changes when `target` may not attend to `source` in `layers` [start, stop), None for all.

    `source`, `target`: a segment ("image", "question", ...), "last" (all that predict the answer), "all", patches
    [(row, col), ...], a bool grid (rows, cols), or positions. `metric` is what is scored, as `llava_lab.attribute`'s target:
    None is the whole answer. `keep_self` leaves every position its own key. Control: as many random patches (or other
    positions), `draws` times. Proved in the call: attention there is exactly 0, its rows sum to 1, and decoding with a
    cache gives what one whole forward gives.

    Raises OptionError (unknown segment, empty set, a layer out of range, a position left with nothing to attend to),
    TargetError, CheckpointError, and LabError when the cut did not take effect.
    """
    cut, window = _cut(lab, run, source, target, layers, keep_self)
    targets = resolve_targets(lab, run, metric)
    draws, seed = whole_number("draws", draws), whole_number("seed", seed)
    lab.inputs(run)
    edges, where = cut.check(), f"layers {window[0]} to {window[1] - 1}"
    others, name = _others(run, cut, draws if edges else 0, seed)
    notes = () if edges else (f"Nothing was cut: no position of {cut.target.name} comes after one of {cut.source.name}.",)

    @contextmanager
    def prove(proof: dict[str, float]) -> Iterator[None]:
        with cutting(lab, cut, window), proving(lab, cut, window, proof):
            yield

    plan = Plan(
        name="knockout",
        what=f"{cut.target.name} may not attend to {cut.source.name} in {where} ({edges} edges a layer).",
        options={"source": cut.source.name, "target": cut.target.name, "layers": list(window), "keep_self": keep_self},
        start=min(cut.target.positions),
        enter=partial(cutting, lab, cut, window),
        prove=prove,
        controls=[partial(cutting, lab, Cut(one, cut.target, keep_self), window) for one in others],
        control_name=name,
        notes=notes,
    )
    return carry_out(lab, run, targets, plan, seed=seed, answer=answer)


def _cut(lab: Lab, run: Run, source: Any, target: Any, layers: Any, keep_self: bool) -> tuple[Cut, tuple[int, int]]:
    cut = Cut(spots(run, source, option="source"), spots(run, target, option="target"), keep_self)
    cut.check()
    return cut, layer_window(layers, len(language_layers(lab.model)))


def _others(run: Run, cut: Cut, draws: int, seed: int) -> tuple[list[Spots], str]:
    """Random sources of the same size: patches for patches, else other positions but the first, which every row leans on."""
    count = len(cut.source.positions)
    if is_patches(run, cut.source):
        pool, name = np.arange(*run.segments["image"]), f"{count} random patches"
    else:
        free = set(range(1, max(cut.target.positions))) - set(cut.source.positions)
        pool, name = np.array(sorted(free), np.int64), f"{count} other positions at random"
    if len(pool) < count:
        return [], f"none: there are not {count} other positions to cut instead"
    if not draws:
        return [], "none"
    rng = np.random.default_rng((seed, 31))
    drawn = [tuple(sorted(rng.choice(pool, count, replace=False).tolist())) for _ in range(draws)]
    return [Spots(name, one, cut.source.length) for one in drawn], name
