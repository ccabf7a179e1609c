"""TokenLens: what every image patch would say at every state of the language model.

Pointing at a patch shows its likeliest words state by state, its nearest words and its norm; a typed word shows where
and at which state it lights up. All of it is answered in the browser from one buffer. What comes back to Python is
`word`, `state` and `selected` (the locked patch). Computes nothing about models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets

from widgets.base import bundle, styles
from widgets.lens_pack import pack_lens
from widgets.lens_paint import draw_lens
from widgets.lens_words import seen, word_values
from widgets.picture import Patch, PictureWidget

if TYPE_CHECKING:
    from llava_lab.results import LogitLens, NearestWords, Run

MODULES = (
    "maps.js",
    "grid.js",
    "canvas.js",
    "dom.js",
    "parts.js",
    "gestures.js",
    "surface.js",
    "panel.js",
    "lens_data.js",
    "lens_view.js",
    "lens_gestures.js",
    "lens_curve.js",
    "lens_table.js",
    "lens_near.js",
    "lens_word.js",
    "lens_stage.js",
    "lens.js",
)
LONGEST_WORD = 80  # signs


class TokenLens(PictureWidget):
    """What the projected tokens say, to point at; `lens` is what `llava_lab.logit_lens` gives.

    `near` adds each token's nearest words and its norm (`llava_lab.nearest_words`). `word` is looked for first: one of
    the words the lens was asked for is known everywhere, any other only where it is among the top words kept. `state`
    is shown first (default: where `word` is likeliest, else the last); `patch`, a (row, column), is locked first.
    """

    entry, modules, sheets, width = "renderLens", MODULES, ("base.css", "lens.css"), 1080
    _esm = bundle(*MODULES, entry=entry)
    _css = styles(*sheets)

    word = traitlets.Unicode("").tag(sync=True)
    state = traitlets.Int(0).tag(sync=True)

    def __init__(
        self,
        run: Run,
        lens: LogitLens,
        near: NearestWords | None = None,
        *,
        word: str = "",
        state: int | None = None,
        patch: Patch | None = None,
        opacity: float = 0.85,
        **unknown: Any,
    ) -> None:
        self.refuse(unknown)
        if not 0 <= opacity <= 1:
            raise ValueError(f"opacity must lie in 0..1, got {opacity}")
        packed = pack_lens(run, lens, near)
        self.run, self.lens, self.near = run, lens, near
        if state is None:
            found = word_values(lens, word) if seen(lens, word) else None
            state = lens.states[-1 if found is None else int(found.max(1).argmax())]
        super().__init__(
            spec={**packed.spec, "opacity": float(opacity)},
            picture=packed.picture,
            maps=packed.data,
            word=word,
            state=state,
            selected=[] if patch is None else [self._index(patch)],
        )

    def draw_png(self) -> bytes:
        """The map of some states, and the words of one patch at them, as PNG bytes."""
        return draw_lens(self.run, self.lens, self.near, word=self.word, state=self.state, patch=next(iter(self.selected), None))

    def __repr__(self) -> str:
        states = self.lens.states
        about = f"states {states[0]} to {states[-1]}, {self.run.map.rows} x {self.run.map.cols} patches"
        said = f"; looking for {self.word!r}" if self.word else ""
        return f"TokenLens({self.run.question!r} → {self.run.answer!r}; {about}{said})"

    @property
    def values(self) -> np.ndarray:
        """The map shown, float32 (rows, cols): the word's probability at `state`, or the entropy where there is none.

        A word the lens was not asked for counts as 0 wherever it is not among the top words kept.
        """
        at = self.lens.states.index(self.state)
        shown = word_values(self.lens, self.word)[at] if self.word else self.lens.entropy[at]
        return shown.astype(np.float32).reshape(self.run.map.rows, self.run.map.cols)

    def _index(self, patch: Patch) -> int:
        rows, cols = self.run.map.rows, self.run.map.cols
        try:
            row, col = (int(one) for one in patch)
        except (TypeError, ValueError):
            raise ValueError(f"patch must be a pair (row, column), got {patch!r}") from None
        if not (0 <= row < rows and 0 <= col < cols):
            raise ValueError(f"patch must lie in the {rows}x{cols} grid, rows and columns from 0, got ({row}, {col})")
        return row * cols + col

    # -- checks on what Python or the page sets ------------------------------------------------

    @traitlets.validate("word")
    def _valid_word(self, proposal: dict) -> str:
        word = proposal["value"].strip()
        if len(word) > LONGEST_WORD or len(word.splitlines()) > 1:
            raise traitlets.TraitError(f"word must be one line of at most {LONGEST_WORD} signs, got {word[:20]!r}…")
        return word

    @traitlets.validate("state")
    def _valid_state(self, proposal: dict) -> int:
        states = self.lens.states
        if proposal["value"] not in states:
            said = f"one of {states[0]} to {states[-1]}" if len(states) > 1 else f"{states[0]}"
            raise traitlets.TraitError(f"state must be {said}, which this lens read, got {proposal['value']}")
        return proposal["value"]

    @traitlets.validate("selected")
    def _valid_selection(self, proposal: dict) -> list[int]:
        locked = super()._valid_selection(proposal)
        if len(locked) > 1:
            raise traitlets.TraitError(f"one patch can be locked at a time, got {len(locked)}")
        return locked
