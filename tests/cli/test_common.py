"""What is typed is read exactly."""

from __future__ import annotations

from typing import Any

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
