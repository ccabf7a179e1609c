"""One small example of every kind of result, by its class: for saving, showing and drawing."""

from __future__ import annotations

from typing import Any

import numpy as np

from llava_lab import results
from llava_lab.geometry import PictureMap, View
from llava_lab.results import Saved
from tests.support import ablation_examples, flow_examples, lens_examples, score_examples
from tests.support.compare_examples import one_patch_each
from tests.support.widget_examples import make_relevance, make_run, spots

ABOUT: dict[str, Any] = {"model": "m", "fingerprint": "f"}
NASTY = "<b>red & 'blue'</b>"  # a model may say this; it must be text wherever it is shown


def examples() -> dict[type[Saved], Saved]:
    """Every public result by its class."""
    run, sweep, grid = flow_examples.two()
    _, lens, near = lens_examples.example()
    # a picture that was looked at twice, as LLaVA-NeXT does
    tiles = View("tiles", 4, True, PictureMap.make(288, 288, size=64, rows=3, cols=4, mode="pad"), 1, (0, 0, 0), (0, 0, 0, 0))
    views = (View("overview", 4, False, run.map), tiles)
    values = spots(run).astype(np.float32)
    looked_twice: dict[str, Any] = {"views": views, "view_values": (values, np.ones((4, 3, 4), np.float32))}
    every: list[Saved] = [
        make_run(f"The car is {NASTY}"),
        make_relevance(run, values, notes=(NASTY,), extras={"mass": [0.5]}, **looked_twice),
        one_patch_each()[1],
        sweep,
        grid,
        lens,
        near,
        score_examples.example_score(notes=(NASTY,)),
        score_examples.example_truth(),
        score_examples.example_comparison(),
        score_examples.example_board(),
        score_examples.example_sanity(),
        ablation_examples.example_ablation(notes=(NASTY,)),
        score_examples.example_benchmark(notes=(NASTY,)),
        *_interventions(run),
        *_probes(run),
        *_connectors(),
        *_generated(),
    ]
    return {type(result): result for result in every}


def _interventions(run: results.Run) -> list[Saved]:
    two = np.array([-0.25, -1.5], np.float32)
    targets = flow_examples.two_targets(run)
    effect = results.Effect(
        name="knockout",
        what=f"No attention from {NASTY} to the last position.",
        options={"layers": [0, 2]},
        targets=targets,
        before=two,
        after=two - np.float32(1),
        control=np.array([[-0.5, -2.0], [-0.25, -1.0]], np.float32),
        control_name="2 random patches",
        answer_before="red",
        answer_after="blue",
        answered=True,
        proof={"edges": 288.0, "largest": 0.0},
        side={},
        map=run.map,
        seed=0,
        passes={"forward": 4},
        seconds=0.5,
        **ABOUT,
    )
    changed = np.array([[True, False], [True, True]])
    rates = results.ControlRates(
        "cover", {}, 2, 3, 1.0, 0.5, (0.34, 1.0), (0.1, 0.9), changed, np.array([4, 5]), seed=0, seconds=1.0, **ABOUT
    )
    right = np.array([[[1, 0, 1], [1, 1, 1]], [[0, 0, 0.5], [0.5, 1, 1]]], np.float32)
    full, cost = np.array([True, True, False]), np.array([0.3, 0.6])
    pruning = results.Pruning(
        ("fastv", "random"), np.array([9, 36]), right, full, ("a", "b", "c"), cost, 144, 2, "test", seconds=1.0, **ABOUT
    )
    return [effect, rates, pruning, *_inside(run)]


def _inside(run: results.Run) -> list[Saved]:
    rng = np.random.default_rng(0)
    drawn, length, peak = rng.random((3, 2, 2, run.map.rows, run.map.cols), np.float32)
    drawn[0, 1, 2, 3], length[0, 1, 2, 3], drawn[0, 1, 4, 5] = 9.0, 7.0, 5.0
    limits, words = {"attended": 4.0, "long": 3.0, "peak": 0.1}, {NASTY: 0.5}
    sinks = results.Sinks(
        ("tower 0", "language 0"), drawn, length, peak / 20, limits, np.zeros(2, np.float32), np.zeros((2, 2), np.float32), True,
        np.ones((2, 3), np.float32), np.array([[0, 2], [3, 80]]), words, map=run.map, seconds=1.0, **ABOUT
    )  # fmt: skip
    heads, mlps = rng.normal(size=(2, 3, 4)).astype(np.float32), rng.normal(size=(2, 3)).astype(np.float32)
    heads[0, 0, 0] = np.nan
    target = flow_examples.two_targets(run)[0]
    nodes = results.NodeScores(
        ("image", "last"), heads, mlps, True, "clean", 0, target, "grey", 3.0, -2.0, passes={"forward": 9}, seconds=1.0, **ABOUT
    )
    kept, chance = np.array([[0.4, 0.6], [1, 1]], np.float32), np.array([[[0, 0.1], [1, 1]]], np.float32)
    circuit = results.Circuit(
        np.array([0.1, 1.0]), np.array([3, 30]), kept, chance, np.array([0.5, 0.4], np.float32), 30, 12,
        (NASTY, "MLP 0 -> output"), np.array([2.0, -1.0], np.float32), 0.9, 5, "color", 0, seconds=1.0, **ABOUT
    )  # fmt: skip
    changed, stays = np.zeros((2, 2, 5, 1, 4), np.float32)
    changed[:, 0, 0, :3], changed[:, 4], stays[:, :3, 0, 1:], stays[:, 3] = 1, 1, 1, np.nan
    interchange = results.Interchange(
        np.array([0, 3]), changed, stays, "color", "kind", "last", 8, 256, 32, seconds=1.0, **ABOUT
    )  # fmt: skip
    return [sinks, nodes, circuit, interchange]


