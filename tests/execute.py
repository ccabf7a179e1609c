"""Run the lessons and store them so that two runs give the same bytes.

    python tests/execute.py store [NOTEBOOK ...]    run and write back (default: every lesson)
    python tests/execute.py check [NOTEBOOK ...]    run and compare with what is stored; exit 1 when they differ
    python tests/execute.py answer NOTEBOOK --map map.png    run, print `run.answer`, draw `relevance` on its picture

What differs between runs is left out: timestamps, widget state and views, progress bars, the
interpreter's version (a widget's picture or text stays). What is left is what JupyterLab, as `run.py lab` starts it,
would write itself, so opening, saving and closing a lesson leave its file as it was. Comparing
allows what another processor or font library may change: the last printed digit of a number, a
shade of a pixel. It lives outside `llava_lab`, which never imports Jupyter. Usually started by
``run.py notebooks``.
"""

from __future__ import annotations

import argparse
import base64
import io
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
LESSONS = ROOT / "notebooks"
LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
CELL_SECONDS = 600
LARGEST = 1_000_000  # bytes; code hosts stop showing larger notebooks
LIGHT = 50_000  # characters of a picture that is stored as it is
SHADE = 0.5  # mean difference of two drawings, of 255; one wrong patch in a 12x12 map is about 1
ANSWER_CODE = """
from pathlib import Path as _Path
import llava_lab.plots as _plots
_axes = _plots.overlay(run, relevance)
_axes.figure.savefig(_Path({path!r}), dpi=150)
print(run.answer)
"""
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", re.IGNORECASE)
BAR = re.compile(r"\d+%\|.*\|\s*\d+/\d+ \[")  # tqdm's
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")


class LessonError(Exception):
    """A lesson that does not run, or cannot be stored; one line."""


def execute(path: Path, *, then: str | None = None) -> tuple[nbformat.NotebookNode, str]:
    """Run a notebook in its own folder without writing it; returns it cleaned, and what the extra code printed."""
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError) as error:
        raise LessonError(f"{path} cannot be read as a notebook: {error}") from None
    if then is not None:
        notebook.cells.append(nbformat.v4.new_code_cell(then))
    options: dict[str, Any] = {
        "store_widget_state": False,
        "record_timing": False,
        "coalesce_streams": True,
        "timeout": CELL_SECONDS,
    }
    options["extra_arguments"] = ["--log-level=ERROR"]  # a warning about loopback transport at every start helps nobody
    resources = {"metadata": {"path": str(path.resolve().parent)}}
    try:
        with _own_jupyter_folders():
            NotebookClient(notebook, resources=resources, kernel_name="python3", **options).execute()
    except CellExecutionError as error:
        raise LessonError(f"{path.name}: {error.ename}: {_one_line(error.evalue)}") from None
    except (CellTimeoutError, DeadKernelError) as error:
        raise LessonError(f"{path.name}: {type(error).__name__}: {_one_line(str(error))}") from None
    said = ""
    if then is not None:
        said = "".join(output.get("text", "") for output in notebook.cells.pop().outputs if output.get("name") == "stdout")
    return _clean(notebook), said


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """Why a notebook should not be stored: outputs that change with every run, or too many bytes."""
    found = []
    for index, cell in enumerate(notebook.cells):
        if any(ADDRESS.search(text) for text in _texts(cell)):
            found.append(f"cell {index} shows a memory address")
    size = len(nbformat.writes(notebook).encode())
    if size > LARGEST:
        found.append(f"it has {size} bytes; code hosts show at most {LARGEST}")
    return found


LIVE = "live"  # the tag of cells whose numbers come from a training; each processor rounds its own way through it


def differences(stored: nbformat.NotebookNode, fresh: nbformat.NotebookNode) -> list[str]:
    """What a reader would see change; empty when the stored lesson is what the code makes."""
    if len(stored.cells) != len(fresh.cells):
        return [f"{len(stored.cells)} cells stored, {len(fresh.cells)} run"]
    found = []
    for index, (old, new) in enumerate(zip(stored.cells, fresh.cells, strict=True)):
        before, after = old.get("outputs", []), new.get("outputs", [])
        if old.source != new.source:
            found.append(f"cell {index}: source differs")
        elif [_shape(output) for output in before] != [_shape(output) for output in after]:
            found.append(f"cell {index}: outputs are {[_shape(o) for o in before]} stored, {[_shape(o) for o in after]} run")
        elif old.get("execution_count") != new.get("execution_count"):
            found.append(f"cell {index}: stored out of order; run all cells from the top")
        elif LIVE not in old.metadata.get("tags", []):
            pairs = zip(before, after, strict=True)
            found += [f"cell {index}: {why}" for a, b in pairs for why in _output_differences(a, b)]
    return found


