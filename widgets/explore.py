"""Explore: pick a picture, ask about it in turns, point at the words of the answer. No code, and the code of it to copy.

`show` is what ``llava_lab.explore`` calls (entry point ``llava_lab.explore``); it is handed a session that asks and explains, and
says which pictures and methods there are. The parts are `PicturePicker`, `PatchExplorer` and `CodeBox` between plain ipywidgets.

Asking runs in a thread beside the kernel, so that Stop is heard. Whatever was typed, answered or named by a file enters the page
through `html.escape`.
"""

from __future__ import annotations

import base64
import html
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import numpy as np
from PIL import Image

from llava_lab.checks import entry, shown
from llava_lab.errors import OptionError
from widgets.pack import image_bytes
from widgets.patch_explorer import PatchExplorer
from widgets.picture_picker import CodeBox, PicturePicker

if TYPE_CHECKING:
    from llava_lab.results import Relevance, Run

log = logging.getLogger(__name__)

SESSION, PICTURE = ("name", "knows", "methods", "gallery", "ask", "explain"), ("name", "picture", "questions")
EVERY = 0.08  # seconds between two looks at a growing answer
PREVIEW = 420  # pixels of the longer side of a picture that was not asked about yet
SOFT = "color: var(--jp-content-font-color2, #5b6270)"
WARN = "border-left: 3px solid var(--jp-warn-color1, #c05621); padding-left: 8px"
MINE = "background: var(--jp-layout-color2, #eef0f3); border-radius: 8px; padding: 6px 10px; margin: 10px 0 4px"


def show(session: Any, picture: Any = None) -> Explore:
    """The widget of a `llava_lab.session.Session`, with a picture of it or with none chosen yet."""
    return Explore(session, picture)


