"""How good a map is, as frozen dataclasses over numpy arrays: what was measured, and its controls beside it.

`Faithfulness` is about the model (does the answer depend on what the map marks?), `GroundTruth` about
the world (does the map mark what decides the question?). They are different quantities and are never
averaged. `Comparison` holds several methods on one example, `Leaderboard` on a data set. Each saves to
one ``.npz`` file and loads again without torch or the model. Nothing here measures anything.

`Sanity`: does a map change when what it should depend on is destroyed? Similarity curves with their controls.

A frozen dataclass over numpy arrays; it saves to one ``.npz`` file and loads again without torch or the model.
`llava_lab.judging.sanity` measures it; nothing here runs a model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from llava_lab.errors import OptionError
from llava_lab.geometry import PictureMap
from llava_lab.results.run import Relevance, Target
from llava_lab.results.save import Saved, join, load_npz, save_npz, split


@dataclass(frozen=True)
class Faithfulness(Saved):
    """What happens to the targets when patches are taken away, or given back, in the order of a map.

    Curves are normalised per target and fill: 1 is the whole picture, 0 the picture with every patch
    filled; NaN where filling everything hardly changes the score, so that nothing can be told.
    """

    KIND = "faithfulness"

    method: str
    options: dict[str, Any]  # of the map that is scored
    targets: tuple[Target, ...]
    fills: tuple[str, ...]  # none of them was used by the method
    fractions: np.ndarray  # float64 (steps,), share of the patches taken away or given back, 0 to 1, the same backwards
    deletion: np.ndarray  # float32 (targets, fills, steps), best patches taken away first
    insertion: np.ndarray  # float32 (targets, fills, steps), best patches given back first
    random: np.ndarray  # float32 (2, seeds, targets, fills, steps), deletion and insertion of random maps
    center: np.ndarray  # float32 (2, targets, fills, steps), of a bump at the picture's centre
    whole: np.ndarray  # float64 (targets,), score of the whole picture, on `scale`
    filled: np.ndarray  # float64 (targets, fills), score with every patch filled
    interval: np.ndarray  # float64 (targets, 2), of the gain minus that of one random map (see `faithfulness`)
    beats_random: np.ndarray  # bool (targets,)
    effects: np.ndarray  # float32 (targets, fills, things), normalised drop when one thing is covered; no things, no columns
    claims: np.ndarray  # float32 (targets, things), how much more than its average the map puts on each thing
    random_claims: np.ndarray  # float32 (maps, things)
    scale: str  # "probability" or "logprob"
    fingerprint: str
    passes: dict[str, int]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def deletion_area(self) -> np.ndarray:
        """Area under the deletion curve, float64 (targets,), mean over fills; lower is better."""
        return mean_of_known(area(self.fractions, self.deletion))

    @property
    def insertion_area(self) -> np.ndarray:
        """Area under the insertion curve, float64 (targets,), mean over fills; higher is better."""
        return mean_of_known(area(self.fractions, self.insertion))

    @property
    def gain(self) -> np.ndarray:
        """Insertion minus deletion area, (targets,). 0 is the expectation of a random map, whatever the model."""
        return mean_of_known(self.gain_by_fill)

    @property
    def gain_by_fill(self) -> np.ndarray:
        """(targets, fills)"""
        return area(self.fractions, self.insertion) - area(self.fractions, self.deletion)

    @property
    def random_gains(self) -> np.ndarray:
        """(2 * seeds, targets, fills): each random map and its reverse, whose gain is exactly the opposite."""
        deletion, insertion = area(self.fractions, self.random)
        return np.concatenate([insertion - deletion, deletion - insertion])

    @property
    def inverse(self) -> np.ndarray:
        """Deletion and insertion of the map upside down, (2, targets, fills, steps): the same pictures read backwards."""
        return np.stack([self.insertion[..., ::-1], self.deletion[..., ::-1]])

    @property
    def hits(self) -> np.ndarray:
        """1 where the thing the map marks most is the one the answer needs most, shared among ties; (targets,), NaN if untold."""
        return np.array([_hit(claim, effect) for claim, effect in zip(self.claims, self.effects, strict=True)])

    @property
    def random_hits(self) -> np.ndarray:
        """The same for random maps on average, (targets,)."""
        by_target = [[_hit(claim, effect) for claim in self.random_claims] for effect in self.effects]
        return np.array([float(np.mean(hits)) if hits else np.nan for hits in by_target])


@dataclass(frozen=True)
class GroundTruth(Saved):
    """How well a map agrees with what decides the question. About the world, not about the model."""

    KIND = "ground truth"

    method: str
    options: dict[str, Any]
    targets: tuple[Target, ...]
    measures: tuple[str, ...]  # pointing, mass, auc, iou
    values: np.ndarray  # float64 (targets, measures), all 0 to 1, higher is better; NaN where undefined
    random: np.ndarray  # float64 (seeds, measures), of random maps
    center: np.ndarray  # float64 (measures,), of a bump at the picture's centre
    deciding: np.ndarray  # float32 (rows, cols), share of each patch that the deciding things cover
    fingerprint: str
    notes: tuple[str, ...] = ()

    def value(self, measure: str, target: int = 0) -> float:
        return float(self.values[target, _index("measure", measure, self.measures)])

    @property
    def expected(self) -> np.ndarray:
        """The mean of the random maps, (measures,): what knowing nothing scores."""
        return self.random.mean(0)


@dataclass(frozen=True)
class Comparison:
    """Several methods on one example: their maps, how far they agree, what they score and cost."""

    maps: dict[str, Relevance]  # all of the same targets, in the order asked for
    faithfulness: dict[str, Faithfulness]
    truth: dict[str, GroundTruth]  # empty when what decides is not known
    spearman: np.ndarray  # float64 (methods, methods), rank correlation of the maps, mean over targets
    overlap: np.ndarray  # float64 (methods, methods), share of the `top` patches in common, mean over targets
    top: int
    chance: float  # overlap of two random maps
    refused: dict[str, str]  # method -> why it cannot explain these targets
    fingerprint: str
    seconds: float
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(self.maps)

    @property
    def targets(self) -> tuple[Target, ...]:
        return next(iter(self.maps.values())).targets

    def greyed(self, target: int = 0) -> tuple[str, ...]:
        """Methods whose map did not beat random maps on this target; a view shows them in grey."""
        return tuple(name for name, score in self.faithfulness.items() if not score.beats_random[target])

    def rows(self, target: int = 0) -> list[dict[str, Any]]:
        """One plain dict per method, the highest gain first, NaN gains last."""
        rows = [self._row(name, target) for name in self.methods]
        return sorted(rows, key=lambda row: -row["gain"] if row["gain"] == row["gain"] else np.inf)

    def _row(self, name: str, target: int) -> dict[str, Any]:
        score, rel = self.faithfulness[name], self.maps[name]
        row: dict[str, Any] = {"method": name, "beats_random": bool(score.beats_random[target])}
        row |= {"gain": float(score.gain[target]), "interval": score.interval[target].tolist()}
        row |= {"deletion": float(score.deletion_area[target]), "insertion": float(score.insertion_area[target])}
        if score.effects.shape[-1]:
            row["object"] = float(score.hits[target])
        if name in self.truth:
            truth = self.truth[name]
            row["truth"] = {measure: truth.value(measure, target) for measure in truth.measures}
        return row | {"passes": dict(rel.passes), "seconds": rel.seconds}

    def save(self, path: str | os.PathLike) -> Path:
        header: dict[str, Any] = {}
        arrays: dict[str, np.ndarray] = {}
        for part in ("maps", "faithfulness", "truth"):
            header[part] = {}
            for number, (name, one) in enumerate(getattr(self, part).items()):
                header[part][name], inner = split(one)
                arrays |= {f"{part}.{number}.{key}": value for key, value in inner.items()}
        plain = {name: getattr(self, name) for name in ("top", "chance", "refused", "fingerprint", "seconds", "interrupted")}
        header |= plain | {"notes": list(self.notes)}
        return save_npz(path, "comparison", header, arrays | {"spearman": self.spearman, "overlap": self.overlap})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        header, arrays = load_npz(path, "comparison")
        kinds: dict[str, type] = {"maps": Relevance, "faithfulness": Faithfulness, "truth": GroundTruth}
        for part, kind in kinds.items():
            for number, (name, inner) in enumerate(header[part].items()):
                mark = f"{part}.{number}."
                own = {key.removeprefix(mark): value for key, value in arrays.items() if key.startswith(mark)}
                header[part][name] = join(kind, inner, own)
        return join(cls, header, {name: arrays[name] for name in ("spearman", "overlap")})


@dataclass(frozen=True)
class Leaderboard(Saved):
    """Every method on many pictures: means with intervals over pictures, paired against random, by type of question."""

    KIND = "leaderboard"

    methods: tuple[str, ...]
    types: tuple[str, ...]  # "all" first
    measures: tuple[str, ...]
    mean: np.ndarray  # float64 (methods, types, measures); NaN where nothing was measured
    interval: np.ndarray  # float64 (methods, types, measures, 2)
    against: np.ndarray  # float64 (methods, types, measures), mean difference from random on the same pictures
    against_interval: np.ndarray  # float64 (methods, types, measures, 2)
    counts: np.ndarray  # int64 (methods, types, measures), pictures behind each mean
    spearman: np.ndarray  # float64 (methods, methods), mean over pictures
    refused: dict[str, str]
    about: dict[str, Any] = field(default_factory=dict)  # model, data, settings, numbers of pictures, seconds

    def at(self, method: str, measure: str, kind: str = "all") -> dict[str, Any]:
        """One cell with its interval, its paired difference from random, and the number of pictures behind it."""
        where = _index("method", method, self.methods), _index("type", kind, self.types)
        cell = (*where, _index("measure", measure, self.measures))
        parts = {"mean": self.mean, "against": self.against, "n": self.counts}
        found = {name: part[cell].item() for name, part in parts.items()}
        return found | {"interval": self.interval[cell].tolist(), "against_interval": self.against_interval[cell].tolist()}

    def order(self, measure: str, kind: str = "all") -> tuple[str, ...]:
        """Methods by the mean of a measure, highest first, unmeasured last."""
        values = self.mean[:, _index("type", kind, self.types), _index("measure", measure, self.measures)]
        return tuple(self.methods[i] for i in np.argsort(np.where(np.isnan(values), np.inf, -values), kind="stable"))


def area(fractions: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """Area under curves (..., steps) by the trapezoid rule."""
    return np.asarray(curves, np.float64) @ trapezoid(fractions)


def trapezoid(fractions: np.ndarray) -> np.ndarray:
    """The weight of each step in `area`, (steps,), sum 1 for fractions from 0 to 1."""
    widths = np.diff(fractions)
    return (np.append(widths, 0.0) + np.insert(widths, 0, 0.0)) / 2


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN where nothing is known."""
    known = ~np.isnan(values)
    return np.where(known.any(-1), np.where(known, values, 0.0).sum(-1) / np.maximum(known.sum(-1), 1), np.nan)


