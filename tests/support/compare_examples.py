"""Many methods' maps, a comparison and head maps made by hand for the widget tests, no model anywhere.

Each method's map is a spot of its own width round the word's thing, from sharp to useless, so that tests and
eyes know the right order. `heads` has one head per word that looks at the thing, and many that look nowhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llava_lab.results import Comparison, Faithfulness, GroundTruth, HeadMaps, Relevance, Run, Target
from tests.support.widget_examples import make_relevance, make_run, single_cell, spots
from widgets import CompareView

METHODS = (
    "rollout",
    "relevancy",
    "attention",
    "value_attention",
    "localization_heads",
    "integrated_gradients",
    "gradcam",
    "tam",
    "direct_logit",
    "occlusion",
    "rise",
    "shapley",
    "random",
    "center",
    "edges",
)
SIGNED = ("integrated_gradients", "direct_logit", "occlusion", "shapley")
CONTROLS = ("random", "center", "edges")
FRACTIONS = np.linspace(0, 1, 5)
GREY = np.full((288, 288, 3), 128, np.uint8)  # a picture that leaves a map its colours
CELLS = {"one": 17, "two": 60, "three": 101}  # of `three`: the one bright patch of each
SCORES = {
    "one": {"gain": 0.1, "deletion": 0.3},
    "two": {"gain": 0.7, "deletion": 0.5},
    "three": {"gain": 0.4, "deletion": 0.1},
}
LAYERS, HEADS = 6, 4  # of `one_patch_each`


def contrast_of(run: Run) -> Target:
    """Why "red." and not "blue", at the answer's last word."""
    word = run.target(run.words[-1])
    return Target("contrast", "red, not blue", word.positions, word.token_ids, (9,))


def methods_example(run: Run | None = None, names: tuple[str, ...] = METHODS) -> tuple[Run, dict[str, Relevance]]:
    """A map per word and for the whole answer by each method; those that are signed also explain a contrast."""
    run = make_run() if run is None else run
    random = np.random.default_rng(7)
    maps = {}
    for place, name in enumerate(names):
        words = spots(run, width=22 + 4 * place, seed=place, noise=0.05 + 0.03 * place)
        values = np.concatenate([words, words.mean(0, keepdims=True)])
        targets = [*run.word_targets(), run.target(None)]
        if name in CONTROLS:
            values = random.random(values.shape)
        if name in SIGNED:
            values = np.concatenate([values, (words[-1] - 0.6 * words[1])[None]]) - 0.08
            targets.append(contrast_of(run))
        passes = {"forward": 1 + 10 * place}
        maps[name] = make_relevance(run, 0.01 * (place + 1) * values, targets, method=name, options={}, passes=passes)
    return run, maps


def comparison_example(run: Run | None = None) -> tuple[Run, Comparison]:
    """Eight methods with curves that go from good to useless, a ground truth, and one method that was refused."""
    names = ("rollout", "relevancy", "attention", "gradcam", "occlusion", "shapley", "random", "center")
    run, given = methods_example(run, names)
    targets = (*run.word_targets(), run.target(None))
    maps = {}
    for name, rel in given.items():
        maps[name] = make_relevance(
            run, rel.values[: len(targets)], targets, method=name, options={"layers": None}, passes=rel.passes
        )
    quality = dict(zip(names, (0.9, 0.7, 0.5, 0.3, 0.8, 0.6, 0.0, -0.1), strict=True))
    comparison = Comparison(
        maps=maps,
        faithfulness={name: _faithfulness(run, name, targets, quality[name]) for name in names},
        truth={name: _truth(run, name, targets, quality[name]) for name in names},
        spearman=np.array([[1 - abs(quality[a] - quality[b]) for b in names] for a in names]),
        overlap=np.eye(len(names)),
        top=14,
        chance=0.1,
        refused={"relative_attention": "method 'relative_attention' needs a question"},
        fingerprint=run.fingerprint,
        seconds=1.5,
        notes=("The random maps took 80 passes, once for all methods.",),
    )
    return run, comparison


