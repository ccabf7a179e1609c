"""``llava-lab app``: the page of `llava_lab.explore` without a notebook, through Voila, for this machine alone.

    llava-lab app
    llava-lab app --model smol --port 8899 --no-browser

Voila by itself answers any host and asks for no token; here it has one, answers 127.0.0.1 under its own name alone, serves no
files, and may load nothing from elsewhere (its templates name icons on other machines, which are left out). Every open page
has a kernel with a model of its own, which ends ten minutes after it was left.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from pathlib import Path
from typing import Any

from llava_lab.cli.common import Add, Reply, say
from llava_lab.errors import LabError, OptionError
from llava_lab.shipped import MODELS

SECONDS = 120  # a server that is silent for two minutes is broken
IDLE = 600  # seconds after which a page that was left loses its kernel
MESSAGE = 10_000_000  # bytes of one message from the page
ALLOWED = ("anywidget", "@voila-dashboards/widgets-manager8", "@jupyter-widgets/jupyterlab-manager")
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' ws://127.0.0.1:*; form-action 'self'; base-uri 'none'; object-src 'none'; "
    "frame-ancestors 'none'"
)


def add_commands(add: Add) -> None:
    command = add("app", app, "ask without code in the browser: pick a picture, ask, point (Ctrl-C ends it)", "nothing")
    command.add_argument("--model", default="tiny", help=f"{', '.join(MODELS)}, a folder, or a hub name (default: tiny)")
    command.add_argument("--port", type=int, help="default: any free one")
    command.add_argument("--no-browser", action="store_true", help="only print the address")


def app(args: argparse.Namespace) -> Reply:
    """Serve until Ctrl-C. Raises LabError where Voila is not installed or does not start."""
    for package in ("voila", "ipywidgets"):
        if importlib.util.find_spec(package) is None:
            raise LabError(f"the page needs {package}, which is not installed; `pip install 'llava-lab[lab,app]'` brings it")
    if args.json:
        raise OptionError("a page has nothing to print as JSON; leave --json out")
    port, token = args.port or free_port(), secrets.token_urlsafe()
    address = f"http://127.0.0.1:{port}/?token={token}"
    with tempfile.TemporaryDirectory(prefix="llava-lab-app-") as temporary:
        command, environment = prepare(Path(temporary), args.model, port, token)
        with subprocess.Popen(command, env=environment) as server:
            try:
                wait_for(server, port)
                say(f"open {address}\nCtrl-C ends it")
                if not args.no_browser:
                    threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
                return Reply(None, code=server.wait())
            finally:
                server.terminate()


def prepare(folder: Path, model: str, port: int, token: str) -> tuple[list[str], dict[str, str]]:
    """The notebook and the settings in `folder`, which only this user reads; the command that serves them, its environment."""
    cell: dict[str, Any] = {"cell_type": "code", "execution_count": None, "id": "explore", "metadata": {}, "outputs": []}
    source = f"import llava_lab as ll\n\nll.explore(model={model!r})"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {"cells": [{**cell, "source": source}], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    for name, content in (("explore.ipynb", notebook), ("voila.json", settings(port, token))):
        with os.fdopen(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(content, file)
    command = [sys.executable, "-m", "voila", str(folder / "explore.ipynb"), "--no-browser"]
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")  # the user's own settings stay out of it
    private = {name: str(folder / name.lower()) for name in names}
    return [*command, f"--Voila.config_file_paths={folder}"], {**os.environ, **private}


def settings(port: int, token: str) -> dict[str, Any]:
    """What Voila is told."""
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    server = {"allow_remote_access": False, "local_hostnames": ["localhost", "127.0.0.1"], "headers": headers}
    told = {
        "Voila": {
            "ip": "127.0.0.1",
            "port": port,
            "port_retries": 0,
            "open_browser": False,
            "token": token,
            "tornado_settings": {**server, "websocket_max_message_size": MESSAGE},
        },
        "VoilaConfiguration": {
            "strip_sources": True,
            "show_tracebacks": False,
            "file_allowlist": ["$^"],
            "allow_template_override": "NO",
            "allow_theme_override": "NOTEBOOK",
            "extension_allowlist": list(ALLOWED),
        },
        "MappingKernelManager": {"cull_idle_timeout": IDLE, "cull_interval": 60, "cull_connected": False},
    }
    return told | ({"KernelManager": {"transport": "ipc"}} if os.name == "posix" else {})


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    """Until the server answers, with anything. Raises LabError where it does not."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if server.poll() is not None:
            raise LabError(f"Voila ended with code {server.returncode} before it served anything; its own lines are above")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/static/none", timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
    raise LabError(f"Voila did not answer within {SECONDS} seconds")
