"""The map of the rooms: who may import whom, what an import may load, how long a file may be.

The table is the design's: lower may not import higher. Names under ``if TYPE_CHECKING`` count only
where the design says so (`widgets` may name results there), because they never run.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llava_lab

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llava_lab"
LONGEST_FILE = 320  # lines; the aim is 300
LONGEST_FUNCTION = 60  # lines; the aim is 50
LONGEST_CELL = 20

# Each row may import itself and the rows above it.
ORDER = (
    {
        "errors",
        "results",
        "geometry",
        "packing",
        "results_probes",
        "scores",
        "scores_sanity",
        *("results_interventions", "results_connectors", "results_ablation"),
    },
    {"capture"},
    {"models"},
    {"connectors", "worlds"},
    {"attribution", "probes", "interventions", "evaluation"},
    {"training"},
    {
        *("bench", "bench_capture", "bench_connectors", "bench_models", "bench_occlusion", "bench_probes", "bench_relevancy"),
        *("bench_scale", "doctor", "doctor_model"),
        *("cli", "cli_commands", "cli_compare", "cli_knockout", "cli_lens", "cli_report", "cli_sanity", "cli_train"),
        *("cli_ablate", "cli_convert", "cli_endpoint"),
    },
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
SPECIAL = {
    "plots": {"plots", "results", "geometry", "errors"},
    "plots_scores": {"plots_scores", "scores", "packing", "results", "geometry", "errors"},
    "plots_flow": {"plots_flow", "plots_scores", "results_interventions", "scores", "packing", "results", "geometry", "errors"},
    "plots_ablation": {
        "plots_ablation",
        "plots_scores",
        "results_ablation",
        "scores",
        "packing",
        "results",
        "geometry",
        "errors",
    },
    "diagrams": {"diagrams", "plots", "results", "geometry", "errors"},
}
FOREIGN_TO_WIDGETS = {"torch", "transformers", "llava_lab"}
FOREIGN_TO_PACKAGE = {
    "IPython",
    "ipykernel",
    "ipywidgets",
    "jupyter_client",
    "jupyterlab",
    "nbclient",
    "nbformat",
    "widgets",
    "tests",
    "run",
}
HTML_SINKS = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|\beval\(|new Function")

Found = tuple[int, str]  # line, dotted name


def imports(source: str, *, package: str, typing_too: bool) -> Iterator[Found]:
    """Every module `source` imports, relative ones resolved against `package`; one entry per imported name."""
    for node in _nodes(ast.parse(source), typing_too):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def room_violations(room: str, source: str, *, package: str) -> list[str]:
    """Imports of `llava_lab` rooms that the table does not allow to `room`."""
    found = []
    for line, name in imports(source, package=package, typing_too=False):
        parts = name.split(".")
        if parts[0] != "llava_lab" or len(parts) < 2 or parts[1] == "__version__":
            continue
        other = parts[1] if parts[1] in LEVEL or parts[1] in SPECIAL else _home(parts[1])
        if other not in LEVEL and other not in SPECIAL:
            found.append(f"line {line}: {other} has no place in the table of tests/test_layering.py")
        elif not _may(room, other):
            found.append(f"line {line}: {room} may not import {other}")
    return found


def _may(room: str, other: str) -> bool:
    if room in SPECIAL:
        return other in SPECIAL[room]
    top = LEVEL[room] == len(ORDER) - 1
    return top if other in SPECIAL else room == other or LEVEL[other] <= LEVEL[room]


def _home(public: str) -> str:
    return llava_lab._HOMES.get(public, f"llava_lab.{public}").split(".")[1]


def _nodes(tree: ast.AST, typing_too: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and not typing_too and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from _nodes(ast.Module([other], []), typing_too)
            continue
        yield node
        yield from _nodes(node, typing_too)


def _modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _package(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


PYTHON_FILES = [ROOT / "run.py", *_modules(PACKAGE), *_modules(ROOT / "widgets"), *_modules(ROOT / "tests")]
ROOMS = [path for path in _modules(PACKAGE) if path != PACKAGE / "__init__.py"]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", ROOMS, ids=_name)
def test_lower_rooms_do_not_import_higher_ones(path: Path) -> None:
    room = _room(path)
    assert room in LEVEL or room in SPECIAL, f"{room} has no place in the table; add it where the design puts it"
    assert room_violations(room, path.read_text("utf-8"), package=_package(path)) == []


@pytest.mark.parametrize("path", ROOMS, ids=_name)
def test_package_never_imports_notebooks_or_widgets(path: Path) -> None:
    names = imports(path.read_text("utf-8"), package=_package(path), typing_too=True)
    assert [found for found in names if found[1].split(".")[0] in FOREIGN_TO_PACKAGE] == []


@pytest.mark.parametrize("path", _modules(ROOT / "widgets"), ids=_name)
def test_widgets_show_and_do_not_compute(path: Path) -> None:
    source = path.read_text("utf-8")
    running = imports(source, package=_package(path), typing_too=False)
    assert [found for found in running if found[1].split(".")[0] in FOREIGN_TO_WIDGETS] == []
    named = [name for _, name in imports(source, package=_package(path), typing_too=True)]
    assert [n for n in named if n.startswith(("torch", "transformers"))] == []
    assert [n for n in named if n.startswith("llava_lab") and not n.startswith("llava_lab.results")] == []


@pytest.mark.parametrize(
    ("room", "source", "expected"),
    [
        ("capture", "from llava_lab.models import Lab", "capture may not import models"),
        ("capture", "def f():\n    import llava_lab.models.layout", "capture may not import models"),
        ("models", "from ..attribution import base", "models may not import attribution"),
        ("errors", "import llava_lab as ll\nfrom llava_lab import load", "errors may not import models"),
        ("plots", "from llava_lab.attribution import METHODS", "plots may not import attribution"),
        ("attribution", "from llava_lab import plots", "attribution may not import plots"),
        ("models", "import llava_lab.news", "news has no place"),
    ],
)
def test_import_table_catches(room: str, source: str, expected: str) -> None:
    found = room_violations(room, source, package=f"llava_lab.{room}")
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("attribution", "from llava_lab.models.layout import projector\nfrom . import base"),
        ("capture", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from llava_lab.models import Lab"),
        ("cli", "from llava_lab import plots, load"),
    ],
)
def test_import_table_allows(room: str, source: str) -> None:
    assert room_violations(room, source, package=f"llava_lab.{room}") == []


@pytest.mark.parametrize(
    ("module", "unloaded"),
    [
        ("llava_lab", ["torch", "transformers", "matplotlib", "numpy"]),
        *((f"llava_lab.{name}", ["torch", "transformers", "matplotlib"]) for name in ("results", "scores", "results_probes")),
        ("llava_lab.results", ["torch", "transformers", "matplotlib"]),
        ("llava_lab.results", ["torch", "transformers", "matplotlib"]),
        *(
            (f"llava_lab.{n}", ["torch", "transformers", "matplotlib"])
            for n in ("results_connectors", "results_ablation", "plots_scores")
        ),
        ("llava_lab.plots.ablation", ["torch", "transformers", "matplotlib"]),
        ("llava_lab.cli", ["torch", "transformers", "matplotlib", "numpy"]),
        ("widgets", ["torch", "transformers", "llava_lab"]),
    ],
)
def test_import_stays_light(module: str, unloaded: list[str]) -> None:
    code = f"import {module}, sys, json; print(json.dumps([name for name in {unloaded!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_public_names_resolve_and_others_say_what_exists() -> None:
    for name in llava_lab.__all__:
        assert getattr(llava_lab, name) is not None
    with pytest.raises(AttributeError, match="no 'atribute'; its public names are load, Lab"):
        _ = llava_lab.atribute  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", sorted((ROOT / "widgets").rglob("*.js")), ids=_name)
def test_page_text_never_becomes_markup(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert [(number, line) for number, line in enumerate(lines, 1) if HTML_SINKS.search(line)] == []


def test_files_and_functions_stay_readable() -> None:
    long = []
    for path in PYTHON_FILES:
        text = path.read_text("utf-8")
        if len(text.splitlines()) > LONGEST_FILE:
            long.append(f"{_name(path)}: {len(text.splitlines())} lines, over {LONGEST_FILE}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    long.append(f"{_name(path)}: {node.name} has {length} lines, over {LONGEST_FUNCTION}")
    assert not long, "\n".join(long)


def test_every_module_says_what_it_is_for() -> None:
    silent = [_name(path) for path in PYTHON_FILES if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert silent == []


def test_lessons_use_public_names_only() -> None:
    wrong = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for index, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
            source = "".join(cell["source"])
            if cell["cell_type"] != "code":
                continue
            wrong += [f"{path.name} cell {index}: {why}" for why in lesson_violations(source)]
    assert wrong == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import llava_lab as ll\nll._load()", "ll._load"),
        ("from llava_lab.models import _find", "_find is private"),
        ("from llava_lab.models.layout import projector", "import from llava_lab.models"),
        ("ll.atribute(lab, run)", "ll.atribute is not one"),
        ("run._answer", "run._answer"),
        ("!pip install something", "not plain Python"),
        ("\n".join(["x = 1"] * 21), "21 lines"),
    ],
)
def test_lesson_check_catches(source: str, expected: str) -> None:
    assert any(expected in why for why in lesson_violations(source))


def test_lesson_check_allows_what_lessons_are_for() -> None:
    source = "%matplotlib inline\nimport llava_lab as ll\nfrom llava_lab import plots\nfrom llava_lab.worlds import picturebook\n"
    source += "from widgets import PatchExplorer\nlab = ll.load('tiny')\nrun.__class__"
    assert lesson_violations(source) == []


def lesson_violations(source: str) -> list[str]:
    """What a lesson's code cell should not do: private names, shell lines, more than a screenful."""
    lines = [line for line in source.splitlines() if not line.lstrip().startswith("%")]
    found = [f"{len(lines)} lines, over {LONGEST_CELL}"] if len(lines) > LONGEST_CELL else []
    try:
        tree = ast.parse("\n".join(lines))
    except SyntaxError:
        return [*found, "it is not plain Python"]
    return found + [why for node in ast.walk(tree) for why in _not_public(node)]


def _not_public(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        if re.match(r"_[^_]", node.attr):
            yield f"{ast.unparse(node)} is private"
        elif isinstance(node.value, ast.Name) and node.value.id in ("ll", "llava_lab") and node.attr not in llava_lab.__all__:
            yield f"{ast.unparse(node)} is not one of llava_lab's public names"
    elif isinstance(node, ast.ImportFrom):
        stem = (node.module or "").split(".")
        if stem[0] in ("llava_lab", "widgets") and len(stem) > 2:
            yield f"{node.module} is inside a room; import from {'.'.join(stem[:2])}"
        yield from (f"{alias.name} is private" for alias in node.names if alias.name.startswith("_"))
