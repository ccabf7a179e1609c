"""JupyterLab in a real browser, for tests: one server and one Lab page for the whole session.

Fixtures (import them in a conftest): `chromium`, `lab_server`, `lab`. With `lab`:

    lab.open(path_or_cells)      a notebook by path, or code cells given as strings; 1-2 s each
    lab.run_all()                run it; raises with the traceback when a cell failed
    lab.page                     the playwright page, for locators, mouse and keyboard
    lab.python(expression)       evaluate in the notebook's kernel, come back as plain JSON data
    lab.is_changed(), lab.save() whether the tab is marked as changed; save it and get its file
    lab.cells()                  number of cells now
    lab.dark(True)               JupyterLab's dark theme
    lab.outside                  requests that left this machine (must stay empty)

The server's settings live in a temporary folder; nothing of the user's Jupyter is read or changed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright

import run
from llava_lab.doctor import find_chromium

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS, RUN_SECONDS, LOOK_SECONDS = 90, 240, 20
JUPYTER_FOLDERS = (
    "JUPYTER_CONFIG_DIR",
    "JUPYTER_DATA_DIR",
    "JUPYTER_RUNTIME_DIR",
    "JUPYTERLAB_SETTINGS_DIR",
    "JUPYTERLAB_WORKSPACES_DIR",
    "IPYTHONDIR",
)
NO_BROWSER = "no Chromium found: `apt-get install -y --no-install-recommends chromium fonts-dejavu-core`, or set CHROME_PATH"

OPEN = """async (path) => {
  const app = window.jupyterapp;
  const widget = await app.commands.execute('docmanager:open', { path, factory: 'Notebook' });
  app.shell.activateById(widget.id);
  await widget.context.ready;
  await widget.sessionContext.ready;
  await widget.sessionContext.session.kernel.info;
}"""
CLOSE = """async () => {
  const widget = window.jupyterapp.shell.currentWidget;
  if (!widget || !widget.sessionContext) return;
  await widget.sessionContext.shutdown();
  await widget.context.save();
  widget.dispose();
}"""
SAVE = """async () => {
  const { context } = window.jupyterapp.shell.currentWidget;
  await context.save();
  return context.path;
}"""
RUN_ALL = """async (seconds) => {
  const late = new Promise((_, fail) => setTimeout(() => fail(new Error(`cells still run after ${seconds} s`)), 1000 * seconds));
  await Promise.race([window.jupyterapp.commands.execute('notebook:run-all-cells'), late]);
  return [...window.jupyterapp.shell.currentWidget.model.cells].flatMap((cell) => {
    const outputs = cell.toJSON().outputs || [];
    return outputs.filter((output) => output.output_type === 'error').map((output) => output.traceback.join('\\n'));
  });
}"""
EXECUTE = """async (code) => {
  const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  const future = kernel.requestExecute({ code, silent: false, store_history: false });
  let text = '', error = '';
  future.onIOPub = (message) => {
    if (message.header.msg_type === 'stream') text += message.content.text;
    if (message.header.msg_type === 'error') error = message.content.traceback.join('\\n');
  };
  await future.done;
  return { text, error };
}"""


class LabServer:
    """A JupyterLab server on this machine, in folders of its own."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "notebooks"
        self.root.mkdir(parents=True)
        self.token = secrets.token_urlsafe(24)
        self.url = f"http://127.0.0.1:{_free_port()}"
        self.log = folder / "server.log"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        for name in JUPYTER_FOLDERS:
            environment[name] = str(folder / name.lower())
        run._write_settings(folder)
        flags = [f"--ServerApp.port={self.url.rsplit(':', 1)[1]}", f"--ServerApp.root_dir={self.root}"]
        flags += [f"--IdentityProvider.token={self.token}", "--LabApp.expose_app_in_browser=True"]  # for tests only
        flags += ["--no-browser", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0", "--ServerApp.answer_yes=True"]
        flags += ["--LabApp.extension_manager=readonly", "--LabApp.news_url=", "--LabApp.custom_css=True"]
        flags += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "jupyterlab", *flags]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self.root)
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"{self.url}/api/status?token={self.token}", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None:
                    break
                time.sleep(0.2)
        tail = self.log.read_text("utf-8", "replace")[-2000:]
        self.close()
        raise RuntimeError(f"JupyterLab did not start within {START_SECONDS} s; its log ends:\n{tail}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(15)


class LabPage:
    """The one Lab page; each notebook is opened inside it."""

    def __init__(self, server: LabServer, page: Page) -> None:
        self.server, self.page = server, page
        self.outside: list[str] = []
        self.errors: list[str] = []
        self._count = 0
        page.on("request", self._note)
        page.on("pageerror", self._fault)
        page.goto(f"{server.url}/lab?token={server.token}&reset", wait_until="domcontentloaded")
        page.wait_for_function("() => window.jupyterapp?.shell", timeout=START_SECONDS * 1000)
        page.evaluate("() => window.jupyterapp.restored")
        page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")

    def _fault(self, error: Error) -> None:
        # on a slow start JupyterLab takes its own splash screen out of the page twice
        if not ("removeChild" in str(error) and "jlab_core" in str(error.stack)):
            self.errors.append(str(error))

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self.server.url, self.server.url.replace("http", "ws"), "data:", "blob:")):
            self.outside.append(request.url)

    def open(self, notebook: Path | Sequence[str], *, files: Iterable[Path] = ()) -> None:
        """Open a notebook in this page, the one before it closed; `files` and folders are laid beside it."""
        self.page.evaluate(CLOSE)
        self._count += 1
        folder = self.server.root / f"n{self._count}"
        folder.mkdir()
        for file in files:
            (shutil.copytree if file.is_dir() else shutil.copy2)(file, folder / file.name)
        if isinstance(notebook, Path):
            name = notebook.name
            shutil.copy2(notebook, folder / name)
        else:
            name = "test.ipynb"
            cells = [nbformat.v4.new_code_cell(source) for source in notebook]
            kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
            nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / name)
        self.page.evaluate(OPEN, f"{folder.name}/{name}")

    def is_changed(self) -> bool:
        """Whether the notebook's tab is marked as changed, after what its kernel said of itself was written into it."""
        self.page.wait_for_timeout(500)
        return self.page.evaluate("() => window.jupyterapp.shell.currentWidget.context.model.dirty")

    def save(self) -> Path:
        """Save the notebook as it is; returns its file."""
        path = self.page.evaluate(SAVE)
        return self.server.root / path

    def run_all(self, *, seconds: float = RUN_SECONDS) -> None:
        """Run every cell and wait for the end; AssertionError with the first traceback when one fails."""
        failures = self.page.evaluate(RUN_ALL, seconds)
        assert not failures, failures[0]

    def python(self, expression: str) -> Any:
        """The value of an expression in the kernel; it must be JSON-able."""
        done = self.page.evaluate(EXECUTE, f"import json as _json; print(_json.dumps({expression}))")
        assert not done["error"], done["error"]
        return json.loads(done["text"])

    def becomes(self, expression: str, value: Any) -> None:
        """Wait until an expression in the kernel has a value: a click's news may still be on its way when the page shows it."""
        end = time.monotonic() + LOOK_SECONDS
        while (found := self.python(expression)) != value and time.monotonic() < end:
            time.sleep(0.1)
        assert found == value

    def cells(self) -> int:
        return self.page.evaluate("() => window.jupyterapp.shell.currentWidget.model.cells.length")

    def dark(self, on: bool) -> None:
        """Switch JupyterLab's theme and wait until it shows."""
        theme = "JupyterLab Dark" if on else "JupyterLab Light"
        self.page.evaluate("(theme) => window.jupyterapp.commands.execute('apputils:change-theme', { theme })", theme)
        self.page.wait_for_function("(light) => document.body.dataset.jpThemeLight === light", arg="false" if on else "true")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A real Chromium; the tests that need it are skipped, or fail on CI, where there is none."""
    path = find_chromium()
    if path is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(NO_BROWSER)
    with sync_playwright() as playwright, open_browser(playwright, path) as browser:
        yield browser


def open_browser(playwright: Any, path: str) -> Browser:
    """Chromium as the tests use it; root, as in containers, cannot have its sandbox."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if root else [])


@pytest.fixture(scope="session")
def lab_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabServer]:
    server = LabServer(tmp_path_factory.mktemp("lab"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def lab(chromium: Browser, lab_server: LabServer) -> Iterator[LabPage]:
    """The one Lab page. A test opens its own notebook in it."""
    context = chromium.new_context(viewport={"width": 1280, "height": 1000})
    context.set_default_timeout(LOOK_SECONDS * 1000)
    yield LabPage(lab_server, context.new_page())
    context.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
