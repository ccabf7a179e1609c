"""chat: several questions about one picture, each with what was said before."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_lab.cli import main as cli
from llava_lab.results import Run
from tests.support.stand_in import StandIn


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What comes by standard input."""

    def lines(*text: str, person: bool = False) -> None:
        given = io.StringIO("".join(f"{line}\n" for line in text))
        given.isatty = lambda: person  # type: ignore[method-assign]
        monkeypatch.setattr("sys.stdin", given)

    return lines


@pytest.fixture
def asked(lab: StandIn, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every question the stand-in was asked, with its options."""
    calls: list[dict[str, Any]] = []
    whole = lab.ask

    def ask(picture: Any, question: str, **options: Any) -> Run:
        run = whole(picture, question, **options)
        calls.append({"question": question, "size": picture.shape[:2], **options})
        return run

    monkeypatch.setattr(lab, "ask", ask)
    return calls


def test_each_question_has_what_was_said_before(
    asked: list[dict[str, Any]], typed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    typed("What is it?", "", "And where?", "/new", "Again?")
    assert cli.main(["chat", "car.png", "--json", "--save", "last.npz", "--temperature", "0.5"]) == 0
    told = ("What color is the car?", "The car is red.")  # as the stand-in's run says it was read
    assert [call["history"] for call in asked] == [(), (told,), ()]
    assert asked[0]["temperature"] == 0.5
    data = json.loads(capsys.readouterr().out)
    assert [turn["answer"] for turn in data["turns"]] == ["The car is red."] * 3
    assert Run.load("last.npz").answer == "The car is red."


def test_another_picture_begins_anew(asked: list[dict[str, Any]], typed: Callable[..., None], here: Path) -> None:
    Image.new("RGB", (8, 6)).save(here / "other.png")
    typed("What is it?", "/picture other.png", "What is it?", "/quit", "never asked")
    assert cli.main(["chat", "car.png"]) == 0
    assert [(call["size"], call["history"]) for call in asked] == [((40, 60), ()), ((6, 8), ())]


def test_a_person_sees_a_prompt_and_goes_on_after_a_mistake(
    asked: list[dict[str, Any]], typed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    typed("/what", "...", "What is it?", person=True)
    assert cli.main(["chat", "car.png"]) == 0
    out, err = capsys.readouterr()
    assert out.count("> ") == 4
    assert "no command /what; /new forgets" in err
    assert len(asked) == 1
    typed("...", "What is it?")
    assert cli.main(["chat", "car.png"]) == 2  # a script's mistake is the script's exit code
    assert len(asked) == 2
