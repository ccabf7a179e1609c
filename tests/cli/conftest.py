"""What the command line's tests share: a folder with a picture, stand-ins for everything heavy, one printed object."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import llava_lab as ll
from llava_lab.cli import main as cli
from llava_lab.errors import OptionError
from tests.support.stand_in import StandIn


@pytest.fixture
def here(picture: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with car.png in it."""
    Image.fromarray(picture).save(tmp_path / "car.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, here: Path) -> StandIn:
    """In place of `llava_lab.load`, `attribute` and `METHODS`."""
    stand_in = StandIn()

    def with_defaults(options: dict[str, Any]) -> dict[str, Any]:
        for name in options:
            if name not in method.options:
                raise OptionError(f"no option {name!r}")
        return {**method.options, **options}

    about = {"name": "rollout", "truth": "t", "source": "s", "cost": "1", "blind_to": "b", "equation": "e", "paper": "p"}
    options = {"residual": 0.5, "seed": 0}
    method = SimpleNamespace(**about, options=options, with_defaults=with_defaults, refuse=lambda lab, targets: None)
    monkeypatch.setitem(ll.__dict__, "load", stand_in.load)
    monkeypatch.setitem(ll.__dict__, "attribute", stand_in.attribute)
    monkeypatch.setitem(ll.__dict__, "METHODS", {"rollout": method})
    return stand_in


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What a command prints with --json: one object on one line, nothing else."""

    def run(*argv: str) -> dict[str, Any]:
        capsys.readouterr()
        assert cli.main([*argv, "--json"]) == 0
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        return json.loads(out)

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line that a command says of a user's mistake, with exit code 2 and nothing on standard output."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        assert cli.main(list(argv)) == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("llava-lab: ")]
        assert lines == captured.err.splitlines()[-1:]  # loading may have said something before
        assert captured.out == "" or "--json" not in argv
        return lines[0]

    return run
