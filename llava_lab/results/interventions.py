"""What touching the model did: `Effect` of one intervention, `FlowSweep` over layer windows, `PatchGrid` over places.

Frozen dataclasses over numpy arrays; each saves to one ``.npz`` file and loads again without torch or the
model. `llava_lab.interventions` measures them; nothing here runs a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from llava_lab.errors import OptionError
from llava_lab.geometry import PictureMap
from llava_lab.results.run import Target
from llava_lab.results.save import Saved


@dataclass(frozen=True)
class Effect(Saved):
    """One intervention: scores before and after, the answer it gives, the same done at random, and the proof that it took.

    A score is the natural log-probability of the target's tokens, summed; for a contrast the logit of the token
    said minus that of the token not said.
    """

    KIND: ClassVar[str] = "effect"

    name: str  # the function that made it
    what: str  # what was done, one sentence
    options: dict[str, Any]
    targets: tuple[Target, ...]
    before: np.ndarray  # float32 (targets,)
    after: np.ndarray  # float32 (targets,)
    control: np.ndarray  # float32 (draws, targets), the change made by each random control; no rows when there is none
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

    @property
    def change(self) -> np.ndarray:
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
        names = (
            "name",
            "what",
            "options",
            "answer_before",
            "answer_after",
            "answered",
            "control_name",
            "proof",
            "side",
            "model",
            "seconds",
        )
        rows = [
            {"target": target.text, "before": float(self.before[i]), "after": float(self.after[i]),
             "change": float(self.change[i]), "percentile": float(self.percentile[i]), "control": self.control[:, i].tolist()}
            for i, target in enumerate(self.targets)
        ]  # fmt: skip
        about = {name: getattr(self, name) for name in names}
        return about | {"targets": rows, "interrupted": self.interrupted, "passes": self.passes, "notes": list(self.notes)}


@dataclass(frozen=True)
class FlowSweep(Saved):
    """What cutting each flow in each window of layers does to each target. NaN where Ctrl-C came first."""

    KIND: ClassVar[str] = "flow sweep"

    flows: tuple[str, ...]  # "image -> question": what is read, and who may not read it
    windows: np.ndarray  # int64 (windows, 2), layers [start, stop)
    centres: np.ndarray  # int64 (windows,), the layer in the middle
    targets: tuple[Target, ...]
    before: np.ndarray  # float32 (targets,), as in `Effect`
    after: np.ndarray  # float32 (flows, windows, targets)
    proof: dict[str, float]
    model: str
    fingerprint: str
    passes: dict[str, int]
    seconds: float
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    @property
    def change(self) -> np.ndarray:
        """After minus before, float32 (flows, windows, targets)."""
        return self.after - self.before

    @property
    def relative(self) -> np.ndarray:
        """(p' - p) / p of each target's probability, -1 upwards; NaN for a contrast, which has no probability."""
        plain = np.array([not target.against_ids for target in self.targets])
        with np.errstate(over="ignore"):
            return np.where(plain, np.expm1(self.change), np.nan)

    def flow(self, name: str) -> np.ndarray:
        """The change of one flow, (windows, targets)."""
        if name not in self.flows:
            raise OptionError(f"no flow {name!r} here; there is {', '.join(self.flows)}")
        return self.change[self.flows.index(name)]


@dataclass(frozen=True)
class PatchGrid(Saved):
    """Activation patching: what each place in the clean run, put into the corrupted one, brings back."""

    KIND: ClassVar[str] = "patch grid"

    components: tuple[str, ...]  # "residual" | "attention" | "mlp"
    sites: tuple[str, ...]
    windows: np.ndarray  # int64 (windows, 2), layers [start, stop) patched together
    targets: tuple[Target, ...]
    corruption: str
    clean: np.ndarray  # float32 (targets,)
    corrupt: np.ndarray  # float32 (targets,)
    scores: np.ndarray  # float32 (components, sites, windows, targets); NaN where Ctrl-C came first
    answers: np.ndarray  # str (components, sites, windows): the likeliest token at the first target's place, or the answer
    clean_answer: str
    corrupt_answer: str
    proof: dict[str, float]
    model: str
    fingerprint: str
    passes: dict[str, int]
    seconds: float
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    @property
    def values(self) -> np.ndarray:
        """(patched - corrupt) / (clean - corrupt): 0 nothing brought back, 1 all; NaN where corruption changed nothing."""
        whole = self.clean - self.corrupt
        return (self.scores - self.corrupt) / np.where(np.abs(whole) > 1e-6, whole, np.nan)


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
    changed: np.ndarray  # bool (n, 2): without the deciding patches, without the random ones
    patches: np.ndarray  # int64 (n,), patches taken away
    model: str
    fingerprint: str
    seed: int
    seconds: float
    interrupted: bool = False

    @property
    def passed(self) -> bool:
        """The two intervals do not meet: the deciding place matters more than chance."""
        return self.deciding_interval[0] > self.random_interval[1]
