"""The command line with stand-ins for everything heavy: what it passes on, what it prints, how it fails.

The real model through the real commands is in ``test_cli_tiny.py``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import llava_lab as ll
from llava_lab.cli import common
from llava_lab.cli import main as cli
from llava_lab.errors import OptionError
from llava_lab.results import Relevance, Run
from tests.support.stand_in import StandIn, finished_run


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    Image.new("RGB", (60, 40)).save(tmp_path / "car.png")
    (tmp_path / "notes.txt").write_text("not a picture", "utf-8")
    monkeypatch.chdir(tmp_path)
    stand_in = StandIn()
    method = types.SimpleNamespace(
        name="rollout", truth="t", source="s", cost="1", blind_to="b", options={"residual": 0.5, "seed": 0}
    )
    method.with_defaults = lambda given: _refuse(given, method.options)
    monkeypatch.setitem(ll.__dict__, "load", stand_in.load)
    monkeypatch.setitem(ll.__dict__, "attribute", stand_in.attribute)
    monkeypatch.setitem(ll.__dict__, "METHODS", {"rollout": method})
    return stand_in


def _refuse(given: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    for name in given:
        if name not in known:
            raise OptionError(f"no option {name!r}")
    return {**known, **given}


def _json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert cli.main([*argv, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1  # one object on one line, nothing else
    return json.loads(out)


def test_ask_json_is_the_promised_object(lab: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    data = _json(capsys, "ask", "car.png", "What color is the car?", "--seed", "7", "--temperature", "0.5", "--fit", "crop")
    assert set(data) == {"answer", "words", "tokens", "logprobs", "segments", "model"}
    assert data["words"] == ["The", "car", "is", "red."]
    start, stop = data["segments"]["answer"]
    assert "".join(data["tokens"][start:stop]) == "The car is red."
    assert data["logprobs"] == [-0.5, -0.25, None, 0.0]  # JSON has no infinity
    assert lab.asked["seed"] == 7
    assert lab.asked["temperature"] == 0.5
    assert lab.asked["fit"] == "crop"
    assert lab.loaded == {"name": "tiny", "device": None, "dtype": None}


def test_ask_streams_the_answer_for_a_person(lab: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", "car.png", "What color is the car?", "--model", "folder"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "The car is red. "
    assert lab.loaded["name"] == "folder"


def test_explain_json_is_the_promised_object(lab: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    data = _json(capsys, "explain", "car.png", "What color is the car?")
    keys = {"answer", "words", "targets", "grid", "relevance", "method", "options", "seconds", "notes", "picture"}
    assert set(data) == keys
    assert data["targets"] == ["The", "car", "is", "red."]
    assert data["grid"] == [2, 2]
    assert np.asarray(data["relevance"]).tolist() == np.arange(16).reshape(4, 2, 2).tolist()
    assert data["picture"] == {"width": 60, "height": 40, "mode": "pad", "seen_box": [0.0, 0.0, 60.0, 40.0]}
    assert data["notes"] == ["read me"]
    assert lab.attributed["target"] == "words"


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ([], "words"),
        (["--target", "answer"], "answer"),
        (["--target", "red"], "red"),
        (["--target", "3"], "3"),  # the word "3", as in an answer that counts
        (["--target", "#3"], 3),
        (["--target", "red/blue"], ("red", "blue")),
        (["--target", "red", "--target", "#0"], ["red", 0]),
    ],
)
def test_targets_are_read_as_typed(lab: StandIn, given: list[str], passed: Any) -> None:
    assert cli.main(["explain", "car.png", "what?", *given]) == 0
    assert lab.attributed["target"] == passed


def test_options_are_json_where_they_can_be_and_the_seed_is_passed_on(lab: StandIn) -> None:
    assert common.read_options(["a=1", "b=0.5", "c=[2, 3]", "d=true", "e=mean", "f=a=b", 'g="1"']) == {
        "a": 1,
        "b": 0.5,
        "c": [2, 3],
        "d": True,
        "e": "mean",
        "f": "a=b",
        "g": "1",
    }
    assert cli.main(["explain", "car.png", "what?", "--option", "residual=0.7", "--seed", "5"]) == 0
    assert lab.attributed["options"] == {"residual": 0.7, "seed": 5}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ask", "notes.txt", "what?"], "notes.txt"),
        (["ask", "car.png", "..."], "a question needs words"),
        (["explain", "car.png", "what?", "--method", "magic"], "no method 'magic'; the methods are rollout"),
        (["explain", "car.png", "what?", "--option", "residual"], "--option wants NAME=VALUE"),
        (["explain", "car.png", "what?", "--option", "target=red"], "--option wants NAME=VALUE"),
        (["explain", "car.png", "what?", "--option", "residul=1"], "no option 'residul'"),
        (["explain", "car.png", "what?", "--out", "map.bmpx"], "--out must end in one of"),
    ],
)
@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_users_mistake_is_one_line_and_exit_2(
    lab: StandIn, argv: list[str], message: str, extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*argv, *extra]) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith("llava-lab: ")
    assert message in last
    assert captured.err.count("llava-lab: ") == 1
    if extra:
        assert captured.out == ""


@pytest.mark.parametrize("argv", [[], ["ask"], ["ask", "a", "b", "--bogus"], ["data", "moon"], ["evaluate", "--n", "0"]])
def test_wrong_usage_is_one_line_and_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("llava-lab: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [["car.png", "what?", "--option", "residul=1"], ["cat.png", "what?"]])
def test_a_mistyped_option_or_path_is_said_before_a_large_model_is_loaded(lab: StandIn, argv: list[str]) -> None:
    assert cli.main(["explain", *argv]) == 2
    assert lab.loaded == {}


def test_interrupting_gives_130_also_when_the_lab_kept_what_it_had(lab: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.run = finished_run(options={"stopped": "interrupted"})
    assert cli.main(["ask", "car.png", "what?"]) == 130
    monkeypatch.setattr(lab, "ask", _interrupted)
    assert cli.main(["ask", "car.png", "what?", "--json"]) == 130


def _interrupted(*_: Any, **__: Any) -> Run:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("target", "panels"), [("red.", 1), ("words", 4)])
def test_out_draws_one_map_or_one_for_each_word(lab: StandIn, tmp_path: Path, target: str, panels: int) -> None:
    out = tmp_path / "new" / "map.svg"
    assert cli.main(["explain", "car.png", "what?", "--target", target, "--out", str(out)]) == 0
    drawn = out.read_text("utf-8")
    assert drawn.count('<g id="axes_') == panels + 1  # and one for the colour bar


def test_saved_results_load_again(lab: StandIn, tmp_path: Path) -> None:
    assert cli.main(["ask", "car.png", "what?", "--save", str(tmp_path / "run.npz")]) == 0
    assert Run.load(tmp_path / "run.npz").answer == "The car is red."
    assert cli.main(["explain", "car.png", "what?", "--save", str(tmp_path / "map.npz")]) == 0
    assert Relevance.load(tmp_path / "map.npz").notes == ("read me",)


def test_an_unwritable_place_is_one_line(lab: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["ask", "car.png", "what?", "--save", str(tmp_path / "file" / "run.npz")]) == 2
    assert "llava-lab: cannot write" in capsys.readouterr().err


def test_methods_lists_each_with_its_truth(lab: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    data = _json(capsys, "methods")
    assert [sorted(row) for row in data["methods"]] == [["blind_to", "cost", "name", "options", "source", "truth"]]
    assert cli.main(["methods"]) == 0
    assert "residual=0.5" in capsys.readouterr().out


SCORE = {"accuracy": 0.96, "interval": [0.95, 0.97], "n": 200}


def test_evaluate_prints_scores_beside_their_controls(
    lab: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}
    controls = {name: {**SCORE, "accuracy": 0.31} for name in ("blind", "shuffled", "majority")}
    result = {**SCORE, "by_type": {"colour": SCORE}, "controls": controls, "model": "tiny"}

    def evaluate(lab: Any, **options: Any) -> dict[str, Any]:
        given.update(options)
        return result

    monkeypatch.setitem(sys.modules, "llava_lab.evaluation", types.SimpleNamespace(evaluate=evaluate))
    assert _json(capsys, "evaluate", "--n", "200", "--split", "compositions", "--seed", "3") == result
    assert given == {"data": "picturebook", "split": "compositions", "n": 200, "seed": 3, "controls": True, "normalise": False}
    assert cli.main(["evaluate", "--no-controls"]) == 0
    assert given["controls"] is False
    assert "control: blind" in capsys.readouterr().out


def test_data_writes_what_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "world"
    data = _json(capsys, "data", "picturebook", "--n", "2", "--seed", "4", "--split", "test", "--out", str(out))
    assert len(json.loads(Path(data["file"]).read_text("utf-8"))) == 2
    assert data["n"] == 2
    assert data["split"] == "test"
    assert cli.main(["data", "picturebook", "--n", "2", "--split", "test", "--out", str(out)]) == 2
    assert "empty folder" in capsys.readouterr().err


def test_bench_prints_its_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"name": "ours", "seconds": 2.0, "ratio_to_floor": 1.2, "ratio_to_peer": 0.5, "extra_mb": None, "max_error": 0.0}
    result = {
        "device": "cpu",
        "threads": 2,
        "rows": [row],
        "floor": 1.6,
        "peak_flops_fraction": None,
    }
    monkeypatch.setattr("llava_lab.bench.harness.run", lambda name, **_: {**result, "asked": name})
    assert _json(capsys, "bench", "start")["asked"] == "start"
    assert cli.main(["bench", "start"]) == 0
    assert "1.2" in capsys.readouterr().out
    monkeypatch.undo()
    assert cli.main(["bench", "nothing"]) == 2
    assert "start" in capsys.readouterr().err


def test_doctor_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert _json(capsys, "doctor")["parts"]["jupyterlab"]["usable"] is True


def test_lab_starts_run_py_in_a_checkout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(cli.subprocess, "call", lambda command: calls.append(command) or 5)
    assert cli.main(["lab", "--port", "8899", "--no-browser", "--json"]) == 5
    assert calls[0][1:] == [str(cli.RUN_PY), "lab", "--port=8899", "--no-browser", "--json"]
    assert capsys.readouterr().out == ""  # run.py prints the one object
    monkeypatch.setattr(cli, "RUN_PY", Path("/nowhere/run.py"))
    assert cli.main(["lab", "--no-browser"]) == 5
    assert calls[1][1:] == ["-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", "--no-browser"]
    assert cli.main(["lab", "--check"]) == 2


def test_every_command_takes_model_seed_and_json() -> None:
    parser = cli.build_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    names = {"ask", "explain", "methods", "evaluate", "data", "train", "bench", "doctor", "lab"}
    assert names <= set(commands)
    for command in commands.values():
        assert {"--model", "--seed", "--json"} <= set(command._option_string_actions)


def test_help_answers_without_torch() -> None:
    code = "import sys; from llava_lab.cli import main as cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = "import sys; from llava_lab import doctor; from llava_lab.cli import main as cli; doctor._compute = lambda: {'threads': 1}; "  # no need for torch
    code += "sys.exit(cli.main(['doctor']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert process.returncode == 0


def test_plain_makes_json_of_anything_we_return() -> None:
    value = {"a": np.float32(0.5), "b": (1, np.arange(2)), "c": float("nan"), "d": Path("x"), 3: None, "e": np.array([np.inf])}
    assert common.plain(value) == {"a": 0.5, "b": [1, [0, 1]], "c": None, "d": "x", "3": None, "e": [None]}
