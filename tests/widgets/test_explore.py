"""Explore: pick, ask in turns, explain, stop, copy the code; what was typed or named enters the page as text."""

from __future__ import annotations

import io
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from tests.support.all_widgets import ATTACK
from tests.support.widget_examples import make_relevance, make_run, spots
from widgets.explore import Explore
from widgets.picture_picker import PicturePicker, read_upload

PICTURE = np.full((40, 60, 3), 200, np.uint8)


class Session:
    """Answers at once, remembers what it was asked; `hold` keeps an answer waiting."""

    name, knows = "stand-in", "It knows nothing."
    methods: ClassVar[dict[str, str]] = {"rollout": "a truth", "random": "a control", "other": ATTACK}
    first, chosen = ("rollout", "random"), ("rollout",)

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple]] = []
        self.hold: threading.Event | None = None
        self.answer = "The car is red."

    def gallery(self) -> list[Any]:
        return [SimpleNamespace(name="one", picture=PICTURE, code="one", questions=("What is it?",))]

    def uploaded(self, name: str, picture: np.ndarray) -> Any:
        return SimpleNamespace(name=name, picture=picture, code="file", questions=())

    def ask(self, picture: np.ndarray, question: str, *, history: Any, on_token: Any) -> Any:
        self.asked.append((question, tuple(history)))
        if question == "bad":
            raise ValueError(f"cannot {ATTACK}")
        stopped = "eos"
        try:
            for word in self.answer.split(" "):
                on_token(word + " ")
                if self.hold:
                    self.hold.wait(10)
        except KeyboardInterrupt:
            stopped = "interrupted"
        run = make_run(self.answer, question=question)
        return replace(run, options={"stopped": stopped}, notes=(f"note {ATTACK}",), knows=self.knows)

    def explain(self, run: Any, method: str) -> Any:
        return make_relevance(run, spots(run), method=method)

    def without(self, run: Any, patches: Any, history: Any) -> Any:
        return run

    def code(self, shown: Any, question: str, *, history: Any, methods: Any) -> str:
        return f"{shown.code} {question} {len(history)} {methods}"


@pytest.fixture
def session() -> Session:
    return Session()


@pytest.fixture
def widget(session: Session) -> Explore:
    made = Explore(session)
    made.picker.chosen = 0  # as a click does
    return made


def test_what_a_map_means_is_said_beside_it(widget: Explore, session: Session) -> None:
    made = session.explain

    def explain(run: Any, method: str) -> Any:
        rel = made(run, method)
        return rel if method == "random" else replace(rel, values=-rel.values, notes=("measured",))

    session.explain = explain  # type: ignore[method-assign]
    widget._boxes["random"].value = True
    widget.ask("What is it?")
    widget.join()
    assert widget.view is not None
    notes = {method["name"]: method["notes"] for method in widget.view.spec["methods"]}
    first, last = f"{session.methods['rollout']} Orange is more, blue is less, clear is nothing.", "measured"
    assert notes["rollout"] == [first, last]
    assert notes["random"] == [f"{session.methods['random']} The brighter, the more."]
    assert widget.maps["rollout"].notes == ("measured",)  # the result itself stays as it was


def test_a_question_is_answered_explained_and_remembered(widget: Explore, session: Session) -> None:
    for question in ("What is it?", "And now?"):
        widget.ask(question)
        widget.join(20)
    assert session.asked == [("What is it?", ()), ("And now?", (("What is it?", "The car is red."),))]
    assert list(widget.maps) == ["rollout"]
    assert widget.view is not None
    assert widget._stage.children == (widget.view,)
    assert session.knows in widget._head.value
    assert session.knows not in str(widget.view.spec)  # said once
    assert widget.code.code == "one And now? 1 ['rollout']"
    widget.new()
    assert widget.history == []
    assert widget.code.code == ""


def test_what_was_typed_and_answered_is_text(widget: Explore, session: Session) -> None:
    session.answer = f"The {ATTACK}"
    for question in (ATTACK, "bad"):
        widget.ask(question)
        widget.join(20)
    for part in (widget._log, widget._head, widget._truths):
        assert "<img" not in part.value
        assert "<script" not in part.value
    assert "cannot &lt;img" in widget._log.value
    assert "note &lt;img" in widget._log.value
    assert not widget.busy
    assert not widget._ask_button.disabled


def test_stop_keeps_the_answer_so_far_and_makes_no_maps(widget: Explore, session: Session) -> None:
    session.hold = threading.Event()
    widget.ask("What is it?")
    assert widget.busy
    assert widget._ask_button.disabled
    widget.ask("another")  # not heard while one is answered
    widget.stop()
    session.hold.set()
    widget.join(20)
    assert len(session.asked) == 1
    assert widget.run is not None
    assert widget.run.cut
    assert widget.maps == {}


def test_without_a_method_the_answer_comes_alone(widget: Explore) -> None:
    for box in widget._boxes.values():
        box.value = False
    widget.ask("What is it?")
    widget.join(20)
    assert widget.view is None
    assert "None is chosen" in widget._truths.value


def test_another_method_can_be_added(widget: Explore) -> None:
    widget._more.value = "other"
    assert widget._boxes["other"].value is True
    assert "other" not in widget._more.options


def test_nothing_is_asked_without_a_picture_or_a_question(session: Session) -> None:
    widget = Explore(session)
    widget.ask("What is it?")
    widget.picker.chosen = 0
    widget.ask("   ")
    assert session.asked == []
    assert repr(widget) == "Explore('stand-in', one)"


def test_a_saved_notebook_has_a_still(widget: Explore) -> None:
    bundle = widget._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert data["image/png"]
    assert data["text/plain"] == "Explore('stand-in', one)"


def _file(kind: str = "PNG", size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind)
    return buffer.getvalue()


def test_an_uploaded_file_is_read_or_its_problem_is_said() -> None:
    picked: list[tuple[str, tuple]] = []
    picker = PicturePicker([], on_pick=lambda name, picture: picked.append((name, picture.shape)))
    picker.set_state({"name": "car.png", "chosen": -1, "picture": memoryview(_file())})  # as the page's message sets it
    assert picked == [("car.png", (4, 6, 3))]
    picker.picture = b"no picture"
    assert "cannot be read as a picture" in picker.problem
    picker.picture = _file("JPEG")
    assert picker.problem == ""
    for raw, said in (
        (b"x" * 9_000_000, "more than 8 MB"),
        (_file("TIFF"), "cannot be read"),
        (_file(size=(3000, 1)), "pixels a side"),
    ):
        with pytest.raises(ValueError, match=said):
            read_upload(raw)
