"""What came of generating instruction rows: how many, why not more, and how true they are.

made = Generated.load("data/truth.npz")
print(made.table())
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float64, Int64

from llava_lab.errors import DataError
from llava_lab.results.save import Saved
from llava_lab.results.table import Table, percent, plain

VERDICTS = (True, False, None)  # true, false, cannot be told; the last axis of `Generated.claims`


@dataclass(frozen=True)
class Generated(Saved):
    """Rows by kind, rejections by reason, claims by type and verdict.

    Claims are of every row that could be read, also of those rejected later. `chair` counts, for each kind, things named that
    are not there, things named at all, sentences that name one that is not there, and sentences.
    """

    KIND: ClassVar[str] = "generated rows"

    folder: str
    teacher: str
    terms: str
    source: dict[str, Any]
    kinds: tuple[str, ...]
    asked: Int64[np.ndarray, " kinds"]
    kept: Int64[np.ndarray, " kinds"]
    turns: Int64[np.ndarray, " kinds"]  # in the rows kept
    passing: Int64[np.ndarray, " kinds"]  # rows kept in which no claim is false
    reasons: tuple[str, ...]
    rejected: Int64[np.ndarray, "kinds reasons"]  # rows and turns
    types: tuple[str, ...]
    claims: Int64[np.ndarray, "kinds types 3"]  # true, false, cannot be told
    chair: Int64[np.ndarray, "kinds 4"]
    used: tuple[int, int]  # tokens read and written, where the teacher counts them
    seed: int
    finished: bool  # False where another worker was still at it; then of the chunks there were
    seconds: float

    @property
    def rows(self) -> int:
        """Rows written."""
        return int(self.kept.sum())

    def shares(self, kind: str | None = None) -> dict[str, float]:
        """Shares of claims that are true, false and cannot be told, and CHAIR's two, of one kind or all; NaN where none are."""
        at = slice(None) if kind is None else slice(self.kinds.index(kind), self.kinds.index(kind) + 1)
        claims, chair = self.claims[at].sum((0, 1)), self.chair[at].sum(0)
        with np.errstate(invalid="ignore"):
            true, false, untold = (claims / claims.sum()).tolist()
            things, said = (chair[[0, 2]] / chair[[1, 3]]).tolist()
        return {"true": true, "false": false, "not told": untold, "chair_i": things, "chair_s": said}

    def table(self) -> Table:
        """Rows and truth by kind, claims by type, and rejections by reason."""
        names = [*self.kinds, *(["all"] if len(self.kinds) > 1 else [])]
        rows = []
        for name in names:
            at = slice(None) if name == "all" else slice(self.kinds.index(name), self.kinds.index(name) + 1)
            counts = [int(values[at].sum()) for values in (self.asked, self.kept, self.passing)]
            shares = self.shares(None if name == "all" else name)
            rows.append((name, *map(str, counts), str(int(self.claims[at].sum())), *map(percent, shares.values())))
        headings: tuple[str, ...] = ("kind", "asked", "kept", "nothing false", "claims")
        headings += ("true %", "false %", "not told %", "CHAIR_i %", "CHAIR_s %")
        title = f"{self.rows} rows by {self.teacher}" + ("" if self.finished else " so far; another worker is at the rest")
        return Table(headings, tuple(rows), title=title, below=(self._by_type(), self._rejections()))

    def _by_type(self) -> Table:
        rows = []
        for name, counts in zip(self.types, self.claims.sum(0), strict=True):
            if total := int(counts.sum()):
                rows.append((name, str(total), *(percent(float(count) / total) for count in counts)))
        return Table(("claim", "claims", "true %", "false %", "not told %"), tuple(rows), title="")

    def _rejections(self) -> Table:
        counts = self.rejected.sum(0)
        rows = tuple((name, str(int(count))) for name, count in zip(self.reasons, counts, strict=True) if count)
        return Table(("thrown away", "rows and turns"), rows, title="") if rows else Table(notes=("nothing was thrown away",))

    def to_dict(self) -> dict[str, Any]:
        """Counts by name, and the shares."""
        rejected = {
            kind: {reason: int(n) for reason, n in zip(self.reasons, counts, strict=True) if n}
            for kind, counts in zip(self.kinds, self.rejected, strict=True)
        }
        claims = {
            kind: {
                name: dict(zip(("true", "false", "not told"), of.tolist(), strict=True))
                for name, of in zip(self.types, part, strict=True)
            }
            for kind, part in zip(self.kinds, self.claims, strict=True)
        }
        by_kind = {
            kind: {
                "asked": int(self.asked[i]), "kept": int(self.kept[i]), "turns": int(self.turns[i]),
                "nothing_false": int(self.passing[i]), "rejected": rejected[kind], "claims": claims[kind],
            } | self.shares(kind)
            for i, kind in enumerate(self.kinds)
        }  # fmt: skip
        about = {
            name: getattr(self, name) for name in ("folder", "teacher", "terms", "source", "used", "seed", "finished", "seconds")
        }
        return plain(about | {"rows": self.rows} | self.shares() | {"kinds": by_kind})


