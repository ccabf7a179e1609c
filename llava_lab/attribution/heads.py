"""Heads: which ones a method looks at, every head's own map, and the few that point at one place in the picture.

``heads`` has the same three forms everywhere: None is all of them, numbers are these heads of every layer in the
window, and pairs ``((14, 24), (14, 13))`` are exactly these (layer, head).

`head_maps` is the raw material of the layer x head view. One forward; of each layer only the predicting rows and the
image columns are kept, averaged over a word's tokens: in float16 1.2 MB per word at LLaVA-1.5-7B, where the whole
attention is 1.6 GB. It says where each head looks, not what it moves from there (`value_attention`) nor whether the
answer depends on it (`knockout`).

``localization_heads``: a head qualifies when much of its attention goes to the picture (more than the elbow of all
heads' sorted image shares) and is ranked by how much its map hangs together: the entropy of the 8-connected regions
above the map's mean, lowest first. The best `top` maps are smoothed and averaged. The first two layers are left out, as
the authors do, where the model has more than four. Every cell above the mean belongs to a region; the authors' program asks
that it lie 0.001 above, a number for maps of 24 x 24 that would leave nothing of a small head's: faint cells that it drops
can join or add regions here, so a ranking may differ from theirs. A head can point firmly at the wrong thing, and the
choice for one run is one sample; `find_localization_heads` votes over several runs, as the paper does over a thousand.

Sources: Kang et al. 2025 (arXiv 2503.06287); spatial entropy after Peruzzo et al. 2022 (arXiv 2206.04636).

    heads = find_localization_heads(lab, runs)
    attribute(lab, run, method="attention", heads=heads)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.attribution.method import Count, Heads, Maps, Window, at_least, method, refuse_contrast
from llava_lab.capture import HeadRows, PickedRows, fuse_heads, undisturbed, watch_attention
from llava_lab.capture.watch import attention_module
from llava_lab.checks import Sweep, entry, is_list, is_whole, layer_window, made_by, same_model, shown, whole_number
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.replay.targets import Targets, Wanted, predicting_rows, resolve_targets
from llava_lab.results import HeadMaps, Run

EARLY = 2  # layers left out at the bottom
DEEP = 4  # of a model with more layers than this
REACH = 3  # of the smoothing, patches to each side: a kernel of 7
VOTES = 10  # heads each run may vote for


# -- which heads ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """Layers to look at and heads to look with, checked against the model."""

    layers: tuple[int, ...]
    heads: tuple[int, ...] | None = None  # the same of every layer; None is all
    pairs: tuple[tuple[int, int], ...] = ()  # or exactly these (layer, head), and `layers` are theirs

    def of(self, layer: int) -> tuple[int, ...] | None:
        """The heads wanted of one layer, None for all."""
        return tuple(head for at, head in self.pairs if at == layer) if self.pairs else self.heads

    @property
    def which(self) -> str:
        if self.pairs:
            return "the heads " + ", ".join(f"L{layer}H{head}" for layer, head in self.pairs)
        return "all heads" if self.heads is None else "heads " + ", ".join(map(str, self.heads))

    @property
    def window(self) -> str:
        return f"layers {self.layers[0]} to {self.layers[-1]}"

    def __str__(self) -> str:
        return self.which if self.pairs else f"{self.which} of {self.window}"


def choose_heads(lab: Lab, layers: Window, heads: Heads) -> Chosen:
    """The options `layers` and `heads` as what they mean for this model. Raises OptionError."""
    decoder = language_layers(lab.model)
    config: Any = attention_module(decoder[0]).config
    count = int(config.num_attention_heads)

    def is_head(value: Any) -> bool:
        return is_whole(value) and 0 <= int(value) < count

    def is_pair(value: Any) -> bool:
        return is_list(value) and len(value) == 2 and all(map(is_whole, value))

    several: Sequence[Any] = heads if is_list(heads) else (heads,)
    if len(several) and all(map(is_pair, several)):
        if layers is not None:
            raise OptionError(f"(layer, head) pairs name their layers already; leave layers=None, got {layers!r}")
        pairs = tuple(dict.fromkeys((int(layer), int(head)) for layer, head in several))
        if all(0 <= layer < len(decoder) and is_head(head) for layer, head in pairs):
            return Chosen(tuple(sorted({layer for layer, _ in pairs})), None, pairs)
    window = tuple(range(*layer_window(layers, len(decoder))))
    if heads is None:
        return Chosen(window)
    if len(several) and all(map(is_head, several)):
        return Chosen(window, tuple(int(head) for head in several))
    raise OptionError(
        f"heads must be numbers from 0 to {count - 1}, or None for all, or (layer, head) pairs like "
        f"((0, 1), (2, 3)) with layers from 0 to {len(decoder) - 1}; got {shown(heads)}"
    )


@dataclass(frozen=True)
class Rows:
    """Attention of some query rows: fused over everything chosen, and part by part."""

    fused: Float[Tensor, "Q K"]
    parts: Float[Tensor, "M Q K"]  # a layer each, or a (layer, head) pair each, in the order chosen


def read_rows(lab: Lab, inputs: dict[str, Tensor], at: Sequence[int], chosen: Chosen, fusion: str = "mean") -> Rows:
    """One forward of `inputs`: attention of the rows `at` (ascending), heads fused; layers, or pairs, averaged.

    ``max`` and ``min`` are taken over each layer's heads, and over all pairs when pairs are given.
    """
    decoder = language_layers(lab.model)
    watched = [decoder[layer] for layer in chosen.layers]
    reducer: HeadRows | PickedRows = HeadRows(at) if chosen.pairs else PickedRows(at, fusion=fusion, heads=chosen.heads)
    with undisturbed(lab.model), watch_attention(watched, reducer):
        lab.model(**inputs, use_cache=False, logits_to_keep=1)
    if isinstance(reducer, PickedRows):
        parts = torch.stack([reducer.layers[i][0] for i in range(len(watched))])
        return Rows(parts.mean(0), parts)
    parts = torch.stack([reducer.layers[chosen.layers.index(layer)][0, head] for layer, head in chosen.pairs])
    return Rows(fuse_heads(parts[None], fusion)[0], parts)


# -- every head's map -----------------------------------------------------------------------


@entry
def head_maps(lab: Lab, run: Run, *, target: Wanted = "words") -> HeadMaps:
    """The attention of every language-model head to every patch, a map per target, layer and head.

    `target` as in `attribute`, but without contrasts: attention is the same for every word predicted at a
    position. Values are shares of a head's whole attention, so each map sums to the head's share on the picture.

    Raises TargetError (not in the answer, a contrast), CheckpointError (the run was made by another checkpoint).

    >>> maps = ll.head_maps(lab, run, target="answer")
    >>> maps.values.shape[0], maps.values.shape[3:]
    (1, (12, 12))
    """
    same_model(lab, run)
    targets = resolve_targets(lab, run, target)
    refuse_contrast("head_maps", targets)
    start = time.perf_counter()
    values = _maps_of_heads(lab, run, targets, 0, len(language_layers(lab.model))).astype(np.float16)
    return HeadMaps(
        values=np.ascontiguousarray(values),
        targets=targets,
        map=run.map,
        **made_by(lab, start),
        notes=("Attention of the positions that predict each word, mean over its tokens; head by head, nothing weighed in.",),
    )


def _maps_of_heads(lab: Lab, run: Run, targets: Targets, start: int, stop: int) -> np.ndarray:
    """Each head's mean map per target, float32 (targets, layers, heads, rows, cols), of layers [start, stop)."""
    at = predicting_rows(targets)
    reducer = HeadRows(at, columns=slice(*run.segments["image"]), mix=target_mix(at, targets))
    with undisturbed(lab.model), watch_attention(language_layers(lab.model)[start:stop], reducer):
        lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=1)
    stack = torch.stack([reducer.layers[i][0] for i in range(stop - start)])  # L H N P
    maps = stack.permute(2, 0, 1, 3).cpu().numpy()
    return maps.reshape(*maps.shape[:3], run.map.rows, run.map.cols)


