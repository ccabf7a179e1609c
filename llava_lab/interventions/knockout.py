"""Attention knockout: some positions may not attend to others, in a window of layers; and a sweep of it up the layers.

A cut is laid on the mask that each layer's attention is given, in the form it already has: boolean, additive, or
none at all. Rows and columns are positions of the sequence, counted from what the cache holds, so one cut serves a
whole forward and every later step. Weights are masked before softmax: what is left of a row still sums to one.
Each call proves, under sdpa and eager attention, that the cut entries are gone.

The order is always (source, target): *target attends to source* is what is cut. Published code often says it the
other way round. Everything else stays; what a position had gathered in other layers remains.

    effect = knockout(lab, run, source="image", target="last", layers=(0, 2))
    sweep = knockout_sweep(lab, run, flows=[("image", "question")])

Sources: Geva et al. 2023 (arXiv 2304.14767); Zhang et al. 2024 (arXiv 2411.18620) for image, question and last, and for
the sweep with three flows and a window of nine layers; transformers 5.x ``LlamaAttention``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from llava_lab.capture import Reducer, hooked, undisturbed, watch_attention
from llava_lab.capture.watch import NAME, attention_module
from llava_lab.checks import Sweep, entry, layer_window, made_by, one_of, whole_number
from llava_lab.errors import LabError, OptionError
from llava_lab.interventions.plan import DRAWS, Plan, Positions, carry_out, first_position, positions_of
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.replay.prefix import Prefix
from llava_lab.replay.score import LOGODDS, LOGPROB, NAMES, SCORES, Reader
from llava_lab.replay.targets import Wanted, resolve_targets
from llava_lab.results import Effect, FlowSweep, Run

FLOWS = (("image", "question"), ("question", "last"), ("image", "last"))
WIDTH = 9  # layers of the paper's 32- and 40-layer models
SUMS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}  # how far a row's sum may be from one
KNOWN = ("sdpa", "eager")


@dataclass(frozen=True)
class Cut:
    """`target` may not attend to `source`; with `keep_self` a position always sees itself."""

    source: Positions
    target: Positions
    keep_self: bool = True

    def blocked(self, rows: Tensor, keys: int) -> Bool[Tensor, "Q K"]:
        """Which of the columns 0 .. keys-1 each row (a position) may not read, of those the causal mask leaves it."""
        columns = torch.arange(keys, device=rows.device)
        seen = columns < rows[:, None] if self.keep_self else columns <= rows[:, None]
        return self.target.holds(rows)[:, None] & self.source.holds(columns)[None] & seen

    def check(self) -> int:
        """How many edges it cuts. Raises OptionError when some position would be left with nothing to attend to."""
        length = self.target.length + 1  # one more: the first position generated later
        rows = torch.arange(length)
        blocked = self.blocked(rows, length)
        empty = (blocked.sum(1) == rows + 1).nonzero().flatten()
        if len(empty):
            raise OptionError(
                f"expected every position to keep something to attend to, got position {int(empty[0])} with every key "
                f"blocked ({self.source.name} -> {self.target.name}); leave keep_self=True or spare a source"
            )
        return int(blocked[:-1].sum())


@contextmanager
def cutting(lab: Lab, cut: Cut, window: tuple[int, int]) -> Iterator[None]:
    """Cut in the layers [start, stop) for every forward inside the block; no hook remains on leaving."""
    check_attention(lab)

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        states = args[0] if args else kwargs["hidden_states"]
        first, rows = first_position(module, kwargs), states.shape[1]
        blocked = cut.blocked(torch.arange(first, first + rows, device=states.device), first + rows)
        if not bool(blocked.any()):
            return None  # nothing to cut: the very kernel that would have run
        return args, {**kwargs, "attention_mask": _masked(kwargs.get("attention_mask"), blocked, states)}

    with hooked(*map(attention_module, language_layers(lab.model)[slice(*window)]), before=before, with_kwargs=True):
        yield


@contextmanager
def proving(lab: Lab, cut: Cut, window: tuple[int, int], proof: dict[str, float]) -> Iterator[None]:
    """Look at the attention of the one forward inside; raise LabError unless the cut entries are exactly 0 and rows sum to 1.

    Adds to `proof`: ``edges`` (entries looked at, over layers), ``largest`` (their largest weight) and ``row_error``.
    """
    layers = language_layers(lab.model)[slice(*window)]
    eager = _implementation(lab) == "eager"
    seen = _Seen(cut, lab.dtype if eager else torch.float32)
    with hooked(*map(attention_module, layers), after=seen.after) if eager else watch_attention(layers, seen):
        yield
    if seen.layers != len(layers):
        raise LabError(f"expected the attention of {len(layers)} layers to prove the cut, got {seen.layers}; run one forward")
    proof["edges"] = proof.get("edges", 0.0) + seen.edges
    proof["largest"] = max(proof.get("largest", 0.0), seen.largest)
    proof["row_error"] = max(proof.get("row_error", 0.0), seen.row_error)


class _Seen(Reducer):
    """What the attention really was at the cut entries."""

    def __init__(self, cut: Cut, dtype: torch.dtype) -> None:
        self.cut, self.limit = cut, SUMS.get(dtype, 1e-4)
        self.layers, self.edges, self.largest, self.row_error = 0, 0.0, 0.0, 0.0

    def open(self, layer: int, keys: int) -> None:
        self.layers += 1

    def add(self, layer: int, rows: slice | Tensor, attention: Tensor) -> None:
        at = torch.arange(rows.start, rows.stop, device=attention.device) if isinstance(rows, slice) else rows
        blocked = self.cut.blocked(at, attention.shape[-1])
        touched = blocked.any(1)
        if not bool(touched.any()):
            return
        weights = attention[:, :, touched].float()
        largest = float((weights * blocked[touched]).max())
        error = float((weights.sum(-1) - 1).abs().max())
        if largest != 0 or not error <= self.limit:
            raise LabError(
                f"expected attention 0 where it was cut and rows that sum to 1, got {largest:.3g} and a row off by {error:.3g}; "
                "this model's attention does not follow its mask: load it with sdpa or eager attention"
            )
        self.edges += float(blocked.sum())
        self.row_error = max(self.row_error, error)

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None:
            raise LabError("expected eager attention to give its weights, got none; load the model with sdpa")
        self.open(0, weights.shape[-1])
        self.add(0, slice(weights.shape[-1] - weights.shape[-2], weights.shape[-1]), weights)


def check_attention(lab: Lab) -> None:
    """Raise LabError for an attention whose mask is not known here."""
    if _implementation(lab) not in (*KNOWN, NAME):
        raise LabError(
            f"expected attention by {' or '.join(KNOWN)}, got {_implementation(lab)!r}; load the model with one of them"
        )


def _implementation(lab: Lab) -> str:
    config: Any = attention_module(language_layers(lab.model)[0]).config
    return str(config._attn_implementation)


def _masked(mask: Tensor | None, blocked: Bool[Tensor, "Q K"], like: Tensor) -> Tensor:
    """`mask` with the blocked entries closed, in its own form; without one, causal and additive."""
    least = torch.finfo(like.dtype).min
    if mask is None:
        rows, keys = blocked.shape
        future = torch.ones(rows, keys, dtype=torch.bool, device=like.device).triu(keys - rows + 1)
        return torch.zeros(1, 1, rows, keys, dtype=like.dtype, device=like.device).masked_fill_(blocked | future, least)
    spare = mask.shape[-1] - blocked.shape[-1]
    blocked = nn.functional.pad(blocked, (0, spare)) if spare else blocked
    return mask & ~blocked if mask.dtype == torch.bool else mask.masked_fill(blocked, least)


def windows_around(count: int, width: int, centres: Sequence[int]) -> list[tuple[int, int]]:
    """`width` layers around each centre, cut off at both ends of a model with `count` layers."""
    return [(max(0, centre - width // 2), min(count, centre - width // 2 + width)) for centre in centres]


@contextmanager
@entry
def knocked_out(
    lab: Lab, run: Run, *, source: Any, target: Any, layers: Sequence[int] | None = None, keep_self: bool = True
) -> Iterator[Lab]:
    """The model with those attention edges cut, for every forward inside the block and for `lab.ask` with the same prompt.

    Positions are those of `run`. Raises OptionError as `knockout` does.

    >>> with ll.knocked_out(lab, run, source="image", target="last"):
    ...     lab.ask(picture, run.question).answer == run.answer
    False
    """
    lab.inputs(run)
    cut, window = _cut(lab, run, source, target, layers, keep_self)
    with cutting(lab, cut, window):
        yield lab


@entry
def knockout(
    lab: Lab,
    run: Run,
    *,
    source: Any,
    target: Any,
    layers: Sequence[int] | None = None,
    metric: Wanted = None,
    score: str = LOGODDS,
    keep_self: bool = True,
    draws: int = DRAWS,
    seed: int = 0,
    answer: bool = True,
) -> Effect:
    """What changes when `target` may not attend to `source` in `layers` [start, stop), None for all.

    `source`, `target`: a segment ("image", "question", ...), "last" (all that predict the answer), "all", patches
    [(row, col), ...], a bool grid (rows, cols), or positions. `metric` is what is scored, as `llava_lab.attribute`'s target:
    None is the whole answer; `score` is "logodds" or "logprob" (`llava_lab.replay.score`). `keep_self` leaves every position
    its own key. Control: as many random patches (or other positions), `draws` times. Proved in the call: attention there is
    exactly 0, its rows sum to 1, and decoding with a cache gives what one whole forward gives.

    Raises OptionError (unknown segment, empty set, a layer out of range, a position left with nothing to attend to),
    TargetError, CheckpointError, and LabError when the cut did not take effect.

    >>> effect = ll.knockout(lab, run, source="image", target="last", draws=0, answer=False)
    >>> bool(effect.change[0] < -0.5), effect.proof["largest"]
    (True, 0.0)
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
        controls=[partial(cutting, lab, Cut(source, cut.target, keep_self), window) for source in others],
        control_name=name,
        notes=notes,
    )
    return carry_out(lab, run, targets, plan, seed=seed, answer=answer, score=score)


