"""pyproject.toml, constraints.txt and environment.yml say the same, and the suite's own safeguards are on."""

from __future__ import annotations

import importlib.metadata
import json
import re
import socket
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base", "huggingface-hub": "huggingface-hub"}
# developers use run.py; the last three are on PyPI alone
NOT_FOR_CONDA = {"test", "lint", "dev", "easy-vqa", "photo", "lmms-eval"}
NOT_PINNED = {"dev", "lmms-eval"}  # a harness with fifty packages of its own, in a job of its own


def _requirements(*extras: str) -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {canonicalize_name(found.name): found for found in map(Requirement, lines)}


def _everything() -> dict[str, Requirement]:
    return _requirements(*(extra for extra in PROJECT["optional-dependencies"] if extra not in NOT_PINNED))


def _pins() -> dict[str, SpecifierSet]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(one.name): one.specifier for one in found}


def _conda() -> tuple[dict, dict[str, SpecifierSet]]:
    data = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    plain = [line for line in data["dependencies"] if isinstance(line, str)]
    found = {re.split(r"[<>=!~ ]", line)[0]: re.sub(r"^[\w.-]+", "", line).strip() for line in plain}
    return data, {canonicalize_name(name): SpecifierSet(spec) for name, spec in found.items()}


def test_every_dependency_is_pinned_inside_its_range() -> None:
    pins = _pins()
    for name, requirement in _everything().items():
        assert name in pins, f"{name} is in pyproject.toml and not in constraints.txt"
        exact = str(pins[name]).removeprefix("==").replace("*", "0")
        assert requirement.specifier.contains(exact), f"{name} is pinned to {exact}, outside {requirement.specifier}"


def test_pins_are_exact_and_torch_takes_any_build_of_its_release() -> None:
    pins = {name: str(spec) for name, spec in _pins().items()}
    assert pins.pop("torch") == "==2.13.*"
    assert [name for name, spec in pins.items() if not re.fullmatch(r"==[\w.]+", spec)] == []


def test_the_lock_has_the_same_pins_with_the_hashes_of_their_files_and_all_but_torch() -> None:
    """Made by `python3 run.py lock`; CI installs from it, so that a file with other bytes is refused."""
    head, *entries = re.split(r"^(?=[\w.-]+==)", (ROOT / "requirements.lock").read_text("utf-8"), flags=re.MULTILINE)
    assert "python3 run.py lock" in head
    locked = {canonicalize_name(one.split("==")[0]): re.match(r"[\w.-]+(==[\w.]+)", one)[1] for one in entries}  # type: ignore[index]
    assert locked == {name: str(spec) for name, spec in _pins().items() if name != "torch"}
    assert [one for one in entries if not re.fullmatch(r"\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\s*", one)] == []


def test_what_is_installed_is_what_is_pinned() -> None:
    wrong = []
    for name, spec in _pins().items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # another platform's, or an extra that is not installed
        if not spec.contains(Version(version).public if name == "torch" else version):
            wrong.append(f"{name} {version} is installed, {spec} is pinned")
    assert wrong == []


def test_everything_needed_at_run_time_is_pinned_too() -> None:
    """The whole tree, so that tomorrow's release of something unnamed cannot break today's checkout."""
    pins, unpinned, todo, seen = _pins(), set(), list(_everything().values()), set()
    while todo:
        wanted = todo.pop()
        key = (canonicalize_name(wanted.name), tuple(sorted(wanted.extras)))
        if key in seen:
            continue
        seen.add(key)
        try:
            needs = importlib.metadata.requires(wanted.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if key[0] not in pins:
            unpinned.add(key[0])
        for need in map(Requirement, needs):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in (*wanted.extras, "")):
                need.marker = None
                todo.append(need)
    assert unpinned == set()


def test_conda_file_asks_for_the_same_ranges() -> None:
    _, conda = _conda()
    extras = [extra for extra in PROJECT["optional-dependencies"] if extra not in NOT_FOR_CONDA]
    wanted = {canonicalize_name(CONDA_NAMES.get(name, name)): r.specifier for name, r in _requirements(*extras).items()}
    wanted[canonicalize_name("python")] = SpecifierSet(PROJECT["requires-python"])
    wanted[canonicalize_name("pip")] = SpecifierSet()
    assert conda == wanted


def test_conda_file_keeps_to_one_channel_and_says_who_needs_each_line() -> None:
    data, _ = _conda()
    assert data["channels"] == ["conda-forge", "nodefaults"]
    assert data["dependencies"][-1] == {"pip": ["-e ."]}
    lines = (ROOT / "environment.yml").read_text("utf-8").partition("dependencies:")[2].splitlines()
    entries = [line for line in lines if line.strip().startswith("- ") and not line.strip().endswith(":")]
    assert len(entries) == len(data["dependencies"])
    assert [line for line in entries if "#" not in line] == []


def test_every_file_of_a_package_that_is_not_python_is_shipped() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]
    for package in ("llava_lab", "widgets"):
        folder = ROOT / package
        there = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        shipped = {path for pattern in patterns[package] for path in folder.glob(pattern)}
        assert there - shipped == set()


def test_workflow_and_ci_use_the_same_command() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    commands = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert "python run.py lint" in commands
    assert "python run.py test --all" in commands
    assert commands.count("python run.py install --locked") == 2
    assert "python3 run.py test" in (ROOT / ".ci/run").read_text("utf-8")


def test_the_workflow_s_actions_are_pinned_by_commit() -> None:
    uses = re.findall(r"uses: (.*)", (ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    assert len(uses) >= 5
    assert [one for one in uses if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", one)] == []


def test_python_versions_agree() -> None:
    assert PROJECT["requires-python"] == ">=3.11"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py311"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == "3.11"
    assert "sys.version_info < (3, 11)" in (ROOT / "run.py").read_text("utf-8")


def test_suite_cannot_leave_this_machine() -> None:
    with pytest.raises(RuntimeError, match="tests stay on this machine"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(RuntimeError, match=r"example\.org"):
        socket.getaddrinfo("example.org", 443)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        socket.create_connection(server.getsockname(), timeout=5).close()


@pytest.mark.long
def test_shapes_in_signatures_are_checked_while_tests_run() -> None:
    """Where long tests run too; see `tests/conftest.py`."""
    from llava_lab.replay.targets import target_rows
    from llava_lab.results import Target

    target = Target("token", "red", (1,), (2,))
    assert target_rows(torch.ones(1, 3), (1,), (target,)).shape == (1, 3)
    with pytest.raises(TypeError, match="Q K"):
        target_rows(torch.ones(3), (1,), (target,))


def test_the_method_that_readers_are_shown_is_the_one_that_is_tested() -> None:
    """`tests/attribution/test_conformance.py` runs the file as written."""
    shown = (ROOT / "tests" / "attribution" / "added_method.py").read_text("utf-8")
    assert f"```python\n{shown}```" in (ROOT / "README.md").read_text("utf-8")
    cells = json.loads((ROOT / "notebooks" / "02_patch_influence.ipynb").read_text("utf-8"))["cells"]
    assert any(f"```python\n{shown}```" in "".join(cell["source"]) for cell in cells)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
