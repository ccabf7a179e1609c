"""Sanity checks: destroy what a map should depend on, and see whether the map notices.

*Model*: the weights are shuffled from the top down, one group of layers after the other (language model from its
last layer to its first, then the connector, then the vision tower), and the map of the same answer is made
again. A map that survives shows the picture or the architecture, not what the model learned. Embeddings, the final
norm and the output head stay as they are. Shuffling permutes the values inside each parameter, so nothing explodes;
all of them come back bitwise, from a copy in main memory (13 GB for all of a 7B model in 16 bits).
*Question*: the same answer is put after another question. A map that survives does not depend on what was asked;
whatever it shows, it cannot say why *this* question got this answer.

Similarity to an unrelated map is not 0 when maps are smooth, so two controls stand beside the curve: random
maps, and the map itself moved, mirrored and turned at random. Passing is necessary, not sufficient: it says that a
map depends on the model, not that it is right (`faithfulness` asks that).

    found = sanity(lab, run, "attention", target="red")
    found.verdict, found.spearman

Sources: Adebayo et al. 2018 (arXiv 1810.03292), whose cascading randomisation draws new weights; label randomisation
there retrains the model on random labels, here the question plays that part, because an answer means something else
after another question. Wang et al. 2004 for structural similarity (SSIM), here with a square window.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from llava_lab.attribution.attention import ask_instead
from llava_lab.attribution.registry import attribute
from llava_lab.checks import Sweep, entry, made_by, one_picture, whole_number
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import connector_of, language_layers, vision_tower
from llava_lab.models.text import pieces
from llava_lab.models.weights import weights_put_back
from llava_lab.replay.targets import Targets, Wanted, resolve_targets
from llava_lab.results import Relevance, Run, Sanity
from llava_lab.stats import spearman, top_overlap

TESTS = ("model", "question")
OTHERS = ("How many things are there?", "What is the weather like?", "Who took this picture?")  # one is asked instead
TOP = 0.1  # share of the patches whose overlap is measured
DRAWS = 200  # control maps of each kind
WINDOW = 7  # side of the SSIM window, less on smaller grids
STEADY = (0.01**2, 0.03**2)  # SSIM's constants for values from 0 to 1


@entry
def sanity(
    lab: Lab,
    run: Run,
    method: str = "rollout",
    *,
    target: Wanted = None,
    options: Mapping[str, Any] | None = None,
    tests: str | Sequence[str] = TESTS,
    groups: int = 8,
    questions: str | Sequence[str] | None = None,
    structure: bool = False,
    seed: int = 0,
) -> Sanity:
    """Whether `method`'s map of this answer changes when the model is randomised and when the question is another.

    `options` are the method's own. `tests` may leave one of the two out. The language model is shuffled in at
    most `groups` steps. `questions` are asked instead of the run's; None takes its own words shuffled and one
    about something else. `structure` adds the structural similarity (SSIM). Cost: a map per step and question.
    Interrupting (KeyboardInterrupt) gives the finished part; the weights are put back bitwise in any case, from a
    copy in main memory.

    Raises OptionError, TargetError, CheckpointError as `attribute` does.

    >>> found = ll.sanity(lab, run, "edges", tests="question")
    >>> found.verdict["question"]
    'unchanged'
    """
    chosen = (tests,) if isinstance(tests, str) else tuple(tests)
    if not chosen or any(test not in TESTS for test in chosen):
        raise OptionError(f"tests must be some of {', '.join(map(repr, TESTS))}, got {tests!r}")
    groups, seed = whole_number("groups", groups, least=1), whole_number("seed", seed)
    targets = resolve_targets(lab, run, target)
    start = time.perf_counter()
    texts = _questions(run, questions, seed) if "question" in chosen else ()
    others = [(text, *_instead(lab, run, targets, text)) for text in texts]
    steps = parts_from_top(lab.model, groups) if "model" in chosen else []

    def explain(asked: Run, wanted: Targets) -> Relevance:
        relevance = attribute(lab, asked, method=method, target=list(wanted), **dict(options or {}))
        if relevance.interrupted:
            raise KeyboardInterrupt
        return relevance

    original = explain(run, targets)
    of_questions: dict[str, Relevance] = {}
    of_steps: dict[str, Relevance] = {}
    with Sweep(f"sanity of {method}", total=len(others) + len(steps), unit="map") as done:
        for text, other, moved_targets in others:
            of_questions[text] = explain(other, moved_targets)
            done.step()
        with weights_put_back(seed) as shuffle:
            for name, parameters in steps:
                shuffle(parameters)
                of_steps[name] = explain(replace(run, fingerprint=lab.fingerprint), targets)
                done.step()
    seen = run.map.coverage() > 0
    top = max(1, round(TOP * int(seen.sum())))
    first = original.values
    maps, question_maps = (
        np.array([relevance.values for relevance in made.values()], np.float32).reshape(-1, *first.shape)
        for made in (of_steps, of_questions)
    )
    rng = np.random.default_rng((seed, DRAWS))  # not the numbers that the method `random` draws
    random = rng.random((DRAWS, *first.shape))
    elsewhere = np.stack([[moved(values, rng) for values in first] for _ in range(DRAWS)])
    nothing = np.zeros((0, 0), np.float32)
    every = [original, *of_steps.values(), *of_questions.values()]
    notes = ["The answer stays the one that was given; it is put back into the model's mouth each time."]
    if done.interrupted:
        notes.append(f"Interrupted after {done.count} of {len(others) + len(steps)} maps.")
    if any(not np.ptp(values[seen]) for values in first):
        notes.append("A map without any differences cannot change: its similarities are 0 and say nothing.")
    return Sanity(
        method=method,
        options=original.options,
        targets=targets,
        steps=tuple(of_steps),
        questions=tuple(of_questions),
        original=first,
        maps=maps,
        question_maps=question_maps,
        spearman=rank_likeness(first, maps, seen),
        overlap=top_likeness(first, maps, seen, top),
        ssim=structure_likeness(first, maps) if structure else nothing,
        question_spearman=rank_likeness(first, question_maps, seen),
        question_overlap=top_likeness(first, question_maps, seen, top),
        question_ssim=structure_likeness(first, question_maps) if structure else nothing,
        random_spearman=rank_likeness(first, random, seen),
        moved_spearman=rank_likeness(first, elsewhere, seen),
        top=top,
        chance=top / int(seen.sum()),
        map=run.map,
        **made_by(original, start),
        seed=seed,
        passes={name: sum(relevance.passes.get(name, 0) for relevance in every) for name in original.passes},
        interrupted=done.interrupted,
        notes=tuple(notes),
    )


def with_question(lab: Lab, run: Run, question: str) -> Run:
    """The run with another question before the same answer. What the model thinks of it is not known: logprobs are NaN.

    >>> from llava_lab.judging import with_question
    >>> with_question(lab, run, "What is it?").question
    'What is it?'
    """
    one_picture(run)
    question = question.strip()
    if not question:
        raise OptionError("expected a question to ask instead, got empty text")
    other = ask_instead(lab, run, question)
    moved = other.segments["answer"][0] - run.segments["answer"][0]
    return replace(
        other,
        tokens=pieces(lab.tokenizer, other.token_ids),
        words=tuple(replace(word, start=word.start + moved, stop=word.stop + moved) for word in run.words),
        logprobs=np.full_like(run.logprobs, np.nan),
    )


def _instead(lab: Lab, run: Run, targets: Targets, question: str) -> tuple[Run, Targets]:
    """The run after another question, and the targets where they stand there."""
    other = with_question(lab, run, question)
    by = other.segments["answer"][0] - run.segments["answer"][0]
    return other, tuple(replace(target, positions=tuple(at + by for at in target.positions)) for target in targets)


def _questions(run: Run, given: str | Sequence[str] | None, seed: int) -> tuple[str, ...]:
    """What to ask instead: as given, or the run's own words shuffled and the least related of `OTHERS`."""
    if given is not None:
        texts = tuple(dict.fromkeys(text.strip() for text in ([given] if isinstance(given, str) else given)))
        if not texts or run.question in texts:
            raise OptionError(f"questions must be others than the run's own {run.question!r}, at least one; got {given!r}")
        return texts
    words = run.question.split()
    own = {word.strip(".,!?").casefold() for word in words}
    other = min(OTHERS, key=lambda text: (len(own & {word.strip("?").casefold() for word in text.split()}), OTHERS.index(text)))
    if len(set(words)) < 2:  # nothing to shuffle
        return (other,)
    rng, mixed = np.random.default_rng(seed), words
    while mixed == words:
        mixed = [words[i] for i in rng.permutation(len(words))]
    return " ".join(mixed), other


