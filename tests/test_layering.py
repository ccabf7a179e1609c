"""The map of the rooms as rules: each test reads every file and lists all that break its rule.

A room may import itself and what stands before it in `ORDER`. Names under ``if TYPE_CHECKING`` never run, so they
count only where the rule says so. What is long is printed as advice, never a failure: a file is one idea, read whole.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import llava_lab

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llava_lab"
ADVISED_FILE, ADVISED_FUNCTION = 400, 60  # lines
MOST_FILES = 16  # of Python in a folder, and of JavaScript
LONGEST_CELL = 20

# Each row may import itself and the rows before it.
ORDER = (
    {"errors", "shipped"},
    {"options"},
    {"geometry", "checks", "stats", "bridge"},
    {"results"},
    {"capture"},
    {"models"},
    {"connectors", "worlds"},
    {"replay"},
    {"attribution", "probes", "interventions"},
    {"judging", "evaluation"},
    {"training"},
    {"comparison", "serving"},
    {"remote", "bench", "doctor", "session"},
    {"instructions", "page"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
PLOTS = {"plots", "results", "geometry", "checks", "errors", "stats"}  # what `plots` may import; only the last rows import it
CHECKS = ("llava_lab.checks", "llava_lab.errors")  # what `widgets` may import at the top: the guard and its refusals
FOREIGN_TO_PACKAGE = {
    *("IPython", "ipykernel", "ipywidgets", "jupyter_client", "jupyterlab", "nbclient", "nbformat"),
    *("widgets", "tests", "run"),
}
HOOKS = re.compile(r"register_(?:full_)?(?:forward|backward)(?:_pre)?_hook|Attention(?:Mask)?Interface\.register")
HTML_SINKS = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|\beval\(|new Function")
FAKE_LABS = re.compile(r'cast\("Lab"|cast\(Any, None\)')

Found = tuple[int, str]  # line, dotted name


@cache  # several rules ask about the same files
def imports(source: str, *, package: str, typing_too: bool) -> tuple[Found, ...]:
    """Every module `source` imports, relative ones resolved against `package`; one entry per imported name."""
    return tuple(_imports(source, package, typing_too))


def _imports(source: str, package: str, typing_too: bool) -> Iterator[Found]:
    for node in _nodes(ast.parse(source), typing_too):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def _nodes(tree: ast.AST, typing_too: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and not typing_too and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from _nodes(ast.Module([other], []), typing_too)
            continue
        yield node
        yield from _nodes(node, typing_too)


def room_violations(room: str, source: str, *, package: str) -> list[str]:
    """Imports of `llava_lab` rooms that the table does not allow to `room`."""
    wrong = []
    for line, name in imports(source, package=package, typing_too=False):
        parts = name.split(".")
        if parts[0] != "llava_lab" or len(parts) < 2 or parts[1] == "__version__":
            continue
        if parts[1:3] == ["plots", "palette"]:  # a table of colours, for whoever shows anything
            continue
        other = parts[1] if parts[1] in LEVEL or parts[1] == "plots" else _home(parts[1])
        if other not in LEVEL and other != "plots":
            wrong.append(f"line {line}: {other} has no place in the table of tests/test_layering.py")
        elif not _may(room, other):
            wrong.append(f"line {line}: {room} may not import {other}")
    return wrong


def _may(room: str, other: str) -> bool:
    if room == "plots":
        return other in PLOTS
    if other == "plots":
        return LEVEL[room] >= LEVEL["comparison"]
    return room == other or LEVEL[other] < LEVEL[room]


def _home(public: str) -> str:
    return llava_lab._HOMES.get(public, f"llava_lab.{public}").split(".")[1]


def _modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _package(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PYTHON = [ROOT / "run.py", *_modules(PACKAGE), *_modules(ROOT / "widgets"), *_modules(ROOT / "tests")]
ROOMS = [path for path in _modules(PACKAGE) if path != PACKAGE / "__init__.py"]


def test_a_room_imports_itself_and_what_stands_before_it() -> None:
    homeless = sorted({_room(path) for path in ROOMS} - set(LEVEL) - {"plots"})
    assert homeless == [], "give them a place in ORDER"
    wrong = [f"{_name(p)} {why}" for p in ROOMS for why in room_violations(_room(p), p.read_text("utf-8"), package=_package(p))]
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize(
    ("room", "source", "expected"),
    [
        ("capture", "from llava_lab.models import Lab", "capture may not import models"),
        ("capture", "def f():\n    import llava_lab.models.layout", "capture may not import models"),
        ("models", "from ..attribution import method", "models may not import attribution"),
        ("errors", "import llava_lab as ll\nfrom llava_lab import load", "errors may not import models"),
        ("probes", "from llava_lab.attribution import METHODS", "probes may not import attribution"),
        ("plots", "from llava_lab.attribution import METHODS", "plots may not import attribution"),
        ("attribution", "from llava_lab import plots", "attribution may not import plots"),
        ("models", "import llava_lab.news", "news has no place"),
    ],
)
def test_the_table_catches(room: str, source: str, expected: str) -> None:
    wrong = room_violations(room, source, package=f"llava_lab.{room}")
    assert len(wrong) == 1
    assert expected in wrong[0]


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("attribution", "from llava_lab.models.layout import language_layers\nfrom . import method"),
        ("capture", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from llava_lab.models import Lab"),
        ("cli", "from llava_lab import plots, load"),
    ],
)
def test_the_table_allows(room: str, source: str) -> None:
    assert room_violations(room, source, package=f"llava_lab.{room}") == []


def test_no_import_circle() -> None:
    """Also through imports inside functions: a circle that only works late is still a circle."""
    known = {_dotted(path): path for path in PYTHON if path.is_relative_to(PACKAGE)}
    arrows: dict[str, set[str]] = {}
    for name, path in known.items():
        if path.name == "__init__.py":  # a package lists names; whoever imports through it imports what it lists
            continue
        used = (found for _, found in imports(path.read_text("utf-8"), package=_package(path), typing_too=False))
        arrows[name] = {target for target in (_module_of(name, known) for name in used) if target and target != name}
    circles = _circles(arrows)
    assert circles == [], "\n".join(" -> ".join(circle) for circle in circles)


def _module_of(name: str, known: dict[str, Path]) -> str | None:
    """The file a dotted name comes from; names listed by a package are followed one step, to the file that makes them."""
    if name in known and known[name].name != "__init__.py":
        return name
    stem, _, last = name.rpartition(".")
    if stem in known and known[stem].name != "__init__.py":
        return stem
    if stem == "llava_lab" and last in llava_lab._HOMES:
        stem = llava_lab._HOMES[last]
    return _listed(known[stem]).get(last) if stem in known else None


@cache
def _listed(init: Path) -> dict[str, str]:
    """The names a package lists, and the module each comes from."""
    nodes = (node for node in ast.parse(init.read_text("utf-8")).body if isinstance(node, ast.ImportFrom))
    return {alias.asname or alias.name: node.module or "" for node in nodes for alias in node.names}


def _circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Every group of files that reach each other, found by Tarjan's walk."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in arrows.get(name, ()):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for name in arrows:
        if name not in index:
            visit(name)
    return groups


def test_circles_are_found() -> None:
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert _circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_no_file_imports_a_private_name_of_another() -> None:
    wrong = []
    for path in PYTHON:
        found = imports(path.read_text("utf-8"), package=_package(path), typing_too=True)
        names = ((line, name) for line, name in found if name.split(".")[0] in ("llava_lab", "widgets", "tests"))
        wrong += [f"{_name(path)}:{line} {name}" for line, name in names if re.search(r"\._[^_]", name)]
    assert wrong == [], "\n".join(wrong)


def test_hooks_and_registered_functions_only_in_capture() -> None:
    wrong = _lines([path for path in ROOMS if _room(path) != "capture"], HOOKS)
    assert wrong == [], "use capture.hooked:\n" + "\n".join(wrong)


def test_no_object_pretends_to_be_a_lab() -> None:
    wrong = _lines(ROOMS, FAKE_LABS)
    assert wrong == [], "\n".join(wrong)


def _lines(paths: list[Path], pattern: re.Pattern[str]) -> list[str]:
    texts = ((path, path.read_text("utf-8").splitlines()) for path in paths)
    return [
        f"{_name(path)}:{i} {line.strip()}" for path, lines in texts for i, line in enumerate(lines, 1) if pattern.search(line)
    ]


def test_the_package_never_imports_notebooks_or_widgets() -> None:
    wrong = []
    for path in ROOMS:
        found = imports(path.read_text("utf-8"), package=_package(path), typing_too=True)
        wrong += [f"{_name(path)}:{line} {name}" for line, name in found if name.split(".")[0] in FOREIGN_TO_PACKAGE]
    assert wrong == [], "\n".join(wrong)


def test_widgets_show_and_do_not_compute() -> None:
    """The one guard and its refusals; results for typing, plots for stills and only when one is drawn; never torch."""
    wrong = []
    for path in _modules(ROOT / "widgets"):
        source, package = path.read_text("utf-8"), _package(path)
        top = {name for _, name in _top_imports(source, package) if not name.startswith(CHECKS)}
        wrong += [f"{_name(path)} {n} at the top" for n in top if n.split(".")[0] in ("torch", "transformers", "llava_lab")]
        for line, name in imports(source, package=package, typing_too=True):
            fine = not name.startswith("llava_lab") or name.startswith(("llava_lab.results", "llava_lab.plots", *CHECKS))
            if not fine or name.split(".")[0] in ("torch", "transformers"):
                wrong.append(f"{_name(path)}:{line} {name}")
    assert wrong == [], "\n".join(wrong)


def _top_imports(source: str, package: str) -> Iterator[Found]:
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imports(ast.unparse(node), package=package, typing_too=False)


def test_imports_stay_light() -> None:
    """One interpreter imports everything that must not load torch, in an order in which the lightest come first."""
    heavy = ("torch", "transformers", "matplotlib")
    steps = [
        ("llava_lab", (*heavy, "numpy")),
        ("llava_lab.cli.main", (*heavy, "numpy")),
        ("llava_lab.doctor", (*heavy, "numpy")),
        ("widgets", ("torch", "transformers", "llava_lab.results")),
        ("llava_lab.results", heavy),
        ("llava_lab.plots", heavy),
        ("llava_lab.checks", ("torch", "transformers")),
        ("llava_lab.stats", ("torch", "transformers")),
    ]
    code = "import sys, json, importlib\nwrong = []\n"
    code += f"for name, absent in {steps!r}:\n    importlib.import_module(name)\n"
    code += "    wrong += [f'{name} loads {one}' for one in absent if one in sys.modules]\nprint(json.dumps(wrong))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_public_names_resolve_and_others_say_what_exists() -> None:
    for name in llava_lab.__all__:
        assert getattr(llava_lab, name) is not None
    with pytest.raises(AttributeError, match="no 'atribute'; its public names are load, Lab"):
        _ = llava_lab.atribute  # type: ignore[attr-defined]


def test_page_text_never_becomes_markup() -> None:
    wrong = _lines(sorted((ROOT / "widgets").rglob("*.js")), HTML_SINKS)
    assert wrong == [], "\n".join(wrong)


def test_a_folder_holds_few_files() -> None:
    folders = {path.parent for path in PYTHON if path.is_relative_to(PACKAGE) or path.is_relative_to(ROOT / "widgets")}
    folders |= {path.parent for path in (ROOT / "widgets").rglob("*.js")}
    counts = {(_name(folder), end): len(list(folder.glob(f"*.{end}"))) for folder in folders for end in ("py", "js")}
    wrong = [f"{folder}: {count} .{end}" for (folder, end), count in sorted(counts.items()) if count > MOST_FILES]
    assert wrong == [], f"at most {MOST_FILES}:\n" + "\n".join(wrong)


def test_every_module_says_what_it_is_for() -> None:
    silent = [_name(path) for path in PYTHON if not _begins_with_text(path)]
    assert silent == []


def _begins_with_text(path: Path) -> bool:
    with tokenize.open(path) as file:
        kinds = (token.type for token in tokenize.generate_tokens(file.readline))
        return next(kind for kind in kinds if kind not in (tokenize.COMMENT, tokenize.NL)) == tokenize.STRING


def test_a_package_s_init_lists_names_and_nothing_else() -> None:
    wrong = []
    for path in ROOMS:
        if path.name == "__init__.py":
            body = ast.parse(path.read_text("utf-8")).body[1:]
            allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AugAssign, ast.If)
            wrong += [f"{_name(path)}:{node.lineno}" for node in body if not isinstance(node, allowed)]
    assert wrong == []


@pytest.mark.long
def test_long_files_and_functions_are_named_as_advice() -> None:
    """Prints, never fails: a limit once cut this house into pieces too small to read."""
    for path in PYTHON:
        text = path.read_text("utf-8")
        if len(text.splitlines()) > ADVISED_FILE:
            print(f"{_name(path)}: {len(text.splitlines())} lines; is it one idea?")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > ADVISED_FUNCTION:
                    print(f"{_name(path)}: {node.name} has {length} lines; can it be read at once?")


def test_lessons_use_public_names_only() -> None:
    wrong = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for index, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                wrong += [f"{path.name} cell {index}: {why}" for why in lesson_violations("".join(cell["source"]))]
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import llava_lab as ll\nll._load()", "ll._load"),
        ("from llava_lab.models import _find", "_find is private"),
        ("from llava_lab.models.layout import language_layers", "import from llava_lab.models"),
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
    wrong = [f"{len(lines)} lines, over {LONGEST_CELL}"] if len(lines) > LONGEST_CELL else []
    try:
        tree = ast.parse("\n".join(lines))
    except SyntaxError:
        return [*wrong, "it is not plain Python"]
    return wrong + [why for node in ast.walk(tree) for why in _not_public(node)]


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
