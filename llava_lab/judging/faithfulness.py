"""Does the answer depend on the patches a map marks? Deletion, insertion and remove-one-thing, beside random maps.

Patches are taken away (deletion) or given back to a filled picture (insertion) in the order of the map, and
the finished answer is scored again each time (`llava_lab.replay.alter`). Four choices are made here:

- **Scale.** ``probability`` is the probability of the target, the geometric mean over its tokens (for a
  contrast: of the word said against the other), ``logprob`` the summed log-probability (the logit difference), ``logodds``
  the summed log-odds. The default saturates on purpose: a curve asks whether the answer goes, not by what margin it stays.
  Curves are ``(s - s_filled) / (s_whole - s_filled)``.
- **Fill.** No fill is neutral and a method does best under its own, so at least two others are used: by default, of
  those the method did not use, the two under which the picture matters to most targets (the earlier in `SQUARES`).
- **Steps** lie densely at both ends, where a good map shows, and symmetrically, so that the pictures of a deletion
  curve read backwards are the insertion curve of the map upside down.
- **Control.** The gain is insertion minus deletion area. A map upside down has exactly the opposite gain, so random
  maps have 0 on average *whatever the model*. How far they scatter is measured with `seeds` rankings, each of which
  serves twice, since a random map upside down is a random map too.

``beats_random`` is a verdict on one map of one picture, and strict: under every fill the gain must lie above
every random map's and above 2.5 times their spread, and the 95% interval must lie above 0. That interval
is of the map's gain minus the gain of *one* random map (each resample draws one, and draws the steps anew, for
both); the interval of the difference from the *mean* random map would call half of all random maps better
than random. In simulations (score additive over 144 patches, 4 to 144 of which count, two fills, 10 rankings) one or
two of a hundred random maps beat random, and a perfect map nearly always. Where one or two patches decide everything,
random maps scatter so widely that one picture cannot tell; then a note says so, and `llava_lab.leaderboard` over many
pictures can.

    score = faithfulness(lab, run, attribute(lab, run, method="attention"))
    score.gain, score.interval, score.beats_random

Sources: Petsiuk et al. 2018 (arXiv 1806.07421) section 4.2, deletion and insertion; the normalisation is
iGOS++'s (Khorram et al. 2021, arXiv 2012.15783); the symmetric control and the verdict are ours.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from llava_lab.attribution.controls import center_bump
from llava_lab.attribution.registry import METHODS
from llava_lab.checks import array_of, entry, one_of, whole_number
from llava_lab.errors import OptionError
from llava_lab.replay.alter import open_altered, within_budget
from llava_lab.replay.fills import EVERY_FILL, SQUARES
from llava_lab.replay.score import LOGODDS, LOGPROB
from llava_lab.replay.targets import Targets, resolve_targets
from llava_lab.results import Faithfulness, Relevance, Run, area, trapezoid
from llava_lab.stats import RESAMPLES, best_first, cluster_bootstrap, percentiles

FEWEST_FILLS = 2
SIGMAS = 2.5  # spreads of random maps that a map must lie above them
STEPS, SEEDS, BATCH = 8, 10, 8
SCALES = ("probability", "logprob", "logodds")
MATTERS = {"probability": 0.02, "logprob": 0.1, "logodds": 0.1}  # what filling everything must lower the score by, to tell
CLAIMING = 200  # random maps that say how often marking the right thing is chance; they need no model


@entry
def faithfulness(
    lab: Any,
    run: Run,
    rel: Relevance,
    *,
    fills: Sequence[str] | None = None,
    steps: int = STEPS,
    seeds: int = SEEDS,
    seed: int = 0,
    scale: str = SCALES[0],
    things: np.ndarray | None = None,
    batch: int = BATCH,
) -> Faithfulness:
    """Score `rel` against the model that made it; about ``(seeds + 1 + targets) * 2 * (steps - 1)`` passes per fill.

    `things` are masks of the objects in the picture, bool (things, height, width): each is covered alone
    (its box), and the map should mark most the one the answer needs most.

    Raises OptionError (a fill the method used, fewer than two, a map of another picture),
    CheckpointError (the run was made by another checkpoint); on a closed model also BudgetError and EndpointError.

    >>> relevance = ll.attribute(lab, run, method="center")
    >>> score = ll.faithfulness(lab, run, relevance, steps=2, seeds=2, fills=("grey", "mean"))
    >>> score.deletion.shape
    (1, 2, 3)
    """
    wanted = allowed_fills([(rel.method, rel.options)], fills)

    def score(model: Any) -> Faithfulness:
        judge = Judge(
            model, run, rel.targets, wanted, steps=steps, seeds=seeds, seed=seed, scale=scale, things=things, batch=batch
        )
        judge.choose_fills(FEWEST_FILLS if fills is None else len(wanted))
        judge.measure_controls()
        return judge.score(rel, alone=True)

    done = within_budget(lab, run, score)
    return replace(done.result, notes=(*done.result.notes, *done.notes))


def allowed_fills(used: Iterable[tuple[str, Mapping[str, Any]]], wanted: Sequence[str] | None = None) -> tuple[str, ...]:
    """Fills to score with when maps were made by the methods and options `used`: `wanted` if they are fair, else all that are."""
    own = {fill for method, options in used for fill in _own_fills(method, options)}
    fair = tuple(name for name in SQUARES if name not in own)
    if wanted is None:
        if len(fair) < FEWEST_FILLS:
            raise OptionError(
                f"maps must be scored with two fills that made none of them; {', '.join(sorted(own))} were all used"
            )
        return fair
    chosen = tuple(dict.fromkeys(one_of("fills", name, SQUARES) for name in _as_list(wanted)))
    unfair = [name for name in chosen if name in own]
    if unfair:
        raise OptionError(
            f"a map made with fill {unfair[0]!r} must not be scored with it; choose from {', '.join(fair) or 'no other'}"
        )
    if len(chosen) < FEWEST_FILLS:
        raise OptionError(f"expected at least {FEWEST_FILLS} different fills, since no fill is neutral; got {', '.join(chosen)}")
    return chosen


class Judge:
    """Scores maps of one run and one set of targets; whatever does not depend on the map is measured once."""

    def __init__(
        self,
        lab: Any,
        run: Run,
        targets: Targets,
        fills: Sequence[str],
        *,
        steps: int = STEPS,
        seeds: int = SEEDS,
        seed: int = 0,
        scale: str = SCALES[0],
        things: np.ndarray | None = None,
        batch: int = BATCH,
    ) -> None:
        steps, self.seeds = whole_number("steps", steps, least=2), whole_number("seeds", seeds, least=2)
        batch, self.seed = whole_number("batch", batch, least=1), whole_number("seed", seed)
        self.scale, self.run = one_of("scale", scale, SCALES), run
        self.things = check_masks(run, things) if things is not None else np.zeros((0, *run.picture.shape[:2]), bool)
        self.targets, self.seconds = resolve_targets(lab, run, list(targets)), 0.0
        score = LOGODDS if scale == LOGODDS else LOGPROB
        self.altered = open_altered(
            lab, run, self.targets, fill=fills[0], seed=self.seed, fills=SQUARES, batch=batch, score=score
        )
        if self.altered.score != score:
            raise OptionError(
                f"scale must be one of {', '.join(SCALES[:2])} on a closed model, which lists no more; got {scale!r}"
            )
        self.patches = np.flatnonzero(run.map.coverage().ravel() > 0)  # padding is never ranked nor filled
        self.fills = tuple(fills)
        self.counts = step_counts(len(self.patches), steps)
        self.fractions = self.counts / self.counts[-1]
        self.shares = np.array([run.map.mask_to_patches(thing).ravel()[self.patches] for thing in self.things])

    def choose_fills(self, count: int) -> None:
        """Keep `count` fills, those first under which the picture matters to more targets. Measures the whole and filled."""
        everything = np.ones((1, len(self.patches)), bool)
        self.whole = self._scaled(self._raw(self.fills[0], ~everything))[0]
        lows = {name: self._scaled(self._raw(name, everything))[0] for name in self.fills}
        telling = {name: int((self.whole - low >= MATTERS[self.scale]).sum()) for name, low in lows.items()}
        kept = sorted(self.fills, key=lambda name: -telling[name])[:count]
        self.fills = tuple(name for name in self.fills if name in kept)
        self.filled = np.stack([lows[name] for name in self.fills], 1)  # targets, fills
        self.tells = self.whole[:, None] - self.filled >= MATTERS[self.scale]

    def measure_controls(self) -> None:
        """Random maps, the centre, and each thing covered alone."""
        start = time.perf_counter()
        size = len(self.patches)
        orders = [np.random.default_rng((self.seed, 17, number)).permutation(size) for number in range(self.seeds)]
        bump = center_bump(self.run.map.rows, self.run.map.cols)
        self.random = np.stack([self._curves(order) for order in orders], 1)
        self.center = self._curves(self._order(bump))
        self.effects = self._remove_things()
        self.forwards, self.seconds = self.altered.passes, time.perf_counter() - start

    def score(self, rel: Relevance, *, alone: bool = False) -> Faithfulness:
        """The scores of one map. `alone` counts the shared passes and seconds as its own."""
        if rel.map != self.run.map or rel.fingerprint != self.run.fingerprint or rel.targets != self.targets:
            raise OptionError("expected a map of this run and these targets, got one of another picture, checkpoint or answer")
        start, before = time.perf_counter(), self.altered.passes
        curves = np.stack([self._curves(self._order(values))[:, i] for i, values in enumerate(rel.values)], 1)
        judged = [
            verdict(self.fractions, curves[0, i], curves[1, i], self.random[:, :, i], self.seed) for i in range(len(self.targets))
        ]
        flat = rel.values.reshape(len(rel.values), -1)[:, self.patches]
        chance = np.random.default_rng(self.seed).random((CLAIMING, flat.shape[1]))
        return Faithfulness(
            method=rel.method,
            options=rel.options,
            targets=self.targets,
            fills=self.fills,
            fractions=self.fractions,
            deletion=curves[0],
            insertion=curves[1],
            random=self.random,
            center=self.center,
            whole=self.whole,
            filled=self.filled,
            interval=np.array([interval for interval, _ in judged]),
            beats_random=np.array([beats for _, beats in judged]),
            effects=self.effects,
            claims=self._claims(flat),
            random_claims=self._claims(chance),
            scale=self.scale,
            fingerprint=self.run.fingerprint,
            passes={"forward": self.altered.passes - (0 if alone else before), "backward": 0},
            seconds=time.perf_counter() - start + (self.seconds if alone else 0.0),
            notes=self.notes(),
        )

    def notes(self) -> tuple[str, ...]:
        """What the reader of these scores must see, one sentence each."""
        filled = f"Patches are filled with {' and '.join(self.fills)}, which the method did not use."
        found = [f"Scored on the {self.scale} of the target, 0 with every patch filled and 1 with none. {filled}"]
        for i, target in enumerate(self.targets):
            for name in (name for name, tells in zip(self.fills, self.tells[i], strict=True) if not tells):
                found.append(f"Filling the whole picture with {name} hardly lowers {target.text!r}; it is not counted.")
            if self.tells[i].sum() < FEWEST_FILLS:
                found.append(f"Fewer than two fills tell anything about {target.text!r}: no map of it can be judged.")
            elif not told_apart(self.fractions, self.random[:, :, i]):
                found.append(
                    f"A few patches decide {target.text!r}, so random maps scatter too widely for any map to be told from "
                    "them on this one picture; compare over many."
                )
        return tuple(found)

    def _curves(self, order: np.ndarray) -> np.ndarray:
        """Deletion and insertion, float32 (2, targets, fills, steps), for patches in `order`, best first."""
        place = np.argsort(order)  # of each patch
        gone = place[None] < self.counts[:, None]  # steps, patches
        found = []
        for masks in (gone, ~gone):
            scores = [self._covered(i, masks) for i in range(len(self.fills))]  # steps, targets
            found.append(np.stack(scores).transpose(2, 0, 1))
        return np.stack(found).astype(np.float32)

    def _covered(self, fill: int, masks: np.ndarray) -> np.ndarray:
        """Normalised scores (steps, targets); a fill that tells nothing of any target costs nothing."""
        if not self.tells[:, fill].any():
            return np.full((len(masks), len(self.targets)), np.nan)
        return self._normal(self._raw(self.fills[fill], masks), fill)

    def _raw(self, fill: str, gone: np.ndarray) -> np.ndarray:
        """Scores float64 (B, targets) where `gone`, bool (B, patches), says which of `patches` are filled."""
        masks = np.zeros((len(gone), self.run.map.rows * self.run.map.cols), bool)
        masks[:, self.patches] = gone
        grids = torch.from_numpy(masks.reshape(len(gone), self.run.map.rows, self.run.map.cols))
        return self.altered.hidden(grids, fill).double().numpy()

    def _remove_things(self) -> np.ndarray:
        """The normalised drop when each thing's box alone is filled, float32 (targets, fills, things)."""
        if not len(self.things):
            return np.zeros((len(self.targets), len(self.fills), 0), np.float32)
        seen = 1 - torch.from_numpy(np.stack([self._box(thing) for thing in self.things])).float()
        unknown = np.full((len(seen), len(self.targets)), np.nan)
        drops = [
            1 - self._normal(self.altered.scores(seen, name).double().numpy(), i) if self.tells[:, i].any() else unknown
            for i, name in enumerate(self.fills)
        ]
        return np.stack(drops).transpose(2, 0, 1).astype(np.float32)

    def _box(self, thing: np.ndarray) -> np.ndarray:
        """The thing's box in the frame of what is altered, bool (Y, X): its outline would still tell what it is."""
        inside, where = np.zeros(self.altered.frame, bool), self.run.map
        ys, xs = np.flatnonzero(thing.any(1)), np.flatnonzero(thing.any(0))
        down, across = (count * self.altered.patch / where.size for count in self.altered.grid)  # frame pixels per square pixel
        left, top = where.to_model(xs[0], ys[0])
        right, bottom = where.to_model(xs[-1] + 1, ys[-1] + 1)
        left, right, top, bottom = left * across, right * across, top * down, bottom * down
        y = slice(max(int(np.floor(top)), 0), max(int(np.ceil(bottom)), 0))
        x = slice(max(int(np.floor(left)), 0), max(int(np.ceil(right)), 0))
        inside[y, x] = True
        return inside

    def _claims(self, values: np.ndarray) -> np.ndarray:
        """What maps (maps, patches) put on each thing beyond their own average, float32 (maps, things)."""
        if not len(self.things):
            return np.zeros((len(values), 0), np.float32)
        return ((values - values.mean(1, keepdims=True)) @ self.shares.T).astype(np.float32)

    def _order(self, values: np.ndarray) -> np.ndarray:
        return best_first(values.ravel()[self.patches], np.random.default_rng((self.seed, 23)))

    def _normal(self, scores: np.ndarray, fill: int) -> np.ndarray:
        """Raw scores (B, targets) -> 1 whole, 0 filled; NaN for targets of which this fill tells nothing."""
        low, tells = self.filled[:, fill], self.tells[:, fill]
        span = self.whole - low
        return np.where(tells, (self._scaled(scores) - low) / np.where(tells, span, 1.0), np.nan)

    def _scaled(self, scores: np.ndarray) -> np.ndarray:
        """Scores (..., targets) on the scale chosen."""
        if self.scale in (LOGPROB, LOGODDS):
            return scores
        lengths = np.array([1 if target.against_ids else len(target.token_ids) for target in self.targets])
        contrast = np.array([bool(target.against_ids) for target in self.targets])
        with np.errstate(over="ignore"):  # a hopeless contrast is 0, as it should be
            return np.where(contrast, 1 / (1 + np.exp(-scores)), np.exp(np.minimum(scores, 0.0) / lengths))