def parts_from_top(model: nn.Module, groups: int) -> list[tuple[str, list[nn.Parameter]]]:
    """What to randomise, in order, each with its name: at most `groups` of language layers, connector, vision tower."""
    layers = language_layers(model)
    edges = [int(edge) for edge in np.linspace(len(layers), 0, min(groups, len(layers)) + 1).round()]
    steps = []
    for stop, start in pairwise(edges):
        name = f"layer {start}" if stop - start == 1 else f"layers {start} to {stop - 1}"
        steps.append((name, [parameter for layer in layers[start:stop] for parameter in layer.parameters()]))
    return [
        *steps,
        ("connector", list(connector_of(model).parameters())),
        ("vision tower", list(vision_tower(model).parameters())),
    ]


def rank_likeness(first: np.ndarray, maps: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Spearman correlation of each map (M, targets, rows, cols) with `first` (targets, rows, cols), float32 (M, targets).

    Only patches where `seen` (rows, cols) count. 0 where a map is flat.
    """
    return _each(first, maps, lambda a, b: float(np.nan_to_num(spearman(a[seen], b[seen]))))


def top_likeness(first: np.ndarray, maps: np.ndarray, seen: np.ndarray, top: int) -> np.ndarray:
    """Share of the `top` strongest patches in common, float32 (M, targets)."""
    return _each(first, maps, lambda a, b: top_overlap(a[seen], b[seen], top))


def structure_likeness(first: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Structural similarity of whole grids, each scaled to 0..1 by its own range, float32 (M, targets)."""
    return _each(first, maps, ssim)


def ssim(one: np.ndarray, two: np.ndarray) -> float:
    """Mean structural similarity of two grids after each is scaled to 0..1; 1 for equal maps, 0 when just one is flat."""
    a, b = (_unit(values) for values in (one, two))
    if not np.ptp(a) or not np.ptp(b):
        return float(np.ptp(a) == np.ptp(b))
    side = min(WINDOW, *one.shape)
    views = [np.lib.stride_tricks.sliding_window_view(values, (side, side)) for values in (a, b, a * a, b * b, a * b)]
    mean_a, mean_b, square_a, square_b, product = (view.mean((2, 3)) for view in views)
    varied_a, varied_b, together = square_a - mean_a**2, square_b - mean_b**2, product - mean_a * mean_b
    light = (2 * mean_a * mean_b + STEADY[0]) / (mean_a**2 + mean_b**2 + STEADY[0])
    return float((light * (2 * together + STEADY[1]) / (varied_a + varied_b + STEADY[1])).mean())


def moved(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The map (rows, cols) rolled by a random offset other than none, mirrored and turned at random: as smooth, elsewhere."""
    rows, cols = values.shape
    down, right = divmod(int(rng.integers(1, max(rows * cols, 2))), cols)
    rolled = np.roll(values, (down, right), (0, 1))
    if rng.random() < 0.5:
        rolled = rolled[::-1]
    if rng.random() < 0.5:
        rolled = rolled[:, ::-1]
    return rolled.T if rows == cols and rng.random() < 0.5 else rolled


def _each(first: np.ndarray, maps: np.ndarray, measure: Callable[[np.ndarray, np.ndarray], float]) -> np.ndarray:
    likeness = [[measure(a, b) for a, b in zip(first, other, strict=True)] for other in maps]
    return np.array(likeness, np.float32).reshape(len(maps), len(first))


def _unit(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    return (values.astype(np.float64) - low) / (high - low) if high > low else np.zeros(values.shape)
