"""The command line as a whole: usage, exit codes, clean output, and the commands that need no model of the user's."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest

import llava_lab as ll
from llava_lab.bench import BENCHES
from llava_lab.cli import ask
from llava_lab.cli import main as cli
from llava_lab.results import Run
from llava_lab.shipped import MODELS
from tests.support.stand_in import StandIn, finished_run

Printed = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("argv", [[], ["ask"], ["ask", "a", "b", "--bogus"], ["data", "moon"], ["evaluate", "--n", "0"]])
def test_wrong_usage_is_one_line_and_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("llava-lab: ")
    assert err.count("\n") == 1


LOADING = ("ask", "explain", "chat", "lens", "naming", "knockout", "compare", "sanity", "evaluate", "train")


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["ask", "a", "b", "--max-tokens", "5"], "--max-tokens; did you mean --max-new-tokens?"),
        (["ask", "a", "b", "--max_new_tokens=5"], "--max_new_tokens; did you mean --max-new-tokens?"),
        (["ask", "a", "b", "--temprature", "0"], "did you mean --temperature?"),
        (["ask", "a", "b", "--top-p", "0.9"], "no option --top-p: "),
        (["ask", "a", "b", "--num-beams=3"], "without beams"),
        (["ask", "a", "b", "--system", "x"], "--prompt"),
        (["ask", "a", "b", "--random-seed", "1"], "did you mean --seed?"),
        (["ask", "a", "b", "--stream"], "no option --stream: "),
        (["explain", "a", "b", "--methods", "rollout"], "did you mean --method?"),
        (["explain", "a", "b", "--targets", "car"], "did you mean --target?"),
        (["explain", "a", "b", "--options", "x=1"], "did you mean --option?"),
        (["explain", "a", "b", "--outt", "x.png"], "did you mean --out?"),
        (["evaluate", "--batchsize", "3"], "--batchsize"),
        (["ask", "a", "b", "--qqqq"], "unrecognized arguments: --qqqq"),
    ],
)
def test_an_unknown_option_is_told_with_the_one_that_was_meant(
    argv: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    said = capsys.readouterr().err
    assert (stopped.value.code, said.count("\n")) == (2, 1)
    assert meant in said


def test_a_command_takes_the_options_that_act_in_it_and_no_others() -> None:
    parser = cli.build_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    takes = {name: set(command._option_string_actions) for name, command in commands.items()}
    assert set(takes) >= {*LOADING, "report", "ablate", "convert", "data", "methods", "bench", "doctor", "lab"}
    assert all({"--json", "-v"} <= options for options in takes.values())
    for name in LOADING:
        assert {"--model", "--seed", "--device", "--dtype"} <= takes[name], name
    assert {"--model", "--seed"} <= takes["ablate"]
    for name in ("report", "convert", "methods", "lab"):
        assert not {"--model", "--seed", "--device", "--dtype"} & takes[name], name
    assert not {"--seed", "--device", "--dtype"} & (takes["bench"] | takes["doctor"])
    assert not {"--model", "--device"} & takes["data"]


def test_every_command_that_takes_a_shipped_model_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    for name in (*LOADING, "doctor"):
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert ", ".join(MODELS) in " ".join(capsys.readouterr().out.split()), name


def test_bench_help_names_the_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    out = capsys.readouterr().out
    assert [name for name, about in BENCHES.items() if f"  {name} " not in out or about not in out] == []


@pytest.mark.parametrize("command", [["ask", "--save"], ["explain", "--save"], ["explain", "--out"]])
def test_a_file_that_is_there_is_written_over_with_force_alone(
    command: list[str], lab: StandIn, here: Path, refused: Callable[..., str]
) -> None:
    kept = here / "kept.png"
    kept.write_text("mine")
    argv = [command[0], "car.png", "what?", command[1], str(kept)]
    assert refused(*argv).endswith(f"{kept} is there already; give {command[1]} another name, or --force to write over it")
    assert kept.read_text() == "mine"
    assert lab.loaded == {}  # before anything is done
    assert cli.main([*argv, "--force"]) == 0
    assert kept.read_bytes() != b"mine"


def test_what_the_model_knows_and_what_lies_outside_is_said_once(lab: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    lab.run = finished_run(notes=("one", "two"), options={"stopped": "length", "max_new_tokens": 4})
    assert cli.main(["ask", "car.png", "what?"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == [f"tiny: {MODELS['tiny'].knows}", "note: one", "note: two"]
    assert " ".join(out.split()).endswith("The car is red. … [cut]")


def test_interrupting_gives_130_also_when_the_lab_kept_what_it_had(lab: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Run:
        raise KeyboardInterrupt

    lab.run = finished_run(options={"stopped": "interrupted"})
    assert cli.main(["ask", "car.png", "what?"]) == 130
    monkeypatch.setattr(lab, "ask", interrupted)
    assert cli.main(["ask", "car.png", "what?", "--json"]) == 130


@pytest.mark.parametrize(
    ("error", "line"), [(EOFError("ends early"), "this input cannot be used (EOFError: ends early)"), (None, None)]
)
def test_what_the_system_refuses_is_one_line_and_a_bug_is_not(
    lab: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Any, line: Any
) -> None:
    def run(args: Any) -> Any:
        if error is not None:
            raise error
        return None.bug  # type: ignore[attr-defined]

    ours = FunctionType(run.__code__, {"__name__": "llava_lab.cli.ask"}, closure=run.__closure__)
    monkeypatch.setattr(ask, "ask", ours)
    if not line:
        with pytest.raises(AttributeError):
            cli.main(["ask", "car.png", "what?"])
    else:
        assert cli.main(["ask", "car.png", "what?"]) == 2
        assert capsys.readouterr().err == f"llava-lab: {line}\n"


def test_an_explanation_that_was_stopped_is_kept_and_gives_130(lab: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lab.attribute
    monkeypatch.setitem(ll.__dict__, "attribute", lambda *given, **options: replace(whole(*given, **options), interrupted=True))
    assert cli.main(["explain", "car.png", "what?", "--save", "map.npz"]) == 130
    assert ll.Relevance.load("map.npz").interrupted


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "the memory is not enough"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "the memory is not enough"),
        (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"), "the memory is not enough"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    ],
)
def test_what_the_machine_lacks_is_one_line(
    error: Exception, said: str, lab: StandIn, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    def fail(*_: Any, **__: Any) -> Run:
        raise error

    monkeypatch.setattr(lab, "ask", fail)
    monkeypatch.setattr("llava_lab.cli.main._leave_output", lambda: None)
    assert said in refused("ask", "car.png", "what?")


@pytest.mark.skipif(os.name == "nt", reason="there is no /dev/full")
def test_a_full_disk_behind_the_output_is_one_line() -> None:
    code = "import sys; from llava_lab import doctor; from llava_lab.cli import main as cli; "
    code += "doctor._compute = lambda: {'threads': 1}; sys.exit(cli.main(['doctor']))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "llava-lab: OSError: [Errno 28] No space left on device"


@pytest.mark.parametrize("place", ["new/folder/map.png", "file/map.png", "/proc/map.png", "car.png/x.svg", "x" * 300 + ".png"])
def test_a_figure_is_written_whole_or_one_line_says_why(
    place: str, lab: StandIn, here: Path, refused: Callable[..., str]
) -> None:
    (here / "file").write_text("")
    command = ["explain", "car.png", "what?", "--out", place]
    if place.startswith("new"):
        assert cli.main(command) == 0
        assert (here / place).read_bytes().startswith(b"\x89PNG")
    else:
        beginning = place if len(place) < 100 else place[:60]  # a name of pages is shortened
        assert refused(*command).startswith(f"llava-lab: cannot write {beginning}")
    assert not list(here.rglob("*.part"))


def test_help_answers_without_torch() -> None:
    code = "import sys; from llava_lab.cli import main as cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = "import sys; from llava_lab import doctor; from llava_lab.cli import main as cli; "
    code += "doctor._compute = lambda: {'threads': 1}; sys.exit(cli.main(['doctor']))"  # no need for torch
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert process.returncode == 0


def test_methods_lists_each_with_its_truth(lab: StandIn, printed: Printed, capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed("methods")["methods"]
    assert [sorted(row) for row in rows] == [["blind_to", "cost", "equation", "name", "options", "paper", "source", "truth"]]
    assert cli.main(["methods"]) == 0
    assert "residual=0.5" in capsys.readouterr().out


def test_bench_prints_its_rows(
    monkeypatch: pytest.MonkeyPatch, printed: Printed, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"name": "ours", "seconds": 2.0, "ratio_to_floor": 1.2, "ratio_to_peer": 0.5, "extra_mb": None, "max_error": 0.0}
    result = {"device": "cpu", "threads": 2, "rows": [row], "floor": 1.6, "peak_flops_fraction": None}
    with monkeypatch.context() as patch:
        patch.setattr("llava_lab.bench.run", lambda name, **_: {**result, "asked": name})
        assert printed("bench", "start")["asked"] == "start"
        assert cli.main(["bench", "start"]) == 0
        assert "1.2" in capsys.readouterr().out
    assert "start" in refused("bench", "nothing")


def test_doctor_reports_the_machine_or_how_a_model_differs(
    printed: Printed, refused: Callable[..., str], tiny_folder: Path
) -> None:
    assert printed("doctor")["parts"]["jupyterlab"]["usable"] is True
    assert {fact["name"] for fact in printed("doctor", "--model", str(tiny_folder))["facts"]} >= {"connector", "tower"}
    assert "/nowhere" in refused("doctor", "--model", "/nowhere")


def test_lab_starts_run_py_in_a_checkout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.RUN_PY.is_file()
    calls: list[list[str]] = []

    @contextlib.contextmanager
    def program(command: list[str]) -> Iterator[Any]:
        calls.append(command)
        yield SimpleNamespace(wait=lambda: 5)

    monkeypatch.setattr(cli, "program", program)
    assert cli.main(["lab", "--port", "8899", "--no-browser", "--json"]) == 5
    assert calls[0][1:] == [str(cli.RUN_PY), "lab", "--port=8899", "--no-browser", "--json"]
    assert capsys.readouterr().out == ""  # run.py prints the one object
    monkeypatch.setattr(cli, "RUN_PY", Path("/nowhere/run.py"))
    assert cli.main(["lab", "--no-browser"]) == 5
    assert calls[1][1:] == ["-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", "--no-browser"]
    assert cli.main(["lab", "--check"]) == 2


@pytest.mark.long
def test_the_module_is_the_command_and_keeps_standard_output_clean(here: Path, tiny_folder: Path) -> None:
    command = [sys.executable, "-m", "llava_lab.cli", "ask", str(here / "car.png"), "What is it?", "--model", str(tiny_folder)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([*command, "--json"], cwd=root, capture_output=True, text=True, encoding="utf-8", check=True)
    assert json.loads(done.stdout)["answer"] is not None
    assert done.stdout.count("\n") == 1
