"""Attention sinks and register tokens: positions that draw attention for what they are in the network, not for what they show.

Two marks, each by a run's own numbers and never by a list of dimensions: a position *attended* draws several times what an even
share would give it, and an *outlier* carries a state much longer than a patch has in the middle, or one dimension that holds what
elsewhere many share (a massive activation). A sink is both at once; in the vision tower that is what is called a register.
A patch that is attended and no outlier may well be the thing that was asked about.

    found = sinks(lab, run)
    found.table(), found.patches("language")

Controls: the same attention rows with their weights in random order (how often a column gathers as much by chance), the model
with the values inside each weight in random order, and the other positions of the same sequence, text and class token.

Found (`llava-lab sinks --data picturebook --n 10`, and with `--model smol`): no sink among image tokens in any layer of `tiny` or
`smol`, towers included, whose patches' states are at most 1.2 times the median's length. Up to 4.5% of `tiny`'s image tokens are
attended without being outliers. The same rule does find the sinks that `smol` inherited from its language model: its first
position (states 150 times as long, 99% of the energy in one dimension from layer 12 on) and some words of the prompt's form.

What is not done: moving a register to a token added for it, as Jiang et al. do in towers that have registers. Neither `tiny` nor
`smol` has one to move (see `llava-lab sinks`), so it could not be shown here that the move does what it should.

Sources: Xiao et al. 2023 (arXiv 2309.17453, sinks); Sun et al. 2024 (arXiv 2402.17762, massive activations); Darcet et al. 2023
(arXiv 2309.16588, registers); Kang et al. 2025 (arXiv 2503.03321, visual sinks, whose threshold of 20 for a dimension over the
root mean square is a tenth of the energy at width 4096); Jiang et al. 2025 (arXiv 2506.08010, test-time registers).
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.capture import Reducer, undisturbed, watch_attention
from llava_lab.capture.residual import watch_stream
from llava_lab.checks import Sweep, entry, is_list, made_by, number
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import has_tower_attention, language_layers, patch_grid, used_vision_layers
from llava_lab.models.weights import weights_put_back
from llava_lab.results import Run, Sinks

ATTENDED = 4.0  # times an even share
LONG = 3.0  # times the length of the middle patch's state
PEAK = 0.1  # of a state's energy in one dimension
READERS = 8  # positions that must be able to read one before its share is counted
TOLD = 8  # text tokens named


@dataclass
class Watched:
    """One part of the model in one forward: per layer what each position draws, and how its state is built."""

    causal: bool
    rng: torch.Generator
    drawn: list[Float[Tensor, " S"]] = field(default_factory=list)
    by_chance: list[Float[Tensor, " S"]] = field(default_factory=list)
    length: list[Float[Tensor, " S"]] = field(default_factory=list)
    peak: list[Float[Tensor, " S"]] = field(default_factory=list)

    def state(self, number: int, state: Tensor) -> None:
        """What layer `number` is given, (1, S, D)."""
        energy = state[0].float().square()
        whole = energy.sum(-1)
        self.length.append(whole.sqrt())
        self.peak.append(energy.amax(-1) / whole.clamp_min(torch.finfo(whole.dtype).tiny))


class Drawn(Reducer):
    """What each position draws from the others, over an even share of each row; the same with every row's weights mixed up."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def open(self, layer: int, keys: int) -> None:
        self._sums = torch.zeros(3, keys)  # drawn, drawn by chance, an even share

    def add(self, layer: int, rows: slice | Tensor, attention: Tensor) -> None:
        keys = self._sums.shape[1]
        at = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.cpu()
        weights = torch.nn.functional.pad(attention[0].mean(0).float().cpu(), (0, keys - attention.shape[-1]))
        columns = torch.arange(keys)
        others = columns < at[:, None] if self._watched.causal else columns != at[:, None]
        seen = others.sum(1, keepdim=True) + 1  # itself too
        weights = weights * others
        mixed = torch.zeros_like(weights)
        order = (torch.rand(weights.shape, generator=self._watched.rng) + ~others).argsort(1)  # those not read come last
        mixed.scatter_(1, order, weights.gather(1, (~others).to(torch.int8).argsort(dim=1, stable=True)))
        self._sums += torch.stack([weights.sum(0), mixed.sum(0), (others / seen).sum(0)])

    def close(self, layer: int, norms: Any) -> None:
        even = self._sums[2].clamp_min(torch.finfo(torch.float32).tiny)
        keys = len(even)
        readers = torch.arange(keys).flip(0) if self._watched.causal else torch.full((keys,), keys - 1)
        counted = readers >= READERS
        self._watched.drawn.append(torch.where(counted, self._sums[0] / even, 0.0))
        self._watched.by_chance.append(torch.where(counted, self._sums[1] / even, 0.0))


