"""The example in each public function's docstring runs as written, and gives what it says.

Examples may use ``ll``, ``plots``, ``np``, ``lab`` (the shipped `tiny`), ``picture``, ``run`` (a question about it) and
``tmp``, a folder of their own. They run one after the other on one lab, so each must leave it as it was.
"""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

import llava_lab as ll
from llava_lab import plots

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "notebooks" / "images" / "red-car-and-fish.png"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.REPORT_NDIFF

PUBLIC = {name: getattr(ll, name) for name in ll.__all__} | {f"plots.{name}": getattr(plots, name) for name in plots.__all__}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(inspect.unwrap(value))}


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    lab = ll.load("tiny")
    picture = Image.open(PICTURE)
    run = lab.ask(picture, "What color is the car?")
    return {"ll": ll, "plots": plots, "np": np, "lab": lab, "picture": picture, "run": run}


def test_every_public_function_has_an_example() -> None:
    bare = [name for name, function in FUNCTIONS.items() if ">>>" not in (inspect.getdoc(function) or "")]
    assert bare == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_is_true(name: str, names: dict[str, Any], tmp_path: Path) -> None:
    text = inspect.getdoc(FUNCTIONS[name]) or ""
    weights = names["lab"].fingerprint
    test = doctest.DocTestParser().get_doctest(text, {**names, "tmp": tmp_path}, name, None, 0)
    report: list[str] = []
    outcome = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    assert outcome.failed == 0, "".join(report)
    assert outcome.attempted > 0, f"{name} has no example"
    assert names["lab"].fingerprint == weights, "the example changed the model"
    pyplot.close("all")
