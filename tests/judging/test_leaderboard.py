"""Leaderboard: the table by hand, interruption and resume give the same table, files of other settings are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.cli import main as cli
from llava_lab.errors import DataError, OptionError
from llava_lab.judging import leaderboard
from llava_lab.judging.leaderboard import answer_target, economical
from llava_lab.models import Lab
from llava_lab.results import Leaderboard
from llava_lab.results.scores import COST, FAITHFUL, TRUE
from llava_lab.worlds import picturebook
from tests.support.additive import HOME as JUDGING
from tests.support.additive import everything_tells
from tests.support.planted import scripted_run
from tests.support.stand_in import finished_run

HOME = sys.modules["llava_lab.judging.leaderboard"]  # the package's attribute of this name is the function
METHODS = ["attention", "random", "center"]
QUICK: dict[str, Any] = {"methods": METHODS, "n": 3, "steps": 2, "seeds": 2, "scale": "logprob", "progress": False}


@pytest.fixture
def credulous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer counts as right, and as given from the picture: a random model gives no other."""
    monkeypatch.setattr(HOME, "exact_match", lambda *_: True)
    monkeypatch.setattr(HOME, "LONGEST", 4)
    everything_tells(monkeypatch)


def _same(one: Leaderboard, two: Leaderboard) -> None:
    timeless = [i for i, measure in enumerate(one.measures) if measure != "seconds"]
    for name in ("mean", "interval", "against", "against_interval", "counts"):
        np.testing.assert_array_equal(getattr(one, name)[:, :, timeless], getattr(two, name)[:, :, timeless])
    np.testing.assert_array_equal(one.spearman, two.spearman)
    assert (one.methods, one.types, one.refused) == (two.methods, two.types, two.refused)
    assert [one.about[name] for name in ("pictures", "explained", "asked", "blind")] == [
        two.about[name] for name in ("pictures", "explained", "asked", "blind")
    ]


# -- what is explained ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "short", "text", "positions"),
    [
        ("The car is red.", "red", "red", 1),
        ("Yes, there is a car.", "yes", "Yes", 1),
        ("The car is at the top left.", "top left", "top left", 2),
        ("A car is left of the small car.", "car", "car", 1),
        ("They are the same size.", "small car", "They are the same size.", 0),
    ],
)
def test_the_word_that_answers_is_what_is_explained(
    tiny_random: Lab, picture: np.ndarray, answer: str, short: str, text: str, positions: int
) -> None:
    run = scripted_run(tiny_random, picture, answer)
    target = answer_target(run, short)
    assert target.text == text
    said = "".join(tiny_random.tokenizer.decode([i]) for i in target.token_ids)
    assert said.strip() == text
    first = answer.index(text.strip())
    before = "".join(run.tokens[run.segments["answer"][0] : target.positions[0] + 1])
    assert before.strip() == answer[:first].strip()
    assert positions == 0 or target.kind == "word"


def test_every_short_answer_of_the_picture_book_is_found() -> None:
    from llava_lab.results import Word

    for index in range(40):
        scene = picturebook.scene("test", index)
        for question in picturebook.ask_about(scene, np.random.default_rng(index), 8):
            pieces = question.answer.split()
            words = tuple(Word(text, 6 + i, 7 + i) for i, text in enumerate(pieces))
            ids = np.arange(6 + len(pieces))
            run = finished_run(answer=question.answer, words=words, token_ids=ids, segments={"answer": (6, len(ids))})
            assert answer_target(run, question.short).kind == "word", (question.answer, question.short)


# -- through the model ----------------------------------------------------------------------