def target_mix(at: Sequence[int], targets: Targets) -> Float[Tensor, "N Q"]:
    """Weights that turn rows `at` (ascending) into one mean row per target."""
    where = {position: i for i, position in enumerate(at)}
    mix = torch.zeros(len(targets), len(at))
    for n, target in enumerate(targets):
        for position in target.positions:
            mix[n, where[position]] += 1 / len(target.positions)
    return mix


# -- heads that point at one place ----------------------------------------------------------


@dataclass(frozen=True)
class HeadScore:
    """What the criterion says of one head."""

    layer: int
    head: int
    image_share: float  # of its attention
    entropy: float  # of its map's regions, nats; 0 is one region


@method(
    truth="Where the few heads look whose attention goes to the picture and forms one region.",
    source="Kang et al. 2025, localisation heads, without their program's threshold of 0.001 above the mean",
    equation=r"\sum_{(l,h)\in K}\big(G_\sigma * A^{lh}_{p}\big)_j",
    paper="https://arxiv.org/abs/2503.06287",
    cost="1 forward",
    blind_to="what the values carry, every other head, and whether the region pointed at is the right one",
    contrast=False,
)
def localization_heads(
    lab: Lab,
    run: Run,
    targets: Targets,
    *,
    top: Count = 3,
    layers: Window = None,
    heads: Heads = None,
    threshold: Annotated[float, at_least(0)] | None = None,
    sigma: Annotated[float, at_least(0)] = 1.0,
) -> Maps:
    if heads is None:
        start, stop = _judged_layers(lab, layers)
        maps = _maps_of_heads(lab, run, targets, start, stop)
        chosen = [_best_heads(heads_of_target, start, threshold, top) for heads_of_target in maps]
    else:
        wanted = choose_heads(lab, None, heads)
        if not wanted.pairs:
            forms = "(layer, head) pairs like ((14, 24), (14, 13)), or None to find them"
            raise OptionError(f"heads must be {forms}; got {wanted.heads}")
        start, stop = wanted.layers[0], wanted.layers[-1] + 1
        maps = _maps_of_heads(lab, run, targets, start, stop)
        chosen = [[_score(of_target[layer - start, head], layer, head) for layer, head in wanted.pairs] for of_target in maps]
    values = [
        smooth(np.mean([of_target[score.layer - start, score.head] for score in scores], 0), sigma)
        for of_target, scores in zip(maps, chosen, strict=True)
    ]
    named = [", ".join(f"L{score.layer}H{score.head}" for score in scores) for scores in chosen]
    notes = [f"Mean attention of {names} ({target.text})." for target, names in zip(targets, named, strict=True)]
    if heads is None:
        window = f"layers {start} to {stop - 1}"
        notes.append(f"Heads found on this run among {window}, by image share and then by lowest spatial entropy.")
    # JSON has no infinity, so a flat map's entropy is null
    extras = [
        [asdict(score) | ({} if np.isfinite(score.entropy) else {"entropy": None}) for score in scores] for scores in chosen
    ]
    return Maps(np.stack(values), {"forward": 1}, tuple(notes), {"heads": extras})


