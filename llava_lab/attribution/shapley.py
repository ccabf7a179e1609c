"""The picture as a game: regions are players, a coalition is what may be seen, its worth is the target's score.

- ``shapley`` draws orders and walks through them: what each region adds, averaged over all orders in which regions could
  appear. ``kernel_shap`` draws coalitions and fits a linear model whose weights are the Shapley values in the limit.
  captum does both; here is the game it plays, all targets read together, and the fit's least squares, which captum would
  leave to scikit-learn. Efficiency holds: the values sum to the score of the whole picture minus that of the filled one,
  exactly for every single order, and up to the weight of the end points for the fit. The gap is reported. A region's
  value is shared out evenly over its patches, so the map has the same sum.
- ``greedy`` searches for the few regions that carry the answer: enough by themselves, and missed when they are gone.
  Regions are added one by one, each time the one that makes ``insight + necessity`` largest: insight is the target's
  probability when only the chosen regions are shown, necessity one minus its probability when only the chosen ones are
  hidden. A region's value is the sum of the steps (in size) from its own to the last, so the first region chosen has the
  largest value and the map keeps the order. It says in which order to look, not how large an effect is. This search
  optimises what deletion and insertion scores measure, with this very fill; judge it with another.

`superpixels` cuts the picture into connected regions of whole patches, each about one colour. Regions are grown by
merging: every patch starts alone, and the two neighbours whose union is least mixed (in colour and place) become one,
until the wanted number is left. No randomness, always connected. ``"grid"`` gives plain rectangles instead. Patches that
hold only padding belong to no region (-1) and are always shown: they are not part of the picture.

Sources: Castro et al. 2009 for sampling orders; Lundberg & Lee 2017 (arXiv 1705.07874) for KernelSHAP; captum; EAGLE
(RuoyuChen10/EAGLE @ f498953 ``interpretation/submodular_vision.py``) for insight and necessity, which takes probabilities
per token and their mean (that a value is a sum of steps is ours, to keep the order); Ward 1963 for the merging rule, the
mix of colour and place after SLIC (Achanta et al. 2012).

    attribute(lab, run, method="shapley", target="red", regions=9, orders=4)
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llava_lab.attribution.method import At, Count, Fill, Maps, Seed, at_least, captum_for, method
from llava_lab.checks import Sweep, one_of
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.replay.alter import Altered, open_altered
from llava_lab.replay.targets import Targets
from llava_lab.results import Run, Target

SHAPES = ("color", "grid")
PLACE = 0.5  # weight of a whole side of the grid beside a colour channel of the range 0 to 1


@method(
    truth="What the region adds to the target's log-probability, averaged over random orders of uncovering the picture.",
    source="Castro et al. 2009, captum's ShapleyValueSampling over superpixels",
    equation=r"\frac{1}{n}\sum_{\pi}\big[s(S_{\pi,j}\cup j)-s(S_{\pi,j})\big]",
    paper="https://doi.org/10.1016/j.cor.2008.04.004",
    cost="one forward per region and order, at most",
    blind_to="anything finer than a region, and what the fill itself says",
    reach="pixels",
    economy={"orders": 3},
)
def shapley(
    lab: Lab,
    run: Run,
    targets: Targets,
    *,
    orders: Count = 8,
    regions: Annotated[int, at_least(2)] = 16,
    shape: Literal["color", "grid"] = "color",
    fill: Fill = "grey",
    at: At = "pixels",
    batch: Count = 8,
    seed: Seed = 0,
) -> Maps:
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # captum draws from the global generator; it is put back
        game = open_game(lab, run, targets, regions, shape, fill, at, batch, seed)
        values = walks(game, orders, batch)
        done = len(values)
        notes = [_says(f"averaged over {done} random orders of {game.players} regions", game)]
        if done < orders:
            notes.append(f"Interrupted after {done} of {orders} orders; the values are the mean over these.")
        spread = values.std(0, correction=1) / done**0.5 if done > 1 else torch.full_like(values[0], torch.nan)
        extras = {"orders": done, "standard_error": spread.nan_to_num(0).tolist() if done > 1 else None}
        return _maps(game, values.mean(0), notes, extras, interrupted=done < orders)


@method(
    truth="What the region adds to the target's log-probability, from a linear fit over random coalitions of regions.",
    source="Lundberg & Lee 2017, captum's KernelShap over superpixels",
    equation=r"\arg\min_\phi\sum_S w_S\big(s(S)-\phi_0-\sum_{i\in S}\phi_i\big)^2",
    paper="https://arxiv.org/abs/1705.07874",
    cost="one forward per coalition, at most",
    blind_to="anything finer than a region, and what the fill itself says",
    reach="pixels",
    economy={"samples": 48},
)
def kernel_shap(
    lab: Lab,
    run: Run,
    targets: Targets,
    *,
    samples: Annotated[int, at_least(3)] = 96,
    regions: Annotated[int, at_least(2)] = 16,
    shape: Literal["color", "grid"] = "color",
    fill: Fill = "grey",
    at: At = "pixels",
    batch: Count = 8,
    seed: Seed = 0,
) -> Maps:
    with torch.random.fork_rng():
        game = open_game(lab, run, targets, regions, shape, fill, at, batch, seed)
        values, done = fit(game, samples, batch, seed=seed)
        notes = [_says(f"fitted to {done} coalitions of {game.players} regions", game)]
        if done < samples:
            notes.append(f"Interrupted after {done} of {samples} coalitions; the fit is to these.")
        if done < game.players + 1:
            notes.append("Fewer coalitions than regions: many fits are equally good, and this is the smallest.")
        return _maps(game, values, notes, {"samples": done}, interrupted=done < samples)


def _says(how: str, game: RegionGame) -> str:
    return (
        f"Shapley values of the target's log-probability (for a contrast: of the logit difference), {how}; "
        f"hidden regions are {game.filled}. "
        "A region's value is shared out over its patches."
    )


def _maps(game: RegionGame, values: Float[Tensor, "N n"], notes: list[str], extras: dict[str, Any], *, interrupted: bool) -> Maps:
    full, empty = game.everyone(), game.nobody()
    extras |= {
        "full": full.tolist(),
        "empty": empty.tolist(),
        "sum": values.sum(1).tolist(),
        "efficiency_gap": (values.sum(1) - (full - empty)).tolist(),
        "regions": game.labels.tolist(),
    }
    shared = game.shared_out(values.cpu().numpy())
    return Maps(shared, {"forward": game.forwards}, tuple(notes), extras, interrupted=interrupted)


def walks(game: Game, orders: int, batch: int) -> Float[Tensor, "K N n"]:
    """Each player's gain in each of `orders` orders; fewer after Ctrl-C, which is raised before the first is done.

    One call of captum per order, so that an interrupt keeps what is finished; the draws are those of a single call.
    """
    attribution = captum_for("shapley").ShapleyValueSampling(lambda shown: game.worth(shown > 0.5))
    everyone = torch.ones(1, game.players)
    gains: list[Tensor] = []
    with Sweep("shapley", total=orders, unit="order") as done:
        for _ in range(orders):
            gains.append(attribution.attribute(everyone, n_samples=1, perturbations_per_eval=batch)[0])
            done.step()
    return torch.stack(gains)


def fit(game: Game, samples: int, batch: int, *, seed: int) -> tuple[Float[Tensor, "N n"], int]:
    """KernelSHAP's weights for each target, and the coalitions they were fitted to."""
    captum = captum_for("kernel_shap")
    if game.players < 2:  # nothing to fit: the one region has it all
        return (game.everyone() - game.nobody())[:, None], 2

    def weights(count: int, target: int, done: Sweep | None = None) -> Tensor:
        def look(shown: Tensor) -> Tensor:
            scores = game.worth(shown > 0.5)[:, target]
            if done is not None:
                done.step(len(shown))
            return scores

        torch.manual_seed(seed)  # the same coalitions for every target
        attribution = captum.KernelShap(look)
        attribution.interpretable_model = LeastSquares()
        everyone = torch.ones(1, game.players)
        return attribution.attribute(everyone, n_samples=count, perturbations_per_eval=batch, return_input_shape=False)[0]

    targets = len(game.everyone())
    with Sweep("kernel_shap", total=samples, unit="coalition", least=3) as done:
        weights(samples, 0, done)
    if done.interrupted:
        samples = done.count
    return torch.stack([weights(samples, target) for target in range(targets)]), samples  # every coalition is known by now


