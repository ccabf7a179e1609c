"""How many image tokens does the model live on, and which map finds them?

`prune` keeps k image tokens of one run, chosen by a ranking, and drops the others from a layer on: no later position can read
them, the rest keep their places. A ranking is any method's map, the rule of FastV or of VisionZip, where the truth lies, or
chance. `prune_sweep` does so on many questions: the share still answered rightly with k tokens, and what a prefill costs then.

    prune(lab, run, keep=36, by="rollout")
    prune_sweep(lab, n=40, keeps=(9, 18, 36, 72)).table()

FastV (Chen et al. 2024, arXiv 2403.06764) ranks image tokens by the attention that the last position of the prompt gives them in
the layer before they are dropped, mean over heads (as its program does; the paper speaks of the attention from all positions).
VisionZip (Yang et al. 2024, arXiv 2412.04467) ranks by the attention of the class token in the vision layer that LLaVA reads,
before the language model; its second step, which merges the tokens left over into a few more, is not done here. Both choose
before a word is said. A method's map knows the answer it explains: its ranking is a view of faithfulness, not a way to save time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from llava_lab.attribution import attribute
from llava_lab.attribution.registry import METHODS
from llava_lab.capture import undisturbed, watch_attention
from llava_lab.capture.reducers import LayerByLayer
from llava_lab.checks import Sweep, entry, made_by, whole_number
from llava_lab.errors import DataError, OptionError
from llava_lab.interventions import ablate_tokens
from llava_lab.interventions.ablate import remover, token_layer
from llava_lab.interventions.plan import DRAWS, answer_under, positions_of_patches
from llava_lab.judging.leaderboard import shipped
from llava_lab.models import Lab, layout
from llava_lab.replay.score import LOGODDS
from llava_lab.replay.targets import Wanted
from llava_lab.results import Effect, Pruning, Relevance, Run
from llava_lab.stats import best_first, exact_match
from llava_lab.worlds import picturebook

FASTV, VISIONZIP, TRUTH, RANDOM = "fastv", "visionzip", "truth", "random"
RANKINGS = (FASTV, VISIONZIP, "attention", "rollout", "gradient_input", TRUTH, RANDOM)
AT = 2  # layers that still see every token, as FastV has it
LONGEST = 48  # tokens an answer may take
FILE = "pruning.npz"
COMMAND = "llava-lab prune --model {name} --data picturebook --n 40 --save pruning.npz"


@entry
def prune(
    lab: Lab,
    run: Run,
    *,
    keep: int,
    by: Any = FASTV,
    at: str | int = AT,
    metric: Wanted = None,
    score: str = LOGODDS,
    draws: int = DRAWS,
    seed: int = 0,
    answer: bool = True,
) -> Effect:
    """The run with `keep` of its image tokens, the others dropped from layer `at` on; control: as many random ones dropped.

    `by`: a method's name, "fastv", "visionzip" or "random", a `Relevance` of this run, or numbers (rows, cols), the highest kept.
    Equal numbers are kept in random order. `at`, `metric`, `score`, `draws` and the result as in `ablate_tokens`.
    Raises OptionError for a ranking or a number of tokens that cannot be, and what `attribute` and `ablate_tokens` raise.

    >>> ll.prune(lab, run, keep=36, by="attention", draws=2, answer=False).options["patches"]
    108
    """
    values = ranking(lab, run, by, at=at, seed=seed)
    dropped = patches_dropped(run, values, keep, seed)
    options: dict[str, Any] = {"at": at, "metric": metric, "score": score, "draws": draws, "seed": seed, "answer": answer}
    return ablate_tokens(lab, run, dropped, fill="drop", **options)


def ranking(lab: Lab, run: Run, by: Any, *, at: str | int = AT, seed: int = 0) -> np.ndarray:
    """How much each patch is worth keeping, float (rows, cols)."""
    grid = run.map.rows, run.map.cols
    if isinstance(by, Relevance):
        if by.fingerprint != run.fingerprint or by.map != run.map:
            raise OptionError("by must be a map of this run, got one made for another picture or by another checkpoint")
        return by.values[0]
    if isinstance(by, str):
        if by == RANDOM:
            return np.random.default_rng((seed, 61)).random(grid)
        if by == FASTV:
            before = max(token_layer(lab, at), 1)
            return attribute(lab, run, method="attention", target=0, layers=(before - 1, before)).values[0]
        if by == VISIONZIP:
            return class_attention(lab, run)
        if by in METHODS:
            return attribute(lab, run, method=by).values[0]
        raise OptionError(f"by must be {FASTV}, {VISIONZIP}, {RANDOM}, a method ({', '.join(METHODS)}) or a map; got {by!r}")
    values = np.asarray(by, float) if isinstance(by, np.ndarray | Sequence) else np.empty(0)
    if values.shape != grid or not np.isfinite(values).all():
        raise OptionError(f"by must be finite numbers of shape {grid}, got shape {values.shape}")
    return values


def class_attention(lab: Lab, run: Run) -> np.ndarray:
    """Attention of the tower's class token to each patch in the layer LLaVA reads, mean over heads, float (rows, cols)."""
    layout.require_tower_attention(lab.model, f"ranking {VISIONZIP!r}")
    layout.require_patch_tokens(lab.model, f"ranking {VISIONZIP!r}")
    layers = layout.used_vision_layers(lab.model)
    last: list[np.ndarray] = []

    def fold(layer: int, attention: Any, _: Any) -> None:
        if layer == len(layers) - 1:
            last.append(attention[0].float().cpu().numpy())

    with undisturbed(lab.model), watch_attention(layers, LayerByLayer(fold)):
        layout.vision_tower(lab.model)(lab.inputs(run)["pixel_values"])
    patches = run.map.rows * run.map.cols
    if len(last[0]) == patches:
        raise OptionError(f"ranking {VISIONZIP!r} needs a class token in the vision tower, and this one has none")
    return last[0][-patches:].reshape(run.map.rows, run.map.cols)


