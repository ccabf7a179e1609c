"""How good a map is: what was measured, and its controls beside it. `llava_lab.judging` measures it.

`Faithfulness` is about the model (does the answer depend on what the map marks?), `GroundTruth` about
the world (does the map mark what decides the question?). They are different quantities and are never
averaged. `Comparison` holds several methods on one example, `Leaderboard` on a data set. `Sanity` says
whether a map changes when what it should depend on is destroyed.

    score = Faithfulness.load("faithfulness.npz")
    print(score.table())
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from llava_lab.errors import DataError
from llava_lab.geometry import PictureMap
from llava_lab.results.run import Relevance, Target, target_index
from llava_lab.results.save import Saved
from llava_lab.results.schema import filled, place_of
from llava_lab.results.table import Table, figure, map_row, plain

# What is measured of a map: faithful to the model, true to the picture, and the cost. `better` is the share of pictures
# on which the map beats random ones.
FAITHFUL = ("gain", "deletion", "insertion", "better", "object")
TRUE = ("pointing", "mass", "auc", "iou")
COST = ("forward", "backward", "seconds")
TITLE = ("model", "data", "split", "explained", "pictures", "asked", "wrong", "blind")  # said of every leaderboard
DIGITS = 5  # of a leaderboard's numbers in JSON

SAME = 0.9  # rank correlation from which two maps tell a reader the same story
VERDICTS = ("changed", "partly", "unchanged", "flat", "not run", "not finished")


@dataclass(frozen=True)
class Faithfulness(Saved):
    """What happens to the targets when patches are taken away, or given back, in the order of a map.

    Curves are normalised per target and fill: 1 is the whole picture, 0 the picture with every patch
    filled; NaN where filling everything hardly changes the score, so that nothing can be told.
    """

    KIND: ClassVar[str] = "faithfulness"
    GAPS: ClassVar[tuple[str, ...]] = ("deletion", "insertion", "random", "center", "interval", "effects")

    method: str
    options: dict[str, Any]  # of the map that is scored
    targets: tuple[Target, ...]
    fills: tuple[str, ...]  # none of them was used by the method
    fractions: Float64[np.ndarray, " steps"]  # share of the patches taken away or given back, 0 to 1, the same backwards
    deletion: Float32[np.ndarray, "targets fills steps"]  # best patches taken away first
    insertion: Float32[np.ndarray, "targets fills steps"]  # best patches given back first
    random: Float32[np.ndarray, "2 seeds targets fills steps"]  # deletion and insertion of random maps
    center: Float32[np.ndarray, "2 targets fills steps"]  # of a bump at the picture's centre
    whole: Float64[np.ndarray, " targets"]  # score of the whole picture, on `scale`
    filled: Float64[np.ndarray, "targets fills"]  # score with every patch filled
    interval: Float64[np.ndarray, "targets 2"]  # of the gain minus that of one random map (see `faithfulness`)
    beats_random: Bool[np.ndarray, " targets"]
    effects: Float32[np.ndarray, "targets fills things"]  # normalised drop when one thing is covered; no things, no columns
    claims: Float32[np.ndarray, "targets things"]  # how much more than its average the map puts on each thing
    random_claims: Float32[np.ndarray, "maps things"]
    scale: str  # "probability" or "logprob"
    fingerprint: str
    passes: dict[str, int]
    seconds: float
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        filled(targets=self.targets, fractions=self.fractions)

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

    def table(self) -> Table:
        """A row per target: the gain with its interval against one random map, both areas, and the verdict."""
        rows = [
            (
                target.text,
                figure(self.gain[i]),
                _interval(self.interval[i]),
                figure(self.deletion_area[i]),
                figure(self.insertion_area[i]),
                "yes" if self.beats_random[i] else "no",
            )
            for i, target in enumerate(self.targets)
        ]
        names = ("target", "gain", "above random (95%)", "deletion", "insertion", "beats random")
        return Table(names, tuple(rows), title=self.method, notes=self.notes)


@dataclass(frozen=True)
class GroundTruth(Saved):
    """How well a map agrees with what decides the question. About the world, not about the model."""

    KIND: ClassVar[str] = "ground truth"
    GAPS: ClassVar[tuple[str, ...]] = ("values", "random", "center")

    method: str
    options: dict[str, Any]
    targets: tuple[Target, ...]
    measures: tuple[str, ...]  # pointing, mass, auc, iou
    values: Float64[np.ndarray, "targets measures"]  # all 0 to 1, higher is better; NaN where undefined
    random: Float64[np.ndarray, "draws measures"]  # of random maps
    center: Float64[np.ndarray, " measures"]  # of a bump at the picture's centre
    deciding: Float32[np.ndarray, "rows cols"]  # share of each patch that the deciding things cover
    fingerprint: str
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        filled(targets=self.targets, draws=self.random)

    def value(self, measure: str, target: int | str = 0) -> float:
        return float(self.values[target_index(self.targets, target), place_of("measure", measure, self.measures)])

    @property
    def expected(self) -> np.ndarray:
        """The mean of the random maps, (measures,): what knowing nothing scores."""
        return self.random.mean(0)

    def table(self) -> Table:
        """A row per target, then random maps and a bump at the centre."""
        scores = [(target.text, row) for target, row in zip(self.targets, self.values, strict=True)]
        scores += [("random maps", self.expected), ("centre", self.center)]
        rows = tuple((name, *map(figure, row.tolist())) for name, row in scores)
        return Table(("target", *self.measures), rows, title=self.method, notes=self.notes)


@dataclass(frozen=True)
class Comparison(Saved):
    """Several methods on one example: their maps, how far they agree, what they score and cost."""

    KIND: ClassVar[str] = "comparison"
    GAPS: ClassVar[tuple[str, ...]] = ("spearman",)

    maps: dict[str, Relevance]  # all of the same targets, in the order asked for
    faithfulness: dict[str, Faithfulness]
    truth: dict[str, GroundTruth]  # empty when what decides is not known
    spearman: Float64[np.ndarray, "maps maps"]  # rank correlation of the maps, mean over targets
    overlap: Float64[np.ndarray, "maps maps"]  # share of the `top` patches in common, mean over targets
    top: int
    chance: float  # overlap of two random maps
    refused: dict[str, str]  # method -> why it cannot explain these targets
    fingerprint: str
    seconds: float
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        filled(maps=self.maps)
        parts: list[Any] = [*self.maps.values(), *self.faithfulness.values(), *self.truth.values()]
        if self.faithfulness.keys() != self.maps.keys() or any(name not in self.maps for name in self.truth):
            raise DataError(f"expected a score for each of the maps {', '.join(self.maps)}, got {', '.join(self.faithfulness)}")
        if any(part.targets != self.targets for part in parts):
            raise DataError("its maps and scores must all be of the same targets")

    def pictured(self) -> str:
        """Each method's map of the last target, which in a sentence is what answers."""
        return map_row((f"{name}: {rel.targets[-1].text}", rel.values[-1]) for name, rel in self.maps.items())

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(self.maps)

    @property
    def targets(self) -> tuple[Target, ...]:
        return next(iter(self.maps.values())).targets

    def greyed(self, target: int | str = 0) -> tuple[str, ...]:
        """Methods whose map did not beat random maps on this target; a view shows them in grey."""
        at = target_index(self.targets, target)
        return tuple(name for name, score in self.faithfulness.items() if not score.beats_random[at])

    def rows(self, target: int | str = 0) -> list[dict[str, Any]]:
        """One plain dict per method, the highest gain first, NaN gains last."""
        rows = [self._row(name, target_index(self.targets, target)) for name in self.methods]
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

    def table(self, target: int | str = 0) -> Table:
        """A row per method, the highest gain first."""
        names = ("method", "gain", "deletion", "insertion", "beats random", "passes", "seconds")
        rows = [
            (
                row["method"],
                *(figure(row[part]) for part in ("gain", "deletion", "insertion")),
                "yes" if row["beats_random"] else "no",
                str(sum(row["passes"].values())),
                f"{row['seconds']:.2f}",
            )
            for row in self.rows(target)
        ]
        notes = (*_refusals(self.refused), *self.notes)
        return Table(
            names, tuple(rows), title=f"explained: {self.targets[target_index(self.targets, target)].text!r}", notes=notes
        )

    def to_dict(self, target: int | str = 0) -> dict[str, Any]:
        """What ``llava-lab compare --json`` prints beside the answer and the model."""
        agreement = {"methods": self.methods, "spearman": self.spearman, "overlap": self.overlap, "top": self.top}
        about = {
            "target": self.targets[target_index(self.targets, target)].text,
            "rows": self.rows(target),
            "refused": self.refused,
        }
        return plain(about | {"agreement": agreement, "notes": self.notes, "seconds": self.seconds})