def test_interruption_and_resume_give_the_same_table(
    tiny_random: Lab, tmp_path: Path, credulous: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = leaderboard(tiny_random, **QUICK)
    out, compare, calls = tmp_path / "new" / "board.jsonl", HOME.compare, []

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["seed"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compare(*args, **kwargs)

    monkeypatch.setattr(HOME, "compare", stopping)
    part = leaderboard(tiny_random, out=out, **QUICK)
    assert part.about["interrupted"]
    assert part.about["pictures"] == 2
    assert len(out.read_text("utf-8").splitlines()) == 3  # settings and two pictures
    out.write_bytes(out.read_bytes() + b'{"index": 2, "pict')  # as a crash would leave it
    resumed = leaderboard(tiny_random, out=out, **QUICK)
    assert not resumed.about["interrupted"]
    assert calls == [0, 1, 2, 2]  # what was finished is not done again
    _same(resumed, whole)
    _same(leaderboard(tiny_random, out=out, **QUICK), whole)
    assert len(calls) == 4
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [line["index"] for line in lines[1:]] == [0, 1, 2]
    _same(leaderboard(tiny_random, out=out, **{**QUICK, "n": 2}), part)  # fewer pictures of the same file


def test_nothing_finished_is_raised_on(tiny_random: Lab, credulous: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopping(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(HOME, "compare", stopping)
    with pytest.raises(KeyboardInterrupt):
        leaderboard(tiny_random, **QUICK)


def test_a_comparison_that_was_cut_short_is_not_kept(
    tiny_random: Lab, tmp_path: Path, credulous: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    compare, calls = HOME.compare, []

    def cut(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return replace(compare(*args, **kwargs), interrupted=len(calls) == 2)

    monkeypatch.setattr(HOME, "compare", cut)
    part = leaderboard(tiny_random, out=tmp_path / "board.jsonl", **QUICK)
    assert part.about["interrupted"]
    assert part.about["pictures"] == 1


def test_files_of_other_settings_are_refused(tiny_random: Lab, tmp_path: Path, credulous: None) -> None:
    out = tmp_path / "board.jsonl"
    leaderboard(tiny_random, out=out, **{**QUICK, "n": 1})
    before = out.read_bytes()
    for change, name in (({"steps": 3}, "steps"), ({"seed": 1}, "seed"), ({"methods": ["center"]}, "methods")):
        with pytest.raises(DataError, match=rf"board.jsonl was made with other settings \({name}\); give another file"):
            leaderboard(tiny_random, out=out, **{**QUICK, **change})
    assert out.read_bytes() == before
    for text in ("hello\n", "[1]\n[2]\n", '{"steps": 2}\nnot json\n', "no end of line"):
        out.write_text(text)
        with pytest.raises(DataError, match="give another file"):
            leaderboard(tiny_random, out=out, **QUICK)
        assert out.read_text() == text


def test_each_picture_has_its_own_random_map(
    tiny_random: Lab, tmp_path: Path, credulous: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, maps = HOME.compare, []

    def watching(*args: Any, **kwargs: Any) -> Any:
        result = compare(*args, **kwargs)
        maps.append(result.maps["random"].values)
        return result

    monkeypatch.setattr(HOME, "compare", watching)
    leaderboard(tiny_random, **QUICK)
    assert len(maps) == 3
    assert not np.array_equal(maps[0], maps[1])


def test_an_answer_that_needs_no_picture_is_passed_over(
    tiny_random: Lab, credulous: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(JUDGING, "MATTERS", {"logprob": 1e9})
    out = tmp_path / "board.jsonl"
    with pytest.raises(DataError, match="nothing to explain"):
        leaderboard(tiny_random, out=out, **{**QUICK, "n": 1})
    record = json.loads(out.read_text("utf-8").splitlines()[1])
    assert record["asked"] == record["blind"] == HOME.ATTEMPTS
    assert "methods" not in record


def test_only_right_answers_are_explained(tiny_random: Lab) -> None:
    with pytest.raises(DataError, match="answered no question of 1 pictures right and from the picture"):
        leaderboard(tiny_random, **{**QUICK, "n": 1})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"data": "vqa"}, DataError, "data must be picturebook, got 'vqa'"),
        ({"split": "exam"}, DataError, "split must be one of train"),
        ({"n": 0}, OptionError, "n must be a whole number of at least 1"),
        ({"methods": ["rolout"]}, OptionError, "no method 'rolout'"),
        ({"options": {"rolout": {}}}, OptionError, "no method 'rolout'"),
        ({"options": {"random": {"sed": 1}}}, OptionError, "no option 'sed'"),
    ],
)
def test_mistakes_are_refused(tiny_random: Lab, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        leaderboard(tiny_random, **{**QUICK, **options})


def test_economical_options_exist_and_give_way_to_yours() -> None:
    cheaper = {name: dict(entry.economy) for name, entry in ll.METHODS.items() if entry.economy}
    for name, chosen in cheaper.items():
        assert ll.METHODS[name].with_defaults(chosen)
        first = next(iter(chosen))
        assert economical("all", {name: {first: "mine"}})[name] == {**chosen, first: "mine"}
    assert set(economical("all", {})) == set(cheaper)
    assert economical(["center"], {}) == {}


def test_json_keeps_faithfulness_and_ground_truth_apart(tiny_random: Lab, credulous: None, tmp_path: Path) -> None:
    board = leaderboard(tiny_random, **QUICK)
    data = json.loads(json.dumps(board.to_dict(), default=lambda array: array.tolist()))
    assert set(data) == {"rows", "agreement", "refused", "about"}
    assert len(data["rows"]) == len(board.methods) * len(board.types)
    row = data["rows"][0]
    assert set(row) == {"method", "type", "faithfulness", "ground_truth", "cost"}
    assert set(row["faithfulness"]) == set(FAITHFUL)
    assert set(row["ground_truth"]) == set(TRUE)
    assert set(row["cost"]) == set(COST)
    assert set(row["faithfulness"]["gain"]) == {"mean", "interval", "n", "against_random", "against_random_interval"}
    assert "attention" in str(board.table())
    again = Leaderboard.load(board.save(tmp_path / "board.npz"))
    _same(again, board)
    assert again.about == json.loads(json.dumps(board.about))


def test_the_command_scores_the_shipped_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figure = tmp_path / "board.jsonl", tmp_path / "board.png"
    command = ["compare", "--data", "picturebook", "--n", "1", "--methods", "attention,random", "--steps", "2", "--seeds", "2"]
    assert cli.main([*command, "--out", str(out), "--figure", str(figure), "--json"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert "leaderboard" in captured.err  # the progress bar
    assert data["about"]["explained"] == 1
    assert {row["method"] for row in data["rows"]} == {"attention", "random"}
    assert figure.stat().st_size > 1000
    assert cli.main([*command, "--out", str(out)]) == 0  # all there already
    assert "1 of 1 pictures explained" in capsys.readouterr().out
