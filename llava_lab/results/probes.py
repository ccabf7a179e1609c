"""What the probes find, as frozen dataclasses over numpy arrays; each is one ``.npz`` file and loads without a model.

A state l is the residual stream after l language layers; state 0 is what the connector gives.

    lens = logit_lens(lab, run)
    LogitLens.load(lens.save("lens.npz")).at(2, 0, 0)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float32, Int32

from llava_lab.errors import DataError, OptionError
from llava_lab.geometry import PictureMap
from llava_lab.results.save import Saved
from llava_lab.results.schema import filled, within
from llava_lab.results.table import Table, figure, map_row, plain
from llava_lab.stats import cluster_bootstrap, percentiles

LENSES = ("logit", "tuned", "jacobian")


@dataclass(frozen=True)
class LogitLens(Saved):
    """What each image token would say at each state, if the model stopped there; by a fitted lens, where it leads."""

    KIND: ClassVar[str] = "logit lens"

    states: tuple[int, ...]  # S of 0 .. layers
    top_ids: Int32[np.ndarray, "states patches top"]  # likeliest first
    top_probs: Float32[np.ndarray, "states patches top"]  # 0 to 1
    entropy: Float32[np.ndarray, "states patches"]  # nats, 0 to log(vocabulary)
    words: tuple[str, ...]  # the N chosen words
    word_ids: tuple[int, ...]  # the token each is read as
    ranks: Int32[np.ndarray, "states patches words"]  # 1 is the likeliest of the vocabulary
    probs: Float32[np.ndarray, "states patches words"]  # 0 to 1
    piece_ids: Int32[np.ndarray, " pieces"]  # every token that occurs in `top_ids`, sorted
    pieces: tuple[str, ...]  # its text
    vocabulary: int
    map: PictureMap
    model: str
    fingerprint: str
    seconds: float
    lens: str = "logit"  # of `LENSES`: what each state went through before it was read
    notes: tuple[str, ...] = ()
    read_as: tuple[str, ...] = ()  # the text of the token each word is read as: of a word with several, a part of it

    @classmethod
    def upgraded(cls, header: dict[str, Any]) -> dict[str, Any]:
        """Before there were three lenses a file said only whether it was the tuned one."""
        tuned = header.pop("tuned", False)
        return {"lens": "tuned" if tuned else "logit", **header}

    def check(self) -> None:
        filled(states=self.states, top=self.top_ids.ravel())
        if self.lens not in LENSES:
            raise DataError(f"lens must be one of {', '.join(LENSES)}, got {self.lens!r}")
        _check_pieces(self.top_ids, self.piece_ids)
        if self.read_as:
            _same_length("words", self.words, self.read_as)
        _same_length("words", self.words, self.word_ids)

    def at(self, state: int, row: int, col: int) -> list[tuple[str, float]]:
        """The top words of one patch at one state, as (text, probability), likeliest first."""
        number, patch = _state(self.states, state), _patch(self.map, row, col)
        places = np.searchsorted(self.piece_ids, self.top_ids[number, patch])
        return [(self.pieces[i], float(p)) for i, p in zip(places, self.top_probs[number, patch], strict=True)]

    def _read_as(self, at: int) -> str:
        return self.read_as[at] if self.read_as else self.words[at]

    def _named(self, word: str) -> str:
        """A chosen word as a table names it: only the part of it that was read, where the model has no token for the whole."""
        part = self._read_as(self.words.index(word)).strip()
        return repr(word) if part == word.strip() else f"{part!r} alone, a part of {word!r}"

    def rank_of(self, word: str) -> np.ndarray:
        """Rank of a chosen word, int32 (states, rows, cols)."""
        return self.ranks[:, :, _word(self.words, word)].reshape(-1, self.map.rows, self.map.cols)

    def matching(self, word: str) -> np.ndarray:
        """Ids of the kept pieces that read `word` without the spaces around them, int32; by any case if none is spelt so."""
        texts, wanted = [piece.strip() for piece in self.pieces], word.strip()
        same = np.array([text == wanted for text in texts], bool)
        if not same.any():
            same = np.array([text.lower() == wanted.lower() for text in texts], bool)
        return self.piece_ids[same] if wanted else self.piece_ids[:0]

    def knows(self, word: str) -> bool:
        """Whether `word` is one that was asked for, or is among the top words of some patch and state."""
        return word.strip() in [text.strip() for text in self.words] or len(self.matching(word)) > 0

    def probability_of(self, word: str) -> np.ndarray:
        """Probability of `word`, float64 (states, patches).

        A word that was asked for is read from its own table. Any other is the sum over the pieces that read so, wherever
        they are among the top words; elsewhere it counts as 0.
        """
        words = [text.strip() for text in self.words]
        if word.strip() in words:
            return self.probs[:, :, words.index(word.strip())].astype(np.float64)
        return np.where(np.isin(self.top_ids, self.matching(word)), self.top_probs, 0).sum(-1, dtype=np.float64)

    def table(self, *, patch: tuple[int, int] | None = None, near: NearestWords | None = None) -> Table:
        """What most patches say at each state, and where the chosen words light up.

        `patch` (row, column) adds its own words at every state, `near` the nearest words of the projected tokens.
        """
        about = self.to_dict()
        rows = tuple(
            (str(row["state"]), f"{row['entropy']:.2f}", f"{row['probability']:.3f}",
             ", ".join(f"{word['text'].strip() or word['text']!r} {word['share']:.0%}" for word in row["said"]))
            for row in about["states"]
        )  # fmt: skip
        words = tuple(
            (self._named(row["word"]), f"{row['probability']:.3f}", *(str(row[name]) for name in ("state", "row", "col", "rank")))
            for row in about["words"]
        )
        sentence = f"{{0}}: {{1}} at state {{2}}, row {{3}}, column {{4}}, rank {{5}} of {self.vocabulary}"
        below = [Table(("word", "probability", "state", "row", "column", "rank"), words, line=sentence)] if words else []
        if patch is not None:
            each = [(str(state), _with_numbers(self.at(state, *patch))) for state in self.states]
            each += [("nearest", _with_numbers(near.at(*patch)))] if near is not None else []
            below.append(Table(("state", "words"), tuple(each), title=f"patch row {patch[0]}, column {patch[1]}:"))
        below += [Table(title=near.sentence)] if near is not None else []
        notes = (*self.notes, *(near.notes if near is not None else ()))
        return Table(("state", "entropy", "top probability", "said by most patches"), rows, below=tuple(below), notes=notes)

    def to_dict(self) -> dict[str, Any]:
        """What ``llava-lab lens --json`` prints of the lens: the mean of each state, and each word's most probable place."""
        grid = (self.map.rows, self.map.cols)
        states, words = [], []
        for number, state in enumerate(self.states):
            counted = Counter(self.top_ids[number, :, 0].tolist()).most_common(4)
            names = dict(zip(self.piece_ids.tolist(), self.pieces, strict=True))
            row: dict[str, Any] = {"state": state, "entropy": float(self.entropy[number].mean())}
            row["probability"] = float(self.top_probs[number, :, 0].mean())
            row["said"] = [{"text": names[token], "share": count / self.top_ids.shape[1]} for token, count in counted]
            states.append(row)
        for at, word in enumerate(self.words):
            probability = self.probs[:, :, at]
            number, patch = divmod(int(probability.argmax()), probability.shape[1])
            row = {
                "word": word,
                "read_as": self._read_as(at),
                "token": self.word_ids[at],
                "probability": float(probability.max()),
            }
            row |= {"state": self.states[number], "row": patch // grid[1], "col": patch % grid[1]}
            words.append(row | {"rank": int(self.ranks[number, patch, at]), "by_state": probability.max(1)})
        about = {"grid": grid, "vocabulary": self.vocabulary, "states": states, "words": words}
        return plain(about | {"notes": self.notes, "model": self.model})


@dataclass(frozen=True)
class WordActivation(Saved):
    """How probable chosen words are at every patch and state."""

    KIND: ClassVar[str] = "word activation"

    values: Float32[np.ndarray, "words states rows cols"]  # probability 0 to 1
    words: tuple[str, ...]
    word_ids: tuple[int, ...]
    states: tuple[int, ...]
    map: PictureMap
    model: str
    fingerprint: str
    seconds: float
    notes: tuple[str, ...] = ()

    def pictured(self) -> str:
        """The most probable state at each patch, a map per word."""
        return map_row((word, values.max(0)) for word, values in zip(self.words, self.values, strict=True))

    def check(self) -> None:
        filled(states=self.states)
        _same_length("words", self.words, self.word_ids)

    @property
    def confidence(self) -> np.ndarray:
        """The highest probability over patches and states, float32 (words,): see `llava_lab.activation_map`."""
        return self.values.max((1, 2, 3))

    def peak(self, word: str) -> tuple[int, int, int]:
        """(state, row, col) where `word` is most probable."""
        number = _word(self.words, word)
        state, row, col = np.unravel_index(int(self.values[number].argmax()), self.values[number].shape)
        return self.states[int(state)], int(row), int(col)

    def table(self) -> Table:
        """Where each word is most probable."""
        rows = tuple(
            (word, f"{chance:.3f}", *map(str, self.peak(word))) for word, chance in zip(self.words, self.confidence, strict=True)
        )
        return Table(("word", "probability", "state", "row", "column"), rows, notes=self.notes)


@dataclass(frozen=True)
class HallucinationCheck(Saved):
    """Whether words for what is in the picture light up more than words for what is not."""

    KIND: ClassVar[str] = "hallucination check"

    words: tuple[str, ...]  # every word asked, picture by picture
    picture: Int32[np.ndarray, " words"]  # which picture it was asked of
    present: Bool[np.ndarray, " words"]  # whether it is there
    confidence: Float32[np.ndarray, " words"]  # highest probability over patches and states
    auc: float  # chance that a present word of any picture beats an absent one; 0.5 says nothing
    low: float  # interval by resampling pictures
    high: float
    model: str
    fingerprint: str
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    def table(self) -> Table:
        """Mean confidence of words for what is there and for what is not, under the area under the ROC curve."""
        groups = (("present", self.confidence[self.present]), ("absent", self.confidence[~self.present]))
        rows = tuple((name, str(len(sure)), figure(float(sure.mean()) if len(sure) else np.nan)) for name, sure in groups)
        title = f"AUC {self.auc:.3f} [{self.low:.3f}, {self.high:.3f}] on {len(np.unique(self.picture))} pictures"
        return Table(("words", "count", "mean confidence"), rows, title=title, notes=self.notes)


@dataclass(frozen=True)
class NamingShare(Saved):
    """How often image tokens name what they show, by state, beside two controls."""

    KIND: ClassVar[str] = "naming share"
    GAPS: ClassVar[tuple[str, ...]] = ("share", "interval", "choice", "calibration_error")
    GROUPS: ClassVar[tuple[str, ...]] = ("object", "background", "shuffled")
    WHAT: ClassVar[tuple[str, ...]] = ("kind", "color", "either")

    states: tuple[int, ...]  # S
    share: Float32[np.ndarray, "3 3 states"]  # 0 to 1, pooled over patches
    interval: Float32[np.ndarray, "3 3 states 2"]  # resampling pictures
    choice: Float32[np.ndarray, "3 2 states"]  # share of patches where of all kinds, of all colours, the likeliest is right
    calibration_error: Float32[np.ndarray, "2 states"]  # of its confidence at object patches, over ten bins; 0 is best
    patches: tuple[int, ...]  # of each group
    top: int  # words looked at
    split: str
    pictures: int
    model: str
    fingerprint: str
    seconds: float
    lens: str = "logit"  # of `LENSES`
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        _same_length("groups", self.GROUPS, self.patches)

    def of(self, group: str, what: str = "either") -> np.ndarray:
        """Shares by state, float32 (S,). Raises OptionError for an unknown group or `what`."""
        if group not in self.GROUPS or what not in self.WHAT:
            raise OptionError(f"expected one of {', '.join(self.GROUPS)} and of {', '.join(self.WHAT)}, got {group!r}, {what!r}")
        return self.share[self.GROUPS.index(group), self.WHAT.index(what)]

    def table(self) -> Table:
        """A row for each state: shares of object patches beside background and shuffled pictures, then the choice among kinds."""
        rows = []
        for i, state in enumerate(self.states):
            kind, color, either = self.share[0, :, i]
            low, high = self.interval[0, 2, i]
            interval = f"{either:.1%} ({low:.1%} to {high:.1%})"
            controls = f"{self.share[1, 2, i]:.1%}", f"{self.share[2, 2, i]:.1%}"
            right, shuffled = (f"{self.choice[group, 0, i]:.1%}" for group in (0, 2))
            choice = right, shuffled, f"{self.calibration_error[0, i]:.2f}"
            rows.append((str(state), f"{kind:.1%}", f"{color:.1%}", interval, *controls, *choice))
        names = ("state", "kind of its thing", "its color", "either (95%)", "background", "shuffled")
        choice_names = ("likeliest kind is right", "shuffled", "calibration error")
        return Table((*names, *choice_names), tuple(rows), title=f"{self.lens} lens, top {self.top} words", notes=self.notes)

    def to_dict(self) -> dict[str, Any]:
        """What ``llava-lab naming --json`` prints."""
        shares = {
            group: {
                what: [
                    {"share": share, "interval": interval}
                    for share, interval in zip(self.share[g, w], self.interval[g, w], strict=True)
                ]
                for w, what in enumerate(self.WHAT)
            }
            for g, group in enumerate(self.GROUPS)
        }
        about = {name: getattr(self, name) for name in ("lens", "states", "top", "split", "pictures")}
        about["choice"] = {
            group: {what: self.choice[g, w] for w, what in enumerate(self.WHAT[:2])} for g, group in enumerate(self.GROUPS)
        }
        about["calibration_error"] = dict(zip(self.WHAT[:2], self.calibration_error, strict=True))
        about |= {"patches": dict(zip(self.GROUPS, self.patches, strict=True)), "shares": shares}
        return plain(about | {"notes": self.notes, "model": self.model})


@dataclass(frozen=True)
class NearestWords(Saved):
    """The words of the vocabulary each projected image token points nearest to."""

    KIND: ClassVar[str] = "nearest words"

    top_ids: Int32[np.ndarray, "patches top"]  # nearest first
    cosines: Float32[np.ndarray, "patches top"]  # -1 to 1
    piece_ids: Int32[np.ndarray, " pieces"]  # every token of `top_ids`, sorted
    pieces: tuple[str, ...]
    norms: Float32[np.ndarray, " patches"]  # of the token as the connector gives it
    readable: Bool[np.ndarray, " patches"]  # whether the nearest token is a whole word
    random_shares: Float32[np.ndarray, " draws"]  # the same share for random vectors of the same entries
    random_cosines: Float32[np.ndarray, " draws"]  # their mean nearest cosine
    vocabulary_share: float  # of all the tokens compared with, how many are whole words
    common_direction: float  # squared length of the mean unit vector of the vocabulary as given; 1: all point one way
    space: str  # "input" | "output"
    centered: bool
    map: PictureMap
    model: str
    fingerprint: str
    seconds: float
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        filled(top=self.top_ids.ravel(), draws=self.random_shares)
        _check_pieces(self.top_ids, self.piece_ids)

    @property
    def readable_share(self) -> float:
        """Share of patches whose nearest token is a whole word, to be read beside `random_shares`."""
        return float(self.readable.mean())

    def at(self, row: int, col: int) -> list[tuple[str, float]]:
        """The nearest words of one patch, as (text, cosine)."""
        patch = _patch(self.map, row, col)
        places = np.searchsorted(self.piece_ids, self.top_ids[patch])
        return [(self.pieces[i], float(c)) for i, c in zip(places, self.cosines[patch], strict=True)]

    @property
    def sentence(self) -> str:
        """The share of readable patches beside its control."""
        random = self.random_shares.mean()
        return f"nearest word is a whole word at {self.readable_share:.0%} of patches, {random:.0%} for random vectors"

    def table(self) -> Table:
        """The commonest nearest words, and at how many patches each is nearest."""
        names = dict(zip(self.piece_ids.tolist(), self.pieces, strict=True))
        counted = Counter(self.top_ids[:, 0].tolist()).most_common(8)
        rows = tuple((_word_shown(names[token]), str(count)) for token, count in counted)
        return Table(("nearest word", "patches"), rows, title=self.sentence, notes=self.notes)

    def to_dict(self) -> dict[str, Any]:
        """What ``llava-lab lens --json`` prints as "nearest"."""
        about = {name: getattr(self, name) for name in ("space", "centered", "readable_share")}
        about |= {"random_share": self.random_shares.mean(), "vocabulary_share": self.vocabulary_share}
        about |= {"cosine": self.cosines[:, 0].mean(), "random_cosine": self.random_cosines.mean()}
        return plain(about | {"common_direction": self.common_direction})


@dataclass(frozen=True)
class ProbeScores(Saved):
    """How well a linear probe reads a label at each stage, at the stage's own width and at a width common to all."""

    KIND: ClassVar[str] = "probe scores"
    GAPS: ClassVar[tuple[str, ...]] = ("right", "shuffled")
    WIDTHS: ClassVar[tuple[str, ...]] = ("own", "matched")

    stages: tuple[str, ...]  # S of "before", "after", "layer l"
    right: Float32[np.ndarray, "stages 2 pictures"]  # share of each test picture's labels read right; last but one: own, matched
    counts: Int32[np.ndarray, " pictures"]  # labels of each picture
    shuffled: Float32[np.ndarray, "stages 2 draws"]  # accuracy when labels were shuffled before anything was fitted
    majority: float  # accuracy of always saying the training pictures' commonest label
    widths: Int32[np.ndarray, "stages 2"]  # dimensions used
    classes: tuple[str, ...]
    per: str  # "patch" | "picture": what one label is about
    folds: int
    seed: int
    model: str
    fingerprint: str
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        filled(counts=self.counts, draws=self.shuffled[0, 0] if len(self.stages) else ())
        within("counts", self.counts, 0, 2**31)
        within("seed", self.seed, 0, 2**63)

    @property
    def accuracy(self) -> np.ndarray:
        """Share read right of all held-out labels, float64 (stages, 2)."""
        return self._mean(self.right)

    @property
    def selectivity(self) -> np.ndarray:
        """Accuracy less what the same probe reaches with shuffled labels, (stages, 2)."""
        return self.accuracy - self.shuffled.mean(-1)

    @property
    def interval(self) -> np.ndarray:
        """95% interval of the accuracy by resampling pictures, (stages, 2, low and high)."""
        return self._interval(self.right)

    def difference(self, first: str, second: str, *, width: str = "matched") -> tuple[float, float, float]:
        """Accuracy at `second` less that at `first` on the same pictures: (difference, low, high) with a paired interval."""
        for stage in (first, second):
            if stage not in self.stages:
                raise OptionError(f"stage must be one of {', '.join(self.stages)}, got {stage!r}")
        if width not in self.WIDTHS:
            raise OptionError(f"width must be one of {', '.join(self.WIDTHS)}, got {width!r}")
        at = self.WIDTHS.index(width)
        delta = self.right[self.stages.index(second), at] - self.right[self.stages.index(first), at]
        low, high = self._interval(delta)
        return float(self._mean(delta)), float(low), float(high)

    def verdict(self, first: str = "before", second: str = "after") -> str:
        """``adds``, ``loses`` or ``no difference shown`` between two stages at equal width."""
        _, low, high = self.difference(first, second)
        return "adds" if low > 0 else "loses" if high < 0 else "no difference shown"

    def table(self) -> Table:
        """A row per stage: accuracy with its interval and selectivity, at the stage's own width and at equal widths."""
        accuracy, interval, selectivity = self.accuracy, self.interval, self.selectivity
        rows = tuple(
            (
                stage,
                *(
                    f"{accuracy[i, w]:.1%} [{interval[i, w, 0]:.1%}, {interval[i, w, 1]:.1%}], {selectivity[i, w]:+.1%}"
                    for w in (0, 1)
                ),
            )
            for i, stage in enumerate(self.stages)
        )
        title = f"right about {len(self.classes)} classes per {self.per}, and by how much more than with shuffled labels"
        notes = (f"always saying the commonest label is right at {self.majority:.1%}", *self.notes)
        return Table(("stage", "own width", "equal width"), rows, title=title, notes=notes)

    def _mean(self, right: np.ndarray) -> np.ndarray:
        return right.astype(np.float64) @ self.counts / self.counts.sum()

    def _interval(self, right: np.ndarray) -> np.ndarray:
        def means(weights: np.ndarray) -> np.ndarray:
            labels = weights * self.counts
            return np.moveaxis(right.astype(np.float64) @ labels.T / np.maximum(labels.sum(1), 1), -1, 0)

        return percentiles(cluster_bootstrap(means, len(self.counts), seed=self.seed))


@dataclass(frozen=True)
class TokenGeometry(Saved):
    """The shape of the cloud of image tokens at each stage; each number beside that of the same model with shuffled weights."""

    KIND: ClassVar[str] = "token geometry"
    GAPS: ClassVar[tuple[str, ...]] = ("values", "control", "cka", "control_cka", "overlap", "control_overlap")
    MEASURES: ClassVar[tuple[str, ...]] = ("norm", "effective rank", "anisotropy", "modality gap", "position")

    stages: tuple[str, ...]
    # float32 (S, measures); not a number where a measure has no meaning
    values: Float32[np.ndarray, "stages 5"] = field(metadata={"stored": "table"})
    control: Float32[np.ndarray, "stages 5"]  # the same with every weight of tower, connector and layers shuffled
    cka: Float32[np.ndarray, "stages stages"]  # linear CKA between stages, 0 to 1
    control_cka: Float32[np.ndarray, "stages stages"]
    overlap: Float32[np.ndarray, "stages stages"]  # share of nearest neighbours in common, 0 to 1
    control_overlap: Float32[np.ndarray, "stages stages"]
    norms: Float32[np.ndarray, "stages pictures patches"]
    sinks: Bool[np.ndarray, "stages pictures patches"]  # tokens whose norm is an outlier among their own picture's
    neighbours: int
    chance_overlap: float  # of random neighbours
    chance_position: float  # accuracy of guessing a patch's place
    rows: int
    cols: int
    pictures: int
    seed: int
    model: str
    fingerprint: str
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        want = (len(self.stages), len(self.MEASURES))
        if self.values.shape != want:
            raise DataError(f"values must be {want} (stages, measures), got {self.values.shape}")

    def measure(self, name: str, *, control: bool = False) -> np.ndarray:
        """One measure over the stages, float32 (S,)."""
        if name not in self.MEASURES:
            raise OptionError(f"measure must be one of {', '.join(self.MEASURES)}, got {name!r}")
        return (self.control if control else self.values)[:, self.MEASURES.index(name)]

    def table(self) -> Table:
        """A row per stage, each measure beside its control in brackets."""
        rows = tuple(
            (
                stage,
                *(f"{figure(value, '.3g')} ({figure(control, '.3g')})" for value, control in zip(values, controls, strict=True)),
            )
            for stage, values, controls in zip(self.stages, self.values.tolist(), self.control.tolist(), strict=True)
        )
        return Table(("stage", *self.MEASURES), rows, title="in brackets: the same model with shuffled weights", notes=self.notes)


def _check_pieces(top_ids: np.ndarray, piece_ids: np.ndarray) -> None:
    """Refuse words without a text."""
    if (np.diff(piece_ids) <= 0).any() or not np.isin(top_ids, piece_ids).all():
        raise DataError("piece_ids must be every token of top_ids, sorted")


def _same_length(name: str, one: Sequence[Any], other: Sequence[Any]) -> None:
    if len(one) != len(other):
        raise DataError(f"{name} must have one entry each, got {len(other)} for {len(one)}")


def _state(states: tuple[int, ...], state: int) -> int:
    if state not in states:
        raise OptionError(f"this lens read states {states[0]} to {states[-1]}, got {state}")
    return states.index(state)


def _patch(grid: PictureMap, row: int, col: int) -> int:
    if not (0 <= row < grid.rows and 0 <= col < grid.cols):
        raise OptionError(f"patches lie in a {grid.rows}x{grid.cols} grid, counted from 0; got row {row}, column {col}")
    return row * grid.cols + col


def _word(words: tuple[str, ...], word: str) -> int:
    if word not in words:
        raise OptionError(f"word must be one that was asked for: {', '.join(words) or 'none was'}; got {word!r}")
    return words.index(word)


def _word_shown(text: str) -> str:
    return text.strip() or repr(text)


def _with_numbers(words: list[tuple[str, float]]) -> str:
    return ", ".join(f"{_word_shown(text)} {value:.3f}" for text, value in words)
