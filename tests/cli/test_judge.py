"""sanity, evaluate, and what compare keeps for a report. compare itself is tested with what it calls (tests/judging)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llava_lab.cli import judge
from llava_lab.cli import main as cli
from llava_lab.results import Comparison, Run, Sanity
from tests.support.stand_in import StandIn
from widgets import report

Printed = Callable[..., dict[str, Any]]
Refused = Callable[..., str]
QUESTION = "What is it?"
SCORE = {"accuracy": 0.96, "interval": [0.95, 0.97], "n": 200}


def test_sanity_prints_one_object_with_both_curves(here: Path, tiny_folder: Path, printed: Printed) -> None:
    argv = ["sanity", "car.png", QUESTION, "--model", str(tiny_folder), "--method", "attention", "--target", "#0"]
    files = ["--save", "sanity.npz", "--figure", "new/sanity.svg"]
    data = printed(*argv, "--groups", "1", "--ask", "What color is the car?", *files)
    expected = {"answer", "cut", "method", "targets", "passed", "verdict", "control", "curves", "notes", "seconds", "model"}
    assert set(data) == expected
    assert data["method"] == "attention"
    saved = Sanity.load("sanity.npz")
    assert [row["question"] for row in data["curves"]["question"]] == ["What color is the car?"]
    np.testing.assert_allclose([row["spearman"] for row in data["curves"]["model"]], saved.spearman, atol=1e-6)
    assert data["verdict"] == saved.verdict
    assert Path("new/sanity.svg").read_text("utf-8").startswith("<?xml")


def test_sanity_tells_a_person_curves_controls_and_verdict(
    here: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sanity", "car.png", QUESTION, "--model", str(tiny_folder), "--method", "edges", "--groups", "1"]) == 0
    text = capsys.readouterr().out
    assert "not passed: model unchanged, question unchanged" in text  # edges of the picture do not depend on any model
    assert "unrelated maps stay below a rank correlation of" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a.png", "what?", "--method", "rolout"], "no method 'rolout'"),
        (["a.png", "what?", "--option", "residul=1"], "has no option 'residul'"),
        (["a.png", "what?", "--figure", "x.doc"], "--figure wants a file ending in .png, .svg, .pdf, got 'x.doc'"),
        (["a.png", "what?"], "a.png"),
    ],
)
def test_sanity_says_a_mistake_before_a_model_is_loaded(here: Path, argv: list[str], message: str, refused: Refused) -> None:
    assert message in refused("sanity", *argv, "--model", "no such model")


def test_evaluate_prints_scores_beside_their_controls(
    lab: StandIn, monkeypatch: pytest.MonkeyPatch, printed: Printed, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}
    controls = {name: {**SCORE, "accuracy": 0.31} for name in ("blind", "shuffled", "majority")}
    result = {**SCORE, "by_type": {"colour": SCORE}, "controls": controls, "model": "tiny"}

    def evaluate(lab: Any, **options: Any) -> dict[str, Any]:
        asked.update(options)
        return result

    monkeypatch.setitem(sys.modules, "llava_lab.evaluation", SimpleNamespace(evaluate=evaluate))
    assert printed("evaluate", "--n", "200", "--split", "compositions", "--seed", "3") == result
    assert asked == {"data": "picturebook", "split": "compositions", "n": 200, "seed": 3, "controls": True, "normalise": False}
    assert cli.main(["evaluate", "--no-controls"]) == 0
    assert asked["controls"] is False
    assert "control: blind" in capsys.readouterr().out


def test_a_comparison_and_its_run_make_a_report(
    here: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.setattr(judge, "find_writer", lambda: report.write)
    argv = ["compare", "car.png", QUESTION, "--model", str(tiny_folder), "--methods", "attention,random"]
    assert cli.main([*argv, "--steps", "2", "--seeds", "2", "--save", "compare.npz", "--save-run", "run.npz"]) == 0
    assert Run.load("run.npz").fingerprint == Comparison.load("compare.npz").fingerprint
    assert cli.main(["report", "run.npz", "--compare", "compare.npz", "--out", "report.html"]) == 0
    assert "attention" in Path("report.html").read_text("utf-8")
    assert "--save-run is for one picture" in refused("compare", "--data", "picturebook", "--save-run", "other.npz")
