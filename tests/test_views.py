"""Every public figure and widget refuses what it cannot show in one line of ours, and never with an error of Python's."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from matplotlib import pyplot

import widgets
from llava_lab import plots
from llava_lab.errors import LabError, OptionError
from tests.support.families import family
from tests.support.shown_calls import shown_calls, wrong_values

PUBLIC: dict[str, Callable[..., Any]] = {
    name: value
    for room in (plots, widgets)
    for name, value in ((name, getattr(room, name)) for name in room.__all__)
    if inspect.isfunction(value) or hasattr(value, "_repr_mimebundle_")  # a function or a widget; `plots` also names two types
}
# a line that names another library or a value's type alone says what broke, not what is to be given
PARTS = 5  # not a divisor of the wrong values' number, so that every one of them comes to some argument
VAGUE = ("cannot be used (", "cannot go on (", "beartype")


@pytest.fixture(scope="module")
def calls() -> dict[str, dict[str, Any]]:
    return shown_calls()


@pytest.fixture(scope="module")
def wrong() -> dict[str, Any]:
    return wrong_values()


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    pyplot.close("all")


def _parameters(name: str) -> list[str]:
    function: Any = PUBLIC[name]
    return [
        own for own in inspect.signature(function.__init__ if inspect.isclass(function) else function).parameters if own != "self"
    ]


def test_every_public_figure_and_widget_has_a_call_with_all_its_arguments(calls: dict[str, dict[str, Any]]) -> None:
    assert set(calls) == set(PUBLIC)
    assert {name: sorted(calls[name]) for name in PUBLIC} == {name: sorted(_parameters(name)) for name in PUBLIC}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_call_that_is_spoilt_works(calls: dict[str, dict[str, Any]], name: str) -> None:
    assert PUBLIC[name](**calls[name]) is not None


def _faults(name: str, call: dict[str, Any], wrong: dict[str, Any], places: slice) -> list[str]:
    """Wrong values for the arguments one at a time: what neither is shown nor refused in one line."""
    faults = []
    for option, (what, value) in list(itertools.product(call, wrong.items()))[places]:
        try:
            PUBLIC[name](**{**call, option: value})
        except LabError as error:
            if "\n" in str(error) or len(str(error)) > 1000 or any(part in str(error) for part in VAGUE):
                faults.append(f"{option}={what}: {str(error)[:200]!r}")
        except Exception as error:
            faults.append(f"{option}={what}: {type(error).__name__}: {error}"[:200])
        pyplot.close("all")
    return faults


@family("part", range(PARTS), quick=1)
@pytest.mark.parametrize("name", PUBLIC)
def test_every_wrong_argument_is_refused_in_one_line_or_shown(
    calls: dict[str, Any], wrong: dict[str, Any], name: str, part: int
) -> None:
    """A part of the values for every argument of every entry, others for each."""
    faults = _faults(name, calls[name], wrong, slice((part + len(name)) % PARTS, None, PARTS))
    assert faults == [], "\n".join(faults)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_misspelt_option_is_one_line_that_names_the_nearest(calls: dict[str, Any], name: str) -> None:
    option = max(calls[name], key=len)
    wrong = f"{option}x"
    with pytest.raises(OptionError) as error:
        PUBLIC[name](**calls[name], **{wrong: 1})
    assert f"has no option {wrong!r}; did you mean {option!r}? Its options are" in str(error.value)
    assert "\n" not in str(error.value)
