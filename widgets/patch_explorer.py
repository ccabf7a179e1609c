"""PatchExplorer: point at a word of the answer, see which patches of the picture it came from.

The maps go to the browser once; hovering and arrowing repaint there. What comes back to Python is
`selected` (flat patch indices), the kept `word`, `method` and `layer`, and the request to ask again.
Computes nothing about models: it shows what `llava_lab.results` hold.

The page's part is in ``widgets/js`` (the map, pure helpers, one file per idea) and ``explorer.css``.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets

from widgets.base import Patch, PictureWidget, View, checked_opacity, within
from widgets.pack import Layers, answer_words, as_layers, is_control, pack, probability, whole_probability
from widgets.palette import colors_of

if TYPE_CHECKING:
    from llava_lab.results import Relevance, Run, Target

Ask = Callable[[list[Patch]], "Run | tuple[str, Sequence[float] | None]"]

TRACE_LINES = 40  # of a failed callback's traceback, kept for the page
MOST_WORDS, MOST_METHODS = 14, 4  # of the still picture
SMALLEST, LARGEST = 116, 190  # longer side of one of its maps, pixels

log = logging.getLogger(__name__)


class PatchExplorer(PictureWidget):
    """An answer and its maps on the picture, to point at.

    `relevance` gives the maps by name, ``{"rollout": rel}``; a list of ``(layer label, Relevance)``
    in place of one Relevance adds a layer slider. Controls are named as such.

    `ask` is called with the selected patches as (row, column) pairs when the reader asks again
    without them. It returns a Run, or ``(answer, probabilities)`` with one probability per
    whitespace-separated word, or None for unknown. What it raises is shown in the widget.

    `word` is the first word shown, by position or text (None: the last word with a map); `opacity`
    is 0 to 1; `smooth` interpolates between patch centres. Where `beats_random` says False, for a method or
    for each of its targets, the map is grey and says why.
    """

    entry, script, sheets, width = "renderExplorer", "explorer.js", ("base.css", "explorer.css"), 900

    word = traitlets.Int(0).tag(sync=True)
    method = traitlets.Unicode().tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    reply = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        run: Run,
        relevance: Mapping[str, Relevance | Sequence[tuple[str, Relevance]]],
        *,
        ask: Ask | None = None,
        word: int | str | None = None,
        opacity: float = 0.85,
        smooth: bool = False,
        beats_random: Mapping[str, bool | Sequence[bool | None] | None] | None = None,
        **unknown: Any,
    ) -> None:
        self.refuse(unknown)
        if ask is not None and not callable(ask):
            raise TypeError(f"ask must be a function of the selected patches, got {type(ask).__name__}")
        packed = pack(run, relevance, beats_random=beats_random)
        self.run, self.ask = run, ask
        self.relevance = {name: as_layers(name, given) for name, given in relevance.items()}
        view = {"opacity": checked_opacity(opacity), "smooth": bool(smooth), "can_ask": ask is not None}
        first = packed.spec["methods"][0]
        super().__init__(
            spec={**packed.spec, **view, "p": whole_probability(run)},
            picture=packed.picture,
            maps=packed.maps,
            scales=packed.scales,
            word=_first_word(run, word, first["chips"]),
            method=first["name"],
            layer=max(len(method["layers"]) for method in packed.spec["methods"]) - 1,
        )
        self.on_msg(self._hear)

    def draw_png(self) -> bytes:
        """The picture, and one small map per word and method, as PNG bytes."""
        return draw_maps(self.run, self.relevance, {method["name"]: method["beats"] for method in self.spec["methods"]})

    def view(self) -> View:
        """As a page without a kernel holds it: asking again stays in the notebook."""
        view = super().view()
        return View(view.entry, {**view.state, "spec": {**self.spec, "can_ask": False}, "reply": {}}, view.data)

    def __repr__(self) -> str:
        return f"PatchExplorer({self.run.question!r} → {self.run.answer!r}; {', '.join(self.relevance)})"

    # -- checks on what Python or the page sets ------------------------------------------------

    @traitlets.validate("word")
    def _valid_word(self, proposal: dict) -> int:
        return within("word", proposal["value"], len(self.spec["chips"]))

    @traitlets.validate("layer")
    def _valid_layer(self, proposal: dict) -> int:
        return within("layer", proposal["value"], max(len(method["layers"]) for method in self.spec["methods"]))

    @traitlets.validate("method")
    def _valid_method(self, proposal: dict) -> str:
        if proposal["value"] not in self.relevance:
            raise traitlets.TraitError(f"method must be one of {', '.join(self.relevance)}, got {proposal['value']!r}")
        return proposal["value"]

    # -- asking again --------------------------------------------------------------------------

    def _hear(self, _widget: Any, content: Any, _buffers: Any) -> None:
        """Answer the page. An error is a reply too; nothing is lost."""
        if not isinstance(content, dict) or content.get("kind") != "ask" or self.ask is None:
            return
        asked = {"id": content.get("id"), "selected": list(content.get("selected", []))}
        self.reply = {**asked, "state": "busy"}
        started = time.perf_counter()
        try:
            self.selected = asked["selected"]
            answer = read_answer(self.ask(self.patches))
            self.reply = {**asked, "state": "done", "seconds": time.perf_counter() - started, **answer}
        except (Exception, KeyboardInterrupt) as error:  # the page is where the reader is looking
            log.exception("asking again failed")
            lines = traceback.format_exc().splitlines()[-TRACE_LINES:]
            message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            self.reply = {**asked, "state": "error", "message": message, "trace": "\n".join(lines)}


def read_answer(given: Any) -> dict[str, Any]:
    """What the callback returned, as words with probabilities."""
    if hasattr(given, "words") and hasattr(given, "logprobs"):
        return {"answer": given.answer, "words": answer_words(given), "p": whole_probability(given)}
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str)):
        raise TypeError(f"ask must return a Run or (answer, probabilities per word), got {type(given).__name__}")
    answer, probabilities = given
    words = answer.split()
    if probabilities is None:
        return {"answer": answer, "words": [{"text": word, "p": None} for word in words], "p": None}
    known = [float(p) for p in probabilities]
    if len(known) != len(words):
        raise ValueError(f"ask returned {len(known)} probabilities for {len(words)} words")
    paired = [{"text": word, "p": p} for word, p in zip(words, known, strict=True)]
    return {"answer": answer, "words": paired, "p": float(np.prod(known))}


def _first_word(run: Run, word: int | str | None, mapped: list[int]) -> int:
    if isinstance(word, str):
        return run.words.index(run.word(word))
    if word is not None:
        return within("word", word, len(mapped))
    own = [chip for chip, target in enumerate(mapped) if target >= 0]
    words = [chip for chip in own if chip < len(run.words)]
    return (words or own or [0])[-1]


# -- the still picture ------------------------------------------------------------------------


def draw_maps(run: Run, relevance: Mapping[str, Layers], beats: Mapping[str, Sequence[bool | None]]) -> bytes:
    """Small multiples as PNG bytes: a row per method, a column per word, the last layer where there are several.

    One colour scale per method, as in the page. `beats` says of each method's targets whether their maps are better
    than random ones; those not shown to be are grey.
    """
    from llava_lab.plots import stills

    shown = dict(list(relevance.items())[:MOST_METHODS])
    fitting = (stills.WIDTH - 2 * stills.MARGIN + stills.GAP) // (SMALLEST + stills.GAP)
    every = columns_of(run, shown)
    columns = strongest_of(every, shown, MOST_WORDS if len(shown) == 1 else fitting)
    per_line = min(len(columns), fitting)
    side = stills.tile_side(per_line, largest=LARGEST)
    edge = stills.MARGIN + per_line * (stills.fit(run, side)[0] + stills.GAP) - stills.GAP
    with stills.sheet(run) as still:
        for name, layers in shown.items():
            rel = layers[-1][1]
            scale = stills.shared_range([rel.values for _, rel in layers])
            signed = scale[0] < 0
            tiles = []
            for target in columns:
                index = rel.targets.index(target) if target in rel.targets else -1
                doubtful = index >= 0 and beats[name][index] is False
                values = rel.values[index] if index >= 0 else None
                colors = colors_of(signed, doubtful=doubtful)
                tiles.append(stills.Tile(_column_name(run, target), values, scale, colors, doubtful=doubtful))
            still.title(f"{name} (control)" if is_control(rel) else name, scale, colors_of(signed), edge=edge)
            still.maps(run, tiles, side, per_line=per_line)
        if left_out := _left_out(relevance, len(columns), len(every)):
            still.note("Shown here: " + "; ".join(left_out))
        return still.png()


def columns_of(run: Run, relevance: Mapping[str, Layers]) -> list[Target]:
    """The targets that get a column: words that some method explains, else whatever is explained."""
    explained = [target for layers in relevance.values() for target in layers[-1][1].targets]
    words = [target for target in run.word_targets() if target in explained]
    return words or list(dict.fromkeys(explained))


def strongest_of(columns: list[Target], relevance: Mapping[str, Layers], most: int) -> list[Target]:
    """Where there are more targets than room: those with the highest peaks in the first method, in reading order."""
    rel = next(iter(relevance.values()))[-1][1]
    peaks = [float(rel.values[rel.targets.index(t)].max()) if t in rel.targets else -np.inf for t in columns]
    best = np.argsort(-np.array(peaks), kind="stable")[:most]
    return [columns[i] for i in sorted(best)]


def _column_name(run: Run, target: Target) -> str:
    if target.kind == "answer":
        return "whole answer"
    if target.kind != "word":
        return f"{target.kind} {target.text}"
    p = probability(run, target.positions[0] + 1, target.positions[-1] + 2)
    return target.text if p is None else f"{target.text}  {p:.0%}"


def _left_out(relevance: Mapping[str, Layers], columns: int, every: int) -> list[str]:
    """What the still picture does not show, and the live widget does."""
    parts = []
    if columns < every:
        parts.append(f"{columns} of {every} words, those with the highest peaks")
    if len(relevance) > MOST_METHODS:
        parts.append(f"{MOST_METHODS} of {len(relevance)} methods")
    if any(len(layers) > 1 for layers in relevance.values()):
        parts.append("the last layer of each method")
    return parts
