"""`Sanity`: does a map change when what it should depend on is destroyed? Similarity curves with their controls.

A frozen dataclass over numpy arrays; it saves to one ``.npz`` file and loads again without torch or the model.
`llava_lab.attribution.sanity` measures it; nothing here runs a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from llava_lab.geometry import PictureMap
from llava_lab.packing import Saved
from llava_lab.results import Target

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