def same_text(stored: str, fresh: str) -> bool:
    """Equal, where a number may differ by one unit of its last printed digit and whole numbers not at all."""
    old, new = NUMBER.findall(stored), NUMBER.findall(fresh)
    if len(old) != len(new) or NUMBER.sub("#", stored) != NUMBER.sub("#", fresh):
        return False
    return all(math.isclose(float(a), float(b), rel_tol=0, abs_tol=_last_digit(a)) for a, b in zip(old, new, strict=True))


def same_picture(stored: str, fresh: str) -> bool:
    """Two base64 PNGs of one size whose mean difference is under `SHADE` of 255."""
    old, new = (np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"), np.float32) for text in (stored, fresh))
    return old.shape == new.shape and float(np.abs(old - new).mean()) < SHADE


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the lessons and store or compare them.")
    parser.add_argument("command", choices=("store", "check", "answer"))
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--map", type=Path, default=Path("map.png"))
    args = parser.parse_args(argv)
    failed = 0
    for path in args.paths or sorted(LESSONS.glob("*.ipynb")):
        try:
            {"store": _store, "check": _check, "answer": _answer}[args.command](path, args.map)
        except LessonError as error:
            print(error, file=sys.stderr)
            failed = 1
    return failed


def _store(path: Path, _: Path) -> None:
    notebook, _said = execute(path)
    if found := problems(notebook):
        raise LessonError(f"{path.name} is not stored: {'; '.join(found)}")
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n")
    print(f"{path.name}: stored, {path.stat().st_size // 1000} kB")


def _check(path: Path, _: Path) -> None:
    fresh, _said = execute(path)
    found = problems(fresh) + differences(nbformat.read(path, as_version=4), fresh)
    if found:
        raise LessonError(f"{path.name}: {'; '.join(found)}")
    print(f"{path.name}: what is stored is what the code makes")


def _answer(path: Path, picture: Path) -> None:
    picture.unlink(missing_ok=True)
    _notebook, said = execute(path, then=ANSWER_CODE.format(path=str(picture.resolve())))
    if not picture.is_file():
        raise LessonError(f"{path.name} ran, but {picture} was not written")
    print(f"{path.name} says: {said.strip()}\nmap: {picture}")


@contextmanager
def _own_jupyter_folders() -> Iterator[None]:
    """The reader's own kernels, profiles and start-up files must not change a lesson."""
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    before = {name: os.environ.get(name) for name in (*names, "MPLBACKEND")}
    with tempfile.TemporaryDirectory(prefix="lessons-") as folder:
        os.environ.update({name: str(Path(folder) / name.lower()) for name in names})
        os.environ.pop("MPLBACKEND", None)  # with another one, figures would not be in the lesson
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = LANGUAGE
    notebook.metadata["kernelspec"] = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":  # a progress bar shows on slow machines only
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
        for output in cell.get("outputs", []):
            if len(output.get("data", {})) > 1:  # its id is random, and without stored state it shows nothing
                output.data.pop(WIDGET_VIEW, None)
            if len(output.get("data", {}).get("image/png", "")) > LIGHT:
                output.data["image/png"] = _lighter(output.data["image/png"])
    return notebook


def _lighter(picture: str) -> str:
    """A base64 PNG in 64 shades of each colour, black and white kept: nobody sees it, and it is half as long."""
    shades = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"), np.float64) / 255
    buffer = io.BytesIO()
    Image.fromarray((np.rint(shades * 63) * 255 / 63).round().astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _is_progress(output: nbformat.NotebookNode) -> bool:
    text = output.get("text", "") or output.get("data", {}).get("text/plain", "")
    lines = [line for line in re.split(r"[\r\n]", text) if line.strip()]
    return bool(lines) and all(BAR.search(line) for line in lines)


def _texts(cell: nbformat.NotebookNode) -> list[str]:
    outputs = cell.get("outputs", [])
    texts = [output.get("text", "") for output in outputs]
    return texts + [value for o in outputs for kind, value in o.get("data", {}).items() if kind.startswith("text/")]


def _shape(output: nbformat.NotebookNode) -> list[str]:
    return [output.output_type, *sorted(output.get("data", {}))]


def _output_differences(old: nbformat.NotebookNode, new: nbformat.NotebookNode) -> list[str]:
    found = [] if same_text(old.get("text", ""), new.get("text", "")) else ["printed text differs"]
    for kind, value in old.get("data", {}).items():
        same = same_picture(value, new.data[kind]) if kind == "image/png" else same_text(str(value), str(new.data[kind]))
        if not same:
            found.append(f"{kind} differs")
    return found


def _last_digit(number: str) -> float:
    """One unit of the last printed digit; 0 for a whole number, which must agree exactly."""
    mantissa, _, exponent = number.lower().partition("e")
    if "." not in mantissa:
        return 0.0
    return 1.000001 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


if __name__ == "__main__":
    sys.exit(main())