@entry
def sinks(
    lab: Lab,
    runs: Any,
    *,
    attended: float = ATTENDED,
    long: float = LONG,
    peak: float = PEAK,
    control: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Sinks:
    """Sinks among the image tokens of a run, or of several, in every layer of the vision tower and of the language model.

    Attended: at least `attended` times an even share, mean over heads, over the rows that may look there, a row's look at itself
    left out. Outlier: the state that the layer is given is `long` times as long as the median patch's, or one dimension holds
    `peak` of its energy and three times what it holds in the median patch. `control` reads the first run once more with mixed
    weights. A tower without attention, or whose patches are not the image tokens, is left out, with a note.
    Raises OptionError for thresholds that are not above 0, CheckpointError for a run of another model.

    >>> found = ll.sinks(lab, run, progress=False)
    >>> int(found.found.sum()), found.layers[0], found.layers[-1]
    (0, 'tower 0', 'language 5')
    """
    began = time.perf_counter()
    every: list[Run] = list(runs) if is_list(runs) else [runs]
    for one in every:
        if not isinstance(one, Run):
            raise OptionError(f"runs must be a run of this model or a list of them, got {type(one).__name__}")
        lab.inputs(one)
    if not every:
        raise OptionError("runs must hold at least one run, got an empty list")
    attended, long, peak = (number(name, value) for name, value in (("attended", attended), ("long", long), ("peak", peak)))
    if min(attended, long, peak) == 0:
        raise OptionError(f"attended, long and peak must be above 0, got {attended:g}, {long:g} and {peak:g}")
    rule = Rule(attended, long, peak)
    notes = [f"The last {READERS} positions are not counted: too few can read them."]
    tower = _reads_patches(lab)
    if not tower:
        notes.append("The vision tower is left out: it has no attention, or its patches are not the image tokens.")
    names = [f"tower {number}" for number in range(len(used_vision_layers(lab.model)) if tower else 0)]
    names += [f"language {number}" for number in range(len(language_layers(lab.model)))]
    cells: list[np.ndarray] = []
    chances: list[np.ndarray] = []
    firsts: list[np.ndarray] = []
    others = np.zeros((len(names), 2), np.int64)
    words: Counter[str] = Counter()
    mixed = np.zeros((len(names), 2), np.float32)
    with Sweep("sinks", total=len(every) + bool(control), unit="run", show=progress) as sweep:
        for one in every:
            read = [_read(part, one, rule) for part in watch(lab, one, tower=tower, seed=seed)]
            cells.append(np.concatenate([part.cells for part in read], 1))
            chances.append(np.concatenate([part.by_chance for part in read]))
            firsts.append(np.concatenate([part.first for part in read]))
            others += np.concatenate([part.others for part in read])
            words.update(read[-1].words)
            sweep.step()
        if control:
            with weights_put_back(seed) as shuffle:
                shuffle([p for p in lab.model.parameters() if p.is_floating_point()])
                anew = replace(every[0], fingerprint=lab.fingerprint)
                read = [_read(part, anew, rule) for part in watch(lab, anew, tower=tower, seed=seed)]
            mixed = np.concatenate([np.stack([part.attended, part.outlier], -1).mean(1) for part in read]).astype(np.float32)
            sweep.step()
    if sweep.interrupted:
        notes.append(f"Interrupted after {len(cells)} of {len(every)} runs; the control of mixed weights was not taken.")
    grid = every[0].map.rows, every[0].map.cols
    drawn, length, top = np.stack(cells, 1).astype(np.float32).reshape(3, len(cells), len(names), *grid)
    readings = len(cells) * len(language_layers(lab.model))
    return Sinks(
        layers=tuple(names),
        drawn=drawn,
        length=length,
        peak=top,
        limits={"attended": float(attended), "long": float(long), "peak": float(peak)},
        chance=np.mean(chances, 0).astype(np.float32),
        mixed=mixed,
        controlled=bool(control) and not sweep.interrupted,
        first=np.mean(firsts, 0).astype(np.float32),
        others=others,
        words={text: count / readings for text, count in words.most_common(TOLD)},
        map=every[0].map,
        **made_by(lab, began),
        interrupted=sweep.interrupted,
        notes=tuple(notes),
    )


def watch(lab: Lab, run: Run, *, tower: bool, seed: int = 0) -> list[Watched]:
    """One forward of the run's sequence: the tower's layers that LLaVA reads (with `tower`) and the language model's."""
    parts = [(used_vision_layers(lab.model), False)] if tower else []
    parts += [(language_layers(lab.model), True)]
    watched = [Watched(causal, torch.Generator().manual_seed(seed)) for _, causal in parts]
    model: Any = lab.model
    with undisturbed(lab.model), ExitStack() as stack:
        for (layers, _), part in zip(parts, watched, strict=True):
            stack.enter_context(watch_attention(layers, Drawn(part)))
            stack.enter_context(watch_stream(layers, part.state))
        model(**lab.inputs(run), use_cache=False, logits_to_keep=1)
    return watched


@dataclass(frozen=True)
class Rule:
    """What makes a position attended, and what an outlier."""

    attended: float
    long: float
    peak: float

    def outlier(self, long: np.ndarray, peak: np.ndarray, common: np.ndarray) -> np.ndarray:
        """Of lengths over the median patch's and of peaks, whose median over patches is `common`; bool, as `long`."""
        return (long >= self.long) | ((peak >= self.peak) & (peak >= self.long * common))


@dataclass(frozen=True)
class _Read:
    cells: np.ndarray  # 3 L P: drawn, length over the median, peak
    attended: np.ndarray  # L P
    outlier: np.ndarray  # L P
    by_chance: np.ndarray  # L: share of patches that are attended with their rows mixed
    first: np.ndarray  # L 3: the same three of the first position
    others: np.ndarray  # L 2: sinks found among the other positions, and how many there are
    words: Counter[str]


def _read(part: Watched, run: Run, rule: Rule) -> _Read:
    """Image tokens and the rest of one part, a layer a row."""
    drawn, chance, length, top = (
        torch.stack(rows).cpu().numpy()
        for rows in (part.drawn, part.by_chance, part.length[: len(part.drawn)], part.peak[: len(part.drawn)])
    )
    count = run.map.rows * run.map.cols
    start = run.segments["image"][0] if part.causal else drawn.shape[1] - count
    inside = np.zeros(drawn.shape[1], bool)
    inside[start : start + count] = True
    middle = np.median(length[:, inside], 1, keepdims=True)
    common = np.median(top[:, inside], 1, keepdims=True)
    long = length / np.maximum(middle, np.finfo(np.float32).tiny)
    outlier = rule.outlier(long, top, common)
    attended = drawn >= rule.attended
    counted = ~inside
    if part.causal:
        counted[len(counted) - READERS :] = False
    found = attended & outlier & counted
    words: Counter[str] = Counter()
    if part.causal:
        for position in np.nonzero(found)[1].tolist():
            words[f"{run.tokens[position]!r} at {position}" if position == 0 else repr(run.tokens[position])] += 1
    return _Read(
        cells=np.stack([drawn, long, top])[..., inside],
        attended=attended[:, inside],
        outlier=outlier[:, inside],
        by_chance=(chance[:, inside] >= rule.attended).mean(1),
        first=np.stack([drawn[:, 0], long[:, 0], top[:, 0]], -1),
        others=np.stack([found.sum(1), np.full(len(found), counted.sum())], -1),
        words=words,
    )


def _reads_patches(lab: Lab) -> bool:
    """Whether the tower attends, and gives one image token for each of its patches."""
    if not has_tower_attention(lab.model):
        return False
    config: Any = lab.model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    return patch_grid(lab.model) == (side, side)
