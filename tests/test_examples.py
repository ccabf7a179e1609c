"""The example in each public function's docstring runs as written, and gives what it says.

Examples may use ``ll``, ``lab`` (the shipped `tiny`), ``picture``, ``run`` (a question about it) and ``tmp``, a folder
of their own. They run one after the other on one lab, so each must leave it as it was.
"""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import llava_lab as ll

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "notebooks" / "images" / "red-car-and-fish.png"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.REPORT_NDIFF

FUNCTIONS = [name for name in ll.__all__ if inspect.isfunction(inspect.unwrap(getattr(ll, name)))]


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    lab = ll.load("tiny")
    picture = Image.open(PICTURE)
    return {"ll": ll, "lab": lab, "picture": picture, "run": lab.ask(picture, "What color is the car?")}


def test_every_public_function_has_an_example() -> None:
    bare = [name for name in FUNCTIONS if ">>>" not in (inspect.getdoc(getattr(ll, name)) or "")]
    assert bare == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_is_true(name: str, names: dict[str, Any], tmp_path: Path) -> None:
    text = inspect.getdoc(getattr(ll, name)) or ""
    weights = names["lab"].fingerprint
    test = doctest.DocTestParser().get_doctest(text, {**names, "tmp": tmp_path}, name, None, 0)
    report: list[str] = []
    outcome = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    assert outcome.failed == 0, "".join(report)
    assert outcome.attempted > 0, f"{name} has no example"
    assert names["lab"].fingerprint == weights, "the example changed the model"