class LeastSquares:
    """A weighted linear fit with an intercept, in float64, in the place of captum's scikit-learn model."""

    def __init__(self) -> None:
        self._weights: Tensor | None = None

    def fit(self, data: Any, **kwargs: Any) -> dict[str, float]:
        """Take the coalitions, their scores and their weights from captum's loader."""
        shown, scores, weights = (torch.cat(part).double() for part in zip(*data, strict=True))
        root = weights.reshape(-1, 1).sqrt()
        design = torch.cat([shown, torch.ones(len(shown), 1, dtype=shown.dtype)], 1)
        found = np.linalg.lstsq((root * design).numpy(), (root[:, 0] * scores.reshape(-1)).numpy(), rcond=None)[0]
        self._weights = torch.from_numpy(found[:-1]).float()[None]
        return {}

    def representation(self) -> Float[Tensor, "1 n"]:
        assert self._weights is not None, "fit first"
        return self._weights


# -- greedy search ---------------------------------------------------------------------


@method(
    truth="Regions in the order in which they best make the answer likely alone and unlikely when they are gone.",
    source="the objective of EAGLE (RuoyuChen10/EAGLE), insight and necessity over superpixels",
    equation=r"\arg\max_j\ s(S\cup j)-s(\overline{S\cup j})",
    paper="https://arxiv.org/abs/2509.22496",
    cost="about as many forwards as the number of regions squared, for each target",
    blind_to="anything finer than a region, and combinations that no single step leads to",
    reach="tokens",
    economy={"steps": 3},
)
def greedy(
    lab: Lab,
    run: Run,
    targets: Targets,
    *,
    steps: Count | None = None,
    regions: Annotated[int, at_least(2)] = 16,
    shape: Literal["color", "grid"] = "color",
    fill: Fill = "grey",
    at: At = "pixels",
    batch: Count = 8,
    seed: Seed = 0,
) -> Maps:
    every, parts = token_targets(targets)
    paths = [Path(part, bool(target.against_ids)) for part, target in zip(parts, targets, strict=True)]
    game = open_game(lab, run, every, regions, shape, fill, at, batch, seed)
    wanted = game.players if steps is None else min(steps, game.players)
    search(game, paths, wanted)
    done = len(paths[0].chosen)
    values = game.painted(np.stack([path.values(game.players) for path in paths]))
    notes = [
        f"Regions in the order of a greedy search for insight and necessity, {game.filled}; "
        "a value is the sum of the steps from its region to the last, in probability."
    ]
    if done < wanted:
        notes.append(f"Interrupted after {done} of {wanted} steps; regions not reached are 0.")
    elif wanted < game.players:
        notes.append(f"The first {wanted} of {game.players} regions; the others are 0.")
    extras = {
        "order": [path.chosen for path in paths],
        "insight": [path.insight for path in paths],
        "necessity": [path.necessity for path in paths],
        "regions": game.labels.tolist(),
    }
    return Maps(values, {"forward": game.forwards}, tuple(notes), extras, interrupted=done < wanted)