@dataclass(frozen=True)
class CheckPays(Saved):
    """Whether training on rows that pass the truth check is better than on all, or on as many at random.

    Accuracy is the share of whole answers that are right. Pairs are "first - second"; a verdict is 1 (better), -1 (worse)
    or 0 (cannot be told), from seeds and pictures together (`llava_lab.stats.table`).
    """

    KIND: ClassVar[str] = "check pays"

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    types: tuple[str, ...]  # of questions; the first is all of them
    rows: Int64[np.ndarray, "arms seeds"]
    accuracy: Float64[np.ndarray, "arms seeds"]
    by_type: Float64[np.ndarray, "arms types"]
    interval: Float64[np.ndarray, "arms 2"]  # 95%, pictures resampled
    last_loss: Float64[np.ndarray, "arms seeds"]  # of training, mean of the last ten steps
    pairs: tuple[str, ...]
    effect: Float64[np.ndarray, " pairs"]
    picture_interval: Float64[np.ndarray, "pairs 2"]
    seed_interval: Float64[np.ndarray, "pairs 2"]
    p_adjusted: Float64[np.ndarray, " pairs"]
    verdict: Int64[np.ndarray, " pairs"]
    lies_found: Int64[np.ndarray, " 4"]  # turns, over seeds: lies found, lies, truths called false, truths
    setup: dict[str, Any]
    start: str
    questions: int
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises DataError where the setup lacks the numbers that the table says."""
        for name in ("lie", "steps", "batch"):
            if isinstance(self.setup.get(name), bool) or not isinstance(self.setup.get(name), (int, float)):
                raise DataError(f"its setup has no number {name!r}")

    def table(self) -> Table:
        """A row per arm, a row per pair, and how well the check knew lies from truths."""
        rows = []
        for arm, count, right, span in zip(self.arms, self.rows, self.accuracy, self.interval, strict=True):
            spread = percent(float(right.std(ddof=1)))
            rows.append((arm, f"{count.mean():.0f}", percent(float(right.mean())), _span(span), spread))
        lie, steps, batch = (self.setup[name] for name in ("lie", "steps", "batch"))
        how = f"{steps} steps of {batch}, {len(self.seeds)} seeds, {self.questions} questions"
        title = f"stage 2 on rows of a teacher lying {lie:g}: {how}"
        found, lies, wrong, truths = (int(count) for count in self.lies_found)
        note = f"the check called {found} of {lies} lies false, and {wrong} of {truths} truths"
        arms = Table(("rows", "mean number", "right %", "95% over pictures", "± over seeds"), tuple(rows), title=title)
        return Table(title=None, below=(arms, self._pairs()), notes=("", note, *self.notes))

    def _pairs(self) -> Table:
        rows = []
        for i, name in enumerate(self.pairs):
            word = {1: "better", -1: "worse", 0: "cannot be told"}[int(self.verdict[i])]
            spans = (_span(self.picture_interval[i]), _span(self.seed_interval[i]))
            rows.append((name, percent(float(self.effect[i])), *spans, f"{self.p_adjusted[i]:.3g}", word))
        headings = ("difference", "points", "95% over pictures", "95% over seeds", "p (Holm)", "verdict")
        return Table(headings, tuple(rows), title="")

    def to_dict(self) -> dict[str, Any]:
        """Numbers by the names of arms and pairs."""
        arms = {
            arm: {
                "rows": self.rows[i].tolist(), "accuracy": float(self.accuracy[i].mean()), "by_seed": self.accuracy[i].tolist(),
                "interval": self.interval[i].tolist(), "by_type": dict(zip(self.types, self.by_type[i].tolist(), strict=True)),
                "last_loss": self.last_loss[i].tolist(),
            }
            for i, arm in enumerate(self.arms)
        }  # fmt: skip
        pairs = {
            pair: {
                "effect": float(self.effect[i]), "picture_interval": self.picture_interval[i].tolist(),
                "seed_interval": self.seed_interval[i].tolist(), "p_adjusted": float(self.p_adjusted[i]),
                "verdict": int(self.verdict[i]),
            }
            for i, pair in enumerate(self.pairs)
        }  # fmt: skip
        names = ("found", "lies", "truths_called_false", "truths")
        lies = dict(zip(names, self.lies_found.tolist(), strict=True))
        about = {name: getattr(self, name) for name in ("seeds", "setup", "start", "questions", "notes")}
        return plain({"arms": list(self.arms), "accuracy": arms, "pairs": pairs, "check": lies} | about)


def _span(interval: np.ndarray) -> str:
    return " to ".join(percent(float(value)) for value in interval)
