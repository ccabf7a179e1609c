"""Every widget, small and made by hand, for the rules that all of them keep; and the same with markup in every text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from llava_lab.results import HeadMaps
from tests.support import lens_examples
from tests.support.bench_examples import bench_example
from tests.support.compare_examples import METHODS, comparison_example, heads_example, methods_example, one_patch_each, three
from tests.support.flow_examples import two
from tests.support.widget_examples import example, make_relevance, make_run, many, spots
from widgets import CompareView, ConnectorBench, FlowView, HeadGrid, LossPlot, PatchExplorer, TokenLens, seen
from widgets.base import LabWidget

ATTACK = '<img/src=x/onerror="window.attacked=1"><script>window.attacked=1</script>'
Make = Callable[..., LabWidget]


def losses(steps: int = 4, name: str = "align", *, beside: bool = True) -> LossPlot:
    """A plot of a training, as `start` leaves it (`beside`) or in a cell that keeps the kernel."""
    plot = LossPlot(name, total=10)
    plot.running = beside
    for step in range(1, steps + 1):
        plot.told({"step": step, "loss": 4 / step, "seconds": 2.0 * step})
    plot.publish()
    return plot


def bench(**options: Any) -> ConnectorBench:
    one, second, ranks = bench_example()
    return ConnectorBench(one, second, ranks=ranks, **options)


EVERY: dict[str, Make] = {
    "PatchExplorer": lambda **options: PatchExplorer(*example(), ask=lambda patches: ("x", None), **options),
    "CompareView": lambda **options: CompareView(*comparison_example(), target="car", **options),
    "HeadGrid": lambda **options: HeadGrid(*heads_example(), **options),
    "TokenLens": lambda **options: TokenLens(*lens_examples.example(), word="car", patch=(8, 5), **options),
    "FlowView": lambda **options: FlowView(*two(), selected={"flow": [0, 1], "cell": [0, 1]}, **options),
    "ConnectorBench": bench,
    "LossPlot": lambda **options: LossPlot(**options) if options else losses(),
}


def _attacked_run() -> Any:
    return make_run(f"The {ATTACK} is red.", question=ATTACK, model=ATTACK)


def _attacked_explorer() -> PatchExplorer:
    run = _attacked_run()
    rel = make_relevance(run, spots(run), options={"fill": ATTACK}, notes=(ATTACK,))
    return PatchExplorer(run, {ATTACK: rel})


def _attacked_compare() -> CompareView:
    run = _attacked_run()
    rel = make_relevance(run, np.ones((4, 12, 12)), options={"fill": ATTACK}, notes=(ATTACK,))
    return CompareView(run, {ATTACK: rel}, scores={ATTACK: {ATTACK: 1.0}})


def _attacked_heads() -> HeadGrid:
    run, maps = one_patch_each(f"The {ATTACK} is red.")
    return HeadGrid(run, HeadMaps(maps.values, maps.targets, maps.map, ATTACK, maps.fingerprint, 0.1, (ATTACK,)), word=1)


def _attacked_lens() -> TokenLens:
    run, lens, near = lens_examples.example()
    pieces = (lens.pieces[0], *[ATTACK] * (len(lens.pieces) - 1))
    return TokenLens(run, replace(lens, pieces=pieces, notes=(ATTACK,)), near)


def _attacked_flow() -> FlowView:
    run, sweep, grid = two()
    return FlowView(run, sweep, replace(grid, clean_answer=ATTACK, notes=(ATTACK,)))


def _attacked_bench() -> ConnectorBench:
    run = _attacked_run()
    sides = [seen(f"{ATTACK}{i}", run, make_relevance(run, spots(run)), words=[[(ATTACK, 0.5)]] * 144) for i in range(2)]
    return ConnectorBench(*sides)


ATTACKED: dict[str, Callable[[], LabWidget]] = {
    "PatchExplorer": _attacked_explorer,
    "CompareView": _attacked_compare,
    "HeadGrid": _attacked_heads,
    "TokenLens": _attacked_lens,
    "FlowView": _attacked_flow,
    "ConnectorBench": _attacked_bench,
    "LossPlot": lambda: losses(name=ATTACK),
}


def _big_heads() -> HeadGrid:
    run = make_run(grid=24, size=336)
    values = np.random.default_rng(0).random((4, 32, 32, 24, 24), np.float32).astype(np.float16) / 576
    return HeadGrid(run, HeadMaps(values, run.word_targets(), run.map, run.model, run.fingerprint, 1.0))


def _big_flow() -> FlowView:
    run, sweep, grid = two()
    random, layers = np.random.default_rng(0), 32
    windows = np.stack([np.arange(layers), np.arange(1, layers + 1)], 1)
    after = random.normal(-1, 1, (3, layers, 2)).astype(np.float32)
    sweep = replace(sweep, windows=windows, centres=np.arange(layers), after=after)
    scores = random.normal(-1, 1, (2, 12, layers, 2)).astype(np.float32)
    sites = tuple(f"site {i}" for i in range(12))
    answers = np.full(scores.shape[:3], "red.")
    return FlowView(run, sweep, replace(grid, windows=windows, sites=sites, scores=scores, answers=answers))


# at the size of a 7B model: what is shown, and where it is pointed at
BIG: dict[str, tuple[Callable[[], LabWidget], str]] = {
    "PatchExplorer": (lambda: PatchExplorer(*many(8, 4)), "canvas.lab-canvas"),
    "CompareView": (lambda: CompareView(*methods_example(make_run(grid=24, size=336), METHODS)), ".lab-tile-canvas >> nth=7"),
    "HeadGrid": (_big_heads, "canvas.lab-matrix"),
    "TokenLens": (lambda: TokenLens(*lens_examples.big()), "canvas.lab-canvas"),
    "FlowView": (_big_flow, "canvas.lab-flow-cells"),
}

__all__ = ["ATTACK", "ATTACKED", "BIG", "EVERY", "bench", "losses", "three"]