def search(game: Game, paths: list[Path], steps: int) -> None:
    """Let every path take its steps together; Ctrl-C keeps the finished ones, and is raised before the first."""
    full, empty = game.everyone()[None], game.nobody()[None]
    for path in paths:
        path.before = float(path.probability(empty) + 1 - path.probability(full))
    with Sweep("greedy", total=steps) as done:
        for _ in range(steps):
            shown = torch.cat([path.candidates(game.players) for path in paths])
            game.worth(torch.cat([shown, ~shown]))  # all at once, in full batches; kept for `take`
            for path in paths:
                path.take(game)
            done.step()
    for path in paths:
        del path.chosen[done.count :], path.insight[done.count :], path.necessity[done.count :]


@dataclass
class Path:
    """One target's search so far."""

    part: slice  # its tokens among the scores
    contrast: bool
    chosen: list[int] = field(default_factory=list)
    insight: list[float] = field(default_factory=list)  # after each step
    necessity: list[float] = field(default_factory=list)
    before: float = 0.0  # the objective with nothing chosen

    def probability(self, scores: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
        """Mean probability of the target's tokens; for a contrast, of the word said against the other alone."""
        own = scores[:, self.part]
        return own.sigmoid().mean(1) if self.contrast else own.exp().mean(1)

    def candidates(self, players: int) -> Bool[Tensor, "C n"]:
        """What is chosen with each of the others added."""
        rest = self._rest(players)
        shown = torch.zeros(len(rest), players, dtype=torch.bool)
        shown[:, self.chosen] = True
        shown[torch.arange(len(rest)), rest] = True
        return shown

    def take(self, game: Game) -> None:
        """The best next region; the scores are known by now. Of equals, the first in reading order."""
        shown = self.candidates(game.players)
        insight, without = (self.probability(game.worth(which)) for which in (shown, ~shown))
        best = int((insight + 1 - without).argmax())
        self.chosen.append(self._rest(game.players)[best])
        self.insight.append(float(insight[best]))
        self.necessity.append(float(1 - without[best]))

    def _rest(self, players: int) -> list[int]:
        return [player for player in range(players) if player not in self.chosen]

    def values(self, players: int) -> np.ndarray:
        """Of every region: the sizes of the steps from its own to the last; 0 if it was not chosen."""
        objective = np.array([self.before, *(i + n for i, n in zip(self.insight, self.necessity, strict=True))])
        steps = np.abs(np.diff(objective))
        values = np.zeros(players)
        values[self.chosen] = steps[::-1].cumsum()[::-1]
        return values


def token_targets(targets: Targets) -> tuple[Targets, list[slice]]:
    """Each token of each target as a target of its own, and which of them belong to which; a contrast stays whole."""
    every: list[Target] = []
    parts = []
    for target in targets:
        start = len(every)
        if target.against_ids:
            every.append(target)
        else:
            each = zip(target.positions, target.token_ids, strict=True)
            every += [Target("token", target.text, (position,), (token,)) for position, token in each]
        parts.append(slice(start, len(every)))
    return tuple(every), parts


# -- the game --------------------------------------------------------------------------


class Game(ABC):
    """What coalitions of players are worth to each target."""

    players: int
    forwards: int  # pictures the model has been given

    @abstractmethod
    def worth(self, shown: Bool[Tensor, "B n"]) -> Float[Tensor, "B N"]:
        """Each target's score for each coalition, float32 on the processor."""

    def everyone(self) -> Float[Tensor, " N"]:
        """The score with every player there."""
        return self.worth(torch.ones(1, self.players, dtype=torch.bool))[0]

    def nobody(self) -> Float[Tensor, " N"]:
        """The score with no player there."""
        return self.worth(torch.zeros(1, self.players, dtype=torch.bool))[0]


class RegionGame(Game):
    """Players are regions of the picture; what is not shown is filled. Every coalition is looked at once."""

    def __init__(self, altered: Altered, labels: np.ndarray) -> None:
        self.labels = labels
        self.players = int(labels.max()) + 1
        self._altered = altered
        self._labels = torch.from_numpy(labels)

    @property
    def forwards(self) -> int:  # type: ignore[override]
        return self._altered.passes

    @property
    def filled(self) -> str:
        """What is done to hidden regions, in words for a note."""
        return self._altered.filled

    def worth(self, shown: Bool[Tensor, "B n"]) -> Float[Tensor, "B N"]:
        return self._altered.hidden((~shown)[:, self._labels.clamp_min(0)] & (self._labels >= 0))

    def shared_out(self, values: np.ndarray) -> np.ndarray:
        """Each region's value spread evenly over its patches, (N, rows, cols); sums stay what they were."""
        return self.painted(values / np.bincount(self.labels[self.labels >= 0], minlength=self.players))

    def painted(self, values: np.ndarray) -> np.ndarray:
        """Each region's value (N, n) at each of its patches, float32 (N, rows, cols); 0 on padding."""
        return np.where(self.labels >= 0, values[:, self.labels], 0).astype(np.float32)


def open_game(
    lab: Lab,
    run: Run,
    targets: Targets,
    regions: int,
    shape: str = "color",
    fill: str = "grey",
    at: str = "pixels",
    batch: int = 8,
    seed: int = 0,
) -> RegionGame:
    """The game for a method's options."""
    labels = superpixels(run, regions, shape=shape)
    return RegionGame(open_altered(lab, run, targets, at=at, fill=fill, seed=seed, batch=batch), labels)


# -- superpixels -----------------------------------------------------------------------


def superpixels(run: Run, regions: int, *, shape: str = SHAPES[0]) -> np.ndarray:
    """Region of each patch, int (rows, cols): 0 to n - 1 in reading order, -1 where there is only padding.

    A picture of fewer patches than `regions` gets one region per patch; ``"grid"`` gives about as many as asked for.
    """
    one_of("shape", shape, SHAPES)
    if regions < 2:
        raise OptionError(f"regions must be a whole number of at least 2, got {regions}")
    covered = run.map.coverage() > 0
    labels = _rectangles(covered, regions) if shape == "grid" else merged(_features(run), covered, regions)
    return in_reading_order(labels)


def _features(run: Run) -> np.ndarray:
    """Mean colour (0 to 1) of each patch, taken over the picture alone, and its place, (rows, cols, 5)."""
    where = run.map
    weight = where.mask_to_patches(np.ones((where.height, where.width), np.float32))
    colors = np.stack([where.mask_to_patches(run.picture[..., i].astype(np.float64) / 255) for i in range(3)], -1)
    colors = colors / np.maximum(weight, 1e-6)[..., None]
    y, x = np.mgrid[: where.rows, : where.cols]
    side = max(where.rows, where.cols)
    return np.concatenate([colors, PLACE * y[..., None] / side, PLACE * x[..., None] / side], -1)


def merged(features: np.ndarray, covered: np.ndarray, regions: int) -> np.ndarray:
    """Merge neighbours by Ward's rule until `regions` are left, or until what is left does not touch."""
    rows, cols = covered.shape
    name = np.arange(rows * cols).reshape(rows, cols)
    means = {int(i): features.reshape(-1, features.shape[-1])[i] for i in name[covered]}
    sizes = dict.fromkeys(means, 1)
    members = {i: [i] for i in means}
    beside: dict[int, set[int]] = {i: set() for i in means}
    for one, two in _touching(name, covered):
        beside[one].add(two)
        beside[two].add(one)

    def price(one: int, two: int) -> float:
        return sizes[one] * sizes[two] / (sizes[one] + sizes[two]) * float(((means[one] - means[two]) ** 2).sum())

    heap = [(price(one, two), one, two) for one in beside for two in beside[one] if one < two]
    heapq.heapify(heap)
    new = rows * cols
    while len(means) > regions and heap:
        _, one, two = heapq.heappop(heap)
        if one not in means or two not in means:  # merged into something else meanwhile
            continue
        sizes[new] = sizes[one] + sizes[two]
        means[new] = (sizes[one] * means[one] + sizes[two] * means[two]) / sizes[new]
        members[new] = members.pop(one) + members.pop(two)
        beside[new] = (beside.pop(one) | beside.pop(two)) - {one, two}
        for other in beside[new]:
            beside[other] = (beside[other] - {one, two}) | {new}
        for gone in (one, two):
            del means[gone], sizes[gone]
        for other in sorted(beside[new]):
            heapq.heappush(heap, (price(other, new), other, new))
        new += 1
    labels = np.full(rows * cols, -1)
    for region, patches in enumerate(members.values()):
        labels[patches] = region
    return labels.reshape(rows, cols)


def _touching(name: np.ndarray, covered: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of patches that share an edge, both on the picture."""
    pairs = ((name[:, :-1], name[:, 1:], covered[:, :-1] & covered[:, 1:]), (name[:-1], name[1:], covered[:-1] & covered[1:]))
    for one, two, both in pairs:
        yield from zip(one[both].tolist(), two[both].tolist(), strict=True)


def _rectangles(covered: np.ndarray, regions: int) -> np.ndarray:
    """About `regions` equal rectangles over the part of the grid that is on the picture."""
    ys, xs = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    height, width = len(ys), len(xs)
    down = min(max(round((regions * height / width) ** 0.5), 1), height)
    across = min(max(round(regions / down), 1), width)
    labels = np.full(covered.shape, -1)
    y = np.arange(height) * down // height
    x = np.arange(width) * across // width
    labels[np.ix_(ys, xs)] = y[:, None] * across + x[None]
    return np.where(covered, labels, -1)


def in_reading_order(labels: np.ndarray) -> np.ndarray:
    """The same regions, numbered by their first patch."""
    flat = labels.ravel()
    order = list(dict.fromkeys(flat[flat >= 0].tolist()))
    names = {old: new for new, old in enumerate(order)}
    return np.array([names.get(one, -1) for one in flat.tolist()]).reshape(labels.shape)
