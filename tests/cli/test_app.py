"""app: what Voila is told, and the refusals; the page itself is looked at in tests/browser."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def test_the_page_follows_the_reader_s_system_in_dark(tmp_path: Path) -> None:
    voila, paths = pytest.importorskip("voila.exporter"), pytest.importorskip("voila.paths")
    _, environment = serve.prepare(tmp_path, "tiny", 8899, "secret")
    assert json.loads((tmp_path / "voila.json").read_text("utf-8"))["VoilaConfiguration"]["template"] == "system"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", environment["JUPYTER_PATH"])
        found = paths.collect_template_paths(["voila", "nbconvert"], "system", prune=True)
    exporter = voila.VoilaExporter(template_paths=found, template_name="system", theme="light", base_url="/")
    own = serve.TEMPLATE.split("-%}", 1)[1].replace("{{ super() }}", "")  # without the page of Voila's that it adds to
    template = exporter.environment.from_string(own)
    with ThreadPoolExecutor(1) as thread:  # this one may have a loop of Chromium's that is running
        page = thread.submit(lambda: asyncio.run(template.render_async())).result()
    dark = page.split('<style media="(prefers-color-scheme: dark)">')[1].split("</style>")[0]
    assert ":root:root {" in dark  # over the light theme wherever it stands
    assert "--jp-layout-color0: #111;" in dark


def test_the_notebook_is_one_that_can_be_read(tmp_path: Path) -> None:
    serve.prepare(tmp_path, "a 'folder'", 8899, "secret")
    notebook = nbformat.read(tmp_path / "explore.ipynb", as_version=4)
    nbformat.validate(notebook)
    compile(notebook.cells[0].source, "cell", "exec")
    assert "ll.explore(model=\"a 'folder'\")" in notebook.cells[0].source


@pytest.mark.parametrize(
    ("command", "end"),
    [
        ("app", "SIGTERM"),
        ("lab", "SIGHUP"),
        pytest.param("app", "SIGHUP", marks=pytest.mark.long),
        pytest.param("lab", "SIGTERM", marks=pytest.mark.long),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_the_server_ends_with_the_command_however_that_is_ended(tmp_path: Path, command: str, end: str) -> None:
    server, note = tmp_path / "server.py", tmp_path / "server.py.pid"
    server.write_text("import os, sys, time\nopen(sys.argv[0] + '.pid', 'w').write(str(os.getpid()))\ntime.sleep(600)\n")
    code = f"""
import sys
from pathlib import Path
from llava_lab.cli import serve
from llava_lab.cli.main import main
sys.modules["llava_lab.cli.main"].RUN_PY = Path({str(server)!r})
serve.prepare = lambda *given: ([sys.executable, {str(server)!r}], None)
serve.wait_for = lambda *given: None
sys.exit(main([{command!r}, "--no-browser"]))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 60
            while not (note.exists() and note.read_text()):
                assert time.monotonic() < until
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(getattr(signal, end))
            assert process.wait(60) == 130
        finally:
            process.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    assert "leave --json out" in refused("app", "--json")
    monkeypatch.setattr("llava_lab.cli.serve.importlib.util.find_spec", lambda name: None if name == "voila" else name)
    assert "pip install 'llava-lab[lab,app]'" in refused("app")
