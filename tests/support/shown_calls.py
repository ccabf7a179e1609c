"""A call of every public figure and widget that works, on results put together by hand: no model.

calls = shown_calls()
plots.overlay(**calls["overlay"])
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from matplotlib import pyplot

from llava_lab import results
from llava_lab.results import Saved
from tests.support import bench_examples, compare_examples, flow_examples, lens_examples, score_examples
from tests.support.public_calls import WRONG
from tests.support.result_examples import examples
from tests.support.widget_examples import example, make_relevance, make_run, spots


def wrong_values() -> dict[str, Any]:
    """What is wrong nearly anywhere: plain values, and results where they do not belong."""
    run, every = make_run(), examples()
    rel = make_relevance(run, spots(run))
    other = make_run("The house is blue.", question="What is it?", grid=6)
    return WRONG | {
        "a run": run,
        "another picture's run": other,
        "a run without a picture": replace(run, picture=np.zeros((0, 0, 3), np.uint8)),
        "a map": rel,
        "a map of another picture": make_relevance(other, np.ones((4, 6, 6))),
        "a map of other weights": replace(rel, fingerprint="f"),
        "a map of nothing": replace(rel, values=rel.values[:0], targets=()),
        "a map with holes": replace(rel, values=rel.values * np.float32(np.nan)),
        "a list of maps": [rel, rel],
        "maps by number": {1: rel},
        "maps by name": {"rollout": rel},
        "an effect": every[results.Effect],
        "a list of effects": [every[results.Effect]],
        "a class": results.Run,
        "a picture": np.zeros((40, 60, 3), np.uint8),
        "a grey picture": np.zeros((40, 60), np.uint8),
        "a cube": np.ones((2, 2, 2)),
        "a table of texts": np.array([["a", "b"], ["c", "d"]]),
        "two lists of other lengths": [[1, 2], [1]],
        "a pair the wrong way round": (1.0, 0.0),
        "a set": {1, 2},
    }


def shown_calls() -> dict[str, dict[str, Any]]:
    """Every argument of each, by name."""
    every: dict[type[Saved], Any] = examples()
    run = make_run()
    mass = {"mass": [{"image": 0.5, "question": 0.25}] * 4, "null_mass": [{"image": 0.4}]}
    rel = make_relevance(run, spots(run), extras=mass)
    look: dict[str, Any] = {"run": run, "rel": rel, "opacity": 0.75, "smooth": False, "cmap": "viridis", "ax": None}
    side_by_side = {name: value for name, value in look.items() if name not in ("rel", "cmap")}
    board, score, sanity = score_examples.example_board(), score_examples.example_score(), score_examples.example_sanity()
    ablation, sweep = every[results.Ablation], flow_examples.two()[1]
    whole = replace(sweep, after=np.nan_to_num(sweep.after))
    cells: dict[str, Any] = {"result": ablation, "split": ablation.splits[0], "type": "all", "ax": None}
    figures: dict[str, dict[str, Any]] = {
        "accuracies": cells,
        "differences": cells,
        "sweep": {"result": ablation, "ax": None},
        "journey": {"run": run, "widths": (64, 128), "ax": None},
        "matrices": {"given": {"A": np.eye(2)}, "labels": ("the", "car"), "ax": None, "digits": 2},
        "patch_mosaic": {"picture": run.picture, "where": run.map},
        "sinks": {"result": every[results.Sinks], "ax": None},
        "circuit": {"result": every[results.Circuit], "ax": None},
        "interchange": {"result": every[results.Interchange], "ax": None},
        "mark_sinks": {"ax": pyplot.subplots()[1], "run": replace(run, fingerprint="f"), "result": every[results.Sinks]}
        | {"number": 0, "part": "language"},
        "overlay": {**look, "target": 0, "scale": (0.0, 1.0), "colorbar": True, "title": "t"},
        "words_figure": {**look, "columns": 5},
        "compare_figure": {**side_by_side, "maps": {"rollout": rel}, "target": 0, "columns": 4},
        "segment_bars": {"run": run, "rel": rel, "ax": None},
        "color_scale": {"maps": [rel]},
        "dots": {"board": board, "measure": "gain", "kind": "all", "ax": None, "sort": "gain"},
        "leaderboard": {"board": board, "measures": ("gain",), "kind": "all", "ax": None},
        "by_type": {"board": board, "measure": "gain", "ax": None},
        "agreement": {"result": board, "which": "spearman", "ax": None},
        "curve": {"score": score, "kind": "deletion", "target": 0, "fill": "mean", "ax": None},
        "curves": {"score": score, "target": 0, "fill": "mean", "ax": None},
        "sanity": {"score": sanity, "target": 0, "ax": None},
        "sanities": {"scores": [sanity], "target": 0, "ax": None},
        "sanity_maps": {"scores": [sanity], "target": 0, "ax": None},
        "comparison": {"result": score_examples.example_comparison(), "target": 0, "ax": None},
        "mean_sweep": {"sweeps": [whole], "target": 0, "seed": 0},
        "flows": {"sweeps": [whole], "target": 0, "ax": None},
        "stays": {"shares": {"half": [(0.5, 0.25, 0.75)]}, "xlabel": "x", "ax": None},
        "pruning": {"result": every[results.Pruning], "ax": None},
    }
    return figures | widget_calls()


def widget_calls() -> dict[str, dict[str, Any]]:
    """Every argument of each widget, by name."""
    run, maps = example()
    compared, comparison = compare_examples.comparison_example()
    heads_run, heads = compare_examples.heads_example()
    lens_run, lens, near = lens_examples.example()
    flow_run, sweep, grid = flow_examples.two()
    one, two, ranks = bench_examples.bench_example()
    offered = SimpleNamespace(name="one", picture=run.picture, code="one", questions=("What is it?",))
    session = SimpleNamespace(
        name="m", knows="", methods={"rollout": "a truth"}, first=("rollout",), chosen=("rollout",), gallery=lambda: [offered],
        ask=lambda *given, **options: run, explain=lambda run, method: None,
    )  # fmt: skip
    by_name = dict(comparison.maps)
    return {
        "PatchExplorer": {"run": run, "relevance": maps, "ask": lambda patches: ("x", None), "word": "car", "opacity": 0.5}
        | {"smooth": False, "beats_random": {"rollout": True}},
        "CompareView": {"run": compared, "maps": by_name, "scores": {next(iter(by_name)): {"gain": 0.1}}, "target": 0}
        | {"beats_random": {next(iter(by_name)): True}, "agreement": np.eye(len(by_name)), "method": next(iter(by_name))}
        | {"sort": "gain", "opacity": 0.5, "smooth": True},
        "HeadGrid": {"run": heads_run, "maps": heads, "word": 0, "layer": 0, "head": 0, "opacity": 0.5, "megabytes": 1.0},
        "TokenLens": {"run": lens_run, "lens": lens, "near": near, "word": "car", "state": lens.states[0], "patch": (1, 2)}
        | {"kind": "logit", "opacity": 0.5},
        "FlowView": {"run": flow_run, "sweep": sweep, "grid": grid, "target": 0, "component": 0, "selected": {"flow": [0, 1]}},
        "ConnectorBench": {"one": one, "two": two, "ranks": ranks, "rank": 0},
        "seen": {"name": "a", "run": run, "relevance": maps["random"], "target": 0, "words": (), "r2": 0.5},
        "LossPlot": {"name": "loss", "total": 10, "log": False},
        "Explore": {"session": session, "picture": offered},
    }
