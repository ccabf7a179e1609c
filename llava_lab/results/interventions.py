"""What touching the model did: `Effect` of one intervention, `FlowSweep` over layer windows, `PatchGrid` over places.

Frozen dataclasses over numpy arrays; each saves to one ``.npz`` file and loads again without torch or the
model. `llava_lab.interventions` measures them; nothing here runs a model.

    effect = knockout(lab, run, source="image", target="last")
    Effect.load(effect.save("effect.npz")).table()
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, Shaped

from llava_lab.errors import DataError
from llava_lab.geometry import PictureMap
from llava_lab.results.run import Target, above_noise
from llava_lab.results.save import Saved
from llava_lab.results.schema import filled, place_of
from llava_lab.results.table import NEGLIGIBLE, Table, figure, pairs, plain
from llava_lab.stats import resampled_means, wilson


class Noisy:
    """What a result says of its noise floor: how much rounding alone may change each target's score."""

    targets: tuple[Target, ...]
    score: str
    noise_floor: tuple[float, ...]
    change: np.ndarray  # (..., targets)

    def check_noise(self) -> None:
        """Raise DataError unless there is one noise floor for each target, or none at all."""
        numbers = all(0 <= floor < np.inf for floor in self.noise_floor)
        if len(self.noise_floor) not in (0, len(self.targets)) or not numbers:
            raise DataError(
                f"expected a noise floor of 0 or more for each of {len(self.targets)} targets, got {self.noise_floor}"
            )

    @property
    def floors(self) -> np.ndarray:
        """The noise floor of each target, float32 (targets,); 0 where none was measured."""
        return np.array(self.noise_floor or np.zeros(len(self.targets)), np.float32)

    def noise_notes(self) -> tuple[str, ...]:
        """The noise floor of each target and how many changes lie below it; nothing where none was measured."""
        parts = []
        for target, floor, change in zip(self.targets, self.noise_floor, np.moveaxis(self.change, -1, 0), strict=False):
            below = int((np.abs(change) < floor).sum())
            parts.append(f"{floor:.2g} for {target.text!r}" + (f" ({below} of {np.size(change)} below)" if below else ""))
        return (f"Scored by {self.score}; noise floor, by rounding: {', '.join(parts)}.",) if parts else ()


@dataclass(frozen=True)
class Effect(Noisy, Saved):
    """One intervention: scores before and after, the answer it gives, the same done at random, and the proof that it took.

    A score is the log-odds or the log-probability of the target's tokens (`score`), natural, summed; for a contrast the logit
    of the token said minus that of the token not said. A change below the `noise_floor` is none that can be told.
    """

    KIND: ClassVar[str] = "effect"

    name: str  # the function that made it
    what: str  # what was done, one sentence
    options: dict[str, Any]
    targets: tuple[Target, ...]
    before: Float32[np.ndarray, " targets"]
    after: Float32[np.ndarray, " targets"]
    control: Float32[np.ndarray, "draws targets"]  # the change made by each random control; no rows when there is none
    control_name: str  # what was drawn at random, or why nothing was
    answer_before: str
    answer_after: str  # "" when `answered` is false
    answered: bool  # whether the question was answered again
    proof: dict[str, float]  # what the check inside the call measured
    side: dict[str, Any]  # other questions: "questions", "before", "after", "change" of the old answer's log-probability
    map: PictureMap
    model: str
    fingerprint: str
    seed: int
    passes: dict[str, int]
    seconds: float
    interrupted: bool = False
    notes: tuple[str, ...] = ()
    score: str = "logprob"  # or "logodds": what `llava_lab.replay.score` says
    noise_floor: tuple[float, ...] = ()  # of each target: what rounding may change; empty in files of before it was measured

    def check(self) -> None:
        filled(targets=self.targets)
        self.check_noise()

    @property
    def change(self) -> np.ndarray:  # type: ignore[override]
        """After minus before, float32 (targets,); negative where the target became less likely."""
        return self.after - self.before

    @property
    def percentile(self) -> np.ndarray:
        """Share of random controls that lowered the score less than this did, 0 to 100, ties half; NaN without controls."""
        if not len(self.control):
            return np.full(len(self.before), np.nan)
        weaker = (self.control > self.change).mean(0) + (self.control == self.change).mean(0) / 2
        return 100.0 * weaker

    @property
    def answer_changed(self) -> bool:
        """Whether the model says something else; False too when it was not asked again."""
        return self.answered and self.answer_before != self.answer_after

    def to_dict(self) -> dict[str, Any]:
        """Everything but the picture's map, ready for JSON."""
        names = ["name", "what", "options", "answer_before", "answer_after", "answered"]
        names += ["control_name", "proof", "side", "model", "seconds", "score"]
        columns = {"before": self.before, "after": self.after, "change": self.change, "percentile": self.percentile}
        columns |= {"noise_floor": self.floors}
        rows = [
            {"target": target.text, **{name: column[i] for name, column in columns.items()}, "control": self.control[:, i]}
            for i, target in enumerate(self.targets)
        ]
        about = {name: getattr(self, name) for name in names}
        return plain(about | {"targets": rows, "interrupted": self.interrupted, "passes": self.passes, "notes": self.notes})

    def table(self) -> Table:
        """A row per target, under what was done and both answers; the control and the proof below."""
        rows = [
            (
                target.text,
                *(f"{float(part[i]):z.3f}" for part in (self.before, self.after)),
                _told(float(self.change[i]), float(self.floors[i])),
                figure(float(self.percentile[i]), ".0f"),
            )
            for i, target in enumerate(self.targets)
        ]
        title = f"{self.what}\nbefore: {self.answer_before}\nafter:  {self.answer_after}"
        notes = [f"control: {self.control_name}; {len(self.control)} draws"]
        # the functions that cut no attention prove themselves in other ways
        if "edges" in self.proof:
            notes.append(f"proof: {self.proof['edges']:.0f} cut entries, largest weight {self.proof.get('largest', 0):g}")
        else:
            notes.append(f"proof: {pairs({name: f'{value:g}' for name, value in self.proof.items()})}")
        notes += self.noise_notes()
        names = ("target", "before", "after", "change", "percentile")
        return Table(names, tuple(rows), title=title, notes=(*notes, *self.notes))