def _probes(run: results.Run) -> list[Saved]:
    rng = np.random.default_rng(0)
    words = ("car", NASTY)
    activation = results.WordActivation(
        rng.random((2, 3, 12, 12), np.float32), words, (5, 6), (0, 1, 2), run.map, seconds=0.1, **ABOUT
    )
    present, sure = np.array([True, False, True, False]), np.array([0.9, 0.2, 0.6, 0.7], np.float32)
    check = results.HallucinationCheck(words * 2, np.array([0, 0, 1, 1], np.int32), present, sure, 0.75, 0.5, 1.0, **ABOUT)
    share = rng.random((3, 3, 2), np.float32)
    naming = results.NamingShare(
        (0, 4), share, np.stack([share / 2, share], -1), share[:, :2], share[0, :2], (30, 60, 30), 5, "test", 6,
        seconds=0.1, lens="jacobian", **ABOUT,
    )  # fmt: skip
    scores = results.ProbeScores(
        stages=("before", "after"),
        right=rng.random((2, 2, 8), np.float32),
        counts=np.full(8, 4, np.int32),
        shuffled=np.full((2, 2, 3), 0.3, np.float32),
        majority=0.4,
        widths=np.array([[16, 8], [32, 8]], np.int32),
        classes=("car", "house"),
        per="patch",
        folds=2,
        seed=0,
        **ABOUT,
    )
    square = np.eye(2, dtype=np.float32)
    measures = rng.random((2, 5), np.float32)
    measures[0, 3] = np.nan
    geometry = results.TokenGeometry(
        ("before", "after"), measures, measures / 2, square, square, square, square,
        norms=np.ones((2, 3, 4), np.float32), sinks=np.zeros((2, 3, 4), bool), neighbours=4, chance_overlap=0.1,
        chance_position=0.25, rows=2, cols=2, pictures=3, seed=0, **ABOUT,
    )  # fmt: skip
    return [activation, check, naming, scores, geometry]


def _connectors() -> list[Saved]:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    linearized = results.Linearized(
        weight=weight, bias=weight[:, 0], full=weight, directions=np.eye(2, dtype=np.float32), feature_mean=np.zeros(3),
        output_mean=np.ones(2), rank=2, ranks=(1, 2), rank_r2=np.array([0.5, 0.75]), r2=0.75, r2_interval=(0.7, 0.8),
        token_r2=np.full((2, 2), 0.75, np.float32), variants=("linear", "mean"), variant_r2=np.array([0.75, 0.0]),
        cosine=np.array([0.9, 0.1]), norm_error=np.array([0.1, 0.5]), train_r2=0.8, ridge=1e-3, pictures=(8, 4), tokens=(32, 16),
        connector="mlp2x_gelu", language="l", vision="v", seconds=0.1, **ABOUT,
    )  # fmt: skip
    tokens = np.linspace(0.5, 1, 4)
    local = results.LocalLinearity(
        tokens, 1 - tokens, tokens / 10, 2, 0.5, 0.25, 0.25, 0.5, np.array([1, 0.5], np.float32), 0.05, 4, seconds=0.1, **ABOUT
    )
    cells = np.array([[0.1, 0.2], [0.0, 0.4]])
    around = np.stack([cells - 0.05, cells + 0.05], -1)
    effect = results.LinearEffect(
        ("linear", "mean"), ("all", "color"), cells, around, cells, around, -cells, -around[..., ::-1],
        original_accuracy=np.array([0.9, 0.8]), questions=np.array([20, 10]), pictures=5, data="picturebook", split="test",
        seed=0, seconds=0.1, **ABOUT,
    )  # fmt: skip
    return [linearized, local, effect]


def _generated() -> list[Saved]:
    claims = np.array([[[5, 1, 0], [2, 0, 1]], [[3, 0, 0], [0, 0, 0]]])
    made = results.Generated(
        folder="data", teacher=NASTY, terms="t", source={"world": "picturebook", "n": 3}, kinds=("detail", "brief"),
        asked=np.array([3, 3]), kept=np.array([2, 3]), turns=np.array([2, 3]), passing=np.array([1, 3]),
        reasons=("format", "leak"), rejected=np.array([[1, 0], [0, 0]]), types=("kind", "color"), claims=claims,
        chair=np.array([[1, 6, 1, 4], [0, 3, 0, 3]]), used=(10, 20), seed=0, finished=True, seconds=0.5,
    )  # fmt: skip
    two = np.array([[0.5, 0.25], [0.75, 0.5]])
    pays = results.CheckPays(
        arms=("all", "passed"), seeds=(0, 1), types=("all", "color"), rows=np.array([[9, 9], [4, 5]]), accuracy=two,
        by_type=two, interval=two, last_loss=two, pairs=("passed - all",), effect=np.array([0.25]),
        picture_interval=np.array([[0.1, 0.4]]), seed_interval=np.array([[0.0, 0.5]]), p_adjusted=np.array([0.04]),
        verdict=np.array([1]), lies_found=np.array([9, 10, 0, 20]), setup={"lie": 0.3, "steps": 2, "batch": 3}, start="tiny",
        questions=8, notes=(NASTY,),
    )  # fmt: skip
    return [made, pays]