@dataclass(frozen=True)
class Leaderboard(Saved):
    """Every method on many pictures: means with intervals over pictures, paired against random, by type of question."""

    KIND: ClassVar[str] = "leaderboard"
    GAPS: ClassVar[tuple[str, ...]] = ("mean", "interval", "against", "against_interval", "spearman")

    methods: tuple[str, ...]
    types: tuple[str, ...]  # "all" first
    measures: tuple[str, ...]
    mean: Float64[np.ndarray, "methods types measures"]  # NaN where nothing was measured
    interval: Float64[np.ndarray, "methods types measures 2"]
    against: Float64[np.ndarray, "methods types measures"]  # mean difference from random on the same pictures
    against_interval: Float64[np.ndarray, "methods types measures 2"]
    counts: Int64[np.ndarray, "methods types measures"]  # pictures behind each mean
    spearman: Float64[np.ndarray, "methods methods"]  # mean over pictures
    refused: dict[str, str]
    about: dict[str, Any] = field(default_factory=dict)  # model, data, settings, numbers of pictures, seconds

    def check(self) -> None:
        if "all" not in self.types or "gain" not in self.measures:
            raise DataError("a leaderboard has the type 'all' and the measure 'gain'")
        if missing := [name for name in TITLE if name not in self.about]:
            raise DataError(f"its `about` lacks {', '.join(missing)}")

    def at(self, method: str, measure: str, kind: str = "all") -> dict[str, Any]:
        """One cell with its interval, its paired difference from random, and the number of pictures behind it."""
        where = place_of("method", method, self.methods), place_of("type", kind, self.types)
        cell = (*where, place_of("measure", measure, self.measures))
        parts = {"mean": self.mean, "against": self.against, "n": self.counts}
        numbers = {name: part[cell].item() for name, part in parts.items()}
        return numbers | {"interval": self.interval[cell].tolist(), "against_interval": self.against_interval[cell].tolist()}

    def order(self, measure: str, kind: str = "all") -> tuple[str, ...]:
        """Methods by the mean of a measure, highest first, unmeasured last."""
        values = self.mean[:, place_of("type", kind, self.types), place_of("measure", measure, self.measures)]
        return tuple(self.methods[i] for i in np.argsort(np.where(np.isnan(values), np.inf, -values), kind="stable"))

    def table(self) -> Table:
        """Faithfulness first, the world's truth in columns of their own, then two measures by type of question."""
        about = self.about
        title = (
            f"{about['model']} on {about['data']} {about['split']}: {about['explained']} of {about['pictures']} pictures "
            f"explained; {about['asked']} questions asked, {about['wrong']} answered wrong, {about['blind']} without the picture"
        )
        measures = [name for name in (*FAITHFUL[1:], *TRUE, "seconds") if name in self.measures]
        rows = []
        for name in self.order("gain"):
            gain = self.at(name, "gain")
            cells = (figure(self.at(name, measure)["mean"]) for measure in measures)
            rows.append((name, f"{figure(gain['mean'])} {_interval(gain['interval'])}", *cells))
        by_type = []
        for measure in [name for name in ("gain", "pointing") if name in self.measures]:
            means = {name: [self.at(name, measure, kind)["mean"] for kind in self.types] for name in self.order("gain")}
            cells_by_type = tuple((name, *map(figure, row)) for name, row in means.items())
            by_type.append(Table((measure, *self.types), cells_by_type, title=""))
        names = ("method", "gain (95%)", *measures)
        return Table(names, tuple(rows), title=title, below=tuple(by_type), notes=tuple(_refusals(self.refused)))

    def to_dict(self) -> dict[str, Any]:
        """What ``llava-lab compare --data --json`` prints: a row per method and type, its measures in three groups."""
        groups = {
            group: [measure for measure in measures if measure in self.measures]
            for group, measures in (("faithfulness", FAITHFUL), ("ground_truth", TRUE), ("cost", COST))
        }
        rows = [
            {"method": name, "type": kind}
            | {group: {measure: self._cell(name, kind, measure) for measure in known} for group, known in groups.items()}
            for name in self.methods
            for kind in self.types
        ]
        agreement = {"methods": self.methods, "spearman": self.spearman.round(DIGITS)}
        return plain({"rows": rows, "agreement": agreement, "refused": self.refused, "about": self.about})

    def _cell(self, method: str, kind: str, measure: str) -> dict[str, Any]:
        cell = self.at(method, measure, kind)
        shown = {"mean": cell["mean"], "interval": cell["interval"], "n": cell["n"]}
        if measure not in (*COST, "better"):
            shown |= {"against_random": cell["against"], "against_random_interval": cell["against_interval"]}
        return {name: np.round(value, DIGITS).tolist() for name, value in shown.items()}


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
    known = ~np.isnan(effects).any(1)
    if effects.shape[1] < 2 or not known.any():
        return float("nan")
    marked = (claims == claims.max()) / (claims == claims.max()).sum()
    return float(np.mean([marked[row == row.max()].sum() for row in effects[known]]))