def find_localization_heads(
    lab: Lab, runs: Sequence[Run], *, top: int = 3, layers: Any = None, threshold: float | None = None
) -> tuple[tuple[int, int], ...]:
    """The `top` (layer, head) pairs most often among the best ten over `runs`, for ``heads=`` of any attention method.

    Each run is judged at the position that predicts its answer's first word. Ties go to the lower entropy.

    >>> from llava_lab.attribution import find_localization_heads
    >>> len(find_localization_heads(lab, [run], top=2, threshold=0.0))
    2
    """
    if not runs:
        raise OptionError("expected at least one run to find localisation heads on, got none")
    votes: Counter[tuple[int, int]] = Counter()
    entropy: dict[tuple[int, int], float] = {}
    with Sweep("localisation heads", total=len(runs), unit="run", least=len(runs)) as done:
        for run in runs:
            start, stop = _judged_layers(lab, layers)
            maps = _maps_of_heads(lab, run, (run.target(0),), start, stop)[0]
            for score in rank_heads(maps, first=start, threshold=threshold)[:VOTES]:
                pair = score.layer, score.head
                votes[pair] += 1
                entropy[pair] = entropy.get(pair, 0.0) + score.entropy
            done.step()
    order = sorted(votes, key=lambda pair: (-votes[pair], entropy[pair] / votes[pair], pair))
    return tuple(order[: whole_number("top", top, least=1)])