def check_masks(run: Run, masks: Any, what: str = "things") -> np.ndarray:
    """Masks bool (things, height, width) of the run's picture, none of them empty; one mask alone is taken too."""
    found = array_of(what, masks)
    found = found[None] if found.ndim == 2 else found
    if found.dtype != bool or found.shape[1:] != run.picture.shape[:2]:
        height, width = run.picture.shape[:2]
        raise OptionError(f"{what} must be masks, bool (things, {height}, {width}), got {found.dtype} {found.shape}")
    if not all(mask.any() for mask in found):
        raise OptionError(f"{what} has an empty mask, which names no place; leave it out")
    return found


def _own_fills(method: str, options: Mapping[str, Any]) -> list[str]:
    """The fills a map was made with, also where it was made from another method's map."""
    # what is not in the registry may call its fill anything
    names = METHODS[method].fill_options if method in METHODS else tuple(options)
    own = [fill for name in names for fill in _as_list(options.get(name)) if fill in EVERY_FILL]
    inner = str(options.get("of"))
    return own + (_own_fills(inner, METHODS[inner].with_defaults(options.get("options") or {})) if inner in METHODS else [])


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else []


def step_counts(patches: int, steps: int) -> np.ndarray:
    """How many of `patches` are changed at each step, int (about steps + 1,): 0 first, all last, the same backwards."""
    half = (1 - np.cos(np.pi * np.arange(steps // 2 + 1) / steps)) / 2
    counts = np.floor(half * patches + 0.5).astype(int)
    return np.unique(np.concatenate([counts, patches - counts]))


def verdict(
    fractions: np.ndarray, deletion: np.ndarray, insertion: np.ndarray, random: np.ndarray, seed: int = 0
) -> tuple[tuple[float, float], bool]:
    """The 95% interval of this map's gain minus one random map's, and whether the map beats random.

    deletion, insertion (fills, steps) of one target, NaN where a fill tells nothing; random (2, seeds, fills, steps).
    """
    known = ~np.isnan(deletion).any(1)
    if known.sum() < FEWEST_FILLS:
        return (float("nan"), float("nan")), False
    lead = (insertion - deletion)[known].astype(np.float64)
    forth = (random[1] - random[0])[:, known].astype(np.float64)
    others = np.concatenate([forth, -forth[..., ::-1]])  # maps, fills, steps
    gains, scatter = area(fractions, lead), area(fractions, others)
    above = (gains > scatter.max(0)) & (gains > SIGMAS * np.sqrt((scatter**2).mean(0)))
    interval = _interval(trapezoid(fractions)[1:-1], (lead.mean(0) - others.mean(1))[:, 1:-1], seed)
    return interval, bool(above.all() and interval[0] > 0)


def told_apart(fractions: np.ndarray, random: np.ndarray) -> bool:
    """Whether a perfect map could be told from random ones under some fill; random (2, seeds, fills, steps), one target."""
    gains = area(fractions, random[1] - random[0])
    spread = np.sqrt((gains[:, ~np.isnan(gains).any(0)] ** 2).mean(0))
    return bool((SIGMAS * spread < trapezoid(fractions)[1:-1].sum()).any())


def _interval(weights: np.ndarray, ahead: np.ndarray, seed: int) -> tuple[float, float]:
    """Bootstrap over random maps and steps: weights (S,), ahead (maps, S) the map's lead over each random map at each step."""
    rng = np.random.default_rng((seed, 19))
    which = rng.integers(len(ahead), size=RESAMPLES // 2)

    def means(times: np.ndarray) -> np.ndarray:
        times = times * weights
        return (ahead[which] * times).sum(1) / times.sum(1) * weights.sum()

    low, high = percentiles(cluster_bootstrap(means, len(weights), seed=rng, resamples=RESAMPLES // 2))
    return float(low), float(high)
