"""llava-lab evaluate --benchmark: on files, on drawn twins, on answers made elsewhere, and what does not go together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_lab.cli import main as cli
from llava_lab.results import BenchmarkScores
from tests.support.benchmark_files import write

Printed = Callable[..., dict[str, Any]]
Refused = Callable[..., str]


def test_a_benchmark_from_files_prints_saves_and_keeps_its_answers(
    here: Path, tiny_folder: Path, printed: Printed, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write("gqa", here / "gqa")
    asked = ["evaluate", "--benchmark", "gqa", "--data", str(data)]
    files = ["--answers", "said.jsonl", "--submission", "sent.json", "--save", "scores.npz", "--batch", "2"]
    result = printed(*asked, "--model", str(tiny_folder), *files)
    assert set(result) == {"benchmark", "model", "fingerprint", "measures", "about", "seconds", "notes"}
    assert [row["measure"] for row in result["measures"]] == ["accuracy", "binary", "open"]
    assert result["measures"][0]["published"] == {"LLaVA-1.5 7B": 62.0, "LLaVA-1.5 13B": 63.3}
    assert set(result["measures"][0]["controls"]) == {"blind", "shuffled"}
    assert BenchmarkScores.load("scores.npz").to_dict() == result
    assert [row["questionId"] for row in json.loads(Path("sent.json").read_text())] == ["200", "201"]
    again = printed(*asked, "--model", "no such model", "--score", "said.jsonl")
    assert again["measures"][0]["value"] == result["measures"][0]["value"]
    assert again["fingerprint"] == ""
    assert cli.main([*asked, "--score", "said.jsonl"]) == 0
    text = capsys.readouterr().out
    assert "LLaVA-1.5 13B" in text
    assert "leaves out case and marks" in text


def test_a_drawn_twin_and_the_list(here: Path, tiny_folder: Path, printed: Printed) -> None:
    result = printed("evaluate", "--benchmark", "pope", "--n", "1", "--model", str(tiny_folder), "--no-controls")
    assert result["about"]["data"] == "picturebook"
    assert result["measures"][0]["controls"] == result["measures"][0]["published"] == {}
    listed = printed("evaluate", "--benchmark", "list")["benchmarks"]
    assert len(listed) == 13
    assert set(listed[0]) == {"name", "title", "asks", "files", "source"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--benchmark", "vqa"], "no benchmark 'vqa'; the benchmarks are vqav2"),
        (["--score", "a.jsonl"], "--score belongs to --benchmark NAME"),
        (["--judge", "rule"], "--judge belongs to --benchmark NAME"),
        (["--benchmark", "pope", "--normalised"], "--normalised and --pictures are of evaluate without --benchmark"),
        (["--benchmark", "pope", "--score", "a.jsonl", "--answers", "b.jsonl"], "with --score there is none"),
        (["--benchmark", "mm-vet", "--judge", "gpt-4o"], "--judge gpt-4o needs --judge-url"),
        (["--benchmark", "mm-vet", "--judge-url", "http://127.0.0.1:1/v1"], "--judge-url belongs to --judge NAME"),
        (["--benchmark", "pope", "--data", "none", "--score", "a.jsonl"], "holds no"),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_model_is_loaded(
    here: Path, argv: list[str], message: str, refused: Refused
) -> None:
    (here / "none").mkdir()
    assert message in refused("evaluate", *argv, "--model", "no such model")
