"""A file is whole or absent, as readable as any other, also when many threads write at once; a place has one writer."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llava_lab.errors import OptionError
from llava_lab.results import file_hash, only_writer, whole_file


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
