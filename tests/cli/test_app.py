"""app: what Voila is told, and the refusals; the page itself is looked at in tests/browser."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from llava_lab.cli import serve


def test_the_page_is_for_this_machine_alone_and_asks_for_its_token(tmp_path: Path) -> None:
    command, environment = serve.prepare(tmp_path, "smol", 8899, "secret")
    told = json.loads((tmp_path / "voila.json").read_text("utf-8"))
    assert (told["Voila"]["ip"], told["Voila"]["port"], told["Voila"]["token"]) == ("127.0.0.1", 8899, "secret")
    assert told["Voila"]["tornado_settings"]["allow_remote_access"] is False
    assert "default-src 'none'" in told["Voila"]["tornado_settings"]["headers"]["Content-Security-Policy"]
    assert told["VoilaConfiguration"]["file_allowlist"] == ["$^"]
    assert told["VoilaConfiguration"]["show_tracebacks"] is False
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / "voila.json").stat().st_mode) == 0o600
    assert "secret" not in " ".join(command)  # others see command lines
    assert command[3] == str(tmp_path / "explore.ipynb")  # one notebook, never a folder
    assert environment["JUPYTER_CONFIG_DIR"].startswith(str(tmp_path))


def test_the_notebook_is_one_that_can_be_read(tmp_path: Path) -> None:
    serve.prepare(tmp_path, "a 'folder'", 8899, "secret")
    notebook = nbformat.read(tmp_path / "explore.ipynb", as_version=4)
    nbformat.validate(notebook)
    compile(notebook.cells[0].source, "cell", "exec")
    assert "ll.explore(model=\"a 'folder'\")" in notebook.cells[0].source


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    assert "leave --json out" in refused("app", "--json")
    monkeypatch.setattr("llava_lab.cli.serve.importlib.util.find_spec", lambda name: None if name == "voila" else name)
    assert "pip install 'llava-lab[lab,app]'" in refused("app")
