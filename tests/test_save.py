"""A file is whole or absent, as readable as any other, also when many threads write at once; a place has one writer."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llava_lab.errors import OptionError, WriteError
from llava_lab.results import file_hash, only_writer, whole_file

ROOT = Path(__file__).parents[1]


def test_an_error_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def fail() -> None:
        with whole_file(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a", "old")]


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
def test_many_threads_leave_whole_files_with_the_user_s_mode_and_umask(tmp_path: Path) -> None:
    def write(name: int) -> None:
        for _ in range(50):
            with whole_file(tmp_path / str(name)) as temporary:
                temporary.write_text("whole")

    before = os.umask(0o027)
    try:
        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        after = os.umask(before)
    assert after == 0o027
    assert {(oct(file.stat().st_mode & 0o777), file.read_text()) for file in tmp_path.iterdir()} == {("0o640", "whole")}
    assert len(list(tmp_path.iterdir())) == 8


def test_the_second_writer_is_told_who_the_first_is_and_a_killed_one_is_forgotten(tmp_path: Path) -> None:
    code = "import sys, time\nfrom llava_lab.results import only_writer\n"
    code += "with only_writer(sys.argv[1]):\n    print('in', flush=True)\n    time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert first.stdout is not None
    first.stdout.readline()
    try:
        with pytest.raises(OptionError, match=rf"out is being written by process {first.pid} \(-c .*out\), since 2\d+-.*another"):
            only_writer(tmp_path / "out").__enter__()
    finally:
        first.kill()
        first.communicate()
    with only_writer(tmp_path / "out"), only_writer(tmp_path / "lines.jsonl", folder=False):
        refused: list[str] = []

        def second() -> None:
            for place, folder in ((tmp_path / "out", True), (tmp_path / "lines.jsonl", False)):
                try:
                    only_writer(place, folder=folder).__enter__()
                except OptionError as error:
                    refused.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert [f"process {os.getpid()}" in line for line in refused] == [True, True]
    assert sorted(file.name for file in tmp_path.rglob("*")) == [".lines.jsonl.lock", ".lock", "out"]
    (tmp_path / "file").write_text("a")
    with pytest.raises(OptionError, match="cannot write in .*file"):
        only_writer(tmp_path / "file").__enter__()
    assert file_hash(tmp_path / "file") != file_hash(tmp_path / ".lines.jsonl.lock")


def _full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["a", "new/folder/a"])
def test_a_full_disk_is_one_line_and_changes_nothing(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")
    monkeypatch.setattr("llava_lab.results.save.os.replace", _full)
    with (
        pytest.raises(WriteError, match=rf"^cannot write .*{where}: No space left on device$") as told,
        whole_file(tmp_path / where),
    ):
        pass
    assert told.value.errno == errno.ENOSPC
    assert isinstance(told.value, OSError)
    assert [(path.name, path.read_text()) for path in tmp_path.rglob("*") if path.is_file()] == [("a", "old")]


@pytest.mark.skipif(os.name == "nt", reason="links and pipes are POSIX")
def test_no_link_is_followed_and_nothing_but_files_is_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "link").symlink_to(precious)
    with whole_file(tmp_path / "link") as temporary:
        assert not temporary.is_symlink()
        temporary.write_text("new")
    assert (precious.read_text(), (tmp_path / "link").read_text()) == ("mine", "new")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    impossible = [tmp_path, Path("/dev/null"), *(tmp_path / name for name in ("pipe", "file/below", "no\0name", "n" * 300))]
    for path in impossible:
        with pytest.raises(WriteError, match="^cannot write "), whole_file(path):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {"precious", "link", "pipe", "file"}


WRITES = {"write_text", "write_bytes", "savefig", "save_pretrained", "save_file", "copyfile"}
# a test folder of a benchmark; training, whose folders have a rule of their own
ELSEWHERE = ("llava_lab/training/", "llava_lab/bench/")


def test_whatever_the_package_writes_is_written_whole() -> None:
    """Every call that writes stands within `whole_file` or `whole_folder`, or writes to memory."""
    wrong = []
    for path in [*(ROOT / "llava_lab").rglob("*.py"), *(ROOT / "widgets").rglob("*.py")]:
        name, tree = path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf-8"))
        blocks = [block for block in ast.walk(tree) if isinstance(block, ast.With)]
        whole = [
            block
            for block in blocks
            if any("whole_f" in ast.unparse(item.context_expr) for item in block.items)
            or ("ExitStack" in ast.unparse(block.items[0]) and "enter_context(whole_file" in ast.unparse(block))
        ]
        inside = {id(call) for block in whole for call in ast.walk(block)}
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and id(call) not in inside and _writes(call) and not name.startswith(ELSEWHERE):
                wrong.append(f"{name}:{call.lineno} {ast.unparse(call)[:80]}")
    assert wrong == [], "\n".join(wrong)


def _writes(call: ast.Call) -> bool:
    what = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if what == "open":
        return any(isinstance(part, ast.Constant) and str(part.value) in ("w", "wb", "x", "xb") for part in call.args)
    return what in WRITES and "buffer" not in ast.unparse(call)
