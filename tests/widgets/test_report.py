"""The report's file and its command: what is in it, how large it may be, what is refused, and how the writer is found."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_lab import bridge
from llava_lab.cli import judge as cli_report
from llava_lab.cli import main as cli
from llava_lab.errors import LabError
from llava_lab.results import HeadMaps
from tests.support.compare_examples import comparison_example, heads_example, methods_example
from tests.support.widget_examples import make_relevance, make_run, spots
from widgets import report

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point as pyproject.toml declares it, whatever was installed."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"][cli_report.GROUP]
    points = [EntryPoint(name, value, cli_report.GROUP) for name, value in declared.items()]
    monkeypatch.setattr(bridge, "entry_points", lambda group: points if group == cli_report.GROUP else [])


def views_in(text: str) -> list[str]:
    stored = re.search(r'<script type="application/json" id="lab-state">(.*?)</script>', text, re.DOTALL)
    assert stored is not None
    return [view["entry"] for view in json.loads(stored[1])["views"]]


def test_the_declared_entry_point_is_the_writer(writer: None) -> None:
    assert cli_report.find_writer() is report.write


def test_an_answer_keeps_its_own_spaces() -> None:
    run = make_run("Red, I think.")
    last = run.words[-1]
    words = [*(replace(last, text=text) for text in ("Red", ",", "I", "think", "."))]
    line = report.answer_line(replace(run, words=tuple(words), notes=()))
    assert re.sub(r"<[^>]*>", "", line) == "Red, I think."


def test_everything_given_is_in_the_file(tmp_path: Path) -> None:
    run, comparison = comparison_example()
    _, heads = heads_example(run)
    path = report.write(tmp_path / "new" / "report.html", run, comparison=comparison, heads=heads, versions={"llava-lab": "9.9"})
    text = path.read_text("utf-8")
    assert views_in(text) == ["renderExplorer", "renderCompare", "renderHeads"]
    for said in ("What color is the car?", "How it was made", "9.9", "numpy", "layers None", "0" * 16, "USER: &lt;image&gt;"):
        assert said in text, said
    row = comparison.rows(0)[0]
    assert f"{row['gain']:.3f}" in text
    assert "relative_attention" in text
    assert text.count("<noscript>") == 3  # a still picture each, where no script runs
    assert "http" not in re.sub(r'content="[^"]*"', "", text.split("<script type")[0]).replace("http-equiv", "")


def test_a_run_alone_is_a_report_too(tmp_path: Path) -> None:
    text = report.write(tmp_path / "run.html", make_run()).read_text("utf-8")
    assert views_in(text) == []
    assert 'src="data:image/png;base64,' in text
    assert text.count("</script>") == 2


def test_one_map_is_pointed_at_and_several_are_compared(tmp_path: Path) -> None:
    run, maps = methods_example(names=("rollout", "attention"))
    one = report.write(tmp_path / "one.html", run, maps={"rollout": maps["rollout"]}).read_text("utf-8")
    assert views_in(one) == ["renderExplorer"]
    two = report.write(tmp_path / "two.html", run, maps=maps).read_text("utf-8")
    assert views_in(two) == ["renderExplorer", "renderCompare"]


@pytest.mark.long
def test_the_picture_is_stored_once_for_all_views(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    run, maps = methods_example(make_run(picture=noise), ("rollout", "attention"))
    text = report.write(tmp_path / "two.html", run, maps=maps).read_text("utf-8")
    stored = json.loads(re.search(r'id="lab-state">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    names = [view["data"]["picture"] for view in stored["views"]]
    assert names[0] == names[1]
    assert len(set(stored["blobs"].values())) == len(stored["blobs"])


@pytest.mark.long
def test_the_same_report_is_the_same_bytes(tmp_path: Path) -> None:
    run, comparison = comparison_example()
    one, two = (report.write(tmp_path / f"{i}.html", run, comparison=comparison).read_bytes() for i in range(2))
    assert one == two


@pytest.mark.long
def test_7b_heads_leave_the_file_under_5_mb(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    run = make_run(" ".join(f"w{i}" for i in range(12)), picture=noise, grid=24, size=336)
    values = np.random.default_rng(1).random((12, 32, 32, 24, 24), np.float32).astype(np.float16) / 576
    heads = HeadMaps(values, run.word_targets(), run.map, run.model, run.fingerprint, 1.0)
    path = report.write(tmp_path / "heads.html", run, maps={"rollout": make_relevance(run, spots(run))}, heads=heads)
    assert path.stat().st_size <= report.LIMIT == 5_000_000
    assert "Left out for want of room" in path.read_text("utf-8")


def test_a_report_that_cannot_be_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LIMIT", 50_000)
    with pytest.raises(ValueError, match=r"the report would be 0\.\d MB, over 0 MB; give it fewer maps or targets"):
        report.write(tmp_path / "big.html", *methods_example()[:1], maps=methods_example()[1])
    assert not (tmp_path / "big.html").exists()


def test_verdicts_follow_a_map_only_to_the_targets_they_are_about(tmp_path: Path) -> None:
    run, comparison = comparison_example()
    rel = comparison.maps["gradcam"]
    word = make_relevance(run, rel.values[:1], rel.targets[:1])
    shown = report.views(run, {"gradcam": rel, "rollout": word}, comparison)
    gradcam, rollout = shown["explorer"].spec["methods"]
    assert gradcam["beats"] == [False] * 5
    assert rollout["beats"] == [None]


def test_where_nothing_can_be_told_no_verdict_is_claimed() -> None:
    _, comparison = comparison_example()
    flat = {
        name: replace(one, deletion=np.where(np.arange(5)[:, None, None] == 0, np.nan, one.deletion))
        for name, one in comparison.faithfulness.items()
    }
    text = report.score_tables(replace(comparison, faithfulness=flat))
    the, car = text.split("<details")[1:3]
    assert the.count("cannot be told") == len(comparison.methods)
    assert "<td>yes</td>" not in the
    assert "cannot be told" not in car
    assert not the.startswith(" open")  # the first table with something in it is
    assert car.startswith(" open")


# -- the command ----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run and what was saved about it."""
    monkeypatch.chdir(tmp_path)
    run, comparison = comparison_example()
    run.save("run.npz")
    comparison.save("compare.npz")
    heads_example(run)[1].save("heads.npz")
    for name in ("rollout", "occlusion"):
        methods_example(run)[1][name].save(f"{name}.npz")
    return tmp_path


