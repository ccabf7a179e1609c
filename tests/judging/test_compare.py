"""Comparison: maps as `attribute` makes them, agreement by hand, refusals with their reason, Ctrl-C keeps the finished part."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.attribution import METHODS, Maps, attribute
from llava_lab.cli import main as cli
from llava_lab.errors import CheckpointError, OptionError, TargetError
from llava_lab.judging import compare
from llava_lab.judging.compare import chosen_methods
from llava_lab.judging.faithfulness import allowed_fills
from llava_lab.models import Lab
from llava_lab.results import Comparison, Run
from tests.support.additive import everything_tells
from tests.support.planted import scripted_run
from tests.support.score_examples import example_comparison

HOME = sys.modules["llava_lab.judging.compare"]  # the package's attribute of this name is the function
REGISTRY = sys.modules["llava_lab.attribution.registry"]
QUICK: dict[str, Any] = {"steps": 2, "seeds": 2, "scale": "logprob"}


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.", fit="crop")


@pytest.fixture(autouse=True)
def _telling(monkeypatch: pytest.MonkeyPatch) -> None:
    everything_tells(monkeypatch)


@pytest.fixture
def result(tiny_random: Lab, run: Run) -> Comparison:
    things = np.zeros((2, 40, 60), bool)
    things[0, 10:30, 15:35] = True
    things[1, 30:38, 38:46] = True
    names = ["attention", "random", "center", "occlusion"]
    options = {"occlusion": {"block": 2}}
    return compare(tiny_random, run, names, target="blue", options=options, things=things, deciding=things[:1], seed=4, **QUICK)


def _upside_down(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Register `names` as methods whose maps are those of ``center``, the second one's upside down."""
    center = METHODS["center"]

    def flipped(*args: Any) -> Maps:
        return Maps(-center.function(*args).values, {"forward": 7})

    first, second = (replace(center, name=name) for name in names)
    added = {names[0]: first, names[1]: replace(second, function=flipped)}
    for home in (HOME, REGISTRY):
        monkeypatch.setattr(home, "METHODS", {**METHODS, **added})


def test_maps_are_those_of_attribute_under_the_same_options(tiny_random: Lab, run: Run, result: Comparison) -> None:
    assert result.methods == ("attention", "random", "center", "occlusion")
    for name, rel in result.maps.items():
        given: dict[str, Any] = {"block": 2} if name == "occlusion" else {}
        given |= {"seed": 4} if "seed" in METHODS[name].options else {}
        again = attribute(tiny_random, run, method=name, target="blue", **given)
        np.testing.assert_array_equal(rel.values, again.values)
        assert rel.options == again.options
        assert result.faithfulness[name].options == again.options
    assert result.targets == (run.target("blue"),)


def test_all_are_scored_with_fills_none_of_them_used_and_the_same_random_maps(result: Comparison) -> None:
    scores = list(result.faithfulness.values())
    assert {score.fills for score in scores} == {scores[0].fills}
    assert "grey" not in scores[0].fills
    assert all(np.array_equal(score.random, scores[0].random, equal_nan=True) for score in scores)
    assert set(result.truth) == set(result.maps)
    row = result.rows()[0]
    assert set(row) >= {"method", "gain", "interval", "deletion", "insertion", "beats_random", "object", "truth", "passes"}