def _judged_layers(lab: Lab, layers: Window) -> tuple[int, int]:
    """The layers whose heads are ranked: those asked for, or all but the earliest of a deep model."""
    count = len(language_layers(lab.model))
    start, stop = layer_window(layers, count)
    return (EARLY, stop) if layers is None and count > DEEP else (start, stop)


def _best_heads(maps: np.ndarray, start: int, threshold: float | None, top: int) -> list[HeadScore]:
    ranked = rank_heads(maps, first=start, threshold=threshold)
    if not ranked:
        most = maps.sum((2, 3)).max()
        raise OptionError(f"no head gives the picture {threshold:g} of its attention, the most is {most:.3f}; lower threshold")
    return ranked[:top]


def rank_heads(maps: np.ndarray, *, first: int = 0, threshold: float | None = None) -> list[HeadScore]:
    """Heads (layers, heads, rows, cols) whose image share reaches `threshold` (None: the elbow), best first.

    Equal entropies, as of two maps with a single region, are ordered by image share.
    """
    shares = maps.sum((2, 3))
    least = elbow(shares.ravel()) if threshold is None else threshold
    scores = [
        _score(maps[layer, head], first + int(layer), int(head)) for layer, head in zip(*np.nonzero(shares >= least), strict=True)
    ]
    return sorted(scores, key=lambda score: (score.entropy, -score.image_share))


def _score(values: np.ndarray, layer: int, head: int) -> HeadScore:
    return HeadScore(layer, head, float(values.sum()), spatial_entropy(values))


def elbow(values: np.ndarray) -> float:
    """Where the sorted values bend most: the one farthest from the line between the smallest and the largest."""
    ordered = np.sort(values.astype(np.float64))
    if len(ordered) < 3:
        return float(ordered[0])
    line = np.linspace(ordered[0], ordered[-1], len(ordered))
    return float(ordered[int(np.argmax(np.abs(ordered - line)))])


def spatial_entropy(values: np.ndarray) -> float:
    """Entropy, in nats, of how the mass above a map's mean is spread over its 8-connected regions; inf for a flat map."""
    from scipy import ndimage  # only where it is used

    above = np.maximum(values.astype(np.float64) - values.mean(dtype=np.float64), 0)
    regions, count = ndimage.label(above > 0, structure=np.ones((3, 3)))
    if not count:
        return float("inf")
    mass = ndimage.sum_labels(above, regions, range(1, count + 1)) / above.sum()
    return max(float(-(mass * np.log(mass)).sum()), 0.0)  # rounding may leave a trace of less


def smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian over the last two axes, seven patches wide; at an edge the weights inside the grid sum to 1."""
    if sigma == 0:
        return values

    def weights(size: int) -> np.ndarray:
        away = np.abs(np.arange(size)[:, None] - np.arange(size)[None, :])
        bump = np.where(away <= REACH, np.exp(-(away**2) / (2 * sigma**2)), 0)
        return bump / bump.sum(1, keepdims=True)

    return weights(values.shape[-2]) @ values @ weights(values.shape[-1]).T