@dataclass(frozen=True)
class FlowSweep(Noisy, Saved):
    """What cutting each flow in each window of layers does to each target. NaN where Ctrl-C came first."""

    KIND: ClassVar[str] = "flow sweep"
    GAPS: ClassVar[tuple[str, ...]] = ("before", "after", "chance")

    flows: tuple[str, ...]  # "image -> question": what is read, and who may not read it
    windows: Int64[np.ndarray, "windows 2"]  # layers [start, stop)
    centres: Int64[np.ndarray, " windows"]  # the layer in the middle
    targets: tuple[Target, ...]
    before: Float32[np.ndarray, " targets"]  # as in `Effect`
    after: Float32[np.ndarray, "flows windows targets"]
    proof: dict[str, float]
    model: str
    fingerprint: str
    passes: dict[str, int]
    seconds: float
    interrupted: bool = False
    notes: tuple[str, ...] = ()
    score: str = "logprob"  # or "logodds": what `llava_lab.replay.score` says
    noise_floor: tuple[float, ...] = ()  # of each target: what rounding may change; empty in files of before it was measured
    # relative change of the probability, NaN for a contrast; empty in those older files, whose `after` says it
    chance: Float32[np.ndarray, "_ _ _"] = field(default_factory=lambda: np.zeros((0, 0, 0), np.float32))

    def check(self) -> None:
        filled(targets=self.targets, flows=self.flows)
        self.check_noise()
        if self.chance.size and self.chance.shape != self.after.shape:
            raise DataError(f"its changes of probability are {self.chance.shape}, its scores {self.after.shape}")

    @property
    def change(self) -> np.ndarray:  # type: ignore[override]
        """After minus before, float32 (flows, windows, targets)."""
        return self.after - self.before

    @property
    def relative(self) -> np.ndarray:
        """(p' - p) / p of each target's probability, -1 upwards; NaN for a contrast, which has no probability."""
        if self.chance.size:
            return self.chance
        plain = np.array([not target.against_ids for target in self.targets])
        with np.errstate(over="ignore"):
            return np.where(plain, np.expm1(self.change), np.nan)

    @property
    def drawn(self) -> np.ndarray:
        """The change with 0 for what does not reach the noise floor, as figures and widgets draw it."""
        return above_noise(self.change, self.floors)

    def flow(self, name: str) -> np.ndarray:
        """The change of one flow, (windows, targets)."""
        return self.change[place_of("flow", name, self.flows)]

    def table(self) -> Table:
        """Change of the first target, a row for each window and a column for each flow."""
        rows = tuple(
            (f"{start} to {stop - 1}", *(_told(float(value), float(self.floors[0])) for value in self.change[:, i, 0]))
            for i, (start, stop) in enumerate(self.windows.tolist())
        )
        title, notes = f"change of {self.targets[0].text!r}", (*self.notes, *self.noise_notes())
        return Table(("layers", *self.flows), rows, title=title, notes=notes)

    def to_dict(self) -> dict[str, Any]:
        """What ``llava-lab knockout --sweep --json`` prints beside the answer."""
        about: dict[str, Any] = {"flows": self.flows, "layers": self.windows, "targets": [target.text for target in self.targets]}
        about |= {"before": self.before, "change": self.change, "relative": self.relative, "proof": self.proof}
        about |= {"score": self.score, "noise_floor": self.noise_floor}
        return plain(about | {name: getattr(self, name) for name in ("interrupted", "notes", "model", "seconds")})