def test_the_command_writes_what_was_saved(saved: Path, writer: None, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--maps", "rollout.npz", "occlusion.npz", "rollout.npz", "--compare", "compare.npz", "--heads", "heads.npz"]
    assert cli.main(["report", "run.npz", "--out", "out/report.html", *files, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    text = Path("out/report.html").read_text("utf-8")
    assert data["bytes"] == len(text.encode()) < 5_000_000
    assert data["out"] == "out/report.html"
    assert views_in(text) == ["renderExplorer", "renderCompare", "renderHeads"]
    assert '"rollout 2"' in text
    assert cli.main(["report", "run.npz"]) == 0
    assert (
        capsys.readouterr().out
        == f"wrote report.html, {Path('report.html').stat().st_size / 1e6:.1f} MB; open it in any browser\n"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["missing.npz"], "no such file: missing.npz"),
        (["rollout.npz"], "rollout.npz holds a relevance of format 1; expected a run of format 1"),
        (["run.npz", "--maps", "run.npz"], "expected a relevance of format 1"),
        (["run.npz", "--compare", "heads.npz"], "holds a head maps of format 1; expected a comparison"),
        (["run.npz", "--out", "report.pdf"], "--out wants a file ending in .html, got 'report.pdf'"),
        (["other.npz", "--maps", "rollout.npz"], "explains another checkpoint (tiny) than the run's (tiny); attribute this run"),
        (["run.npz", "--out", "run.npz/report.html"], "cannot write run.npz/report.html: "),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    saved: Path, writer: None, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(make_run(), fingerprint="other").save("other.npz")
    assert cli.main(["report", *argv]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("broken", [None, "widgets.nowhere:write", "widgets.report:rite"])
def test_without_a_writer_the_command_says_how_to_get_one(
    saved: Path, broken: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points: list[Any] = [EntryPoint("html", broken, cli_report.GROUP)] if broken else []
    monkeypatch.setattr(bridge, "entry_points", lambda group: points)
    assert cli.main(["report", "run.npz"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'llava-lab[lab]'" in said
    assert ("cannot be loaded" if broken else "nothing here can write a report (no entry point 'llava_lab.report')") in said
    with pytest.raises(LabError):
        cli_report.find_writer()