def patches_dropped(run: Run, values: np.ndarray, keep: int, seed: int) -> list[tuple[int, int]]:
    """All patches but the `keep` highest. Raises OptionError for a number that keeps nothing or all."""
    count = values.size
    if not 1 <= whole_number("keep", keep) < count:
        raise OptionError(f"keep must be from 1 to {count - 1} of {count} image tokens, got {keep}")
    order = best_first(values.ravel(), np.random.default_rng((seed, 62)))
    return [(int(place) // run.map.cols, int(place) % run.map.cols) for place in np.sort(order[keep:])]


@entry
def prune_sweep(
    lab: Lab,
    *,
    n: int = 40,
    keeps: Sequence[int] | None = None,
    by: Sequence[str] = RANKINGS,
    at: str | int = AT,
    split: str = "test",
    draws: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> Pruning:
    """Share of questions answered rightly with k image tokens, by ranking, on `n` scenes of the picture book, one question each.

    `keeps` None: a sixteenth, an eighth, a quarter, a half of the tokens. "truth" ranks by how much of a patch the things that
    decide the question cover; "random" is the mean of `draws` rankings. Questions whose answer rests on an absence have no truth
    and are left out. Ctrl-C gives the questions finished so far.
    Raises OptionError for a ranking that this model cannot give, DataError for an unknown split.

    >>> ll.prune_sweep(lab, n=2, keeps=(18, 72), by=("fastv", "random"), draws=1, progress=False).right.shape
    (2, 2, 2)
    """
    n, draws, seed = whole_number("n", n, least=1), whole_number("draws", draws, least=1), whole_number("seed", seed)
    layer, total = token_layer(lab, at), lab.grid[0] * lab.grid[1]
    wanted = tuple(sorted({int(keep) for keep in (keeps or [max(1, total // share) for share in (16, 8, 4, 2)])}))
    names = tuple(dict.fromkeys((by,) if isinstance(by, str) else by))
    if not names:
        raise OptionError(f"by must name a ranking: {FASTV}, {VISIONZIP}, {TRUTH}, {RANDOM} or a method")
    begin = time.perf_counter()
    picturebook.scene(split, 0, seed=seed)
    rows: list[np.ndarray] = []
    full: list[bool] = []
    pictures: list[str] = []
    tokens = 0
    with Sweep("pruning", total=n, unit="question", least=0, show=progress) as done:
        for index in range(n):
            scene = picturebook.scene(split, index, seed=seed)
            rng = np.random.default_rng((picturebook.SPLITS[split], seed, index, 7))
            asked = [question for question in picturebook.ask_about(scene, rng, 8) if question.deciding]
            done.step()
            if not asked:
                continue
            question = asked[0]
            run = lab.ask(np.asarray(scene.picture()), question.text, max_new_tokens=LONGEST)
            if run.options["stopped"] == "interrupted":
                raise KeyboardInterrupt
            tokens = run.segments["answer"][0]
            truth = run.map.mask_to_patches(np.any(scene.masks()[list(question.deciding)], axis=0))
            right = np.zeros((len(names), len(wanted)))
            for row, name in enumerate(names):
                times = draws if name == RANDOM else 1
                for draw in range(times):
                    mixed = seed + 1000 * index + draw
                    values = truth if name == TRUTH else ranking(lab, run, name, at=at, seed=mixed)
                    for column, keep in enumerate(wanted):
                        said = _answer(lab, run, layer, patches_dropped(run, values, keep, mixed))
                        right[row, column] += exact_match(said, question.answer) / times
            rows.append(right)
            full.append(exact_match(run.answer, question.answer))
            pictures.append(scene.name)
    if not rows:
        if done.interrupted:
            raise KeyboardInterrupt
        raise DataError(f"none of {n} pictures of split {split} has a question that something in it decides; ask for more")
    count = len(layout.language_layers(lab.model))
    return Pruning(
        rankings=names,
        keeps=np.array(wanted, np.int64),
        right=np.stack(rows, -1).astype(np.float32),
        full=np.array(full),
        pictures=tuple(pictures),
        cost=np.array([prefill_share(lab, tokens, total - keep, layer) for keep in wanted]),
        tokens=total,
        at=layer,
        split=split,
        **made_by(lab, begin),
        interrupted=done.interrupted,
        notes=(
            f"Tokens are dropped after {layer} of {count} layers; with all {total} of them {np.mean(full):.0%} are right.",
            "The cost is computed: operations of the decoder's layers over the prompt, with fewer positions from that layer on.",
            "A method's map explains the finished answer; FastV's and VisionZip's rules choose before it.",
        ),
    )


@entry
def shipped_pruning(lab: Lab) -> Pruning:
    """What `prune_sweep` found on the loaded model, as it ships with this project.

    Raises DataError when none ships with it, or when it was measured on other weights than the loaded ones.

    >>> ll.shipped_pruning(lab).tokens
    144
    """
    return shipped(lab, FILE, Pruning.load, lambda found: found.fingerprint, f"measure it with: {COMMAND}")


def _answer(lab: Lab, run: Run, layer: int, dropped: list[tuple[int, int]]) -> str:
    remove = partial(remover(lab, run, "drop", layer), positions_of_patches(run, dropped), None)
    answer, interrupted = answer_under(lab, run, remove)
    if interrupted:
        raise KeyboardInterrupt
    return answer


def prefill_share(lab: Lab, tokens: int, dropped: int, layer: int) -> float:
    """Operations of the decoder's layers over a prompt of `tokens` that loses `dropped` after `layer` layers, as a share of all.

    A layer over n positions: two operations for each weight of its matrices and position, and 4 n² times the width of its heads
    for attention (FastV's formula, counted by weights).
    """
    layers, config = layout.language_layers(lab.model), layout.language_model(lab.model).config
    weights = sum(parameter.numel() for parameter in layers[0].parameters() if parameter.ndim == 2)
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def cost(n: int) -> int:
        return 2 * weights * n + 4 * n * n * width

    return (layer * cost(tokens) + (len(layers) - layer) * cost(tokens - dropped)) / (len(layers) * cost(tokens))
