"""generate and check-pays pass on what was asked, and say in one line what does not go together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_lab import instructions
from llava_lab.cli import main as cli

Printed = Callable[..., dict[str, Any]]
Refused = Callable[..., str]


def test_rows_of_a_world_from_the_command_line(here: Path, printed: Printed, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--world", "picturebook", "--n", "2", "--kinds", "detail,brief", "--out", "data"]
    data = printed(*command)
    assert (data["rows"], data["teacher"], data["finished"]) == (4, "rules", True)
    assert len(json.loads((here / "data" / "rows.json").read_text())) == 4
    assert cli.main(command) == 0  # goes on, and there is nothing left to do
    assert "4 rows by rules" in capsys.readouterr().out


def test_an_estimate_sends_nothing(here: Path, printed: Printed) -> None:
    (here / "c.jsonl").write_text(json.dumps({"image": "a.jpg", "captions": ["A dog."]}) + "\n")
    server = ["--teacher", "http://127.0.0.1:9/v1", "--name", "m", "--max-requests", "5", "--price", "1,2"]
    data = printed("generate", "--contexts", "c.jsonl", *server, "--out", "data", "--estimate")
    assert data["requests"] == 3
    assert data["cost"] > 0
    assert not (here / "data" / "rows.json").exists()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ([], "generate wants one of --world"),
        (["--world", "picturebook", "--photos", "x"], "got --world and --photos"),
        (["--world", "picturebook", "--name", "m"], "--name belongs to --teacher http://"),
        (["--world", "picturebook", "--teacher", "http://127.0.0.1:9/v1", "--name", "m"], "--max-requests, the budget"),
        (["--world", "picturebook", "--teacher", "http://127.0.0.1:9/v1", "--lie", "0.1"], "--lie belongs to --teacher rules"),
        (["--world", "picturebook", "--kinds", "details"], "no kind 'details'"),
        (["--world", "picturebook", "--lie", "3"], "lie must be a share"),
        (["--contexts", "none.jsonl"], "cannot read the data file none.jsonl"),
        (["--captions", "none.json"], "no such data file: none.json"),
    ],
)
def test_options_that_do_not_go_together(here: Path, refused: Refused, options: list[str], why: str) -> None:
    assert why in refused("generate", *options, "--out", "data")


def test_check_pays_passes_its_options_on(here: Path, monkeypatch: pytest.MonkeyPatch, printed: Printed) -> None:
    seen: dict[str, Any] = {}

    class Result:
        def to_dict(self) -> dict[str, Any]:
            return {"pairs": {}}

        def table(self) -> str:
            return ""

    monkeypatch.setattr(instructions, "check_pays", lambda **options: seen.update(options) or Result())
    assert printed("check-pays", "--out", "o", "--lie", "0.2", "--arms", "all,passed", "--seeds", "3") == {"pairs": {}}
    assert (seen["lie"], seen["arms"], seen["seeds"], seen["start"], seen["out"]) == (0.2, ["all", "passed"], 3, "tiny", "o")
