"""What is typed is read exactly, and anything we return becomes JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_lab.cli import common


@pytest.mark.parametrize(
    ("text", "target"),
    [
        (None, None),
        ("answer", "answer"),
        ("3", "3"),  # the word "3", as in an answer that counts
        ("#3", 3),
        ("red/blue", ("red", "blue")),
        ("/", "/"),
    ],
)
def test_targets_are_read_as_typed(text: str | None, target: Any) -> None:
    assert common.read_target(text) == target


def test_options_are_json_where_they_can_be() -> None:
    options = common.read_options(["a=1", "b=0.5", "c=[2, 3]", "d=true", "e=mean", "f=a=b", 'g="1"'])
    assert options == {"a": 1, "b": 0.5, "c": [2, 3], "d": True, "e": "mean", "f": "a=b", "g": "1"}


def test_plain_makes_json_of_anything_we_return() -> None:
    value = {"a": np.float32(0.5), "b": (1, np.arange(2)), "c": float("nan"), "d": Path("x"), 3: None, "e": np.array([np.inf])}
    assert common.plain(value) == {"a": 0.5, "b": [1, [0, 1]], "c": None, "d": "x", "3": None, "e": [None]}


def test_a_table_s_columns_are_in_step() -> None:
    assert common.table(("a", "bb"), [["long", ""], ["x", "y"]]) == ["a     bb", "long", "x     y"]
