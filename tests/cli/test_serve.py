"""serve: its token, its refusals, and the whole thing as a process that is asked and stopped."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_lab.cli import serve
from llava_lab.errors import LabError, OptionError
from tests.support.families import family
from tests.support.serving import messages, send

ROOT = Path(__file__).resolve().parents[2]


def test_a_token_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = serve.read_token(str(path))
    assert token == path.read_text() == serve.read_token(str(path))
    assert len(token) >= 40
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o640)
        with pytest.raises(OptionError, match="only you can read"):
            serve.read_token(str(path))


def test_a_file_without_a_token_is_refused(tmp_path: Path) -> None:
    (path := tmp_path / "token").touch(mode=0o600)
    with pytest.raises(OptionError, match="holds no token"):
        serve.read_token(str(path))
    with pytest.raises(LabError, match="cannot write"):
        serve.read_token(str(path / "below"))
    (tmp_path / "folder").mkdir(mode=0o700)
    with pytest.raises(OptionError, match="must be a file"):
        serve.read_token(str(tmp_path / "folder"))


def test_the_environment_may_hold_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.VARIABLE, raising=False)
    assert serve.read_token(None) is None
    monkeypatch.setenv(serve.VARIABLE, " of-the-environment ")
    assert serve.read_token(None) == "of-the-environment"


def test_what_cannot_be_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    assert "leave --json out" in refused("serve", "--json")
    assert "behind a server already" in refused("serve", "--model", "openai:tiny")
    monkeypatch.setattr("llava_lab.cli.serve.importlib.util.find_spec", lambda name: None if name == "uvicorn" else name)
    assert "pip install 'llava-lab[serve]'" in refused("serve")


class Address:
    """Where a server of another process is."""

    def __init__(self, model: str, port: int, token: str) -> None:
        self.model, self.port, self.token = model, port, token


@family("ending", [signal.SIGTERM, signal.SIGINT], quick=(signal.SIGTERM,), ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_real_process_answers_and_stops_cleanly(tiny_folder: Path, tmp_path: Path, ending: signal.Signals) -> None:
    path = tmp_path / "token"
    command = [sys.executable, "-m", "llava_lab.cli", "serve", "--model", str(tiny_folder), "--token-file", str(path)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.fullmatch(r"(\S+) answers at http://127\.0\.0\.1:(\d+)/v1\n", line)
            assert match, line + process.communicate()[1]
            there: Any = Address(match[1], int(match[2]), path.read_text())
            rest = [process.stdout.readline() for _ in range(2)]
            got = send(there, {"messages": messages(), "max_tokens": 3})
            assert got.status == 200, got
            process.send_signal(ending)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, err) == (0, "")
    assert rest == [f"token: that of {path}\n", "Ctrl-C ends it\n"]
    assert out == ""