@dataclass(frozen=True)
class PatchGrid(Noisy, Saved):
    """Activation patching: what each place in the clean run, put into the corrupted one, brings back."""

    KIND: ClassVar[str] = "patch grid"
    GAPS: ClassVar[tuple[str, ...]] = ("scores",)

    components: tuple[str, ...]  # "residual" | "attention" | "mlp"
    sites: tuple[str, ...]
    windows: Int64[np.ndarray, "windows 2"]  # layers [start, stop) patched together
    targets: tuple[Target, ...]
    corruption: str
    clean: Float32[np.ndarray, " targets"]
    corrupt: Float32[np.ndarray, " targets"]
    scores: Float32[np.ndarray, "components sites windows targets"]  # NaN where Ctrl-C came first
    answers: Shaped[np.ndarray, "components sites windows"]  # the likeliest token at the first target's place, or the answer
    clean_answer: str
    corrupt_answer: str
    proof: dict[str, float]
    model: str
    fingerprint: str
    passes: dict[str, int]
    seconds: float
    interrupted: bool = False
    notes: tuple[str, ...] = ()
    score: str = "logprob"  # or "logodds": what `llava_lab.replay.score` says
    noise_floor: tuple[float, ...] = ()  # of each target: what rounding may change; empty in files of before it was measured

    def check(self) -> None:
        filled(targets=self.targets)
        self.check_noise()

    @property
    def values(self) -> np.ndarray:
        """(patched - corrupt) / (clean - corrupt): 0 nothing brought back, 1 all; NaN where corruption changed nothing."""
        return self.change / self._whole

    @property
    def change(self) -> np.ndarray:  # type: ignore[override]
        """Patched minus corrupted, float32 (components, sites, windows, targets)."""
        return self.scores - self.corrupt

    @property
    def drawn(self) -> np.ndarray:
        """The values with 0 for what does not reach the noise floor, as figures and widgets draw them."""
        return above_noise(self.change, self.floors) / self._whole

    def _share(self, value: float) -> str:
        return NEGLIGIBLE if value == 0 < self.floors[0] else figure(value, ".2f")

    @property
    def _whole(self) -> np.ndarray:
        """What corrupting took, NaN where it is not more than the noise."""
        whole = self.clean - self.corrupt
        return np.where(np.abs(whole) > np.maximum(self.floors, 1e-6), whole, np.nan)

    def table(self) -> Table:
        """Share of the first target that each place brings back, a table per component: sites by windows of layers."""
        windows = [str(start) if stop - start == 1 else f"{start} to {stop - 1}" for start, stop in self.windows.tolist()]
        parts = []
        for component, block in zip(self.components, self.drawn[..., 0], strict=True):
            rows = ((site, *(self._share(float(value)) for value in row)) for site, row in zip(self.sites, block, strict=True))
            parts.append(Table((component, *windows), tuple(rows), title=""))
        title = f"share of {self.targets[0].text!r} brought back, corrupted by {self.corruption}"
        return Table(title=title, below=tuple(parts), notes=(*self.notes, *self.noise_notes()))


@dataclass(frozen=True)
class ControlRates(Saved):
    """How often an answer changed without the patches that decide it, and without equally many random others."""

    KIND: ClassVar[str] = "control rates"

    task: str
    options: dict[str, Any]
    n: int  # questions counted: answered rightly, with a place that decides
    asked: int
    deciding: float  # share of answers changed, 0 to 1
    random: float
    deciding_interval: tuple[float, float]  # 95%, Wilson
    random_interval: tuple[float, float]
    changed: Bool[np.ndarray, "n 2"]  # without the deciding patches, without the random ones
    patches: Int64[np.ndarray, " n"]  # patches taken away
    model: str
    fingerprint: str
    seed: int
    seconds: float
    interrupted: bool = False

    @property
    def passed(self) -> bool:
        """The two intervals do not meet: the deciding place matters more than chance."""
        return self.deciding_interval[0] > self.random_interval[1]

    def table(self) -> Table:
        """How often the answer changed, without the deciding patches and without random ones."""
        rates = (("deciding", self.deciding, self.deciding_interval), ("random", self.random, self.random_interval))
        rows = tuple((name, f"{rate:.1%}", f"[{low:.1%}, {high:.1%}]") for name, rate, (low, high) in rates)
        title = f"{self.task}: {self.n} questions of {self.asked}, {'passed' if self.passed else 'not passed'}"
        return Table(("patches taken away", "answer changed", "95%"), rows, title=title)