def test_agreement_by_hand(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _upside_down(monkeypatch, "same", "opposite")
    found = compare(tiny_random, run, ["center", "same", "opposite"], top=4, **QUICK)
    np.testing.assert_allclose(found.spearman, [[1, 1, -1], [1, 1, -1], [-1, -1, 1]])
    np.testing.assert_allclose(found.overlap, [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-6)  # the middle four, the corners
    assert found.chance == 0.25
    assert found.maps["opposite"].passes["forward"] == 7
    gains = [score.gain[0] for score in found.faithfulness.values()]
    np.testing.assert_array_equal(gains[0], gains[1])


def test_a_method_that_cannot_is_listed_with_its_reason(tiny_random: Lab, run: Run) -> None:
    found = compare(tiny_random, run, ["attention", "occlusion", "rollout"], target=("blue", "green"), **QUICK)
    assert found.methods == ("occlusion",)
    assert set(found.refused) == {"attention", "rollout"}
    assert "attention is the same for every word" in found.refused["attention"]
    assert "\n" not in found.refused["attention"]
    with pytest.raises(OptionError, match="none of these methods can explain this; attention: method 'attention' cannot tell"):
        compare(tiny_random, run, ["attention"], target=("blue", "green"), **QUICK)


@pytest.mark.parametrize("where", ["in a method that lets go", "in a method that keeps a part", "in the scores"])
def test_ctrl_c_gives_the_finished_methods(tiny_random: Lab, run: Run, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(*args: Any, **options: Any) -> Maps:
        if where == "in a method that lets go":
            raise KeyboardInterrupt
        return Maps(METHODS["center"].function(*args).values, {}, interrupted=True)

    stopped = replace(METHODS["random"], function=compute)
    if where == "in the scores":
        score, calls = HOME.Judge.score, []

        def scoring(self: Any, rel: Any) -> Any:
            calls.append(rel.method)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return score(self, rel)

        monkeypatch.setattr(HOME.Judge, "score", scoring)
    else:
        monkeypatch.setattr(REGISTRY, "METHODS", {**METHODS, "random": stopped})
    found = compare(tiny_random, run, ["center", "random", "attention"], **QUICK)
    assert found.methods == ("center",)
    assert found.interrupted
    assert found.notes[0] == "Interrupted after 1 of 3 methods; not reached: random, attention."
    if where != "in the scores":
        with pytest.raises(KeyboardInterrupt):  # nothing finished, nothing to give
            compare(tiny_random, run, ["random", "center"], **QUICK)
    whole = compare(tiny_random, run, ["center"], **QUICK)
    assert not whole.interrupted
    np.testing.assert_array_equal(found.maps["center"].values, whole.maps["center"].values)


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        (["occlusoin"], {}, "no method 'occlusoin'; the methods are .*rollout"),
        ("atention", {}, "no method 'atention'"),
        ([], {}, "expected at least one method, got none"),
        (["center"], {"options": {"centre": {}}}, "no method 'centre'"),
        (["occlusion"], {"options": {"occlusion": {"blok": 3}}}, "method 'occlusion' has no option 'blok'"),
        (["center"], {"top": 17}, "top must be at most 16, the patches of this picture, got 17"),
        (["center"], {"top": 0}, "top must be a whole number of at least 1"),
        (["occlusion"], {"fills": ("grey", "mean")}, "made with fill 'grey' must not be scored with it"),
        (["center"], {"deciding": np.ones((1, 3, 3), bool)}, "deciding must be masks"),
        (["center"], {"deciding": np.ones((0, 40, 60), bool)}, "an absence does"),
    ],
)
def test_mistakes_are_refused_before_any_map(
    tiny_random: Lab, run: Run, methods: Any, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_random.model, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    with pytest.raises(OptionError, match=message):
        compare(tiny_random, run, methods, **{**QUICK, **options})


def test_words_not_said_and_foreign_runs_are_refused(tiny_random: Lab, run: Run) -> None:
    with pytest.raises(TargetError, match="no word 'red'"):
        compare(tiny_random, run, ["center"], target="red", **QUICK)
    with pytest.raises(CheckpointError):
        compare(tiny_random, replace(run, fingerprint="other"), ["center"], **QUICK)


def test_the_whole_registry_can_be_scored_with_the_same_two_fills() -> None:
    chosen = chosen_methods("all", {})
    assert set(chosen) == set(METHODS)
    assert len(allowed_fills(chosen.items())) >= 2


def test_progress_shows_only_when_it_takes_long(
    tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llava_lab.checks.PATIENCE", 60.0)
    compare(tiny_random, run, ["center"], **QUICK)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("llava_lab.checks.PATIENCE", 0.0)
    compare(tiny_random, run, ["center"], **QUICK)
    assert "compare" in capsys.readouterr().err


def test_round_trips_exactly(result: Comparison, tmp_path: Path) -> None:
    for number, one in enumerate((result, example_comparison())):
        again = Comparison.load(one.save(tmp_path / f"{number}.npz"))
        assert again.methods == one.methods
        assert repr(again.rows()) == repr(one.rows())
        assert again.refused == one.refused
        assert again.notes == one.notes
        assert np.array_equal(again.spearman, one.spearman, equal_nan=True)
        for name, rel in one.maps.items():
            assert again.maps[name].map == rel.map
            assert again.maps[name].targets == rel.targets
            assert again.maps[name].extras == rel.extras
            assert np.array_equal(again.maps[name].values, rel.values)
            assert np.array_equal(again.faithfulness[name].random, one.faithfulness[name].random, equal_nan=True)


def test_greyed_are_those_that_do_not_beat_random() -> None:
    example = example_comparison()
    assert example.greyed() == ("random",)
    assert example.greyed(1) == ("rollout", "random")
    assert [row["method"] for row in example.rows()] == ["rollout", "random"]


# -- from a terminal ------------------------------------------------------------------------


def _cli(tiny_folder: Path, tmp_path: Path, *argv: str) -> int:
    picture = tmp_path / "wide.png"
    if not picture.exists():
        from PIL import Image

        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(picture)
    known = ["--model", str(tiny_folder), "--steps", "2", "--seeds", "2", "--methods", "attention,random"]
    return cli.main(["compare", str(picture), "What is it?", *known, *argv])


def test_compare_prints_one_object_or_a_table(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    figure, saved = tmp_path / "new" / "compare.svg", tmp_path / "compare.npz"
    assert _cli(tiny_folder, tmp_path, "--json", "--target", "#0", "--save", str(saved), "--figure", str(figure)) == 0
    out = capsys.readouterr().out
    data = json.loads(out)
    assert out.count("\n") == 1
    assert set(data) == {"answer", "cut", "target", "rows", "refused", "agreement", "notes", "seconds", "model"}
    assert {row["method"] for row in data["rows"]} == {"attention", "random"}
    assert np.shape(data["agreement"]["spearman"]) == (2, 2)
    assert Comparison.load(saved).methods == ("attention", "random")
    assert figure.read_text("utf-8").startswith("<?xml")
    assert _cli(tiny_folder, tmp_path) == 0
    text = capsys.readouterr().out
    assert "beats random" in text
    assert "attention" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compare"], "compare wants either a picture and a question, or --data picturebook"),
        (["compare", "a.png", "what?", "--data", "picturebook"], "compare wants either"),
        (["compare", "a.png"], "compare wants a question after the picture"),
        (["compare", "a.png", "what?", "--out", "x.jsonl"], "--out keeps the lines of --data"),
        (["compare", "a.png", "what?", "--figure", "x.doc"], "--figure wants a file ending in .png, .svg, .pdf, got 'x.doc'"),
        (["compare", "a.png", "what?", "--methods", "rolout"], "no method 'rolout'"),
        (["compare", "a.png", "what?", "--methods", ","], "--methods wants all, or names with commas"),
        (["compare", "a.png", "what?"], "a.png"),
        (["compare", "--data", "picturebook", "--target", "red"], "--target is for one picture"),
        (["compare", "--data", "picturebook", "--methods", "rolout"], "no method 'rolout'"),
    ],
)
def test_mistakes_at_the_terminal_are_one_line(
    argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ll.__dict__, "load", lambda *_, **__: pytest.fail("the model was loaded first"))
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
