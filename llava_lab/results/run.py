"""A picture, a question and an answer (`Run`), and the maps that explain the answer (`Relevance`, `HeadMaps`).

A result holds its labels, its options and its picture geometry; it saves to one ``.npz`` file
(no pickle inside) and loads again without torch, transformers or the model. `llava_lab.plots`
and `widgets` draw it.

    run = Run.load("run.npz")
    run.target("red").positions  # the positions that predict the word
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float16, Float32, Float64, Int64, UInt8

from llava_lab.checks import as_python, is_whole, patches_of, shown, whole_number
from llava_lab.errors import DataError, OptionError, TargetError
from llava_lab.geometry import PictureMap, View
from llava_lab.results.save import Saved, shortened
from llava_lab.results.schema import filled, within
from llava_lab.results.table import NEGLIGIBLE, Table, figure, map_row, pairs, plain, thumbnail

Span = tuple[int, int]  # [start, stop) positions in the sequence
# Words that say how and not what: how sure a model is of "The picture shows" depends on the ways of saying it that it knows.
PLAIN = frozenset(
    (
        *("a", "an", "the", "this", "that", "these", "those", "it", "its", "they", "there", "here", "i", "you", "some", "any"),
        *("is", "are", "be", "am", "was", "can", "see", "shows", "show", "picture", "image", "photo", "photograph", "kind"),
        *("of", "in", "on", "at", "to", "and", "or", "with", "for", "as", "from"),
    )
)
CUT = ("length", "interrupted")  # reasons in ``options["stopped"]`` for which an answer is not whole
CUT_MARK = "… [cut]"
ROUNDING = 1e-3  # that the logarithm of a probability of 1 may be off by
OLD_CONTROLS = ("random", "center", "edges", "inverse", "vision")  # of files written before `control` was kept


@dataclass(frozen=True)
class Word:
    """One word of the answer and the token positions that spell it."""

    text: str
    start: int  # absolute position of its first token in the sequence
    stop: int  # one past its last

    def check(self) -> None:
        if not 0 <= self.start < self.stop:
            raise DataError(f"the word {self.text!r} must have tokens, got [{self.start}, {self.stop})")


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

    def check(self) -> None:
        ids = len(self.token_ids), len(self.against_ids)
        if ids not in ((len(self.positions), 0), (len(self.positions),) * 2) or min(self.positions, default=0) < 0:
            raise DataError(f"the target {self.text!r} must have a token for each position, got {ids} for {len(self.positions)}")

    @property
    def scored(self) -> str:
        """What an intervention scores for it, as an axis names it."""
        if self.against_ids:
            return f"logit difference ({self.text})"
        return "log p(whole answer)" if self.kind == "answer" else f"log p({self.text})"

    def scored_as(self, score: str) -> str:
        """The same, where `score` is "logodds" or "logprob"."""
        return self.scored.replace("log p(", "log-odds(") if score == "logodds" else self.scored


@dataclass(frozen=True)
class Run(Saved):
    """One picture, one question, one answer, with every position found rather than assumed.

    A question may also be about several pictures: `picture` and `map` are then those of the first, `others` holds the rest,
    `views` says where the tokens of each stand, and `about` puts another one first. A question without a picture has an empty
    one, (0, 0, 3).
    """

    KIND: ClassVar[str] = "run"
    GAPS: ClassVar[tuple[str, ...]] = ("logprobs",)

    picture: UInt8[np.ndarray, "height width 3"]  # upright RGB, as the user gave it
    question: str
    answer: str
    prompt: str  # the exact text given to the tokenizer, one <image> in it for each picture
    token_ids: Int64[np.ndarray, " tokens"]  # prompt with expanded image tokens, then the answer
    tokens: tuple[str, ...]  # T readable pieces
    segments: dict[str, Span]  # system, image, question, cue ("ASSISTANT:"), answer
    words: tuple[Word, ...]  # of the answer
    logprobs: Float32[np.ndarray, " said"]  # natural log, of each token the model gave
    map: PictureMap
    model: str  # the name it was loaded by
    fingerprint: str  # of the weights; an explanation by another checkpoint is refused
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)  # max_new_tokens, temperature, prompt form, stopped
    # where a picture is looked at several times, or for each of several pictures; `map` is then the first view's
    views: tuple[View, ...] = ()
    # of several pictures those of the views after the first
    others: tuple[UInt8[np.ndarray, "_ _ 3"], ...] = field(default=(), metadata={"stored": "other"})
    # what the reader must see, one sentence each: words or a picture outside what the model was trained on, an answer cut short
    notes: tuple[str, ...] = ()
    knows: str = ""  # what the model was trained on, as its card says; empty where that is not stated

    @classmethod
    def upgraded(cls, header: dict[str, Any]) -> dict[str, Any]:
        """Files written before notes were kept say in their options whether the answer was cut."""
        options = header.get("options")
        return {"notes": list(cut_notes(options)) if isinstance(options, dict) else [], **header}

    def check(self) -> None:
        height, width = self.picture.shape[:2]
        if (height, width) != (self.map.height, self.map.width):
            raise DataError(f"its picture has {width}x{height} pixels, its map {self.map.width}x{self.map.height}")
        if missing := {"image", "answer"} - self.segments.keys():
            raise DataError(f"its segments lack {', '.join(map(repr, sorted(missing)))}")
        for name, (start, stop) in self.segments.items():
            if not 0 <= start <= stop <= len(self.tokens):
                raise DataError(f"the segment {name!r} must lie within {len(self.tokens)} tokens, got [{start}, {stop})")
        start, stop = self.segments["answer"]
        if len(self.logprobs) != stop - start:
            raise DataError(f"its answer has {stop - start} tokens and {len(self.logprobs)} log-probabilities")
        if (self.logprobs > ROUNDING).any():
            raise DataError(f"log-probabilities are at most 0, got {self.logprobs.max():g}")
        if any(one.start > other.start for one, other in pairwise(self.words)):
            raise DataError(f"its words must stand in the order of the answer, got {', '.join(word.text for word in self.words)}")
        within("words", [(word.start, word.stop - 1) for word in self.words], start, stop)
        within("views", [view.start for view in self.views], 0, len(self.tokens))
        if self.others:
            sizes = [(one.map.height, one.map.width) for one in self.views]
            if sizes != [one.shape[:2] for one in (self.picture, *self.others)]:
                raise DataError(f"it has {1 + len(self.others)} pictures, which its {len(sizes)} views do not fit")

    @property
    def cut(self) -> bool:
        """Whether the answer ended because it had to, at the limit of tokens or by an interrupt, not because it was done."""
        return self.options.get("stopped") in CUT

    @property
    def answer_shown(self) -> str:
        """The answer as it is shown to people: a mark behind it where it was cut."""
        return f"{self.answer} {CUT_MARK}" if self.cut else self.answer

    @property
    def pictures(self) -> tuple[np.ndarray, ...]:
        """All pictures in the order in which the model sees them; none without one."""
        if not self.others:
            return (self.picture,) if self.picture.size else ()
        held = zip(self.views, (self.picture, *self.others), strict=True)
        return tuple(picture for _, picture in sorted(held, key=lambda pair: pair[0].start))

    @property
    def number(self) -> int:
        """Which of `pictures` is `picture`, from 0."""
        return sum(view.start < self.views[0].start for view in self.views) if self.others else 0

    def about(self, picture: int) -> Run:
        """The same run with another of its pictures first: what is made of it is a map of that one. The first has number 0.

        Raises OptionError for a picture that is not there.
        """
        order = sorted(range(len(self.views)), key=lambda i: self.views[i].start) if self.others else [0]
        if whole_number("picture", picture) >= len(order):
            raise OptionError(f"picture must be from 0 to {len(order) - 1}, got {picture!r}")
        first = order[picture]
        if not first:
            return self
        rest = [i for i in order if i != first]
        every = (self.picture, *self.others)
        views, others = tuple(self.views[i] for i in (first, *rest)), tuple(every[i] for i in rest)
        return replace(self, picture=every[first], map=views[0].map, views=views, others=others)

    @property
    def image_positions(self) -> np.ndarray:
        """Positions of the image tokens, int64 (rows*cols,), row-major; of all views, newline tokens too."""
        return np.arange(*self.segments["image"])

    def positions(self, patches: Sequence[tuple[int, int]]) -> np.ndarray:
        """Positions in the sequence of patches' image tokens, int64, in the order given; `map.patches` finds patches.

        `patches`: (row, col) pairs, or a bool grid. Raises OptionError for anything else, and for a patch outside the grid.
        """
        grid = self.views[0].positions if self.views else self.image_positions.reshape(self.map.rows, self.map.cols)
        cells = patches_of("patches", patches, self.map.rows, self.map.cols)
        return np.array([grid[row, col] for row, col in cells], np.int64)

    def patch(self, position: int) -> tuple[int, int] | None:
        """The patch (row, col) whose token stands at a position; None where that is no patch of `picture`."""
        grid = self.views[0].positions if self.views else self.image_positions.reshape(self.map.rows, self.map.cols)
        found = np.argwhere(grid == position)
        return (int(found[0][0]), int(found[0][1])) if len(found) else None

    @property
    def answer_positions(self) -> np.ndarray:
        return np.arange(*self.segments["answer"])

    def word(self, text: str, occurrence: int = 0) -> Word:
        """The answer's word `text`; case, the signs around it, and how an accent is written do not matter. Raises TargetError."""
        text, occurrence = as_python(text), whole_number("occurrence", occurrence)
        if not isinstance(text, str):
            raise TargetError(f"a word of the answer is text, got {shown(text)}")
        matches = [word for word in self.words if bare(text) == bare(word.text) != ""]
        if len(matches) <= occurrence:
            words = ", ".join(repr(w.text) for w in self.words) or "no words"
            raise TargetError(f"the answer has no word {text!r} (occurrence {occurrence}); it has {words}")
        return matches[occurrence]

    def target(self, what: str | int | Word | Target | tuple[str, str] | None = None) -> Target:
        """Resolve a target: None or "answer" the whole answer, an int an answer token, a str a word.

        The contrast of two words needs the vocabulary, so it is resolved by the Lab
        (`llava_lab.attribution.resolve_targets`).
        """
        start, stop = self.segments["answer"]
        what = as_python(what)
        if isinstance(what, Target):
            return what
        if what is None or (isinstance(what, str) and what == "answer"):
            return self._target("answer", self.answer, start, stop)
        if is_whole(what):
            if not 0 <= what < stop - start:
                raise TargetError(f"answer tokens run from 0 to {stop - start - 1}, got {what}")
            return self._target("token", self.tokens[start + what], start + what, start + what + 1)
        if isinstance(what, str):
            what = self.word(what)
        if isinstance(what, Word):
            return self._target("word", what.text, what.start, what.stop)
        raise TargetError(f"a target is None, an answer token number, a word, or a pair of words; got {shown(what)}")

    def word_targets(self) -> tuple[Target, ...]:
        """One target per word of the answer, in order."""
        return tuple(self.target(word) for word in self.words)

    def _target(self, kind: str, text: str, start: int, stop: int) -> Target:
        positions = tuple(range(start - 1, stop - 1))
        return Target(kind, text, positions, tuple(int(i) for i in self.token_ids[start:stop]))

    @property
    def probabilities(self) -> Float64[np.ndarray, " words"]:
        """Of each word of the answer: the product of its tokens'; NaN where they are not known."""
        return word_probabilities(self.words, self.logprobs, self.segments["answer"][0])

    @property
    def confidence(self) -> float:
        """Probability of the answer's least certain word that says something of the picture; NaN without a known one.

        Words of `PLAIN` do not count, unless there are no others. It is the model's own probability, and how often answers that
        are so sure are right is for a calibration to say (`llava_lab.evaluation.evaluate`).
        """
        return least_certain(self.words, self.probabilities)

    def table(self) -> Table:
        """The answer's words, each with its probability, under the question and the answer."""
        rows = tuple((word.text, figure(chance, ".1%")) for word, chance in zip(self.words, self.probabilities, strict=True))
        notes = tuple(f"note: {note}" for note in self.notes)
        return Table(("word", "probability"), rows, title=f"{self.question} {self.answer_shown}", notes=notes)

    def pictured(self) -> str:
        """Every picture it is about."""
        return "".join(thumbnail(picture, f"the picture of {self.question!r}") for picture in self.pictures)

    def line(self) -> str:
        """Question, answer and model on one line."""
        parts = (shortened(self.question, 60), shortened(self.answer, 60), f"model={shortened(self.model, 30)}")
        return f"Run({', '.join(parts)}{', cut' if self.cut else ''}{f', {len(self.notes)} notes' if self.notes else ''})"

    def to_dict(self) -> dict[str, Any]:
        """What ``llava-lab ask --json`` prints: all tokens, `segments` as indices into them, `logprobs` of the answer's."""
        parts = {"answer": self.answer, "words": [word.text for word in self.words], "tokens": self.tokens}
        told = {"logprobs": self.logprobs, "segments": self.segments, "model": self.model}
        return plain(parts | told | {"question": self.question, "cut": self.cut, "notes": self.notes})