def _hit(claims: np.ndarray, effects: np.ndarray) -> float:
    """claims (things,), effects (fills, things) -> share of the fills whose neediest thing the map marks most."""
    told = ~np.isnan(effects).any(1)
    if effects.shape[1] < 2 or not told.any():
        return float("nan")
    marked = (claims == claims.max()) / (claims == claims.max()).sum()
    return float(np.mean([marked[one == one.max()].sum() for one in effects[told]]))


def _index(what: str, name: str, names: tuple[str, ...]) -> int:
    if name not in names:
        raise OptionError(f"no {what} {name!r} here; there is {', '.join(names)}")
    return names.index(name)


SAME = 0.9  # rank correlation from which two maps tell a reader the same story
VERDICTS = ("changed", "partly", "unchanged", "flat", "not run", "not finished")


@dataclass(frozen=True)
class Sanity(Saved):
    """A map before and after: with the model randomised from the top down, and with another question.

    Similarities are to the original map, over the patches that hold some of the picture; 0 where one of the two
    maps is flat. A map that stays what it was does not show what the model learned, or what was asked.
    """

    KIND: ClassVar[str] = "sanity"

    method: str
    options: dict[str, Any]
    targets: tuple[Target, ...]
    steps: tuple[str, ...]  # what had been randomised by then, added to all the steps before
    questions: tuple[str, ...]  # what was asked instead
    original: np.ndarray  # float32 (targets, rows, cols)
    maps: np.ndarray  # float32 (steps, targets, rows, cols)
    question_maps: np.ndarray  # float32 (questions, targets, rows, cols)
    spearman: np.ndarray  # float32 (steps, targets), rank correlation
    overlap: np.ndarray  # float32 (steps, targets), share of the strongest patches in common
    ssim: np.ndarray  # float32 (steps, targets), structural similarity; (0, 0) when it was not asked for
    question_spearman: np.ndarray  # float32 (questions, targets)
    question_overlap: np.ndarray  # float32 (questions, targets)
    question_ssim: np.ndarray  # float32 (questions, targets), or (0, 0)
    random_spearman: np.ndarray  # float32 (draws, targets), of random maps
    moved_spearman: np.ndarray  # float32 (draws, targets), of the map itself moved, mirrored and turned at random
    top: int  # patches compared by the overlaps
    chance: float  # overlap that two independent maps have on average
    map: PictureMap
    model: str
    fingerprint: str
    seed: int
    passes: dict[str, int]
    seconds: float
    interrupted: bool = False  # Ctrl-C: what is here is what was done until then
    notes: tuple[str, ...] = ()

    @property
    def limit(self) -> np.ndarray:
        """Correlation that 19 of 20 unrelated maps stay below, (targets,): the higher of the two controls."""
        return np.maximum(np.quantile(self.random_spearman, 0.95, axis=0), np.quantile(self.moved_spearman, 0.95, axis=0))

    @property
    def verdict(self) -> dict[str, str]:
        """For ``"model"`` (when all is random) and ``"question"`` (the one that changed most): one of `VERDICTS`.

        ``changed``: no more like the original than an unrelated map. ``unchanged``: rank correlation `SAME` or
        more. ``partly``: between. ``flat``: the original map says nothing, so nothing can be told. Ctrl-C leaves
        the model test ``not finished``.
        """
        model = self._judge(self.spearman[-1]) if len(self.steps) else "not run"
        if self.interrupted:  # not all is random yet
            model = "not finished"
        question = self._judge(self.question_spearman.min(0)) if len(self.questions) else "not run"
        return {"model": model, "question": question}

    @property
    def passed(self) -> bool:
        """The map is gone when the model is, and does not ignore the question. Tests that were not run do not count."""
        verdict = self.verdict
        return verdict["model"] in ("changed", "not run") and verdict["question"] in ("changed", "partly", "not run")

    def to_dict(self) -> dict[str, Any]:
        """The curves and the verdict without the maps, ready for JSON."""
        model = [
            {"randomised": name, "spearman": self.spearman[i].tolist(), "overlap": self.overlap[i].tolist()}
            for i, name in enumerate(self.steps)
        ]
        question = [
            {"question": name, "spearman": self.question_spearman[i].tolist(), "overlap": self.question_overlap[i].tolist()}
            for i, name in enumerate(self.questions)
        ]
        for rows, ssim in ((model, self.ssim), (question, self.question_ssim)):
            for row, values in zip(rows, ssim, strict=False):
                row["ssim"] = values.tolist()
        about = {"method": self.method, "targets": [target.text for target in self.targets], "passed": self.passed}
        control = {"limit": self.limit.tolist(), "overlap": self.chance, "top": self.top}
        return about | {"verdict": self.verdict, "model": model, "question": question, "control": control}

    def with_notes(self, *notes: str) -> Sanity:
        return replace(self, notes=(*self.notes, *notes))

    def _judge(self, similarity: np.ndarray) -> str:
        seen = self.map.coverage().ravel() > 0
        telling = np.array([np.ptp(values.ravel()[seen]) > 0 for values in self.original])
        if not telling.any():
            return "flat"
        mean, limit = float(similarity[telling].mean()), float(self.limit[telling].mean())
        if mean >= SAME:
            return "unchanged"
        return "changed" if mean <= limit else "partly"
