"""``llava-lab lens``: one JSON object with what the functions found, a table for a person, mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_lab.cli import main as cli
from llava_lab.results import LogitLens

QUESTION = "What color is the car?"


@pytest.fixture
def file(picture: np.ndarray, tmp_path: Path) -> str:
    Image.fromarray(picture).save(tmp_path / "car.png")
    return str(tmp_path / "car.png")


def ask(*more: str, model: Path, file: str) -> int:
    return cli.main(["lens", file, QUESTION, "--model", str(model), "--max-new-tokens", "2", *more])


def test_json_holds_what_the_lens_found(tiny_folder: Path, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "lens.npz"
    more = ("--json", "--word", "red", "--patch", "1,2", "--top", "3", "--save", str(kept))
    assert ask(*more, model=tiny_folder, file=file) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    saved = LogitLens.load(kept)
    assert [one["state"] for one in data["states"]] == [0, 1, 2, 3]
    assert data["grid"] == [4, 4]
    word = data["words"][0]
    assert word["probability"] == pytest.approx(float(saved.probs.max()))
    assert saved.rank_of("red")[word["state"], word["row"], word["col"]] == word["rank"]
    assert [text for text, _ in data["patch"]["states"][2]["top"]] == [text for text, _ in saved.at(2, 1, 2)]
    assert data["states"][1]["entropy"] == pytest.approx(float(saved.entropy[1].mean()))
    assert set(data["nearest"]) >= {"readable_share", "random_share", "space", "centered"}


def test_a_person_gets_a_table(tiny_folder: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("--layers", "1:3", "--word", "red", "--patch", "0,0", model=tiny_folder, file=file) == 0
    text = capsys.readouterr().out
    assert "said by most patches" in text
    assert "'red': " in text
    assert "patch row 0, column 0:" in text
    assert "for random vectors" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--layers", "two"), "--layers wants a state such as 3, or a window such as 2:5, got 'two'"),
        (("--layers", "9"), "layers must be a state from 0"),
        (("--patch", "1"), "--patch wants a row and a column"),
        (("--patch", "9,0"), "--patch lies in a 4x4 grid"),
        (("--space", "middle"), "--space must be input or output, got 'middle'"),
    ],
)
def test_mistakes_are_one_line(
    tiny_folder: Path, file: str, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(*more, "--json", model=tiny_folder, file=file) == 2
    found = capsys.readouterr()
    assert message in found.err.strip().splitlines()[-1]  # loading may have said something before
    assert not found.out
