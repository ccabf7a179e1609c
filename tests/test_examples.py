"""The example in each public function's docstring runs as written, and gives what it says; Ctrl-C at any line leaves no trace.

Examples may use ``ll``, ``plots``, ``np``, ``lab`` (the shipped `tiny`), ``picture``, ``run`` (a question about it) and
``tmp``, a folder of their own. They run one after the other on one lab, so each must leave it as it was.
"""

from __future__ import annotations

import contextlib
import doctest
import functools
import inspect
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image

import llava_lab as ll
from llava_lab import plots
from llava_lab.results import Saved
from tests.support.leftovers import interrupted_at, state_of

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


def noting(function: Callable[..., Any], given: list[Any]) -> Callable[..., Any]:
    """`function`, which notes what it gave."""

    @functools.wraps(function)
    def noted(*args: Any, **options: Any) -> Any:
        given.append(function(*args, **options))
        return given[-1]

    return noted


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_is_true(name: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it gives names the weights it was made with."""
    text = inspect.getdoc(FUNCTIONS[name]) or ""
    weights = names["lab"].fingerprint
    given: list[Any] = []
    function = FUNCTIONS[name]
    monkeypatch.setattr(plots if "." in name else ll, name.split(".")[-1], noting(function, given))
    test = doctest.DocTestParser().get_doctest(text, {**names, "tmp": tmp_path}, name, None, 0)
    report: list[str] = []
    outcome = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    assert outcome.failed == 0, "".join(report)
    assert outcome.attempted > 0, f"{name} has no example"
    assert names["lab"].fingerprint == weights, "the example changed the model"
    assert {result.fingerprint for result in given if isinstance(result, Saved) and hasattr(result, "fingerprint")} <= {weights}
    pyplot.close("all")


LINES = 50  # at which each call is interrupted
SOME = {"Lab.ask": 3, "attribute": 3, "knocked_out": 5, "steered": 5, "ablated": 3, "connector": 8}
ON_THE_LAB = {"Lab.ask": ll.Lab.ask, **FUNCTIONS}
ASK = 'lab.ask(picture, "What is it?", max_new_tokens=2)'


def _calls(name: str) -> Any:
    """The example's lines as one program; the model that trains is the lab itself."""
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(ON_THE_LAB[name]) or "")
    source = ASK if name == "Lab.ask" else "".join(example.source for example in examples)
    return compile(source.replace('ll.load("tiny")', "lab") if name == "train_stage" else source, name, "exec")


def _interrupt(name: str, names: dict[str, Any], tmp: Path, lines: int) -> None:
    lab, program, rng = names["lab"], _calls(name), random.Random(name)
    assert lab.connector is not None  # which notes what it was trained with when it is first asked for
    weights = {key: value.clone() for key, value in lab.model.state_dict().items()}
    with contextlib.suppress(ll.LabError), interrupted_at(0) as count:  # an example may be one of what is refused
        exec(program, {**names, "tmp": tmp / "whole"})
    lab.model.load_state_dict(weights)
    before = state_of(lab)
    for number, line in enumerate(sorted(rng.randint(1, count[0]) for _ in range(lines))):
        with contextlib.suppress(KeyboardInterrupt, ll.LabError), interrupted_at(line):
            exec(program, {**names, "tmp": tmp / str(number)})
        if name == "train_stage":  # the part that trains is what it is when the interrupt comes
            trained = {key: value for key, value in weights.items() if "multi_modal_projector" in key}
            lab.model.load_state_dict({**lab.model.state_dict(), **trained})
        now = state_of(lab)
        assert [key for key in before if now[key] != before[key]] == [], f"{name} interrupted at line {line} of {count[0]}"
        assert all(torch.equal(value, weights[key]) for key, value in lab.model.state_dict().items())
        pyplot.close("all")


@pytest.mark.parametrize("name", SOME)
def test_an_interrupt_leaves_everything_as_it_was(name: str, names: dict[str, Any], tmp_path: Path) -> None:
    _interrupt(name, names, tmp_path, SOME[name])


@pytest.mark.long
@pytest.mark.parametrize("name", ON_THE_LAB)
def test_an_interrupt_at_any_of_fifty_lines_leaves_everything_as_it_was(name: str, names: dict[str, Any], tmp_path: Path) -> None:
    _interrupt(name, names, tmp_path, LINES)
