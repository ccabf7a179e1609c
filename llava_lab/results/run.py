"""What the lab finds out, as frozen dataclasses over numpy arrays and strings.

A result knows its labels, its options and its picture geometry; it saves to one ``.npz`` file
(no pickle inside) and loads again without torch, transformers or the model. It knows nothing
about how it is shown: `llava_lab.plots` and `widgets` do that.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from llava_lab.errors import DataError, OptionError, TargetError
from llava_lab.geometry import PictureMap, View
from llava_lab.results.save import load_npz, save_npz

Span = tuple[int, int]  # [start, stop) positions in the sequence


@dataclass(frozen=True)
class Word:
    """One word of the answer and the token positions that spell it."""

    text: str
    start: int  # absolute position of its first token in the sequence
    stop: int  # one past its last


@dataclass(frozen=True)
class Target:
    """What is explained, always resolved to predicting positions, one before each token.

    `positions` predict `token_ids`; a contrast also holds the `against_ids` whose logits are
    subtracted at the same positions.
    """

    kind: str  # "token" | "word" | "answer" | "contrast"
    text: str
    positions: tuple[int, ...]
    token_ids: tuple[int, ...]
    against_ids: tuple[int, ...] = ()

    @property
    def scored(self) -> str:
        """What an intervention scores for it, as an axis names it."""
        if self.against_ids:
            return f"logit difference ({self.text})"
        return "log p(whole answer)" if self.kind == "answer" else f"log p({self.text})"


@dataclass(frozen=True)
class Run:
    """One picture, one question, one answer, with every position found rather than assumed."""

    picture: np.ndarray  # uint8 (height, width, 3), upright RGB, as the user gave it
    question: str
    answer: str
    prompt: str  # the exact text given to the tokenizer, one <image> in it
    token_ids: np.ndarray  # int64 (T,), prompt with expanded image tokens, then the answer
    tokens: tuple[str, ...]  # T readable pieces
    segments: dict[str, Span]  # system, image, question, cue ("ASSISTANT:"), answer
    words: tuple[Word, ...]  # of the answer
    logprobs: np.ndarray  # float32 (answer tokens,), natural log, of each token the model gave
    map: PictureMap
    model: str  # the name it was loaded by
    fingerprint: str  # of the weights; an explanation by another checkpoint is refused
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)  # max_new_tokens, temperature, prompt form, stopped
    views: tuple[View, ...] = ()  # where a picture is looked at several times; `map` is then the first view's

    @property
    def image_positions(self) -> np.ndarray:
        """Positions of the image tokens, int64 (rows*cols,), row-major; of all views, newline tokens too."""
        return np.arange(*self.segments["image"])

    @property
    def answer_positions(self) -> np.ndarray:
        return np.arange(*self.segments["answer"])

    def word(self, text: str, occurrence: int = 0) -> Word:
        """The answer's word `text` (case and final punctuation do not matter)."""
        want = _bare(text)
        found = [w for w in self.words if _bare(w.text) == want]
        if len(found) <= occurrence:
            said = ", ".join(repr(w.text) for w in self.words) or "no words"
            raise TargetError(f"the answer has no word {text!r} (occurrence {occurrence}); it has {said}")
        return found[occurrence]

    def target(self, what: str | int | Word | Target | tuple[str, str] | None = None) -> Target:
        """Resolve a target: None or "answer" the whole answer, an int an answer token, a str a word.

        The contrast of two words needs the vocabulary, so it is resolved by the Lab
        (`llava_lab.attribution.resolve_targets`).
        """
        start, stop = self.segments["answer"]
        if isinstance(what, Target):
            return what
        if what is None or what == "answer":
            return self._target("answer", self.answer, start, stop)
        if isinstance(what, int):
            if not 0 <= what < stop - start:
                raise TargetError(f"answer tokens run from 0 to {stop - start - 1}, got {what}")
            return self._target("token", self.tokens[start + what], start + what, start + what + 1)
        if isinstance(what, str):
            what = self.word(what)
        if isinstance(what, Word):
            return self._target("word", what.text, what.start, what.stop)
        raise TargetError(f"a target is None, an answer token number, a word, or a pair of words; got {what!r}")

    def word_targets(self) -> tuple[Target, ...]:
        """One target per word of the answer, in order."""
        return tuple(self.target(word) for word in self.words)

    def _target(self, kind: str, text: str, start: int, stop: int) -> Target:
        positions = tuple(range(start - 1, stop - 1))
        return Target(kind, text, positions, tuple(int(i) for i in self.token_ids[start:stop]))

    def save(self, path: str | os.PathLike) -> Path:
        """Write to one ``.npz`` file; `Run.load` gives it back exactly, without the model."""
        header = {
            "question": self.question,
            "answer": self.answer,
            "prompt": self.prompt,
            "tokens": list(self.tokens),
            "segments": {name: list(span) for name, span in self.segments.items()},
            "words": [asdict(word) for word in self.words],
            "map": self.map.to_dict(),
            "model": self.model,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "options": self.options,
        } | ({"views": [view.to_dict() for view in self.views]} if self.views else {})
        arrays = {"picture": self.picture, "token_ids": self.token_ids, "logprobs": self.logprobs}
        return save_npz(path, "run", header, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        header, arrays = load_npz(path, "run")
        return cls(
            picture=arrays["picture"],
            question=header["question"],
            answer=header["answer"],
            prompt=header["prompt"],
            token_ids=arrays["token_ids"],
            tokens=tuple(header["tokens"]),
            segments={name: (span[0], span[1]) for name, span in header["segments"].items()},
            words=tuple(Word(**word) for word in header["words"]),
            logprobs=arrays["logprobs"],
            map=PictureMap.from_dict(header["map"]),
            model=header["model"],
            fingerprint=header["fingerprint"],
            seed=header["seed"],
            options=header["options"],
            views=tuple(View.from_dict(view) for view in header.get("views", ())),
        )


OLD_CONTROLS = ("random", "center", "edges", "inverse", "vision")  # of files written before `control` was kept


@dataclass(frozen=True)
class Relevance:
    """One map per target over the patch grid, with what made it and what to know before reading it."""

    values: np.ndarray  # float32 (targets, rows, cols); scale and sign as `method` defines
    targets: tuple[Target, ...]
    method: str
    options: dict[str, Any]
    map: PictureMap
    model: str
    fingerprint: str
    seconds: float
    passes: dict[str, int]  # {"forward": n, "backward": m}
    notes: tuple[str, ...] = ()  # what the reader must see, one sentence each
    extras: dict[str, Any] = field(default_factory=dict)  # JSON-able numbers: mass per segment, lost CLS mass, ...
    views: tuple[View, ...] = ()  # of a run with several, where the method tells their tokens apart
    view_values: tuple[np.ndarray, ...] = ()  # float32 (targets, rows, cols) of each view; the first is `values`
    control: bool = False  # made to compare with, not to explain

    def __post_init__(self) -> None:
        maps = (self.map, *(view.map for view in self.views))
        if len(self.views) != len(self.view_values):
            raise DataError(f"expected values for each of {len(self.views)} views, got {len(self.view_values)}")
        for values, where in zip((self.values, *self.view_values), maps, strict=True):
            want = (len(self.targets), where.rows, where.cols)
            if values.shape != want:
                raise DataError(f"relevance must be {want} (targets, rows, cols), got {values.shape}")

    @property
    def grid(self) -> tuple[int, int]:
        return self.map.rows, self.map.cols

    def on_picture(self, target: int = 0, *, smooth: bool = False, view: str | None = None) -> np.ndarray:
        """The map of one target painted on the original picture, float32 (height, width), NaN where unseen.

        `view` names one of `views`, where the model looked several times. Raises OptionError for a view that is not there.
        """
        if view is None:
            return self.map.project(self.values[target], smooth=smooth)
        names = [one.name for one in self.views]
        if view not in names:
            raise OptionError(f"view must be None or one of {', '.join(names) or '(this map has none)'}, got {view!r}")
        at = names.index(view)
        return self.views[at].map.project(self.view_values[at][target], smooth=smooth)

    def top(self, k: int = 5, target: int = 0) -> list[tuple[int, int, float]]:
        """The k strongest patches as (row, col, value), strongest first."""
        flat = self.values[target].ravel()
        best = np.argsort(-flat, kind="stable")[:k]
        return [(int(i) // self.map.cols, int(i) % self.map.cols, float(flat[i])) for i in best]

    def with_notes(self, *notes: str) -> Relevance:
        return replace(self, notes=(*self.notes, *notes))

    def save(self, path: str | os.PathLike) -> Path:
        header = {
            "targets": [asdict(target) for target in self.targets],
            "method": self.method,
            "options": self.options,
            "map": self.map.to_dict(),
            "model": self.model,
            "fingerprint": self.fingerprint,
            "seconds": self.seconds,
            "passes": self.passes,
            "notes": list(self.notes),
            "extras": self.extras,
            "control": self.control,
        } | ({"views": [view.to_dict() for view in self.views]} if self.views else {})
        more = {f"view_{i}": values for i, values in enumerate(self.view_values)}
        return save_npz(path, "relevance", header, {"values": self.values, **more})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        header, arrays = load_npz(path, "relevance")
        targets = tuple(Target(**_tuples(t)) for t in header["targets"])
        names = ("method", "options", "model", "fingerprint", "seconds", "passes", "extras")
        fields = {name: header[name] for name in names}
        fields["control"] = header.get("control", header["method"] in OLD_CONTROLS)
        fields["views"] = tuple(View.from_dict(view) for view in header.get("views", ()))
        fields["view_values"] = tuple(arrays[f"view_{i}"] for i in range(len(fields["views"])))
        return cls(arrays["values"], targets, map=PictureMap.from_dict(header["map"]), notes=tuple(header["notes"]), **fields)


@dataclass(frozen=True)
class HeadMaps:
    """Where every head of every layer looks on the picture when each target is predicted; nothing averaged over heads."""

    values: np.ndarray  # float16 (targets, layers, heads, rows, cols), share of a head's whole attention, 0 to 1
    targets: tuple[Target, ...]
    map: PictureMap
    model: str
    fingerprint: str
    seconds: float
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape, want = self.values.shape, (len(self.targets), self.map.rows, self.map.cols)
        if len(shape) != 5 or (shape[0], *shape[3:]) != want:
            raise DataError(f"head maps must be (targets, layers, heads, rows, cols) with {want} outside, got {shape}")

    @property
    def image_share(self) -> np.ndarray:
        """How much of each head's attention lies on the picture, float32 (targets, layers, heads)."""
        return self.values.sum((-2, -1), dtype=np.float32)

    def save(self, path: str | os.PathLike) -> Path:
        header = {name: getattr(self, name) for name in ("model", "fingerprint", "seconds")} | {"notes": list(self.notes)}
        header |= {"targets": [asdict(target) for target in self.targets], "map": self.map.to_dict()}
        return save_npz(path, "head maps", header, {"values": self.values})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        header, arrays = load_npz(path, "head maps")
        targets = tuple(Target(**_tuples(t)) for t in header["targets"])
        fields = {name: header[name] for name in ("model", "fingerprint", "seconds")}
        return cls(arrays["values"], targets, PictureMap.from_dict(header["map"]), notes=tuple(header["notes"]), **fields)


def _bare(text: str) -> str:
    return text.strip().strip(".,!?;:\"'").casefold()


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
