"""The executor of lessons: the same bytes twice, differences a reader would see and no others."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from tests import execute

PICTURE = "from IPython.display import display\nfrom PIL import Image\ndisplay(Image.new('RGB', (8, 8), 'red'))"
WIDGET = "import ipywidgets as ipw\nipw.IntSlider()"


def _lesson(path: Path, *sources: str) -> Path:
    cells = [new_markdown_cell("# A lesson", id="title")]
    cells += [new_code_cell(source, id=f"cell-{number}") for number, source in enumerate(sources)]
    nbformat.write(new_notebook(cells=cells), path)
    return path


def _png(shade: int, box: int = 0) -> str:
    pixels = np.full((48, 48, 3), 100, np.uint8)
    pixels[:box, :box] = shade
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lesson that prints, shows a picture and a widget, run and stored once."""
    folder = tmp_path_factory.mktemp("lessons")
    path = _lesson(folder / "lesson.ipynb", "import os\nprint(os.path.basename(os.getcwd()))\nprint('again')", PICTURE, WIDGET)
    assert execute.main(["store", str(path)]) == 0
    return path


@pytest.mark.long
def test_two_runs_store_the_same_bytes(stored: Path) -> None:
    first = stored.read_bytes()
    assert execute.main(["store", str(stored)]) == 0
    assert stored.read_bytes() == first


def test_only_cells_tagged_live_may_show_other_numbers(stored: Path) -> None:
    old, new = (nbformat.read(stored, as_version=4) for _ in range(2))
    new.cells[1].outputs[0].text = "something else 3.5\n"
    assert len(execute.differences(old, new)) == 1
    old.cells[1].metadata["tags"] = [execute.LIVE]
    assert execute.differences(old, new) == []
    new.cells[1].outputs = []
    assert len(execute.differences(old, new)) == 1  # an output must still be there


def test_a_stored_lesson_holds_no_state_no_times_and_runs_in_its_own_folder(stored: Path) -> None:
    notebook = nbformat.read(stored, as_version=4)
    assert "widgets" not in notebook.metadata
    assert notebook.metadata.language_info == execute.LANGUAGE
    assert all("execution" not in cell.metadata for cell in notebook.cells)
    assert notebook.cells[1].outputs[0].text.splitlines()[0].startswith("lessons")
    assert [cell.get("execution_count") for cell in notebook.cells[1:]] == [1, 2, 3]


def test_a_widgets_random_view_gives_way_to_its_picture_and_text() -> None:
    both = {"image/png": _png(0), execute.WIDGET_VIEW: {"model_id": "random"}, "text/plain": "PatchExplorer"}
    cell = new_code_cell("w", outputs=[new_output("display_data", both)])
    cleaned = execute._clean(new_notebook(cells=[cell]))
    assert sorted(cleaned.cells[0].outputs[0].data) == ["image/png", "text/plain"]


def test_large_pictures_are_stored_in_fewer_shades_and_stay_as_they_are_the_second_time() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8)
    noise[:2] = [[[0]], [[255]]]
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    large = base64.b64encode(buffer.getvalue()).decode("ascii")
    cell = new_code_cell("w", outputs=[new_output("display_data", {"image/png": large, "text/plain": "figure"})])
    once = execute._clean(new_notebook(cells=[cell])).cells[0].outputs[0].data["image/png"]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(once))), int)
    assert len(once) < len(large)
    assert np.abs(shown - noise).max() <= 2
    assert (shown[:2] == noise[:2]).all()  # black and white
    assert execute._lighter(once) == once


def test_a_lesson_that_fails_is_one_line_and_not_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _lesson(tmp_path / "broken.ipynb", "x = 1", "raise ValueError('first\\nsecond')")
    before = path.read_bytes()
    assert execute.main(["store", str(path)]) == 1
    assert capsys.readouterr().err == "broken.ipynb: ValueError: first second\n"
    assert path.read_bytes() == before


