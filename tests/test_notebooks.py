"""The lessons run top to bottom in a fresh kernel, are stored executed, and stay small and self-contained."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from tests import execute

LESSONS = sorted(execute.LESSONS.glob("*.ipynb"))
URL = re.compile(r"https?://|www\.", re.IGNORECASE)

every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


@every_lesson
def test_a_lesson_runs_and_its_answer_is_right(path: Path) -> None:
    _, said = execute.execute(path, then="print(run.answer)")
    assert said.splitlines()[-1] == "The car is red."


@every_lesson
def test_a_lesson_is_stored_executed_and_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert 12 <= len(notebook.cells) <= 35
    assert sum(bool(cell.outputs) for cell in code) >= len(code) // 2
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert path.stat().st_size < 1_000_000
    assert "widgets" not in notebook.metadata
    assert max(len(cell.source.splitlines()) for cell in code) <= 20
    assert not any(URL.search(cell.source) for cell in notebook.cells)
