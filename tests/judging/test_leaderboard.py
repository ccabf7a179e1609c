"""Leaderboard: the table by hand, resume and several processes give the same table, other settings are refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llava_lab as ll
from llava_lab.cli import main as cli
from llava_lab.errors import DataError, LabError, OptionError
from llava_lab.judging import leaderboard
from llava_lab.judging.leaderboard import MEASURES, Asked, answer_target, economical, photographed, spread, tabulate
from llava_lab.models import Lab
from llava_lab.results import Leaderboard
from llava_lab.results.scores import COST, FAITHFUL, TRUE
from llava_lab.stats import wilson
from llava_lab.worlds import picturebook
from llava_lab.worlds.photo_names import read_outlined
from tests.support.additive import HOME as JUDGING
from tests.support.additive import everything_tells
from tests.support.closeness import TERMS, close
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


# -- photographs with outlines --------------------------------------------------------------


def test_a_photograph_is_asked_what_it_shows_and_the_named_thing_decides(tiny_random: Lab, outlined: Path) -> None:
    fruit = photographed(1, photographs=read_outlined(outlined))
    assert [asked.text for asked in fruit.questions] == [
        "Is there an orange in the picture?",  # the largest first
        "Is there a bowl in the picture?",
        "What is in this picture?",
    ]
    assert fruit.masks.mean((1, 2)) == pytest.approx([0.2, 0.2, 0.2], abs=0.02)
    orange, bowl, what = fruit.questions

    def told(asked: Asked, answer: str) -> tuple[str, tuple[int, ...]] | None:
        found = asked.told(scripted_run(tiny_random, fruit.picture, answer))
        return found and (found[0].text, found[1])

    assert told(orange, "Yes, there is an orange.") == ("Yes", (0, 2))
    assert told(bowl, "Yes") == ("Yes", (1,))
    assert told(bowl, "No, there is no bowl.") is None
    assert told(what, "It is a soup bowl.") == ("soup bowl", (1,))  # a name of the class below
    assert told(what, "The picture shows a dog.") is None
    assert told(what, "An orange and a bowl.") == ("orange", (0, 2))


@pytest.mark.long
def test_a_leaderboard_of_photographs(tiny_random: Lab, outlined: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything_tells(monkeypatch)
    monkeypatch.setattr(HOME, "LONGEST", 4)
    monkeypatch.setattr(HOME, "_agrees", lambda run, deciding: (run.target(0), deciding))
    board = leaderboard(tiny_random, data="photos", pictures=outlined, **QUICK)
    assert board.about["pictures"] == board.about["explained"] == 2
    assert board.types == ("all", "presence")
    assert not np.isnan(board.mean[..., board.measures.index("pointing")]).any()


def test_photographs_without_outlines_are_refused(tiny_random: Lab, outlined: Path, tmp_path_factory: Any) -> None:
    for broken in ("18 0 0 1 1", "18 0 0 1 1 2 0", "99 0 0 1 1 1 0", "18 a b c d e f"):
        (outlined / "a.txt").write_text(broken)
        with pytest.raises(DataError, match=r"a\.txt line 1"):
            read_outlined(outlined)
    with pytest.raises(DataError, match=r"classes\.txt"):
        leaderboard(tiny_random, data="photos", pictures=tmp_path_factory.mktemp("none"))
    for options in ({"data": "photos"}, {"pictures": outlined}, {"data": "easy-vqa"}):
        with pytest.raises(DataError, match="what decides each question"):
            leaderboard(tiny_random, **options)


# -- through the model ----------------------------------------------------------------------


@pytest.mark.long
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
        ({"data": "vqa"}, DataError, "data must be picturebook, or photos .* got 'vqa'"),
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


def test_the_command_scores_the_shipped_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_lab.checks.PATIENCE", 0)
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


def _record(kind: str, gain: float, pointing: float | None, chance: float = 0.1, **more: Any) -> dict[str, Any]:
    method = {"gain": gain, "deletion": 0.2, "insertion": 0.2 + gain, "better": 1.0, "pointing": pointing, "seconds": 0.5}
    control = {"gain": 0.0, "deletion": 0.5, "insertion": 0.5, "pointing": chance}
    methods = {"good": method, "poor": {"gain": -gain}}
    known = {
        "asked": 2,
        "wrong": 1,
        "blind": 0,
        "type": kind,
        "control": control,
        "methods": methods,
        "refused": {},
        "spearman": [[1, -0.5], [-0.5, 1]],
    }
    return {**known, **more}


def test_means_and_paired_differences_by_hand() -> None:
    records = [
        _record("color", 0.2, 1.0, 0.1),
        _record("color", 0.6, 0.0, 0.3),
        _record("count", 1.0, None),
        {"asked": 4, "wrong": 3, "blind": 1},
    ]
    board = tabulate(records, ("good", "poor"), {"model": "m"})
    assert board.types == ("all", "color", "count")
    assert board.measures == MEASURES
    cell = board.at("good", "gain")
    assert cell["mean"] == pytest.approx(0.6)
    assert cell["n"] == 3
    assert cell["interval"][0] < 0.6 < cell["interval"][1]
    assert board.at("poor", "gain")["mean"] == pytest.approx(-0.6)
    assert board.at("good", "pointing")["mean"] == 0.5
    assert board.at("good", "pointing")["against"] == pytest.approx((0.9 - 0.3) / 2)
    assert board.at("good", "pointing", "count")["n"] == 0
    assert np.isnan(board.at("good", "pointing", "count")["mean"])
    assert board.at("good", "deletion", "color")["against"] == pytest.approx(-0.3)
    assert np.isnan(board.at("good", "gain", "count")["interval"]).all()  # one picture has no interval
    assert board.at("good", "gain", "count")["mean"] == 1
    assert np.isnan(board.at("good", "seconds")["against"])
    np.testing.assert_allclose(board.spearman, [[1, -0.5], [-0.5, 1]])
    assert board.about == {"model": "m", "pictures": 4, "explained": 3, "asked": 10, "wrong": 6, "blind": 1}
    assert board.order("gain") == ("good", "poor")


def test_intervals_shrink_with_pictures_and_all_right_is_not_a_point() -> None:
    rng = np.random.default_rng(0)
    few, many = ([_record("color", value, 1.0) for value in rng.normal(0.3, 0.2, n)] for n in (20, 500))
    boards = [tabulate(records, ("good", "poor"), {}) for records in (few, many)]
    widths = [np.diff(board.at("good", "gain")["interval"])[0] for board in boards]
    assert 3 < widths[0] / widths[1] < 8  # the square root of 25 is 5
    assert widths[1] == pytest.approx(2 * 1.96 * 0.2 / np.sqrt(500), rel=0.15)
    np.testing.assert_allclose(boards[0].at("good", "pointing")["interval"], wilson(20, 20))
    np.testing.assert_allclose(boards[0].at("good", "better")["interval"], wilson(20, 20))
    np.testing.assert_allclose(boards[0].at("good", "pointing")["against_interval"], np.array(wilson(20, 20)) - 0.1)


def test_missing_eight_times_is_not_being_worse_than_random() -> None:
    board = tabulate([_record("color", 0.1, 0.0, chance=0.05) for _ in range(8)], ("good", "poor"), {})
    low, high = board.at("good", "pointing")["against_interval"]
    assert low < 0 < high


def test_a_method_refused_on_some_pictures_is_counted_where_it_was_not() -> None:
    second = _record("color", 0.4, 1.0, methods={"good": {"gain": 0.4}}, refused={"poor": "why"}, spearman=[[1.0]])
    board = tabulate([_record("color", 0.2, 1.0), second], ("good", "poor"), {})
    assert board.at("poor", "gain")["n"] == 1
    assert board.refused == {"poor": "why"}
    np.testing.assert_allclose(board.spearman, [[1, -0.5], [-0.5, 1]])


def _piece(lab: Lab, index: int) -> tuple[int, str]:
    return os.getpid(), f"{lab.fingerprint} {index} {lab.tokenizer.decode([5 + index])}"


def _failing(lab: Lab, index: int) -> None:
    raise OptionError(f"piece {index} cannot be done")


@pytest.mark.long
def test_several_processes_find_what_one_finds(tiny_random: Lab) -> None:
    alone = dict(spread(tiny_random, _piece, range(4)))
    shared = dict(spread(tiny_random, _piece, range(4), workers=2))
    assert {pid for pid, _ in alone.values()} == {os.getpid()}
    assert os.getpid() not in {pid for pid, _ in shared.values()}
    assert {i: text for i, (_, text) in shared.items()} == {i: text for i, (_, text) in alone.items()}


@pytest.mark.long
@pytest.mark.parametrize(("kind", "options"), [("mlp2x_gelu", {"width": 40}), ("linear", {}), ("c_abstractor", {})])
def test_several_processes_have_the_connector_that_was_put_in(tiny_random: Lab, kind: str, options: dict[str, Any]) -> None:
    with ll.connector(tiny_random, ll.new_connector(tiny_random, kind, seed=1, **options)):
        alone = dict(spread(tiny_random, _answered, range(2)))
        shared = dict(spread(tiny_random, _answered, range(2), workers=2))
    assert shared == alone


def _answered(lab: Lab, index: int) -> tuple[str, str]:
    return lab.fingerprint, lab.ask(np.full((60, 60, 3), 40 * index, np.uint8), "What is it?", max_new_tokens=3).answer


@pytest.mark.long
def test_a_worker_that_cannot_build_the_model_says_so(tiny_random: Lab) -> None:
    tiny_random.model.extra = torch.nn.Parameter(torch.ones(1))  # what no config knows of
    try:
        with pytest.raises(LabError, match="cannot build this model again .RuntimeError: .*extra.*; leave workers at 1"):
            list(spread(tiny_random, _piece, range(2), workers=2))
    finally:
        del tiny_random.model.extra


@pytest.mark.long
def test_an_error_of_a_piece_is_the_callers(tiny_random: Lab) -> None:
    with pytest.raises(OptionError, match="piece 1 cannot be done|piece 0 cannot be done"):
        list(spread(tiny_random, _failing, range(2), workers=2))


def test_no_workers_and_workers_on_a_gpu_are_refused(tiny_random: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="workers"):
        list(spread(tiny_random, _piece, range(2), workers=0))
    monkeypatch.setattr(Lab, "device", torch.device("meta"))
    with pytest.raises(OptionError, match="on meta, so leave workers at 1"):
        list(spread(tiny_random, _piece, range(2), workers=2))


@pytest.mark.long
def test_a_leaderboard_shared_by_two_is_the_same_table(tmp_path: Path) -> None:
    lab = ll.load("tiny")
    settings: dict[str, Any] = {"methods": ["attention", "random"], "n": 2, "steps": 2, "seeds": 2, "progress": False}
    alone = ll.leaderboard(lab, **settings)
    shared = ll.leaderboard(lab, workers=2, out=tmp_path / "board.jsonl", **settings)
    for method in ("attention", "random"):
        one, two = (board.at(method, "deletion") for board in (alone, shared))
        close(one["mean"], two["mean"], terms=TERMS)
    assert len((tmp_path / "board.jsonl").read_text("utf-8").splitlines()) == 3