def test_addresses_in_outputs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _lesson(tmp_path / "address.ipynb", "object()")
    assert execute.main(["store", str(path)]) == 1
    assert "cell 1 shows a memory address" in capsys.readouterr().err


def test_check_passes_on_what_was_stored_and_names_the_cell_that_changed(
    stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute.main(["check", str(stored)]) == 0
    notebook = nbformat.read(stored, as_version=4)
    notebook.cells[1].outputs[0].text = notebook.cells[1].outputs[0].text.replace("again", "once")
    altered = stored.with_name("altered.ipynb")
    nbformat.write(notebook, altered)
    assert execute.main(["check", str(altered)]) == 1
    assert "cell 1: printed text differs" in capsys.readouterr().err


@pytest.mark.long
def test_the_answer_command_prints_the_answer_and_draws_the_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make = """
import numpy as np
from llava_lab.geometry import PictureMap
from llava_lab.results import Relevance, Run, Target, Word
where = PictureMap.make(8, 8, size=8, rows=2, cols=2, mode="pad")
known = {"map": where, "model": "m", "fingerprint": "f"}
run = Run(np.zeros((8, 8, 3), np.uint8), "what?", "Red.", "p", np.arange(6), tuple("abcdef"),
          {"image": (0, 4), "answer": (4, 6)}, (Word("Red.", 4, 6),), np.zeros(2, np.float32), **known)
relevance = Relevance(np.ones((1, 2, 2), np.float32), (run.target(),), "rollout", {}, seconds=0.0, passes={}, **known)
"""
    path, out = _lesson(tmp_path / "first.ipynb", make), tmp_path / "map.png"
    before = path.read_bytes()
    assert execute.main(["answer", str(path), "--map", str(out)]) == 0
    assert "first.ipynb says: Red." in capsys.readouterr().out
    with Image.open(out) as drawn:
        assert drawn.size[0] > 100
    assert path.read_bytes() == before
    bare = _lesson(tmp_path / "bare.ipynb", "x = 1")
    assert execute.main(["answer", str(bare), "--map", str(out)]) == 1
    assert "NameError" in capsys.readouterr().err
    assert not out.exists()  # an old map must not pass for a new one


@pytest.mark.long
def test_progress_bars_leave_no_trace_however_slow_the_machine(tmp_path: Path) -> None:
    path = _lesson(tmp_path / "bar.ipynb", "from tqdm.auto import tqdm\nfor _ in tqdm(range(3)):\n    print('kept')")
    assert execute.main(["store", str(path)]) == 0
    assert [output.get("text") for output in nbformat.read(path, as_version=4).cells[1].outputs] == ["kept\nkept\nkept\n"]


@pytest.mark.parametrize(
    ("stored", "fresh", "same"),
    [
        ("mean 0.12", "mean 0.13", True),
        ("mean 0.12", "mean 0.14", False),
        ("5 words", "6 words", False),
        ("1.5e-03", "1.6e-03", True),
        ("1.5e-03", "1.5e-02", False),
        ("red", "blue", False),
        ("[1.0, 2.0]", "[1.0]", False),
        ("-0.1", "0.0", True),
        ("-0.1", "0.1", False),
    ],
)
def test_only_the_last_printed_digit_may_differ(stored: str, fresh: str, same: bool) -> None:
    assert execute.same_text(stored, fresh) is same


def test_pictures_may_differ_by_a_shade_but_not_by_a_patch() -> None:
    assert execute.same_picture(_png(100), _png(101, box=48 // 2))
    assert not execute.same_picture(_png(100), _png(255, box=4))  # one patch of 12x12
    small = io.BytesIO()
    Image.new("RGB", (4, 4)).save(small, "PNG")
    assert not execute.same_picture(_png(100), base64.b64encode(small.getvalue()).decode())


def test_the_readers_own_jupyter_folders_and_backend_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    before = dict(os.environ)
    with execute._own_jupyter_folders():
        assert "lessons-" in os.environ["IPYTHONDIR"]
        assert "MPLBACKEND" not in os.environ
    assert dict(os.environ) == before
