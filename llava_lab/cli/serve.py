"""The commands that show a model in a browser or to other programs: serve, app, page.

    llava-lab serve --model tiny --port 8000 --token-file token.txt
    llava-lab app
    llava-lab app --model smol --port 8899 --no-browser
    llava-lab page --model tiny --out demo.html

``serve`` puts a model behind an OpenAI-compatible address on this machine, until Ctrl-C:

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key=open("token.txt").read())

Any client or harness that takes a base URL and a key can ask it, ours too (``llava-lab explain --model openai:tiny``).
What is taken and given is said in `llava_lab.serving.protocol`, what is kept out in `llava_lab.serving.server`.

``app`` is the page of `llava_lab.explore` without a notebook, through Voila, for this machine alone. Voila by itself answers any
host and asks for no token; here it has one, answers 127.0.0.1 under its own name alone, serves no files, and may load nothing
from elsewhere (its templates name icons on other machines, which are left out). Every open page has a kernel with a model of its
own, which ends ten minutes after it was left.

``page`` writes a whole small model as one HTML file, for people who have no Python.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import secrets
import socket
import stat
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

from llava_lab.cli import common
from llava_lab.cli.common import Add, Reply, positive, say
from llava_lab.errors import LabError, OptionError
from llava_lab.shipped import MODELS

VARIABLE = "LLAVA_LAB_TOKEN"
LARGEST_TOKEN = 4096  # characters of its file

EXAMPLE = f"""example:
  llava-lab serve --model tiny --port 8000 --token-file token.txt

  OPENAI_API_KEY=$(cat token.txt) llava-lab explain car.png "What color is the car?" \\
      --model openai:tiny --base-url http://127.0.0.1:8000/v1 --method occlusion --option block=3 --out map.png

  curl http://127.0.0.1:8000/v1/chat/completions -H "Authorization: Bearer $(cat token.txt)" \\
      -H "Content-Type: application/json" -d '{{"model": "tiny", "messages": [{{"role": "user", "content": [
        {{"type": "image_url", "image_url": {{"url": "data:image/png;base64,..."}}}},
        {{"type": "text", "text": "What color is the car?"}}]}}], "llava_lab": {{"method": "rollout", "segments": true}}}}'

