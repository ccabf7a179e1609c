"""The lessons as they are stored: lean, short, with pictures, and each with a test file that runs it."""

from __future__ import annotations

import base64
import io
import json
import re
import statistics
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from tests import execute
from tests.support import lesson_pictures
from tests.support.lessons import PROBES

LESSONS = sorted(execute.LESSONS.glob("*.ipynb"))
PAPER = re.compile(r"\]\(https://(arxiv\.org/abs|doi\.org)/[\w./-]+\)")
URL = re.compile(r"https?://|www\.", re.IGNORECASE)
INSTALL = re.compile(r"^\s*[!%]|pip install|conda install", re.MULTILINE)

every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def _sources(path: Path, kind: str) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def test_every_lesson_is_probed_and_run_by_its_own_file() -> None:
    assert {path.stem for path in LESSONS} == set(PROBES)
    tests = {path.stem: path.read_text("utf-8") for path in Path(__file__).parent.glob("test_lesson_*.py")}
    assert set(tests) == {f"test_lesson_{path.stem[:2]}" for path in LESSONS}
    assert [name for name, text in tests.items() if "lesson.check()" not in text] == []


READ = re.compile(r"colour bar|beside the colours of")  # where a lesson has the reader read the numbers of a figure
NARROW = 760  # pixels: a panel beside the list of files has some 600 at 1,024, and what is much wider is shrunk to it


def test_a_figure_whose_numbers_are_to_be_read_is_not_shrunk_in_a_narrow_panel() -> None:
    found = 0
    for path in LESSONS:
        widths: list[int] = []
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                drawn = [output.get("data", {}).get("image/png") for output in cell.outputs]
                widths = [Image.open(io.BytesIO(base64.b64decode(image))).width for image in drawn if image]
            elif widths and READ.search(cell.source):
                assert max(widths) <= NARROW, f"{path.stem}: {cell.source[:80]}"
                found += 1
    assert found >= 3


@every_lesson
def test_a_lesson_is_stored_lean(path: Path) -> None:
    text = path.read_text("utf-8")
    assert path.stat().st_size < execute.LARGEST
    assert execute.WIDGET_VIEW not in text
    assert "widget-state" not in text
    assert set(json.loads(text)["metadata"]) == {"kernelspec", "language_info"}
    assert json.loads(text)["metadata"]["language_info"] == execute.LANGUAGE  # or JupyterLab would change the file
    assert not URL.search(PAPER.sub("", text)), "a lesson needs no network, so it holds no address but those of papers"
    assert str(execute.ROOT) not in text


@every_lesson
def test_a_lesson_is_short_and_made_of_small_steps(path: Path) -> None:
    code, prose = _sources(path, "code"), _sources(path, "markdown")
    assert 12 <= len(code) + len(prose) <= 35
    assert statistics.median(len([line for line in source.splitlines() if line]) for source in code) <= 6
    assert not [source for source in code if INSTALL.search(source)]
    assert sum("ll.load(" in source for source in code) == 1  # one cell names the model


@every_lesson
def test_a_lesson_asks_its_reader_checks_itself_and_says_what_it_does_not_show(path: Path) -> None:
    code, prose = _sources(path, "code"), "\n".join(_sources(path, "markdown"))
    assert prose.count("?") >= 6
    assert any("assert " in source for source in code)
    end = prose[len(prose) // 2 :]
    assert "## What this does not show" in end
    assert end.index("## What this does not show") < end.index("## Exercises")


DRAWS = re.compile(r"plots\w*\.[a-z]|diagrams\.(j|m)|plt\.sub|(PatchExplorer|CompareView|HeadGrid|TokenLens|FlowView)\(")


@every_lesson
def test_every_figure_and_widget_of_a_lesson_is_a_picture_in_the_file(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    drawing = [cell for cell in cells if DRAWS.search(cell.source)]
    assert len(drawing) >= 3
    for cell in drawing:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source


@pytest.mark.parametrize("name", lesson_pictures.NAMES)
def test_the_lessons_pictures_are_those_the_world_draws(name: str) -> None:
    with Image.open(lesson_pictures.IMAGES / f"{name}.png") as stored:
        np.testing.assert_array_equal(np.asarray(stored.convert("RGB")), np.asarray(lesson_pictures.draw(name)))


def test_there_are_no_other_pictures() -> None:
    assert {path.stem for path in lesson_pictures.IMAGES.iterdir()} == set(lesson_pictures.NAMES)