def heads_example(run: Run | None = None, *, layers: int = 6, heads: int = 4) -> tuple[Run, HeadMaps]:
    """Head maps in which, for word w, layer 2, head w (of `heads`) looks at the word's thing with most of its attention."""
    run = make_run() if run is None else run
    random = np.random.default_rng(1)
    words, rows, cols = spots(run, noise=0).shape
    values = random.random((words, layers, heads, rows, cols)) ** 3
    values *= 0.1 / values.sum((-2, -1), keepdims=True)
    for word, spot in enumerate(spots(run, noise=0)):
        values[word, 2, word % heads] += 0.7 * spot / spot.sum()
    notes = ("Made by hand.",)
    targets = run.word_targets()
    return run, HeadMaps(values.astype(np.float16), targets, run.map, run.model, run.fingerprint, 0.2, notes)


def three(**options: Any) -> CompareView:
    """Three methods on a grey picture, each with one bright patch of its own."""
    run = make_run(picture=GREY)
    return CompareView(run, {name: single_cell(run, [cell] * 4) for name, cell in CELLS.items()}, **{"scores": SCORES, **options})


def one_patch_each(words: str = "The car is red.") -> tuple[Run, HeadMaps]:
    """Word w, layer l, head h looks only at patch 10 w + 4 l + h, with a share of 0.9 for layer 1 and 0.1 elsewhere."""
    run = make_run(words, picture=GREY)
    values = np.zeros((len(run.words), LAYERS, HEADS, 144), np.float16)
    for word in range(len(run.words)):
        for layer in range(LAYERS):
            for head in range(HEADS):
                values[word, layer, head, patch_of(word, layer, head)] = 0.9 if layer == 1 else 0.1
    values = values.reshape(len(run.words), LAYERS, HEADS, 12, 12)
    return run, HeadMaps(values, run.word_targets(), run.map, run.model, run.fingerprint, 0.1, ("Made by hand.",))


def patch_of(word: int, layer: int, head: int) -> int:
    return 10 * word + 4 * layer + head


def _faithfulness(run: Run, name: str, targets: tuple[Target, ...], quality: float) -> Faithfulness:
    count, fills, seeds, things = len(targets), 2, 3, 2
    down, up = 1 - FRACTIONS ** (1 / (1 + quality)), FRACTIONS ** (1 / (1 + quality))
    shape = (count, fills, 1)
    random = np.broadcast_to(np.stack([1 - FRACTIONS, FRACTIONS])[:, None, None, None], (2, seeds, count, fills, len(FRACTIONS)))
    gain = (FRACTIONS ** (1 / (1 + quality))).mean() - 0.5
    fields: dict[str, Any] = {
        "deletion": np.tile(down, shape).astype(np.float32),
        "insertion": np.tile(up, shape).astype(np.float32),
        "random": random.astype(np.float32),
        "center": random[:, 0].astype(np.float32),
        "whole": np.ones(count),
        "filled": np.zeros((count, fills)),
        "interval": np.tile([gain - 0.05, gain + 0.05], (count, 1)),
        "beats_random": np.full(count, quality > 0.4),
        "effects": np.tile(np.array([0.8, 0.1], np.float32), (count, fills, 1)),
        "claims": np.tile(np.array([quality, 0.3], np.float32), (count, 1)),
        "random_claims": np.zeros((seeds, things), np.float32),
    }
    passes = {"forward": 40, "backward": 0}
    about: dict[str, Any] = {"scale": "probability", "fingerprint": run.fingerprint, "passes": passes, "seconds": 0.4}
    return Faithfulness(name, {}, targets, ("grey", "blur"), FRACTIONS, **fields, **about)


def _truth(run: Run, name: str, targets: tuple[Target, ...], quality: float) -> GroundTruth:
    measures = ("pointing", "mass", "auc", "iou")
    values = np.tile(
        [float(quality > 0.4), max(0.0, 0.6 * quality), 0.5 + 0.4 * quality, max(0.0, 0.5 * quality)], (len(targets), 1)
    )
    deciding = np.zeros((run.map.rows, run.map.cols), np.float32)
    return GroundTruth(name, {}, targets, measures, values, np.full((3, 4), 0.2), np.full(4, 0.3), deciding, run.fingerprint)