The token is that of {VARIABLE}, of --token-file, or a new one that is shown once."""


def add_serve(add: Add) -> None:
    command = add("serve", serve, "answer OpenAI's chat completions on 127.0.0.1 with a model of this machine (Ctrl-C ends it)")
    command.add_argument("--port", type=int, default=0, help="default: any free one")
    command.add_argument(
        "--token-file", metavar="FILE", help="the token clients send; made, for your eyes only, where it is missing"
    )
    command.add_argument(
        "--waiting", type=positive, default=64, metavar="N", help="requests in the line, beyond which it says 429"
    )
    command.add_argument("--deadline", type=float, default=300.0, metavar="SECONDS", help="for one request (default: 300)")
    command.below = lambda: EXAMPLE  # type: ignore[attr-defined]


def serve(args: argparse.Namespace) -> Reply:
    """Serve until Ctrl-C or SIGTERM. Raises LabError where the packages are missing, OptionError for a token of no use."""
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise LabError(f"a server needs {package}, which is not installed; `pip install 'llava-lab[serve]'` brings it")
    if args.json:
        raise OptionError("a server has nothing to print as JSON; leave --json out")
    if common.is_closed(args):
        raise OptionError(f"{args.model} is behind a server already; give its address to your clients")
    token = read_token(args.token_file)
    from llava_lab.serving import Server

    lab = common.load(args)
    options = {"port": args.port, "waiting": args.waiting, "deadline": args.deadline, "seed": args.seed}
    server = Server(lab, token=token, **options)
    say(f"{server.model} answers at {server.base_url}")
    say(f"token: {server.token}" if token is None else f"token: that of {args.token_file or VARIABLE}")
    say("Ctrl-C ends it")
    server.run()
    return Reply(None)


def read_token(path: str | None) -> str | None:
    """The token of the file, made where there is none, or of the environment; None where neither is given.

    Raises OptionError for a file that others may read, or that holds no token.
    """
    if path is None:
        return os.environ.get(VARIABLE, "").strip() or None
    file_ = Path(path)
    if not os.path.lexists(file_):
        from llava_lab.results import whole_file

        token = secrets.token_urlsafe(32)
        with whole_file(file_) as temporary:
            temporary.chmod(0o600)  # before there is anything to read
            temporary.write_text(token, encoding="ascii")
        return token
    try:
        mode = file_.stat().st_mode
        if not stat.S_ISREG(mode) or (os.name == "posix" and mode & 0o077):
            raise OptionError(f"{path} must be a file that only you can read (chmod 600 {path})")
        with file_.open(encoding="ascii", errors="replace") as file:
            token = file.read(LARGEST_TOKEN + 1).strip()
    except OSError as error:
        raise OptionError(f"cannot read {path} ({error.strerror or error})") from None
    if not token or len(token) > LARGEST_TOKEN:
        raise OptionError(f"{path} holds no token; remove it to have one made")
    return token


# -- app ------------------------------------------------------------------------------------

SECONDS = 120  # a server that is silent for two minutes is broken
IDLE = 600  # seconds after which a page that was left loses its kernel
MESSAGE = 10_000_000  # bytes of one message from the page
DARK = "(prefers-color-scheme: dark)"
# Voila's page in the colours of the reader's system: its dark theme beside the light one, and over it wherever a script puts that
# (so `:root` twice); the body says which is seen
TEMPLATE = f"""{{%- extends 'voila/templates/lab/index.html.j2' -%}}
{{%- block notebook_css -%}}
{{{{ super() }}}}
<style media="{DARK}">
{{%- filter replace(":root", ":root:root") -%}}{{%- include "static/theme-dark.css" -%}}{{%- endfilter -%}}
</style>
<style>:root {{ color-scheme: light dark; }} body {{ background: var(--jp-layout-color0); }}</style>
{{%- endblock notebook_css -%}}
{{%- block body_header -%}}
{{{{ super() }}}}
<script>
(() => {{
  const dark = matchMedia("{DARK}");
  const named = () => {{ document.body.dataset.jpThemeLight = String(!dark.matches); }};
  dark.addEventListener("change", named);
  named();
}})();
</script>
{{%- endblock body_header -%}}
"""
ALLOWED = ("anywidget", "@voila-dashboards/widgets-manager8", "@jupyter-widgets/jupyterlab-manager")
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' ws://127.0.0.1:*; form-action 'self'; base-uri 'none'; object-src 'none'; "
    "frame-ancestors 'none'"
)


def add_app(add: Add) -> None:
    command = add("app", app, "ask without code in the browser: pick a picture, ask, point (Ctrl-C ends it)", "nothing")
    command.add_argument("--model", default="tiny", help=f"{', '.join(MODELS)}, a folder, or a hub name (default: tiny)")
    command.add_argument("--port", type=int, help="default: any free one")
    command.add_argument("--no-browser", action="store_true", help="only print the address")


def app(args: argparse.Namespace) -> Reply:
    """Serve until Ctrl-C, SIGTERM or a closed terminal. Raises LabError where Voila is not installed or does not start."""
    for package in ("voila", "ipywidgets"):
        if importlib.util.find_spec(package) is None:
            raise LabError(f"the page needs {package}, which is not installed; `pip install 'llava-lab[lab,app]'` brings it")
    if args.json:
        raise OptionError("a page has nothing to print as JSON; leave --json out")
    port, token = args.port or free_port(), secrets.token_urlsafe()
    address = f"http://127.0.0.1:{port}/?token={token}"
    with tempfile.TemporaryDirectory(prefix="llava-lab-app-") as temporary:
        command, environment = prepare(Path(temporary), args.model, port, token)
        with common.program(command, environment) as server:
            wait_for(server, port)
            say(f"open {address}\nCtrl-C ends it")
            if not args.no_browser:
                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
            return Reply(None, code=server.wait())


def prepare(folder: Path, model: str, port: int, token: str) -> tuple[list[str], dict[str, str]]:
    """The notebook and the settings in `folder`, which only this user reads; the command that serves them, its environment."""
    cell: dict[str, Any] = {"cell_type": "code", "execution_count": None, "id": "explore", "metadata": {}, "outputs": []}
    source = f"import llava_lab as ll\n\nll.explore(model={model!r})"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {"cells": [{**cell, "source": source}], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    template = Path("share", "voila", "templates", "system")
    (folder / template).mkdir(parents=True)
    texts = {"explore.ipynb": json.dumps(notebook), "voila.json": json.dumps(settings(port, token))}
    texts |= {str(template / "conf.json"): json.dumps({"base_template": "lab"}), str(template / "index.html.j2"): TEMPLATE}
    for name, text in texts.items():
        with os.fdopen(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
    command = [sys.executable, "-m", "voila", str(folder / "explore.ipynb"), "--no-browser"]
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")  # the user's own settings stay out of it
    private = {name: str(folder / name.lower()) for name in names}
    private["JUPYTER_PATH"] = os.pathsep.join(filter(None, (str(folder / "share"), os.environ.get("JUPYTER_PATH"))))
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
            "template": "system",
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


# -- page -----------------------------------------------------------------------------------


def add_page(add: Add) -> None:
    about = "the whole model as one HTML file that runs in the browser: no server, no network"
    command = add("page", page, about, "nothing")
    command.add_argument("--model", default="tiny", help=f"{', '.join(MODELS)}, a folder, or a hub name (default: tiny)")
    common.add_output(command, "--out", "default: page.html", "page.html")
    command.add_argument("--package", metavar="FILE", help="onnxruntime-web's package file (default: fetched once by npm)")


def page(args: argparse.Namespace) -> Reply:
    """Raises OptionError for a name that is no page's and for a model that a page cannot hold."""
    import llava_lab as ll
    from llava_lab.page import write_page

    if Path(args.out).suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"--out wants a file ending in .html, got {args.out!r}")
    built = write_page(ll.load(args.model, device="cpu", dtype="float32"), args.out, package=args.package)
    return Reply(built.to_dict(), built.describe())
