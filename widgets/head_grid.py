"""HeadGrid: which heads look where, for each word of the answer.

A layer x head matrix says how much of each head's attention lies on the picture; pointing at a head shows its map.
Patches that are pointed at or selected answer the other way: which heads, and which words, look at them. All maps
are in the page; Python hears of `word`, `layer`, `head` and `selected`.

A map travels with one byte per value, so that 7B's 32 x 32 heads take 0.6 MB per word. A level is the square root of
a value beside its map's peak: ``value = peak * (level / 255) ** 2``. Attention has high peaks on low ground; under a
linear scale the ground would be all zeros. The heads' shares on the whole picture travel exactly. Where there is no
room for all words, those that look at the picture most are kept. Attention is read off the forward pass, not an effect on
a score, so it has no noise floor and nothing here is called negligible.

    HeadGrid(run, ll.head_maps(lab, run), word="red")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets

from llava_lab.checks import entry
from llava_lab.errors import OptionError
from widgets.base import PictureWidget, checked_opacity, within
from widgets.pack import LEVELS, check_fits, chip_of, encode_picture, head_of, palettes

if TYPE_CHECKING:
    from llava_lab.results import HeadMaps, Run

MEAN = -1  # in place of a head: the mean over the layer's heads
MEGABYTES = 6.0
MEGABYTE = 1_000_000


class HeadGrid(PictureWidget):
    """The heads of a run, to point at; `maps` is what `llava_lab.head_maps` gives.

    `word` is what is shown first, by position among the words kept, or by text; `layer` and `head` the head shown
    first (default: the one that looks most; head -1 is the mean of a layer's heads). `megabytes` bounds what the
    page is sent: at 7B size ten words are 6 MB. Where there is no room for all, those that look most are kept.

        >>> widget = HeadGrid(run, ll.head_maps(lab, run))
        >>> widget.values.shape
        (12, 12)
    """

    render, script, sheets = "renderHeads", "heads.js", ("base.css", "heads.css")

    word = traitlets.Int(0).tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    head = traitlets.Int(0).tag(sync=True)

    @entry
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
    ) -> None:
        if not megabytes > 0:
            raise OptionError(f"megabytes must be more than 0, got {megabytes}")
        spec, data, kept = pack_heads(run, maps, megabytes=megabytes)
        self.run, self.head_maps, self.kept = run, maps, kept
        first = self._first_word(run, word)
        share = maps.image_share[kept[first]]
        row = int(share.max(1).argmax()) if layer is None else within("layer", layer, len(share))
        super().__init__(
            spec={**spec, "opacity": checked_opacity(opacity)},
            **data,
            word=first,
            layer=row,
            head=int(share[row].argmax()) if head is None else head,
        )

    def draw_png(self) -> bytes:
        """The matrix of each word and the maps of its strongest heads, as PNG bytes."""
        from llava_lab.plots import stills

        return stills.png(stills.head_maps(self.run, self.head_maps, self.kept))

    def __repr__(self) -> str:
        layers, heads = self.head_maps.values.shape[1:3]
        words = ", ".join(chip["text"] for chip in self.spec["chips"])
        return f"HeadGrid({self.run.question!r} → {self.run.answer_shown!r}; {layers} layers x {heads} heads; {words})"

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
            raise OptionError(f"no head maps of {word!r} here; there are {', '.join(repr(target.text) for target in targets)}")
        return targets.index(wanted)

    # -- checks on what Python or the page sets ------------------------------------------------

    @traitlets.validate("word", "layer", "head")
    def _valid_place(self, proposal: dict) -> int:
        name, value = proposal["trait"].name, proposal["value"]
        counts = {"word": len(self.spec["chips"]), "layer": self.spec["layers"], "head": self.spec["heads"]}
        return value if (name, value) == ("head", MEAN) else within(name, value, counts[name])


# -- packing ----------------------------------------------------------------------------------


def pack_heads(run: Run, maps: HeadMaps, *, megabytes: float) -> tuple[dict[str, Any], dict[str, bytes], tuple[int, ...]]:
    """Check that the maps belong to the run, choose the words there is room for, and pack them: spec, data and words kept.

    Of the data ``maps`` is uint8 (words, layers, heads, patches), ``scales`` little-endian float32: (words, layers, heads)
    peaks, then as many shares.
    """
    check_fits(run, "head maps", maps)
    shares = maps.image_share
    kept = roomy(maps.values[0].size, shares, megabytes)
    levels, peaks = square_root_levels(maps.values[list(kept)])
    picture, kind = encode_picture(run.picture)
    chips = [chip_of(run, target) for target in maps.targets]
    left = ", ".join(chip["text"] for i, chip in enumerate(chips) if i not in kept)
    why = f"Left out for want of room: {left}; the words kept are those whose heads look at the picture most."
    spec = {
        **head_of(run),
        "chips": [chips[i] for i in kept],
        "layers": maps.values.shape[1],
        "heads": maps.values.shape[2],
        "notes": [*maps.notes, *([why] if left else [])],
        "picture": kind,
        "palettes": palettes(),
    }
    scales = np.concatenate([peaks.ravel(), shares[list(kept)].ravel()]).astype("<f4")
    return spec, {"picture": picture, "maps": levels.tobytes(), "scales": scales.tobytes()}, kept


def roomy(size: int, shares: np.ndarray, megabytes: float) -> tuple[int, ...]:
    """Which words to keep, in reading order: all, or those whose heads look at the picture most.

    `size` is one word's number of values, `shares` (words, layers, heads). One word is always kept.
    """
    room = max(1, int(megabytes * MEGABYTE // size))
    best = np.argsort(-shares.mean((1, 2)), kind="stable")[:room]
    return tuple(int(i) for i in np.sort(best))


def square_root_levels(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 levels of the shape of `values` (words, layers, heads, rows, cols), and each map's peak, float32."""
    peaks = values.max((-2, -1)).astype(np.float32)
    safe = np.where(peaks > 0, peaks, 1)[..., None, None]
    return np.rint(LEVELS * np.sqrt(values.astype(np.float32) / safe)).astype(np.uint8), peaks