@dataclass(frozen=True)
class Relevance(Saved):
    """One map per target over the patch grid, with what made it and what to know before reading it."""

    KIND: ClassVar[str] = "relevance"

    values: Float32[np.ndarray, "targets rows cols"]  # scale and sign as `method` defines
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
    views: tuple[View, ...] = ()  # of a run with several, where the method tells them apart
    # float32 (targets, rows, cols) of each view; the first is `values`
    view_values: tuple[Float32[np.ndarray, "targets _ _"], ...] = field(default=(), metadata={"stored": "view"})
    control: bool = False  # made to compare with, not to explain
    interrupted: bool = False  # Ctrl-C ended the work early: what is here is what was done until then

    def __post_init__(self) -> None:
        maps = (self.map, *(view.map for view in self.views))
        if len(self.views) != len(self.view_values):
            raise DataError(f"expected values for each of {len(self.views)} views, got {len(self.view_values)}")
        for values, where in zip((self.values, *self.view_values), maps, strict=True):
            want = (len(self.targets), where.rows, where.cols)
            if values.shape != want:
                raise DataError(f"relevance must be {want} (targets, rows, cols), got {values.shape}")

    def check(self) -> None:
        filled(targets=self.targets, values=self.values.ravel())
        floor = self.extras.get("noise_floor", [0.0] * len(self.targets))
        numbers = isinstance(floor, list) and all(isinstance(one, float) and 0 <= one < np.inf for one in floor)
        if not numbers or len(floor) != len(self.targets):
            raise DataError(
                f"its noise floor must be a number of 0 or more for each of {len(self.targets)} targets, got {floor!r}"
            )

    @classmethod
    def upgraded(cls, header: dict[str, Any]) -> dict[str, Any]:
        """Files written before `control` was kept say it by their method."""
        return {"control": header.get("method") in OLD_CONTROLS, **header}

    @property
    def grid(self) -> tuple[int, int]:
        return self.map.rows, self.map.cols

    @property
    def noise_floor(self) -> Float64[np.ndarray, " targets"]:
        """What rounding alone may change in each target's score; 0 where the method has no score or nobody knows it."""
        known = self.extras.get("noise_floor")
        return np.zeros(len(self.targets)) if known is None else np.asarray(known, np.float64)

    @property
    def drawn(self) -> np.ndarray:
        """The values with 0 for what does not reach the noise floor, (targets, rows, cols): what figures and widgets draw."""
        return above_noise(self.values, self.noise_floor[:, None, None])

    def noise_notes(self) -> tuple[str, ...]:
        """How large the noise floor is, and how much of the map lies below it; nothing where there is none."""
        if "noise_floor" not in self.extras:
            return ()
        inside = self.map.coverage() > 0
        below = [int(inside.sum() - np.count_nonzero(values[inside])) for values in self.drawn]
        parts = [
            f"{floor:.2g} for {target.text!r} ({count} of {inside.sum()} patches below)"
            for target, floor, count in zip(self.targets, self.noise_floor, below, strict=True)
        ]
        return (f"Noise floor, by rounding: {', '.join(parts)}. What does not reach it is drawn as nothing.",)

    def on_picture(self, target: int | str = 0, *, smooth: bool = False, view: str | None = None) -> np.ndarray:
        """The map of one target painted on the original picture, float32 (height, width), NaN where unseen.

        `target` is a number or a target's text. `view` names one of `views`, where the model looked several times, or at
        several pictures. Raises TargetError, OptionError for one that is not there.
        """
        target = target_index(self.targets, target)
        if view is None:
            return self.map.project(self.drawn[target], smooth=smooth)
        names = [own.name for own in self.views]
        if view not in names:
            raise OptionError(f"view must be None or one of {', '.join(names) or '(this map has none)'}, got {view!r}")
        at = names.index(view)
        values = above_noise(self.view_values[at][target], self.noise_floor[target])
        return self.views[at].map.project(values, smooth=smooth)

    def top(self, k: int = 5, target: int | str = 0) -> list[tuple[int, int, float]]:
        """The k strongest patches as (row, col, value), strongest first. Raises OptionError, TargetError."""
        flat = self.values[target_index(self.targets, target)].ravel()
        best = np.argsort(-flat, kind="stable")[: whole_number("k", k)]
        return [(int(i) // self.map.cols, int(i) % self.map.cols, float(flat[i])) for i in best]

    def pictured(self) -> str:
        """The map of each target."""
        return map_row((target.text, values) for target, values in zip(self.targets, self.drawn, strict=True))

    def __sub__(self, other: Relevance) -> Relevance:
        """What this map gives each patch beyond the other: two methods, two questions, two models on one picture.

        Scales stay as the methods define them; `normalised` makes maps of two methods comparable. Raises OptionError for maps
        of different places or numbers of targets.
        """
        if not isinstance(other, Relevance):
            return NotImplemented
        _same_places((self, other))
        floor = np.hypot(self.noise_floor, other.noise_floor)
        return self._made(self.values - other.values, f"{self.method} - {other.method}", {"less": other.options}, floor)

    def normalised(self) -> Relevance:
        """The same map with absolute values that sum to 1 for every target, so that maps can be subtracted or averaged."""
        whole = np.abs(self.values).sum((1, 2), keepdims=True)
        whole = np.where(whole > 0, whole, 1)
        return self._made(self.values / whole, self.method, {"normalised": True}, self.noise_floor / whole[:, 0, 0])

    def masked(
        self, *, box: Any = None, mask: np.ndarray | None = None, points: Sequence[tuple[float, float]] | None = None
    ) -> Relevance:
        """The map inside a place on the picture and 0 outside it; the place as in `PictureMap.patches`."""
        inside = np.zeros(self.grid, bool)
        for row, col in self.map.patches(box=box, mask=mask, points=points):
            inside[row, col] = True
        return self._made(self.values * inside, self.method, {"masked": int(inside.sum())}, self.noise_floor)

    @staticmethod
    def mean(maps: Sequence[Relevance]) -> Relevance:
        """The mean of several maps, patch by patch: of seeds, of questions, of methods after `normalised`.

        Raises OptionError for none, or for maps of different places or numbers of targets.
        """
        if not maps:
            raise OptionError("the mean of maps needs at least one")
        _same_places(maps)
        names = "+".join(dict.fromkeys(one.method for one in maps))
        floor = np.sqrt(np.sum([one.noise_floor**2 for one in maps], 0)) / len(maps)
        return maps[0]._made(np.mean([one.values for one in maps], 0), f"mean of {len(maps)} ({names})", {}, floor)

    def _made(self, values: np.ndarray, method: str, options: dict[str, Any], floor: np.ndarray) -> Relevance:
        """A map made of this one; of its extras only the noise `floor` holds for it, where there is one."""
        return replace(
            self,
            values=values.astype(np.float32),
            method=method,
            options=self.options | options,
            view_values=(),
            views=(),
            extras={"noise_floor": floor.tolist()} if floor.any() else {},
            passes={"forward": 0, "backward": 0},
            seconds=0.0,
        )

    def with_notes(self, *notes: str) -> Relevance:
        return replace(self, notes=(*self.notes, *notes))

    def table(self) -> Table:
        """The three strongest patches of every target."""
        rows = []
        for index, (target, floor) in enumerate(zip(self.targets, self.noise_floor, strict=True)):
            strong = [f"({row}, {col}) {value:.3g}" for row, col, value in self.top(3, index) if abs(value) >= floor]
            rows.append((target.text, ", ".join(strong) or f"{NEGLIGIBLE}: nothing above the noise floor"))
        title = f"{self.method} ({pairs(self.options)}), {self.seconds:.2f} s; strongest patches (row, column):"
        notes = tuple(f"note: {note}" for note in self.notes)
        return Table(("target", "strongest patches"), tuple(rows), title=title, notes=notes, line="  {0}: {1}")

    def to_dict(self) -> dict[str, Any]:
        """What ``llava-lab explain --json`` prints beside the run's answer and words."""
        where = self.map
        picture = {"width": where.width, "height": where.height, "mode": where.mode, "seen_box": where.seen_box}
        about = {"method": self.method, "options": self.options, "seconds": self.seconds, "notes": self.notes}
        maps = {"targets": [target.text for target in self.targets], "grid": self.grid, "relevance": self.values}
        maps |= {"noise_floor": self.noise_floor}
        return plain(maps | about | {"picture": picture})


@dataclass(frozen=True)
class HeadMaps(Saved):
    """Where every head of every layer looks on the picture when each target is predicted; nothing averaged over heads."""

    KIND: ClassVar[str] = "head maps"

    values: Float16[np.ndarray, "targets layers heads rows cols"]  # share of a head's whole attention, 0 to 1
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

    def check(self) -> None:
        filled(values=self.values.ravel())

    @property
    def image_share(self) -> np.ndarray:
        """How much of each head's attention lies on the picture, float32 (targets, layers, heads)."""
        return self.values.sum((-2, -1), dtype=np.float32)

    def pictured(self) -> str:
        """The mean over all heads for each target."""
        means = self.values.mean((1, 2), dtype=np.float32)
        return map_row((target.text, values) for target, values in zip(self.targets, means, strict=True))

    def table(self) -> Table:
        """The five heads of every target that look most at the picture."""
        share = self.image_share
        rows = []
        for index, target in enumerate(self.targets):
            for flat in np.argsort(-share[index], axis=None, kind="stable")[:5]:
                layer, head = divmod(int(flat), share.shape[2])
                rows.append((target.text, str(layer), str(head), f"{share[index, layer, head]:.1%}"))
        return Table(("target", "layer", "head", "on the picture"), tuple(rows), notes=self.notes)


def target_index(targets: Sequence[Target], target: Any) -> int:
    """Which of a result's targets is meant: by number, from the end where negative, or by its text. Raises TargetError."""
    names = [own.text for own in targets]
    if isinstance(target, str) and target in names:
        return names.index(target)
    if isinstance(target, Integral) and not isinstance(target, bool) and -len(names) <= int(target) < len(names):
        return int(target) % len(names)
    raise TargetError(f"this result has {len(names)} target(s), {', '.join(map(repr, names))}; got {target!r}")


def above_noise(values: np.ndarray, floor: np.ndarray | float) -> np.ndarray:
    """`values` with 0 for what is smaller than `floor`, either way of 0; NaN stays.

    >>> above_noise(np.array([0.5, -0.5, 0.01]), 0.1).tolist()
    [0.5, -0.5, 0.0]
    """
    return np.where(np.abs(values) < floor, np.zeros_like(values), values)


def _same_places(maps: Sequence[Relevance]) -> None:
    first = maps[0]
    for other in maps[1:]:
        if other.map != first.map or other.values.shape != first.values.shape:
            raise OptionError(
                f"expected maps of one picture with equally many targets, got {first.values.shape} and {other.values.shape}"
                + ("" if other.map == first.map else " on different pictures")
            )


def word_probabilities(words: Sequence[Word], logprobs: np.ndarray, start: int) -> Float64[np.ndarray, " words"]:
    """`logprobs` are of the tokens from position `start` on, natural log."""
    parts = [logprobs[word.start - start : word.stop - start].astype(np.float64) for word in words]
    return np.array([np.exp(part.sum()) if len(part) else np.nan for part in parts])


def least_certain(words: Sequence[Word], probabilities: np.ndarray) -> float:
    """The smallest of the probabilities of words that are not `PLAIN`, or of all where every one is."""
    telling = [chance for word, chance in zip(words, probabilities, strict=True) if bare(word.text) not in PLAIN]
    return float(np.min(telling or probabilities)) if len(words) else float("nan")


def cut_notes(options: Mapping[str, Any]) -> tuple[str, ...]:
    """What is said of an answer that was cut short, from a run's options; nothing of a whole one."""
    stopped = options.get("stopped")
    if stopped == "length":
        limit = options.get("max_new_tokens")
        return (f"The answer was cut at {limit} tokens (max_new_tokens); it may go on.",)
    return ("The answer was stopped before its end.",) if stopped in CUT else ()


def spelling(text: str) -> str:
    """A word without the signs around it, as it is spelt; signs alone stay."""
    return text.strip().strip(".,!?;:\"'") or text.strip()


def bare(text: str) -> str:
    """A word as words are compared: without the signs around it, without case, and one way to write an accent (NFC).

    >>> bare("Caf\u00e9!") == bare("cafe\u0301")
    True
    """
    return unicodedata.normalize("NFC", spelling(text).casefold())