def _cut(lab: Lab, run: Run, source: Any, target: Any, layers: Any, keep_self: bool) -> tuple[Cut, tuple[int, int]]:
    cut = Cut(positions_of(run, source, option="source"), positions_of(run, target, option="target"), keep_self)
    cut.check()
    return cut, layer_window(layers, len(language_layers(lab.model)))


def _others(run: Run, cut: Cut, draws: int, seed: int) -> tuple[list[Positions], str]:
    """Random sources of the same size: patches for patches, else other positions but the first, which every row leans on."""
    count = len(cut.source.positions)
    start, stop = run.segments["image"]
    # some of the picture's patches, not all of them
    if all(start <= position < stop for position in cut.source.positions) and count < stop - start:
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
    return [Positions(name, positions, cut.source.length) for positions in drawn], name


@entry
def knockout_sweep(
    lab: Lab,
    run: Run,
    *,
    flows: Sequence[tuple[Any, Any]] = FLOWS,
    width: int | None = None,
    step: int = 1,
    metric: Wanted = None,
    score: str = LOGODDS,
) -> FlowSweep:
    """Cut each flow (source, target) in a window of `width` layers around every `step`-th layer.

    `width`: None is the paper's nine of thirty-two, in proportion, and at least one. Windows are cut off at the ends.
    `metric` and `score` as in `knockout`; the relative change of the probability is kept beside whatever is scored.
    The part of the sequence before the first target is computed once for each flow. Every cell is proved as in
    `knockout`. Ctrl-C gives the cells that are done, the others NaN.

    Raises OptionError, TargetError, CheckpointError and LabError as `knockout` does.

    >>> sweep = ll.knockout_sweep(lab, run, flows=[("image", "last")], step=3)
    >>> sweep.flows, sweep.after.shape
    (('image -> last',), (1, 2, 1))
    """
    began = time.perf_counter()
    count = len(language_layers(lab.model))
    width = max(1, round(WIDTH * count / 32)) if width is None else whole_number("width", width, least=1)
    step = whole_number("step", step, least=1)
    if width > count:
        raise OptionError(f"width must be at most {count}, the model's layers, got {width}")
    cuts = [
        Cut(positions_of(run, source, option="source"), positions_of(run, target, option="target"))
        for source, target in _pairs(flows)
    ]
    targets = resolve_targets(lab, run, metric)
    lab.inputs(run)
    for cut in cuts:
        cut.check()
    centres = list(range(0, count, step))
    windows = windows_around(count, width, centres)
    after = np.full((len(cuts), len(windows), len(targets)), np.nan, np.float32)
    relative = np.full_like(after, np.nan)
    before = np.full(len(targets), np.nan, np.float32)
    read, chance = Reader(targets, one_of("score", score, SCORES)), Reader(targets, LOGPROB)
    floor: list[float] = []
    proof: dict[str, float] = {}
    passes = 0
    with undisturbed(lab.model), Sweep("knockout sweep", total=after[..., 0].size, unit="cell") as sweep:
        for i, cut in enumerate(cuts):
            tail = Prefix(lab, run, targets, min(cut.target.positions))
            logits = tail.logits()[None]
            before, whole = read(logits)[0].cpu().numpy(), chance(logits)[0].double()
            floor = read.floors[0].tolist()
            for j, window in enumerate(windows):
                with cutting(lab, cut, window), proving(lab, cut, window, proof):
                    logits = tail.logits()[None]
                after[i, j] = read(logits)[0].cpu().numpy()
                relative[i, j] = torch.expm1(chance(logits)[0].double() - whole).float().cpu().numpy()
                sweep.step()
            passes += tail.passes + 1
    notes: tuple[str, ...] = (f"A cell cuts {width} layers around its centre; change: the {NAMES[score]}, after less before.",)
    if sweep.interrupted:
        notes += (f"Interrupted after {sweep.count} of {after[..., 0].size} cells; the rest is NaN.",)
    return FlowSweep(
        flows=tuple(f"{cut.source.name} -> {cut.target.name}" for cut in cuts),
        windows=np.array(windows, np.int64),
        centres=np.array(centres, np.int64),
        targets=targets,
        before=before,
        after=after,
        proof=proof,
        **made_by(run, began),
        passes={"forward": passes},
        interrupted=sweep.interrupted,
        notes=notes,
        score=score,
        noise_floor=tuple(floor),
        chance=np.where([bool(target.against_ids) for target in targets], np.float32(np.nan), relative),
    )


def _pairs(flows: Any) -> list[tuple[Any, Any]]:
    pairs = list(flows) if isinstance(flows, Sequence) and not isinstance(flows, str) else []
    if not pairs or not all(isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2 for pair in pairs):
        raise OptionError(f"flows must be pairs (source, target) such as {FLOWS[0]!r}, got {flows!r}")
    return [(source, target) for source, target in pairs]
