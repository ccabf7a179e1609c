"""Which heads a method looks at, and their attention at the predicting positions, in one forward.

``heads`` has the same three forms everywhere: None is all of them, numbers are these heads of every
layer in the window, and pairs ``((14, 24), (14, 13))`` are exactly these (layer, head). It keeps rows,
never whole matrices, and gives them no meaning.

Every head's map of every answer word: the raw material of the layer x head view, kept small while it is made.

One forward; of each layer only the predicting rows and the image columns are kept, averaged over a word's
tokens: in float16 1.2 MB per word at LLaVA-1.5-7B, where the whole attention is 1.6 GB. It says where each head
looks, not what it moves from there (`value_attention`) nor whether the answer depends on it (`knockout`).

Localisation heads: the few heads that point at one place in the picture, found by their own criterion.

A head qualifies when much of its attention goes to the picture (more than the elbow of all heads'
sorted image shares) and is ranked by how much its map hangs together: the entropy of the 8-connected
regions above the map's mean, lowest first. The best `top` maps are smoothed and averaged. The first
two layers are left out, as the authors do, where the model has more than four.

Nothing here knows the right answer: a head can point firmly at the wrong thing. The choice for one run
is one sample; `find_localization_heads` votes over several runs, as the paper does over a thousand.

Sources: Kang et al. 2025 (arXiv 2503.06287); spatial entropy after Peruzzo et al. 2022
(arXiv 2206.04636).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from llava_lab.attribution.method import Count, Heads, Maps, Window, at_least, method, refuse_contrast
from llava_lab.capture import HeadRows, PickedRows, fuse_heads, undisturbed, watch_attention
from llava_lab.capture.watch import attention_module
from llava_lab.checks import layer_window, same_model, whole_number
from llava_lab.errors import OptionError
from llava_lab.models.layout import language_layers
from llava_lab.replay.targets import Targets, Wanted, predicting_rows, resolve_targets
from llava_lab.results import HeadMaps, Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Chosen:
    """Layers to look at and heads to look with, checked against the model."""

    layers: tuple[int, ...]
    heads: tuple[int, ...] | None = None  # the same of every layer; None is all
    pairs: Pairs = ()  # or exactly these, and `layers` are theirs

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


@dataclass(frozen=True)
class Rows:
    """Attention of some query rows: fused over everything chosen, and one by one."""

    fused: Float[Tensor, "Q K"]
    parts: Float[Tensor, "M Q K"]  # a layer each, or a (layer, head) pair each, in the order chosen


def choose_heads(lab: Lab, layers: Any, heads: Any) -> Chosen:
    """The options `layers` and `heads` as what they mean for this model. Raises OptionError."""
    decoder = language_layers(lab.model)
    each: Any = attention_module(decoder[0]).config
    count = int(each.num_attention_heads)
    if not _are_pairs(heads):
        window = range(*layer_window(layers, len(decoder)))
        return Chosen(tuple(window), _numbers(heads, count, len(decoder)))
    if layers is not None:
        raise OptionError(f"(layer, head) pairs name their layers already; leave layers=None, got {layers!r}")
    pairs = tuple(dict.fromkeys((int(layer), int(head)) for layer, head in heads))
    if not all(0 <= layer < len(decoder) and 0 <= head < count for layer, head in pairs):
        raise OptionError(_forms(count, len(decoder), heads))
    return Chosen(tuple(sorted({layer for layer, _ in pairs})), None, pairs)


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


def target_mix(at: Sequence[int], targets: Targets, device: torch.device | str = "cpu") -> Float[Tensor, "N Q"]:
    """Weights that turn rows `at` (ascending) into one mean row per target."""
    where = {position: i for i, position in enumerate(at)}
    mix = torch.zeros(len(targets), len(at), device=device)
    for n, target in enumerate(targets):
        for position in target.positions:
            mix[n, where[position]] += 1 / len(target.positions)
    return mix


def _are_pairs(heads: Any) -> bool:
    return _listed(heads) and all(_listed(pair) and len(pair) == 2 and all(_whole(end) for end in pair) for pair in heads)


def _numbers(heads: Any, count: int, layers: int) -> tuple[int, ...] | None:
    if heads is None:
        return None
    chosen = (heads,) if _whole(heads) else heads
    if not _listed(chosen) or not all(_whole(head) and 0 <= head < count for head in chosen):
        raise OptionError(_forms(count, layers, heads))
    return tuple(int(head) for head in chosen)


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _forms(heads: int, layers: int, got: Any) -> str:
    return (
        f"heads must be numbers from 0 to {heads - 1}, or None for all, or (layer, head) pairs like "
        f"((0, 1), (2, 3)) with layers from 0 to {layers - 1}; got {got!r}"
    )


def head_maps(lab: Lab, run: Run, *, target: Wanted = "words") -> HeadMaps:
    """The attention of every language-model head to every patch, a map per target, layer and head.

    `target` as in `attribute`, but without contrasts: attention is the same for every word predicted at a
    position. Values are shares of a head's whole attention, so each map sums to the head's share on the picture.

    Raises TargetError (not in the answer, a contrast), CheckpointError (the run was made by another checkpoint).
    """
    weights = same_model(lab, run)
    targets = resolve_targets(lab, run, target)
    refuse_contrast("head_maps", targets)
    start = time.perf_counter()
    layers = language_layers(lab.model)
    rows = predicting_rows(targets)
    reducer = HeadRows(rows, columns=slice(*run.segments["image"]), mix=_means(targets, rows))
    with undisturbed(lab.model), watch_attention(layers, reducer) as kept:
        lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=1)
    values = np.stack([kept.layers[i][0].half().cpu().numpy() for i in range(len(layers))])  # L H N P
    values = values.transpose(2, 0, 1, 3).reshape(len(targets), *values.shape[:2], run.map.rows, run.map.cols)
    notes = ("Attention of the positions that predict each word, mean over its tokens; head by head, nothing weighed in.",)
    return HeadMaps(
        values=np.ascontiguousarray(values),
        targets=targets,
        map=run.map,
        model=lab.name,
        fingerprint=weights,
        seconds=time.perf_counter() - start,
        notes=notes,
    )


def _means(targets: Targets, rows: tuple[int, ...]) -> Float[Tensor, "N Q"]:
    """Weights that turn the kept rows into one mean per target."""
    mix = torch.zeros(len(targets), len(rows))
    for i, target in enumerate(targets):
        for position in target.positions:
            mix[i, rows.index(position)] += 1 / len(target.positions)
    return mix


EARLY = 2  # layers left out at the bottom
DEEP = 4  # of a model with more layers than this
REACH = 3  # of the smoothing, patches to each side: a kernel of 7
VOTES = 10  # heads each run may vote for
PATIENCE = 2.0  # seconds before a progress bar appears


@dataclass(frozen=True)
class HeadScore:
    """What the criterion says of one head."""

    layer: int
    head: int
    image_share: float  # of its attention
    entropy: float  # of its map's regions, nats; 0 is one region


def find_localization_heads(
    lab: Lab, runs: Sequence[Run], *, top: int = 3, layers: Any = None, threshold: float | None = None
) -> tuple[tuple[int, int], ...]:
    """The `top` (layer, head) pairs most often among the best ten over `runs`, for ``heads=`` of any attention method.

    Each run is judged at the position that predicts its answer's first word. Ties go to the lower entropy.
    """
    if not runs:
        raise OptionError("expected at least one run to find localisation heads on, got none")
    votes: Counter[tuple[int, int]] = Counter()
    entropy: Counter[tuple[int, int]] = Counter()
    for run in tqdm(runs, desc="localisation heads", unit="run", delay=PATIENCE, leave=False):
        maps, start = _head_maps(lab, run, (run.target(0),), layers)
        for one in rank_heads(maps[0], first=start, threshold=threshold)[:VOTES]:
            votes[one.layer, one.head] += 1
            entropy[one.layer, one.head] += one.entropy  # type: ignore[assignment]
    order = sorted(votes, key=lambda pair: (-votes[pair], entropy[pair] / votes[pair], pair))
    return tuple(order[: whole_number("top", top, least=1)])


def rank_heads(maps: np.ndarray, *, first: int = 0, threshold: float | None = None) -> list[HeadScore]:
    """Heads (layers, heads, rows, cols) whose image share reaches `threshold` (None: the elbow), best first.

    Equal entropies, as of two maps with a single region, are ordered by image share.
    """
    shares = maps.sum((2, 3))
    least = elbow(shares.ravel()) if threshold is None else threshold
    kept = [
        HeadScore(first + int(layer), int(head), float(shares[layer, head]), spatial_entropy(maps[layer, head]))
        for layer, head in zip(*np.nonzero(shares >= least), strict=True)
    ]
    return sorted(kept, key=lambda one: (one.entropy, -one.image_share))


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


def _head_maps(lab: Lab, run: Run, targets: Targets, layers: Any) -> tuple[np.ndarray, int]:
    """Each head's mean map per target, (targets, layers, heads, rows, cols), and the first layer's number."""
    decoder = language_layers(lab.model)
    start, stop = layer_window(layers, len(decoder))
    if layers is None and len(decoder) > DEEP:
        start = EARLY
    at = predicting_rows(targets)
    reducer = HeadRows(at, columns=slice(*run.segments["image"]), mix=target_mix(at, targets))
    with undisturbed(lab.model), watch_attention(decoder[start:stop], reducer):
        lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=1)
    stack = torch.stack([reducer.layers[i][0] for i in range(stop - start)])  # L H N P
    maps = stack.permute(2, 0, 1, 3).cpu().numpy()
    return maps.reshape(*maps.shape[:3], run.map.rows, run.map.cols), start


@method(
    truth="Where the few heads look whose attention goes to the picture and forms one region.",
    source="Kang et al. 2025, localisation heads",
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
    given = None if heads is None else choose_heads(lab, None, heads)
    if given is not None and not given.pairs:
        raise OptionError(f"heads must be (layer, head) pairs like ((14, 24), (14, 13)), or None to find them; got {given.heads}")
    layers = layers if given is None else (given.layers[0], given.layers[-1] + 1)
    maps, start = _head_maps(lab, run, targets, layers)
    chosen = [_found(one, start, threshold, top) if given is None else _named(one, start, given.pairs) for one in maps]
    values = np.stack([_mean_map(one, start, heads, sigma) for one, heads in zip(maps, chosen, strict=True)])
    extras = {"heads": [[_plain(head) for head in heads] for heads in chosen]}
    notes = [f"Mean attention of {_list(heads)} ({target.text})." for target, heads in zip(targets, chosen, strict=True)]
    if given is None:
        window = f"layers {start} to {start + maps.shape[1] - 1}"
        notes.append(f"Heads found on this run among {window}, by image share and then by lowest spatial entropy.")
    return Maps(values, {"forward": 1}, tuple(notes), extras)


def _found(maps: np.ndarray, start: int, threshold: float | None, top: int) -> list[HeadScore]:
    ranked = rank_heads(maps, first=start, threshold=threshold)
    if not ranked:
        most = maps.sum((2, 3)).max()
        raise OptionError(f"no head gives the picture {threshold:g} of its attention, the most is {most:.3f}; lower threshold")
    return ranked[:top]


def _named(maps: np.ndarray, start: int, pairs: tuple[tuple[int, int], ...]) -> list[HeadScore]:
    each = ((layer, head, maps[layer - start, head]) for layer, head in pairs)
    return [HeadScore(layer, head, float(one.sum()), spatial_entropy(one)) for layer, head, one in each]


def _mean_map(maps: np.ndarray, start: int, heads: list[HeadScore], sigma: float) -> np.ndarray:
    return smooth(np.mean([maps[one.layer - start, one.head] for one in heads], 0), sigma)


def _plain(one: HeadScore) -> dict[str, Any]:
    """For a result's extras; JSON has no infinity, so a flat map's entropy is null."""
    return asdict(one) | ({} if np.isfinite(one.entropy) else {"entropy": None})


def _list(heads: list[HeadScore]) -> str:
    return ", ".join(f"L{one.layer}H{one.head}" for one in heads)
