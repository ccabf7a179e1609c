"""TokenLens: what every image patch would say at every state of the language model.

Pointing at a patch shows its likeliest words state by state, its nearest words and its norm; a typed word shows where
and at which state it lights up. All of it is answered in the browser from one buffer. What comes back to Python is
`word`, `state`, `kind` (which of several lenses is shown) and `selected` (the locked patch).

Tables travel in one buffer. Probabilities are uint16 square roots, ``p = (level / 65535) ** 2``: 1 is exact and a
chance of one in a million keeps two figures, where bytes would make it zero. Entropies are uint16 steps up to the
vocabulary's. Ids count into the pieces of all lenses and the nearest words, whose texts travel once. 7B's
33 states x 576 patches x 5 words are 0.6 MB with their texts.

    TokenLens(run, ll.logit_lens(lab, run), ll.nearest_words(lab, run))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets

from llava_lab.checks import as_python, entry, is_list, is_whole, shown
from llava_lab.errors import OptionError
from widgets.base import Patch, PictureWidget, TraitRefused, checked_opacity
from widgets.pack import encode_picture, head_of, palettes

if TYPE_CHECKING:
    from llava_lab.results import LogitLens, NearestWords, Run

LONGEST_WORD = 80  # signs
STEPS = 65535  # of a level
COSINE_STEPS = 32767  # either side of zero
ALIGNED = 4  # bytes; every part of the buffer starts on a multiple


class TokenLens(PictureWidget):
    """What the projected tokens say, to point at; `lens` is what `llava_lab.logit_lens` gives, or several to choose from.

    Several are the logit lens, a tuned and a Jacobian lens of one run, in any order, of the same states, words and `top`; `kind`
    ("logit", "tuned", "jacobian") is shown first, by default the first of them.

    `near` adds each token's nearest words and its norm (`llava_lab.nearest_words`). `word` is looked for first: one of
    the words the lens was asked for is known everywhere, any other only where it is among the top words kept. `state`
    is shown first (default: where `word` is likeliest, else the last); `patch`, a (row, column), is locked first.

        >>> widget = TokenLens(run, ll.logit_lens(lab, run))
        >>> widget.values.shape
        (12, 12)
    """

    render, script, sheets = "renderLens", "lens.js", ("base.css", "lens.css")

    word = traitlets.Unicode("").tag(sync=True)
    state = traitlets.Int(0).tag(sync=True)
    kind = traitlets.Unicode("logit").tag(sync=True)

    @entry
    def __init__(
        self,
        run: Run,
        lens: LogitLens | Sequence[LogitLens],
        near: NearestWords | None = None,
        *,
        word: str = "",
        state: int | None = None,
        patch: Patch | None = None,
        kind: str | None = None,
        opacity: float = 0.85,
    ) -> None:
        given: list[Any] = list(lens) if is_list(lens) else [lens]
        spec, picture, maps = pack_lens(run, given, near)
        self.run, self.near = run, near
        self.lenses: dict[str, LogitLens] = {each.lens: each for each in given}
        kind = self._known_kind(given[0].lens if kind is None else kind)
        shown = self.lenses[kind]
        if state is None:
            state = shown.states[int(shown.probability_of(word).max(1).argmax()) if shown.knows(word) else -1]
        super().__init__(
            spec={**spec, "opacity": checked_opacity(opacity)},
            picture=picture,
            maps=maps,
            word=word,
            state=state,
            kind=kind,
            selected=[] if patch is None else [self._index(patch)],
        )

    def draw_png(self) -> bytes:
        """The map of some states, and the words of one patch at them, as PNG bytes."""
        from llava_lab.plots import stills

        chosen: dict[str, Any] = {"word": self.word, "state": self.state, "patch": next(iter(self.selected), None)}
        return stills.png(stills.lens_states(self.run, self.lens, self.near, **chosen))

    def __repr__(self) -> str:
        states = self.lens.states
        about = f"states {states[0]} to {states[-1]}, {self.run.map.rows} x {self.run.map.cols} patches"
        looking = f"; looking for {self.word!r}" if self.word else ""
        return f"TokenLens({self.run.question!r} → {self.run.answer_shown!r}; {about}{looking})"

    @property
    def lens(self) -> LogitLens:
        """The lens that is shown."""
        return self.lenses[self.kind]

    @property
    def values(self) -> np.ndarray:
        """The map shown, float32 (rows, cols): the word's probability at `state`, or the entropy where there is none.

        A word the lens was not asked for counts as 0 wherever it is not among the top words kept.
        """
        at = self.lens.states.index(self.state)
        shown = self.lens.probability_of(self.word)[at] if self.word else self.lens.entropy[at]
        return shown.astype(np.float32).reshape(self.run.map.rows, self.run.map.cols)

    def _index(self, patch: Patch) -> int:
        rows, cols = self.run.map.rows, self.run.map.cols
        place = [as_python(one) for one in patch] if is_list(patch) else []
        if len(place) != 2 or not all(map(is_whole, place)):
            raise OptionError(f"patch must be a pair (row, column), got {shown(patch)}")
        row, col = place
        if not (0 <= row < rows and 0 <= col < cols):
            raise OptionError(f"patch must lie in the {rows}x{cols} grid, rows and columns from 0, got ({row}, {col})")
        return row * cols + col

    # -- checks on what Python or the page sets ------------------------------------------------

    @traitlets.validate("word")
    def _valid_word(self, proposal: dict) -> str:
        word = proposal["value"].strip()
        if len(word) > LONGEST_WORD or len(word.splitlines()) > 1:
            raise TraitRefused(f"word must be one line of at most {LONGEST_WORD} signs, got {word[:20]!r}…")
        return word

    @traitlets.validate("kind")
    def _valid_kind(self, proposal: dict) -> str:
        return self._known_kind(proposal["value"])

    def _known_kind(self, kind: str) -> str:
        if kind not in self.lenses:
            raise TraitRefused(f"kind must be one of the lenses given, {', '.join(self.lenses)}; got {kind!r}")
        return kind

    @traitlets.validate("state")
    def _valid_state(self, proposal: dict) -> int:
        states = self.lens.states
        if proposal["value"] not in states:
            choices = f"one of {states[0]} to {states[-1]}" if len(states) > 1 else f"{states[0]}"
            raise TraitRefused(f"state must be {choices}, which this lens read, got {proposal['value']}")
        return proposal["value"]

    @traitlets.validate("selected")
    def _valid_selection(self, proposal: dict) -> list[int]:
        locked = super()._valid_selection(proposal)
        if len(locked) > 1:
            raise TraitRefused(f"one patch can be locked at a time, got {len(locked)}")
        return locked


# -- packing ----------------------------------------------------------------------------------


def pack_lens(run: Run, lenses: Sequence[LogitLens], near: NearestWords | None) -> tuple[dict[str, Any], bytes, bytes]:
    """Check that lenses and nearest words are of this run, and pack them: the page's spec, the picture, all parts in one buffer.

    The spec says where each part lies, its number type and its length; parts of all lenses but the first end in ``@kind``.
    """
    if not lenses:
        raise OptionError("expected at least one lens, what llava_lab.logit_lens gives, got none")
    for each in lenses:
        check_lens(run, each, near)
    lens = lenses[0]
    check_alike(lenses)
    named: list[LogitLens | NearestWords] = [*lenses, *([] if near is None else [near])]
    texts = {piece: text for each in named for piece, text in zip(each.piece_ids.tolist(), each.pieces, strict=True)}
    ids = np.array(sorted(texts))
    parts = {}
    for number, each in enumerate(lenses):
        end = f"@{each.lens}" if number else ""
        parts[f"ids{end}"] = whole(np.searchsorted(ids, each.top_ids), each.vocabulary)
        parts[f"probs{end}"] = root_levels(each.top_probs)
        parts[f"entropy{end}"] = entropy_levels(each.entropy, each.vocabulary)
        parts[f"word_probs{end}"] = root_levels(each.probs)
        parts[f"word_ranks{end}"] = whole(each.ranks, each.vocabulary)
    if near is not None:
        parts["near_ids"] = whole(np.searchsorted(ids, near.top_ids), lens.vocabulary)
        parts["cosines"] = np.rint(near.cosines * COSINE_STEPS).astype("<i2")
        parts["norms"] = near.norms.astype("<f4")
    picture, kind = encode_picture(run.picture)
    places, data = joined(parts)
    spec = {
        **head_of(run),
        "states": list(lens.states),
        "top": lens.top_ids.shape[2],
        "vocabulary": lens.vocabulary,
        "lenses": [each.lens for each in lenses],
        "words": list(lens.words),
        "pieces": [texts[piece] for piece in ids.tolist()],
        "near": None if near is None else {"top": near.top_ids.shape[1], "space": near.space, "centered": near.centered},
        "notes": list(dict.fromkeys(note for each in named for note in each.notes)),
        "picture": kind,
        "palettes": palettes(),
        "parts": places,
    }
    return spec, picture, data


def check_alike(lenses: Sequence[LogitLens]) -> None:
    """Refuse two lenses of one kind, and lenses that were not read of the same states with the same words and top."""
    kinds = [lens.lens for lens in lenses]
    if len(set(kinds)) < len(kinds):
        raise OptionError(f"expected lenses of different kinds, got {', '.join(kinds)}")
    for name in ("states", "words", "top"):
        read = {lens.lens: lens.top_ids.shape[2] if name == "top" else getattr(lens, name) for lens in lenses}
        if len(set(read.values())) > 1:
            told = ", ".join(f"{kind} {value}" for kind, value in read.items())
            raise OptionError(f"expected lenses with the same {name}, got {told}")


def check_lens(run: Run, lens: Any, near: Any) -> None:
    """Refuse what is no lens, what was read by another checkpoint or through another geometry, and what has holes."""
    for name, result, kind, made_by in (
        ("lens", lens, "logit lens", "logit_lens"),
        ("near", near, "nearest words", "nearest_words"),
    ):
        if result is None and name == "near":
            continue
        if getattr(result, "KIND", None) != kind:
            raise OptionError(f"{name} must be what llava_lab.{made_by} gives, got {type(result).__name__}")
        if result.fingerprint != run.fingerprint:
            raise OptionError(
                f"{name} was read from another checkpoint ({result.model}) than the run ({run.model}); read this run"
            )
        if result.map != run.map:
            raise OptionError(f"{name} was read through another picture geometry than the run's; read this run")
    tables = [lens.top_probs, lens.entropy, lens.probs, *([] if near is None else [near.cosines, near.norms])]
    if not all(np.isfinite(table).all() for table in tables):
        raise OptionError("lens or near holds values that are not finite; they cannot be shown")


def root_levels(probs: np.ndarray) -> np.ndarray:
    """uint16 levels of probabilities 0 to 1."""
    return np.rint(STEPS * np.sqrt(np.clip(probs.astype(np.float64), 0, 1))).astype("<u2")


def entropy_levels(entropy: np.ndarray, vocabulary: int) -> np.ndarray:
    """uint16 levels of entropies, 0 to log(vocabulary) nats."""
    most = max(float(np.log(vocabulary)), 1e-9)
    return np.rint(STEPS * np.clip(entropy.astype(np.float64) / most, 0, 1)).astype("<u2")


def whole(values: np.ndarray, most: int) -> np.ndarray:
    """Whole numbers up to `most` in two bytes each where that is enough, else in four."""
    return values.astype("<u2" if most <= STEPS else "<u4")


def joined(parts: dict[str, np.ndarray]) -> tuple[dict[str, list], bytes]:
    """One buffer, and of each part [number type, first byte, count]."""
    places, out = {}, bytearray()
    for name, values in parts.items():
        places[name] = [values.dtype.str[1:], len(out), values.size]
        out += values.tobytes()
        out += bytes(-len(out) % ALIGNED)
    return places, bytes(out)