class Explore(ipw.VBox):
    """Asks and explains by its `session`. `run` is the last answer, `maps` what explains it, `history` what was said before.

    >>> widget = ll.explore()
    >>> widget.pick(widget.gallery[0]); widget.ask("What color is the car?"); widget.join()
    """

    @entry
    def __init__(self, session: Any, picture: Any = None) -> None:
        if not all(hasattr(session, name) for name in SESSION):
            raise OptionError(f"session must be a session with a model, which ll.explore() opens, got {shown(session)}")
        if picture is not None and not all(hasattr(picture, name) for name in PICTURE):
            raise OptionError(f"picture must be one that session.given(...) made, got {shown(picture)}")
        self.session, self.gallery = session, session.gallery()
        self.shown: Any = None  # the picture asked about
        self.run: Run | None = None
        self.maps: dict[str, Relevance] = {}
        self.view: PatchExplorer | None = None
        self.history: list[tuple[str, str]] = []
        self._told: list[str] = []  # finished parts of the talk, HTML
        self._work: threading.Thread | None = None
        self._stop = threading.Event()
        self.code = CodeBox()
        self._build()
        super().__init__([self._head, ipw.HBox([self._left, self._right], layout=ipw.Layout(flex_flow="row wrap"))])
        if picture is not None:
            self.pick(picture)

    # -- what is done ---------------------------------------------------------------------------

    def pick(self, shown: Any) -> None:
        """Ask about another picture; what was said of the one before is forgotten."""
        if self.busy:
            return
        self.shown = shown
        self.new()
        self._suggest(shown.questions)

    def new(self) -> None:
        """Forget what was said."""
        if self.busy:
            return
        self.history, self._told, self.run, self.view, self.maps = [], [], None, None, {}
        self.code.code = ""
        self._talk()
        self._stage.children = [self._preview()] if self.shown is not None else [_line("Choose a picture to begin.", SOFT)]
        self._enable()

    def ask(self, question: str) -> None:
        """Ask, beside the kernel; `join` waits for the answer and its maps."""
        question = question.strip()
        if self.busy or not question or self.shown is None:
            return
        self._stop.clear()
        self._field.value = ""
        methods = [name for name, box in self._boxes.items() if box.value]
        self._work = threading.Thread(target=self._answer, args=(question, methods), name="asking", daemon=True)
        self._enable(busy=True)
        self._work.start()

    def stop(self) -> None:
        """End the answer, or the maps, with what there is."""
        self._stop.set()

    def join(self, seconds: float | None = None) -> None:
        """Wait until what was asked is answered and explained."""
        if self._work is not None:
            self._work.join(seconds)

    @property
    def busy(self) -> bool:
        """Whether something is being answered or explained."""
        return self._work is not None and self._work.is_alive() and self._work is not threading.current_thread()

    # -- answering, in its thread -----------------------------------------------------------------

    def _answer(self, question: str, methods: Sequence[str]) -> None:
        self._told.append(f'<div style="{MINE}">{html.escape(question)}</div>')
        try:
            self.run = self._ask(question)
            self._told.append(_said(self.run))
            self._talk()
            before, run = tuple(self.history), self.run
            self.history.append((run.question, run.answer))
            self._explain(run, methods, before)
            self.code.code = self.session.code(self.shown, question, history=before, methods=list(self.maps))
        except Exception as error:  # the page is where the reader is looking
            log.exception("asking failed")
            said = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            self._told.append(f'<div role="alert" style="{WARN}">{html.escape(said)}</div>')
        finally:
            self._talk()
            self._enable()

    def _ask(self, question: str) -> Run:
        grown, last = "", 0.0

        def heard(piece: str) -> None:
            nonlocal grown, last
            grown += piece
            if self._stop.is_set():
                raise KeyboardInterrupt  # the answer so far is kept
            if time.monotonic() - last > EVERY:
                last = time.monotonic()
                self._talk(f"<div>{html.escape(grown)} <span style='{SOFT}'>…</span></div>")

        self._talk(f"<div style='{SOFT}'>looking …</div>")
        run: Run = self.session.ask(self.shown.picture, question, history=tuple(self.history), on_token=heard)
        return run

    def _explain(self, run: Run, methods: Sequence[str], before: tuple[tuple[str, str], ...]) -> None:
        """Map after map, shown together; Stop leaves those that are done."""
        self.maps, self.view = {}, None
        for name in methods if run.words else ():
            if self._stop.is_set():
                break
            self._talk(f"<div style='{SOFT}'>explaining with {html.escape(name)} …</div>")
            self.maps[name] = self.session.explain(run, name)
        if not self.maps:
            self._stage.children = [self._preview()]
            return
        # what answers stands at the end of a sentence, and a full stop answers nothing
        telling = [i for i, word in enumerate(run.words) if any(map(str.isalnum, word.text))]
        first = telling[-1] if telling else None
        shown = replace(run, knows="")  # that stands at the head of the page already
        maps = {name: self._with_truth(name, rel) for name, rel in self.maps.items()}
        self.view = PatchExplorer(shown, maps, word=first, ask=lambda patches: self.session.without(run, patches, before))
        self._stage.children = [self.view]

    def _with_truth(self, name: str, rel: Relevance) -> Relevance:
        """The map with what its method does and what its colours mean as the first thing to read beside it."""
        colours = "Orange is more, blue is less, clear is nothing." if (rel.values < 0).any() else "The brighter, the more."
        return replace(rel, notes=(f"{self.session.methods[name]} {colours}", *rel.notes))

    # -- the page ---------------------------------------------------------------------------------

    def _build(self) -> None:
        knows = f"<b>{html.escape(self.session.name)}</b> {html.escape(self.session.knows)}"
        self._head = ipw.HTML(f'<div style="{SOFT}; line-height: 1.4; max-width: 1100px">{knows}</div>')
        named = [(shown.name, shown.picture) for shown in self.gallery]
        self.picker = PicturePicker(named, on_pick=self._picked)
        self._log = ipw.HTML()
        self._field = ipw.Text(placeholder="Ask about the picture", continuous_update=True, layout=ipw.Layout(flex="1 1 auto"))
        self._field.add_class("lab-ask")
        self._ask_button = _button("Ask", "primary", lambda: self.ask(self._field.value))
        self._stop_button = _button("Stop", "", self.stop)
        self._new_button = _button("New conversation", "", self.new)
        self._field.on_msg(self._typed)
        self._tries = ipw.HBox(layout=ipw.Layout(flex_flow="row wrap"))
        self._boxes = {name: self._box(name, name in self.session.chosen) for name in self.session.first}
        rest = [name for name in self.session.methods if name not in self._boxes]
        self._more = ipw.Dropdown(options=["more methods …", *rest], layout=ipw.Layout(width="auto"))
        self._more.observe(self._add_method, "value")
        self._methods = ipw.VBox()
        self._truths = ipw.HTML()
        self._list_methods()
        wide = ipw.Layout(width="100%")
        row = ipw.HBox([self._field, self._ask_button], layout=wide)
        tools = ipw.HBox([self._stop_button, self._new_button], layout=wide)
        heads = {name: _line(text, "font-weight: 600") for name, text in (("pick", "1. A picture"), ("ask", "2. A question"))}
        chosen = ipw.Accordion([ipw.VBox([self._methods, self._more, self._truths])], titles=("3. How it is explained",))
        left = [heads["pick"], self.picker, heads["ask"], self._tries, row, self._log, tools, chosen]
        self._left = ipw.VBox(left, layout=ipw.Layout(flex="1 1 360px", max_width="520px", min_width="0", padding="0 16px 0 0"))
        self._stage = ipw.VBox([_line("Choose a picture to begin.", SOFT)])
        self._right = ipw.VBox([self._stage, self.code], layout=ipw.Layout(flex="3 1 560px", min_width="0"))
        self._enable()

    def _picked(self, name: str, picture: np.ndarray) -> None:
        if 0 <= self.picker.chosen < len(self.gallery):
            self.pick(self.gallery[self.picker.chosen])
        else:
            self.pick(self.session.uploaded(name, picture))

    def _typed(self, _widget: Any, content: Any, _buffers: Any) -> None:
        """Enter in the field asks."""
        if isinstance(content, dict) and content.get("event") == "submit":
            self.ask(self._field.value)

    def _suggest(self, questions: Sequence[str]) -> None:
        self._tries.children = [_button(text, "", partial(self.ask, text), small=True) for text in questions]
        self._enable()

    def _box(self, name: str, on: bool) -> ipw.Checkbox:
        box = ipw.Checkbox(value=on, description=name, indent=False, layout=ipw.Layout(width="auto", margin="0 12px 0 0"))
        box.observe(lambda _: self._list_methods(), "value")
        return box

    def _add_method(self, change: dict[str, Any]) -> None:
        name = change["new"]
        if name in self.session.methods and name not in self._boxes:
            self._boxes[name] = self._box(name, True)
            self._more.options = [option for option in self._more.options if option != name]
            self._list_methods()

    def _list_methods(self) -> None:
        """The boxes, and what each chosen method's map means."""
        self._methods.children = [ipw.HBox(list(self._boxes.values()), layout=ipw.Layout(flex_flow="row wrap"))]
        truths = [f"<li><b>{html.escape(name)}</b>: {html.escape(self.session.methods[name])}</li>"
                  for name, box in self._boxes.items() if box.value]  # fmt: skip
        note = "" if truths else "<li>None is chosen: the answer comes without maps.</li>"
        self._truths.value = f'<ul style="{SOFT}; line-height: 1.4; padding-left: 18px">{"".join(truths) or note}</ul>'

    def _talk(self, growing: str = "") -> None:
        """What was said, and what is being said."""
        inside = "".join(self._told) + growing
        self._log.value = f'<div role="log" aria-live="polite" style="line-height: 1.45">{inside}</div>' if inside else ""

    def _enable(self, busy: bool = False) -> None:
        """Which controls can be used now."""
        idle = not busy and self.shown is not None
        for control in (self._field, self._ask_button, *self._tries.children):
            control.disabled = not idle
        self._stop_button.disabled = not busy
        self._new_button.disabled = busy or not self._told

    def _preview(self) -> ipw.HTML:
        image = Image.fromarray(self.shown.picture)
        image.thumbnail((PREVIEW, PREVIEW))
        data, name = base64.b64encode(image_bytes(image)).decode("ascii"), html.escape(self.shown.name)
        return ipw.HTML(f'<img alt="{name}" width="{image.width}" src="data:image/png;base64,{data}">')

    # -- in a saved notebook ------------------------------------------------------------------------

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        still = self.view.draw_png() if self.view is not None else self.picker.draw_png()
        data["image/png"] = base64.b64encode(still).decode("ascii")
        data["text/plain"] = repr(self)
        return bundle

    def __repr__(self) -> str:
        return f"Explore({self.session.name!r}, {self.shown.name if self.shown is not None else 'no picture yet'})"


def _said(run: Run) -> str:
    notes = "".join(f'<div style="{WARN}; margin: 4px 0">{html.escape(note)}</div>' for note in run.notes)
    return f"<div>{html.escape(run.answer_shown) or '(nothing)'}</div>{notes}"


def _line(text: str, style: str) -> ipw.HTML:
    return ipw.HTML(f'<div style="{style}">{html.escape(text)}</div>')


def _button(text: str, style: str, press: Callable[[], Any], *, small: bool = False) -> ipw.Button:
    button = ipw.Button(description=text, button_style=style, layout=ipw.Layout(width="auto", max_width="100%"))
    if small:
        button.style.font_size = "12px"
    button.on_click(lambda _: press())
    return button
