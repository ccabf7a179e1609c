"""What is typed is read exactly."""

from __future__ import annotations

from typing import Any

import pytest

import llava_lab as ll
from llava_lab.cli import ask, common


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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(2,4)", (2, 4)),
        ("(2, 4)", (2, 4)),
        ("2,4", (2, 4)),
        ("[2,4]", [2, 4]),
        ("2:4", [2, 4]),
        ("None", None),
        ("null", None),
        ("True", True),
        ("true", True),
        ("'mean'", "mean"),
        ("mean", "mean"),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("-3", -3),
        ("1_000", 1000),
        ("{'a': 1}", {"a": 1}),
        ("", ""),
        ("a:b", "a:b"),
        ("__import__('os')", "__import__('os')"),
        ("(2,", "(2,"),
        ("[" * 9000, "[" * 9000),
    ],
)
def test_a_value_is_read_as_people_write_it_in_a_shell(text: str, value: Any) -> None:
    assert common.read_value(text) == value


@pytest.mark.parametrize("text", ["(0,2)", "0:2", "0,2", "[0, 2]"])
def test_a_window_of_layers_has_one_meaning_everywhere(text: str) -> None:
    assert ask.read_layers(text) == (0, 2)
    assert ll.METHODS["attention"].with_defaults(common.read_options([f"layers={text}"]))["layers"] in ((0, 2), [0, 2])


def test_options_are_json_where_they_can_be() -> None:
    options = common.read_options(["a=1", "b=0.5", "c=[2, 3]", "d=true", "e=mean", "f=a=b", 'g="1"'])
    assert options == {"a": 1, "b": 0.5, "c": [2, 3], "d": True, "e": "mean", "f": "a=b", "g": "1"}
