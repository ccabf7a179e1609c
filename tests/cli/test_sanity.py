"""``llava-lab sanity``, and what ``llava-lab compare`` keeps for a report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.test_report_file import writer as writer

from llava_lab.cli import main as cli
from llava_lab.results import Comparison, Run, Sanity


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    return str(path)


def test_sanity_prints_one_object_with_both_curves(
    tiny_folder: Path, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, figure = tmp_path / "sanity.npz", tmp_path / "new" / "sanity.svg"
    argv = ["sanity", picture, "What is it?", "--model", str(tiny_folder), "--method", "attention", "--target", "#0"]
    assert (
        cli.main(
            [*argv, "--groups", "1", "--ask", "What color is the car?", "--save", str(saved), "--figure", str(figure), "--json"]
        )
        == 0
    )
    out = capsys.readouterr().out
    data = json.loads(out)
    assert out.count("\n") == 1
    assert set(data) == {
        *("answer", "method", "targets", "passed", "verdict", "control", "curves", "notes", "seconds", "model"),
    }  # fmt: skip
    assert data["method"] == "attention"
    kept = Sanity.load(saved)
    assert [row["question"] for row in data["curves"]["question"]] == ["What color is the car?"]
    np.testing.assert_allclose([row["spearman"] for row in data["curves"]["model"]], kept.spearman, atol=1e-6)
    assert data["verdict"] == kept.verdict
    assert figure.read_text("utf-8").startswith("<?xml")


def test_sanity_tells_a_person_curves_controls_and_verdict(
    tiny_folder: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sanity", picture, "What is it?", "--model", str(tiny_folder), "--method", "edges", "--groups", "1"]) == 0
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
def test_sanity_says_a_mistake_in_one_line_before_a_model_is_loaded(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sanity", *argv, "--model", "no such model"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_comparison_and_its_run_make_a_report(
    writer: None, tiny_folder: Path, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, run, page = (str(tmp_path / name) for name in ("c.npz", "run.npz", "report.html"))
    argv = ["compare", picture, "What is it?", "--model", str(tiny_folder), "--methods", "attention,random"]
    assert cli.main([*argv, "--steps", "2", "--seeds", "2", "--save", saved, "--save-run", run]) == 0
    assert Run.load(run).fingerprint == Comparison.load(saved).fingerprint
    assert cli.main(["report", run, "--compare", saved, "--out", page]) == 0
    assert "attention" in Path(page).read_text("utf-8")
    assert cli.main(["compare", "--data", "picturebook", "--save-run", run]) == 2
    assert "--save-run is for one picture" in capsys.readouterr().err
