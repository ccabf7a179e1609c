"""PatchExplorer: point at a word of the answer, see which patches of the picture it came from.

The maps go to the browser once; hovering and arrowing repaint there. What comes back to Python is
`selected` (flat patch indices), the kept `word`, `method` and `layer`, and the request to ask again.

The page's part is in ``widgets/js`` (the map, pure helpers, one file per idea) and ``explorer.css``.

    PatchExplorer(run, {"rollout": ll.attribute(lab, run, target="words")})
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets

from llava_lab.checks import entry
from llava_lab.errors import OptionError
from widgets.base import Patch, PictureWidget, TraitRefused, View, checked_opacity, within
from widgets.pack import answer_words, as_layers, is_control, pack, whole_probability

if TYPE_CHECKING:
    from llava_lab.results import Relevance, Run

Ask = Callable[[list[Patch]], "Run | tuple[str, Sequence[float] | None]"]

TRACE_LINES = 40  # of a failed callback's traceback, kept for the page

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

        >>> widget = PatchExplorer(run, {"rollout": ll.attribute(lab, run, method="rollout")})
        >>> widget.selected = [0, 13]
        >>> widget.patches
        [(0, 0), (1, 1)]
    """

    render, script, sheets, width = "renderExplorer", "explorer.js", ("base.css", "explorer.css"), 900

    word = traitlets.Int(0).tag(sync=True)
    method = traitlets.Unicode().tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    reply = traitlets.Dict().tag(sync=True)

    @entry
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
    ) -> None:
        if ask is not None and not callable(ask):
            raise OptionError(f"ask must be a function of the selected patches, got {type(ask).__name__}")
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
        """The picture, and one small map per word and method, the last layer where there are several."""
        from llava_lab.plots import stills

        maps = {name: layers[-1][1] for name, layers in self.relevance.items()}
        figure = stills.word_maps(
            self.run,
            maps,
            scales={name: stills.range_over([rel.values for _, rel in layers]) for name, layers in self.relevance.items()},
            beats={method["name"]: method["beats"] for method in self.spec["methods"]},
            controls=[name for name, rel in maps.items() if is_control(rel)],
            note="the last layer of each method" if any(len(layers) > 1 for layers in self.relevance.values()) else "",
        )
        return stills.png(figure)

    def view(self) -> View:
        """As a page without a kernel holds it: asking again stays in the notebook."""
        view = super().view()
        return View(view.entry, {**view.state, "spec": {**self.spec, "can_ask": False}, "reply": {}}, view.data)

    def __repr__(self) -> str:
        return f"PatchExplorer({self.run.question!r} → {self.run.answer_shown!r}; {', '.join(self.relevance)})"

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
            raise TraitRefused(f"method must be one of {', '.join(self.relevance)}, got {proposal['value']!r}")
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
        return {
            "answer": getattr(given, "answer_shown", given.answer),
            "words": answer_words(given),
            "p": whole_probability(given),
        }
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str)):
        raise OptionError(f"ask must return a Run or (answer, probabilities per word), got {type(given).__name__}")
    answer, probabilities = given
    words = answer.split()
    if probabilities is None:
        return {"answer": answer, "words": [{"text": word, "p": None} for word in words], "p": None}
    known = [float(p) for p in probabilities]
    if len(known) != len(words):
        raise OptionError(f"ask returned {len(known)} probabilities for {len(words)} words")
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
