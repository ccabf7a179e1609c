"""HeadGrid: which heads look where, for each word of the answer.

A layer x head matrix says how much of each head's attention lies on the picture; pointing at a head shows its map.
Patches that are pointed at or selected answer the other way: which heads, and which words, look at them. All maps
are in the page (one byte each); Python hears of `word`, `layer`, `head` and `selected`. Computes nothing about models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets

from widgets.base import bundle, styles
from widgets.head_pack import pack_heads
from widgets.head_paint import draw_heads
from widgets.picture import PictureWidget, within

if TYPE_CHECKING:
    from llava_lab.results import HeadMaps, Run

MODULES = (
    "maps.js",
    "grid.js",
    "canvas.js",
    "dom.js",
    "chips.js",
    "parts.js",
    "gestures.js",
    "view.js",
    "surface.js",
    "panel.js",
    "heads_view.js",
    "heads_matrix.js",
    "heads_lists.js",
    "heads.js",
)
MEAN = -1  # in place of a head: the mean over the layer's heads
MEGABYTES = 6.0


class HeadGrid(PictureWidget):
    """The heads of a run, to point at; `maps` is what `llava_lab.head_maps` gives.

    `word` is what is shown first, by position among the words kept, or by text; `layer` and `head` the head shown
    first (default: the one that looks most; head -1 is the mean of a layer's heads). `megabytes` bounds what the
    page is sent: at 7B size ten words are 6 MB. Where there is no room for all, those that look most are kept.
    """

    entry, modules, sheets, width = "renderHeads", MODULES, ("base.css", "heads.css"), 1080
    _esm = bundle(*MODULES, entry=entry)
    _css = styles(*sheets)

    word = traitlets.Int(0).tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    head = traitlets.Int(0).tag(sync=True)

    def __init__(
        self,
        run: Run,
        maps: HeadMaps,
        *,
        word: int | str | None = None,
        layer: int | None = None,
        head: int | None = None,
        opacity: float = 0.85,
        megabytes: float = MEGABYTES,
        **unknown: Any,
    ) -> None:
        self.refuse(unknown)
        if not 0 <= opacity <= 1:
            raise ValueError(f"opacity must lie in 0..1, got {opacity}")
        if not megabytes > 0:
            raise ValueError(f"megabytes must be more than 0, got {megabytes}")
        packed = pack_heads(run, maps, megabytes=megabytes)
        self.run, self.head_maps, self.kept = run, maps, packed.kept
        first = self._first_word(run, word)
        share = maps.image_share[packed.kept[first]]
        row = int(share.max(1).argmax()) if layer is None else within("layer", layer, len(share))
        super().__init__(
            spec={**packed.spec, "opacity": float(opacity)},
            picture=packed.picture,
            maps=packed.maps,
            scales=packed.scales,
            word=first,
            layer=row,
            head=int(share[row].argmax()) if head is None else head,
        )

    def draw_png(self) -> bytes:
        """The matrix of each word and the maps of its strongest heads, as PNG bytes."""
        return draw_heads(self.run, self.head_maps, self.kept)

    def __repr__(self) -> str:
        layers, heads = self.head_maps.values.shape[1:3]
        words = ", ".join(chip["text"] for chip in self.spec["chips"])
        return f"HeadGrid({self.run.question!r} → {self.run.answer!r}; {layers} layers x {heads} heads; {words})"

    @property
    def values(self) -> np.ndarray:
        """The map shown, float32 (rows, cols)."""
        word = self.head_maps.values[self.kept[self.word], self.layer].astype(np.float32)
        return word.mean(0) if self.head == MEAN else word[self.head]

    def _first_word(self, run: Run, word: int | str | None) -> int:
        targets = [self.head_maps.targets[i] for i in self.kept]
        if word is None:
            return len(targets) - 1
        if not isinstance(word, str):
            return within("word", word, len(targets))
        wanted = run.target(word)
        if wanted not in targets:
            raise ValueError(f"no head maps of {word!r} here; there are {', '.join(repr(one.text) for one in targets)}")
        return targets.index(wanted)

    # -- checks on what Python or the page sets ------------------------------------------------

    @traitlets.validate("word")
    def _valid_word(self, proposal: dict) -> int:
        return within("word", proposal["value"], len(self.spec["chips"]))

    @traitlets.validate("layer")
    def _valid_layer(self, proposal: dict) -> int:
        return within("layer", proposal["value"], self.spec["layers"])

    @traitlets.validate("head")
    def _valid_head(self, proposal: dict) -> int:
        value = proposal["value"]
        return value if value == MEAN else within("head", value, self.spec["heads"])