def _interval(edges: Any) -> str:
    return f"[{figure(float(edges[0]))}, {figure(float(edges[1]))}]"


def _refusals(refused: dict[str, str]) -> list[str]:
    return [f"{name} refused: {reason}" for name, reason in refused.items()]


@dataclass(frozen=True)
class Sanity(Saved):
    """A map before and after: with the model randomised from the top down, and with another question.

    Similarities are to the original map, over the patches that hold some of the picture; 0 where one of the two
    maps is flat. A map that stays what it was does not show what the model learned, or what was asked.
    """

    KIND: ClassVar[str] = "sanity"
    GAPS: ClassVar[tuple[str, ...]] = ("ssim", "question_ssim")

    method: str
    options: dict[str, Any]
    targets: tuple[Target, ...]
    steps: tuple[str, ...]  # what had been randomised by then, added to all the steps before
    questions: tuple[str, ...]  # what was asked instead
    original: Float32[np.ndarray, "targets rows cols"]
    maps: Float32[np.ndarray, "steps targets rows cols"]
    question_maps: Float32[np.ndarray, "questions targets rows cols"]
    spearman: Float32[np.ndarray, "steps targets"]  # rank correlation
    overlap: Float32[np.ndarray, "steps targets"]  # share of the strongest patches in common
    ssim: Float32[np.ndarray, "_ _"]  # structural similarity; (0, 0) when it was not asked for
    question_spearman: Float32[np.ndarray, "questions targets"]
    question_overlap: Float32[np.ndarray, "questions targets"]
    question_ssim: Float32[np.ndarray, "_ _"]  # or (0, 0)
    random_spearman: Float32[np.ndarray, "draws targets"]  # of random maps
    moved_spearman: Float32[np.ndarray, "moves targets"]  # of the map itself moved, mirrored and turned at random
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

    def check(self) -> None:
        filled(targets=self.targets, draws=self.random_spearman, moves=self.moved_spearman)
        for rows, shape in ((self.ssim, self.spearman.shape), (self.question_ssim, self.question_spearman.shape)):
            if rows.shape not in (shape, (0, 0)):
                raise DataError(f"ssim must be {shape} or left out, got {rows.shape}")

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
        return plain(about | {"verdict": self.verdict, "model": model, "question": question, "control": control})

    def table(self) -> Table:
        """The two tests' curves, means over the targets, then the control and the verdict."""
        curves = [("model", *row) for row in zip(self.steps, self.spearman, self.overlap, strict=True)]
        curves += [("question", *row) for row in zip(self.questions, self.question_spearman, self.question_overlap, strict=True)]
        rows = tuple((test, name, f"{rank.mean():.2f}", f"{top.mean():.2f}") for test, name, rank, top in curves)
        control = (
            f"unrelated maps stay below a rank correlation of {self.limit.mean():.2f} and share {self.chance:.2f} of the top"
        )
        verdict = ", ".join(f"{test} {how}" for test, how in self.verdict.items())
        notes = (control, f"{'passed' if self.passed else 'not passed'}: {verdict}", *self.notes)
        names = ("test", "randomised so far, or asked instead", "rank correlation", f"same top {self.top}")
        explained = ", ".join(repr(target.text) for target in self.targets)
        return Table(names, rows, title=f"{self.method}, explained: {explained}", notes=notes)

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
