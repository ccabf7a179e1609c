"""A file is whole or absent, as readable as any other, also when many threads write at once."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from llava_lab.results import whole_file


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
