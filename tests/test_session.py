"""The model's side of `explore`: pictures to try, questions in turn, maps, and code that does the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import llava_lab as ll
from llava_lab import bridge
from llava_lab.errors import LabError
from llava_lab.models.scope import scope_of
from llava_lab.session import Session


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(ll.load("tiny"))


def test_the_gallery_has_pictures_with_questions_that_the_model_answers(session: Session) -> None:
    gallery = session.gallery()
    drawn = [shown for shown in gallery if shown.code.startswith("picturebook")]
    assert len(drawn) == 5
    assert all(shown.picture.dtype == np.uint8 and shown.questions for shown in gallery)
    scope = session.lab.scope
    assert scope is not None
    assert not [note for shown in drawn for text in shown.questions for note in scope.about_words(text)]
    assert len({shown.name for shown in gallery}) == len(gallery)


@pytest.mark.parametrize(
    ("name", "first"), [("tiny", "picturebook"), ("smol", "picturebook"), ("photo", "data."), ("own", "data.")]
)
def test_what_the_model_was_made_for_stands_first(
    session: Session, monkeypatch: pytest.MonkeyPatch, name: str, first: str
) -> None:
    pytest.importorskip("skimage")
    monkeypatch.setattr(session.lab, "scope", scope_of(name))
    gallery = [shown.code.startswith(first) for shown in session.gallery()]
    assert gallery[0]
    assert gallery == sorted(gallery, reverse=True)  # one kind, then the other
    assert not gallery[-1]


def test_the_code_does_what_was_done(session: Session) -> None:
    shown = session.gallery()[1]
    first = session.ask(shown.picture, "What color is the car?")
    history = [(first.question, first.answer)]
    second = session.ask(shown.picture, "How many things are there?", history=history)
    code = session.code(shown, "How many things are there?", history=history, methods=["rollout", "random"])
    names: dict[str, Any] = {}
    exec(code.replace("PatchExplorer(run, maps)", ""), names)
    assert names["run"].answer == second.answer
    assert (names["run"].token_ids == second.token_ids).all()
    np.testing.assert_array_equal(names["maps"]["rollout"].values, session.explain(second, "rollout").values)
    assert session.without(second, [(0, 0)], history).question == second.question


def test_code_of_a_file_and_of_covered_patches(session: Session) -> None:
    given = session.uploaded("it's.png", np.zeros((4, 4, 3), np.uint8))
    code = session.code(given, "What?", patches=[(1, 2)])
    compile(code, "code", "exec")
    assert 'picture = "it\'s.png"' in code
    assert "ll.ask_without(lab, run, [(1, 2)]).answer" in code
    assert "widgets" not in code


def test_only_methods_that_work_on_the_model_are_offered(session: Session) -> None:
    assert set(session.chosen) <= set(session.first) <= set(session.methods)
    assert "random" in session.chosen  # the control beside the map
    assert all(session.methods[name] == ll.METHODS[name].truth for name in session.methods)


def test_where_nothing_can_show_it_one_line_says_so(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "entry_points", lambda group: [])
    with pytest.raises(LabError, match=r"nothing here can show explore \(no entry point 'llava_lab.explore'\)"):
        ll.explore(None, session.lab)
