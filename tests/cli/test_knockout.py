"""``llava-lab knockout``: one JSON object, a table for people, and mistakes said before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_lab.cli import main as cli
from llava_lab.cli.ask import read_layers, read_place
from llava_lab.results import Effect, FlowSweep


@pytest.fixture
def command(tiny_folder: Path, tmp_path: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    Image.fromarray(picture).save(tmp_path / "car.png")
    monkeypatch.chdir(tmp_path)
    return ["knockout", "car.png", "What color is the car?", "--model", str(tiny_folder)]


def _json(capsys: pytest.CaptureFixture[str], argv: list[str]) -> dict[str, Any]:
    assert cli.main([*argv, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_json_is_one_object_with_the_effect(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*command, "--source", "0,1;2,3", "--to", "last", "--layers", "0:2", "--draws", "3", "--save", "effect.npz"]
    data = _json(capsys, argv)
    assert data["options"] == {"source": "2 patches", "target": "last", "layers": [0, 2], "keep_self": True}
    assert len(data["targets"][0]["control"]) == 3
    assert data["proof"]["largest"] == 0
    assert Effect.load("effect.npz").what == data["what"]


def test_a_sweep_gives_every_flow_and_window(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    data = _json(capsys, [*command, "--sweep", "--save", "sweep.npz"])
    assert data["flows"] == ["image -> question", "question -> last", "image -> last"]
    assert np.array(data["change"]).shape == (3, 3, 1)
    assert FlowSweep.load("sweep.npz").flows == tuple(data["flows"])


def test_people_get_a_table(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--draws", "1"]) == 0
    out = capsys.readouterr().out
    assert "last may not attend to image in layers 0 to 2" in out
    assert "largest weight 0" in out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--layers", "3"], "--layers wants START:STOP"),
        (["--sweep", "--source", "question"], "--sweep moves its own window"),
        (["--width", "3"], "--width belongs to --sweep"),
        (["--source", "tail"], "no segment 'tail'"),
        (["--layers", "0:9"], "layers must be"),
    ],
)
def test_mistakes_are_one_line(command: list[str], capsys: pytest.CaptureFixture[str], extra: list[str], message: str) -> None:
    assert cli.main([*command, *extra]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llava-lab:")]
    assert len(said) == 1
    assert message in said[0]


def test_places_are_read_as_typed() -> None:
    assert read_place("image") == "image"
    assert read_place("1,2;3,4") == [(1, 2), (3, 4)]
    assert read_layers(None) is None
    assert read_layers("2:5") == (2, 5)
