"""What `tests.support.families` marks: all members are there, and those not named as quick are long."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.families import family


def quick_of(decorator: pytest.MarkDecorator) -> list[Any]:
    return [one.values for one in decorator.args[1] if not one.marks]


def test_the_members_named_are_quick_and_all_others_long() -> None:
    made = family("name", "abcd", quick=("d", "b"))
    assert [one.values for one in made.args[1]] == [("a",), ("b",), ("c",), ("d",)]
    assert quick_of(made) == [("b",), ("d",)]
    assert {mark.name for one in made.args[1] for mark in one.marks} == {"long"}


def test_a_number_takes_members_from_the_first_to_the_last() -> None:
    arrays = [np.full(2, number) for number in range(7)]
    assert [int(one[0][0]) for one in quick_of(family("value", arrays, quick=3))] == [0, 3, 6]
    assert [int(one[0][0]) for one in quick_of(family("value", arrays, quick=1))] == [0]


def test_members_of_several_values_go_by_the_first_or_by_their_id() -> None:
    members = [("a", 1), pytest.param("b", 2, id="second"), ("c", np.ones(2))]
    assert quick_of(family(("name", "value"), members, quick=("a", "second"))) == [("a", 1), ("b", 2)]


def test_a_name_that_is_no_member_is_found() -> None:
    with pytest.raises(AssertionError, match="no such members"):
        family("name", "abc", quick=("d",))