@dataclass(frozen=True)
class Pruning(Saved):
    """Which questions are answered rightly with k image tokens, by the ranking that chose them; one question a picture."""

    KIND: ClassVar[str] = "pruning"

    rankings: tuple[str, ...]
    keeps: Int64[np.ndarray, " keeps"]  # image tokens kept
    right: Float32[np.ndarray, "rankings keeps questions"]  # 0 or 1; of random rankings the mean of several
    full: Bool[np.ndarray, " questions"]  # with all tokens
    pictures: tuple[str, ...]
    cost: Float64[np.ndarray, " keeps"]  # operations of the prefill, share of those with all tokens
    tokens: int
    at: int  # layers that still see every token
    split: str
    model: str
    fingerprint: str
    seconds: float
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        filled(rankings=self.rankings, pictures=self.pictures, keeps=self.keeps)
        if self.right.shape != (len(self.rankings), len(self.keeps), len(self.pictures)):
            raise DataError(
                f"its answers are {self.right.shape}, and it names {len(self.rankings)} rankings, {len(self.keeps)} numbers of "
                f"tokens and {len(self.pictures)} pictures"
            )
        if not ((self.right >= 0) & (self.right <= 1)).all():
            raise DataError("its shares of right answers must lie from 0 to 1")

    @property
    def accuracy(self) -> np.ndarray:
        """Share answered rightly, float32 (rankings, keeps)."""
        return self.right.mean(-1)

    def interval(self, *, against: str | None = None) -> np.ndarray:
        """95% interval over pictures of `accuracy`, or of its difference from the ranking `against`, (rankings, keeps, 2)."""
        values = self.right
        if against is not None:
            values = values - values[place_of("ranking", against, self.rankings)]
        intervals = resampled_means(values, np.arange(len(self.pictures)))[0]
        if against is None:
            for cell in zip(*np.nonzero((self.accuracy == 0) | (self.accuracy == 1)), strict=True):
                right = len(self.pictures) * int(self.accuracy[cell])  # all or none: the bootstrap has no spread
                intervals[cell] = wilson(right, len(self.pictures))
        return intervals

    def table(self) -> Table:
        """A row for each ranking, a column for each number of tokens; a star where it is told apart from random."""
        apart = np.zeros(self.accuracy.shape, bool)
        if "random" in self.rankings:
            low, high = np.moveaxis(self.interval(against="random"), -1, 0)
            apart = (low > 0) | (high < 0)
        low, high = np.moveaxis(self.interval(), -1, 0)
        rows = [
            (name, *(f"{a:.0%} ({lo:.0%} to {hi:.0%}){'*' * bool(star)}" for a, lo, hi, star in zip(*cells, strict=True)))
            for name, *cells in zip(self.rankings, self.accuracy, low, high, apart, strict=True)
        ]
        rows.append(("cost of the prefill", *(f"{share:.0%}" for share in self.cost)))
        names = ("kept by", *(f"{keep} of {self.tokens}" for keep in self.keeps))
        notes = ("* told apart from random tokens on the same pictures (95%)",) if "random" in self.rankings else ()
        return Table(names, tuple(rows), title=f"right answers of {len(self.pictures)}, {self.model}", notes=notes + self.notes)

    def to_dict(self) -> dict[str, Any]:
        """What ``llava-lab prune --json`` prints."""
        about = {
            name: getattr(self, name) for name in ("rankings", "keeps", "accuracy", "cost", "tokens", "at", "split", "model")
        }
        about |= {"interval": self.interval(), "full": float(self.full.mean()), "questions": len(self.pictures)}
        return plain(about | {"interrupted": self.interrupted, "notes": self.notes, "seconds": self.seconds})


def _told(change: float, floor: float) -> str:
    """A change as a table writes it: a word for what rounding alone may do."""
    return NEGLIGIBLE if abs(change) < floor else f"{change:z.3f}"
